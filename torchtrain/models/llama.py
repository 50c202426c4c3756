"""The Llama model: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Letters: B batch, S sequence, D model width, H query heads, K key/value heads, C head width, F feed-forward width,
V vocabulary. Parameter names and the order of rotary pairs (neighbours, not halves) are those of Meta's checkpoints.

Pure modules: nothing here knows of ranks. What a technique of `parallelisms/` replaces is a module of its own:
`Attention.inner_attention` is the kernel, `Transformer.rope` decides which positions the tokens have.

Sources: Touvron et al. 2023 (arXiv:2302.13971, arXiv:2307.09288), Dubey et al. 2024 (arXiv:2407.21783).
"""

import math
from collections.abc import Callable, Container
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtrain.catalog.models import ModelShape
from torchtrain.models.document_masking import BlockMask, document_mask, masked_attention


class Transformer(nn.Module):
    """Tokens [B, S] to logits [B, S, V] of the next token.

    The layers are keyed by their number as text, so a pipeline stage that keeps a few of them keeps their names.
    With tied embeddings `output.weight` is `tok_embeddings.weight`: `parameters()` and `named_parameters()` list it
    once, under the latter name; `state_dict()` has it under both.
    """

    tensor_parallel_plan: ClassVar[
        dict[str, Literal["embedding", "norm", "columns", "rows", "logits"]]
    ] = {
        "tok_embeddings": "embedding",
        "layers.*.attention_norm": "norm",
        "layers.*.attention.wq": "columns",
        "layers.*.attention.wk": "columns",
        "layers.*.attention.wv": "columns",
        "layers.*.attention.wo": "rows",
        "layers.*.ffn_norm": "norm",
        "layers.*.feed_forward.w1": "columns",
        "layers.*.feed_forward.w3": "columns",
        "layers.*.feed_forward.w2": "rows",
        "norm": "norm",
        "output": "logits",
    }
    """How ranks that share each product split it: a norm stays whole, and columns, whose results stay apart, read it;
    then come rows, whose results are summed. Embedding and logits are split over the vocabulary."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.tok_embeddings = nn.Embedding(shape.vocab_size, shape.dim)
        self.rope = RotaryPositions(shape)
        self.layers = nn.ModuleDict(
            {str(layer): TransformerBlock(shape) for layer in range(shape.n_layers)}
        )
        self.norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)
        self.output = nn.Linear(shape.dim, shape.vocab_size, bias=False)
        self.tie()

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """[B, S] to [B, S, V]; under document masking with the `documents` [B, S] of document_masking.py."""
        h = self.tok_embeddings(tokens)
        rotations = self.rope(tokens, documents)
        mask = None if documents is None else document_mask(documents)
        for block in self.layers.values():
            h = block(h, rotations, mask)
        return self.output(self.norm(h))

    def initial_std(self, name: str) -> float | None:
        """How the parameter with this full name is filled: with normal values of mean 0 and this deviation, or ones.

        Matrices that write into the residual stream shrink with the depth they stand at, so that its variance grows
        slowly (Zhang et al. 2019, arXiv:1908.11365). The output's logits start with a standard deviation near 1. A
        tied embedding starts small, as GPT-2's: at 1, or at dim^-0.5, each token would at first predict itself.
        """
        if name.endswith("norm.weight"):
            return None
        if name == "tok_embeddings.weight":
            return 0.02 if self.shape.tied_embeddings else 1.0
        if name == "output.weight":
            return self.shape.dim**-0.5
        layer = int(name.split(".")[1])
        writes_residual = name.endswith(("attention.wo.weight", "feed_forward.w2.weight"))
        return 0.02 / math.sqrt(2 * (layer + 1)) if writes_residual else 0.02

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Transformer":
        """Keep the tie: leaving the meta device (`to_empty`) gives each module a new Parameter of its own."""
        super()._apply(fn, recurse)
        self.tie()
        return self

    def tie(self) -> None:
        """Make a tied output's weight the embedding's again, after that was replaced, where both are kept."""
        if self.shape.tied_embeddings and self.keeps("tok_embeddings") and self.keeps("output"):
            self.output.weight = self.tok_embeddings.weight

    def keep(self, pieces: Container[str]) -> None:
        """Become the part of the model that these of `ModelShape.pieces` make; the others hand on what they get.

        Names of parameters stay those of the whole model. A part without the embedding takes [B, S, D] for tokens, one
        without the output returns it.
        """
        for name in ("tok_embeddings", "norm", "output"):
            if name not in pieces:
                setattr(self, name, nn.Identity())
        for layer in list(self.layers):
            if f"layers.{layer}" not in pieces:
                del self.layers[layer]

    def keeps(self, piece: str) -> bool:
        """Whether this part has the embedding, the final norm or the output, by that name."""
        return not isinstance(self.get_submodule(piece), nn.Identity)


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each on the normalised residual stream and added to it."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.attention = Attention(shape)
        self.feed_forward = FeedForward(shape)
        # PyTorch's RMSNorm computes in fp32 whatever its input, and returns the input's type.
        self.attention_norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)
        self.ffn_norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)

    def forward(
        self, h: Tensor, rotations: Tensor, mask: Tensor | BlockMask | None = None
    ) -> Tensor:
        """h [B, S, D], rotations [S, 1, C/2] complex, to [B, S, D]; `mask` is None or a `document_mask`."""
        h = h + self.attention(self.attention_norm(h), rotations, mask)
        return h + self.feed_forward(self.ffn_norm(h))


class Attention(nn.Module):
    """Causal self-attention; with K < H each key/value head serves H/K query heads (Ainslie et al. 2023)."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.head_width = shape.dim // shape.n_heads
        kv_width = shape.n_kv_heads * self.head_width
        self.wq = nn.Linear(shape.dim, shape.dim, bias=False)
        self.wk = nn.Linear(shape.dim, kv_width, bias=False)
        self.wv = nn.Linear(shape.dim, kv_width, bias=False)
        self.wo = nn.Linear(shape.dim, shape.dim, bias=False)
        self.inner_attention: nn.Module = CausalAttention()

    def forward(
        self, x: Tensor, rotations: Tensor, mask: Tensor | BlockMask | None = None
    ) -> Tensor:
        """x [B, S, D], rotations [S, 1, C/2] complex, to [B, S, D]; `mask` is None or a `document_mask`."""
        q = rotate(self.wq(x).unflatten(-1, (-1, self.head_width)), rotations)  # [B, S, H, C]
        k = rotate(self.wk(x).unflatten(-1, (-1, self.head_width)), rotations)  # [B, S, K, C]
        v = self.wv(x).unflatten(-1, (-1, self.head_width))  # [B, S, K, C]
        mixed = self.inner_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), mask
        )  # [B, H, S, C]
        return self.wo(mixed.transpose(1, 2).flatten(2))


class CausalAttention(nn.Module):
    """The kernel alone: softmax(q kᵀ / √C), masked to the past, times v."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None = None
    ) -> Tensor:
        """q [B, H, S, C]; k, v [B, K, S, C]; to [B, H, S, C]; a `document_mask` narrows the past."""
        if mask is not None:
            return masked_attention(q, k, v, mask)
        # Asked for only where heads are shared: not every CUDA kernel of PyTorch knows the flag.
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) · w3 x) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.w1 = nn.Linear(shape.dim, shape.ffn_hidden_dim, bias=False)
        self.w2 = nn.Linear(shape.ffn_hidden_dim, shape.dim, bias=False)
        self.w3 = nn.Linear(shape.dim, shape.ffn_hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class RotaryPositions(nn.Module):
    """Gives each position its rotations (RoPE, Su et al. 2021, arXiv:2104.09864).

    It has no buffer: the table is cheap beside one block, and one that is stored would have to survive the meta
    device, a cast of the whole model to bf16, and sequences longer than planned.
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """tokens [B, S] at positions 0 .. S-1, to rotations [S, 1, C/2], complex64.

        With `documents` [B, S] (document_masking.py) positions restart in each: to [B, S, 1, C/2].
        """
        places = torch.arange(tokens.shape[1], device=tokens.device)
        return self.at(places if documents is None else places - documents)

    def at(self, positions: Tensor) -> Tensor:
        """positions [..., S], integers, to rotations [..., S, 1, C/2]: exp(i · position · frequency).

        Complex because FSDP casts every real floating-point tensor that enters a block to the compute precision, and
        bf16 cannot tell neighbouring positions apart; also the fastest form there is on a CPU, see `rotate`.
        """
        angles = positions.float().unsqueeze(-1) * rotary_frequencies(self.shape, positions.device)
        return torch.polar(torch.ones_like(angles), angles).unsqueeze(-2)


def rotary_frequencies(shape: ModelShape, device: torch.device) -> Tensor:
    """[C/2], fp32, radians a token: theta^(-2j/C) for pair j, the low ones lowered by Llama 3.1's scaling.

    The scaling (arXiv:2407.21783; reference code in github.com/meta-llama/llama-models) asks how many turns a pair
    makes over the original context: at most `low` turns, the frequency is divided by the factor; at least `high`, it
    stays; between the two, it is interpolated linearly in the number of turns.
    """
    head_width = shape.dim // shape.n_heads
    exponents = torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width
    frequencies = 1.0 / shape.rope_theta**exponents
    if shape.rope_scaling_factor == 1.0:
        return frequencies
    low, high = shape.rope_low_freq_factor, shape.rope_high_freq_factor
    turns = shape.rope_original_seq_len * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / shape.rope_scaling_factor)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Turn each pair of neighbours (x₂ⱼ, x₂ⱼ₊₁) by its position's angle, in fp32.

    Args:
        x: [B, S, heads, C].
        rotations: [S, 1, C/2] or [B, S, 1, C/2], complex64.

    Returns:
        [B, S, heads, C] in x's type.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if (
        torch.compiler.is_compiling()
    ):  # the compiler generates no code for complex products, but fuses these
        even, odd = pairs.unbind(-1)
        cos, sin = torch.view_as_real(rotations).unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    else:  # one kernel instead of seven: 2 ms against 8 to 10 for [8, 512, 8, 64] with its backward on two CPU cores
        turned = torch.view_as_real(torch.view_as_complex(pairs) * rotations)
    return turned.flatten(-2).to(x.dtype)


def flops_per_token(shape: ModelShape, seq_len: int) -> float:
    """Floating-point operations of forward and backward for one token, for the model FLOPs utilisation.

    Counted as in PaLM's appendix B (Chowdhery et al. 2022, arXiv:2204.02311): 6 for each weight of a matrix product
    (embedding look-up and norms left out, the output projection counted, tied or not), and 12·D·S a layer for the
    attention's two products over the whole S × S square, of which a causal kernel computes only half.
    Recomputation is not counted.
    """
    kv_width = shape.n_kv_heads * shape.dim // shape.n_heads
    block = shape.dim * (2 * shape.dim + 2 * kv_width + 3 * shape.ffn_hidden_dim)
    weights = shape.n_layers * block + shape.vocab_size * shape.dim
    return 6.0 * weights + 12.0 * shape.n_layers * shape.dim * seq_len
