"""The Llama model, and its relatives by their shape: RMSNorm, rotary positions, SwiGLU or experts.

Parameter names and the order of rotary pairs are those of Meta's checkpoints.

Letters: B batch, S sequence, D model width, C head width, F feed-forward width, V vocabulary.

Sources: Touvron et al. 2023 (arXiv:2302.13971, arXiv:2307.09288), Dubey et al. 2024
(arXiv:2407.21783).
"""

import math
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from torchtrain.catalog.models import ModelShape
from torchtrain.models.attention import Attention
from torchtrain.models.decoder import Decoder, Role
from torchtrain.models.document_masking import Mask, build_document_mask
from torchtrain.models.moe import SparseFeedForward
from torchtrain.models.rotary import RotaryPositions

WRITES_RESIDUAL = (
    "attention.wo.weight",
    "feed_forward.w2.weight",
    "experts.w2",
    "shared_experts.w2.weight",
)
"""Ends of the names of the matrices that write into the residual stream."""


class Transformer(Decoder):
    """The whole model, or after `keep` a part of it."""

    tensor_parallel_plan: ClassVar[dict[str, Role]] = {
        "tok_embeddings": "embedding",
        "layers.*.attention_norm": "norm",
        "layers.*.attention.wq": "columns",
        "layers.*.attention.wk": "columns",
        "layers.*.attention.wv": "columns",
        "layers.*.attention.q_norm": "head_norm",
        "layers.*.attention.k_norm": "head_norm",
        "layers.*.attention.wo": "rows",
        "layers.*.ffn_norm": "norm",
        "layers.*.feed_forward.w1": "columns",
        "layers.*.feed_forward.w3": "columns",
        "layers.*.feed_forward.w2": "rows",
        "norm": "norm",
        "output": "logits",
    }

    sparse_plan: ClassVar[dict[str, Role]] = {
        "layers.*.ffn_norm": "shard_norm",
        "layers.*.moe": "sparse",
        "layers.*.moe.router.gate": "whole",
        "layers.*.moe.shared_experts.w1": "whole",
        "layers.*.moe.shared_experts.w2": "whole",
        "layers.*.moe.shared_experts.w3": "whole",
    }

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.tok_embeddings = nn.Embedding(shape.vocab_size, shape.dim)
        self.rope = RotaryPositions(shape)
        self.layers = nn.ModuleDict(
            {str(layer): TransformerBlock(shape, layer) for layer in range(shape.n_layers)}
        )
        self.norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)
        self.output = nn.Linear(shape.dim, shape.vocab_size, bias=False)
        self.tie()

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """Take tokens [B, S] to logits [B, S, V]; `documents` [B, S] as in document_masking.py."""
        h = self.tok_embeddings(tokens)
        rotations = self.rope(tokens, documents)
        mask = None if documents is None else build_document_mask(documents)
        for block in self.layers.values():
            h = block(h, rotations, mask)
        return self.output(self.norm(h))

    def initial_std(self, name: str) -> float | None:
        """Return the standard deviation of a parameter's initial values; None for ones.

        Matrices that write into the residual stream shrink with the depth they stand at, so that
        its variance grows slowly (Zhang et al. 2019, arXiv:1908.11365). The output's logits start
        with a standard deviation near 1. A tied embedding starts as small as GPT-2's: at 1, or at
        dim^-0.5, each token would at first predict itself.
        """
        if name.endswith("norm.weight"):
            return None
        if name == "tok_embeddings.weight":
            return 0.02 if self.shape.tied_embeddings else 1.0
        if name == "output.weight":
            return self.shape.dim**-0.5
        if name.endswith(WRITES_RESIDUAL):
            layer = int(name.split(".")[1])
            return 0.02 / math.sqrt(2 * (layer + 1))
        return 0.02

    def flops_per_token(self, seq_len: int) -> float:
        """Return the floating-point operations of forward and backward for one token.

        Counted as in PaLM's appendix B (Chowdhery et al. 2022, arXiv:2204.02311): 6 for each
        weight of a matrix product (embedding look-up and norms left out, the output projection
        counted, tied or not; of a sparse layer the router and the experts of one token), and
        12·H·C·S per layer for the attention's two products over the whole S × S square, of which a
        causal kernel computes only half. Recomputation is not counted.
        """
        shape = self.shape
        q_width = shape.n_heads * shape.width_per_head
        kv_width = shape.n_kv_heads * shape.width_per_head
        attention = shape.n_layers * shape.dim * 2 * (q_width + kv_width)
        dense = (shape.n_layers - shape.n_sparse_layers) * 3 * shape.dim * shape.ffn_hidden_dim
        experts = shape.experts_per_token + shape.n_shared_experts
        sparse = shape.n_experts + experts * 3 * shape.width_per_expert
        weights = attention + dense + shape.n_sparse_layers * shape.dim * sparse
        weights += shape.vocab_size * shape.dim
        return 6.0 * weights + 12.0 * shape.n_layers * q_width * seq_len


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each on the normalized residual stream and added to it."""

    def __init__(self, shape: ModelShape, layer: int) -> None:
        super().__init__()
        self.attention = Attention(shape)
        self.is_sparse = shape.is_sparse(layer)
        if self.is_sparse:
            width = shape.n_shared_experts * shape.width_per_expert
            shared = FeedForward(shape.dim, width) if width else None
            self.moe = SparseFeedForward(shape, shared)
        else:
            self.feed_forward = FeedForward(shape.dim, shape.ffn_hidden_dim)
        # PyTorch's RMSNorm computes in fp32 whatever its input, and returns the input's type.
        self.attention_norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)
        self.ffn_norm = nn.RMSNorm(shape.dim, eps=shape.norm_eps)

    def forward(self, h: Tensor, rotations: Tensor, mask: Mask | None = None) -> Tensor:
        """Take h [B, S, D] and rotations [S, 1, C/2], complex, to [B, S, D]."""
        h = h + self.attention(self.attention_norm(h), rotations, mask)
        feed_forward = self.moe if self.is_sparse else self.feed_forward
        return h + feed_forward(self.ffn_norm(h))


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) · w3 x) (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, width, bias=False)
        self.w2 = nn.Linear(width, dim, bias=False)
        self.w3 = nn.Linear(dim, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Take x [..., D] to [..., D], with [..., F] between."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))
