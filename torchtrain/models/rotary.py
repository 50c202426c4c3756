"""Rotary position embedding (RoPE, Su et al. 2021, arXiv:2104.09864).

The pairs that are turned are neighbors (x₂ⱼ, x₂ⱼ₊₁), not halves, as in Meta's checkpoints.

Letters: B batch, S sequence, C head width.
"""

import math

import torch
from torch import Tensor, nn

from torchtrain.catalog.models import ModelShape


class RotaryPositions(nn.Module):
    """The rotation of each token's position.

    It has no buffer: the table is cheap beside one block, and a stored one would have to survive
    the meta device, a cast of the whole model to bf16, and sequences longer than planned.
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """Return the rotations [S, 1, C/2], complex64, of tokens [B, S] at positions 0 .. S-1.

        With `documents` [B, S] (document_masking.py) positions restart in each document, and the
        rotations are [B, S, 1, C/2].
        """
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        return self.at(positions if documents is None else positions - documents)

    def at(self, positions: Tensor) -> Tensor:
        """Return exp(i · position · frequency), [..., S, 1, C/2], of integer positions [..., S].

        Complex because FSDP casts every real floating-point tensor that enters a block to the
        compute precision, and bf16 cannot tell neighboring positions apart; it is also the fastest
        form on a CPU, see `rotate`.
        """
        angles = positions.float().unsqueeze(-1) * compute_frequencies(self.shape, positions.device)
        return torch.polar(torch.ones_like(angles), angles).unsqueeze(-2)


def compute_frequencies(shape: ModelShape, device: torch.device) -> Tensor:
    """Return theta^(-2j/C) for each pair j, [C/2], fp32, in radians per token.

    Llama 3.1's scaling (arXiv:2407.21783; reference code in github.com/meta-llama/llama-models)
    lowers the low ones. It asks how many turns a pair makes over the original context: at most
    `low` turns, and the frequency is divided by the factor; at least `high`, and it stays; between
    the two it is interpolated linearly in the number of turns.
    """
    head_width = shape.width_per_head
    exponents = torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width
    frequencies = 1.0 / shape.rope_theta**exponents
    if shape.rope_scaling_factor == 1.0:
        return frequencies
    low = shape.rope_low_freq_factor
    high = shape.rope_high_freq_factor
    turns = shape.rope_original_seq_len * frequencies / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (kept + (1 - kept) / shape.rope_scaling_factor)


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Turn each pair of neighbors (x₂ⱼ, x₂ⱼ₊₁) by its position's angle, in fp32.

    Args:
        x: [B, S, heads, C].
        rotations: [S, 1, C/2] or [B, S, 1, C/2], complex64.

    Returns:
        [B, S, heads, C] in x's type.
    """
    pairs = x.float().unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():
        # The compiler generates no code for complex products, but fuses these.
        even, odd = pairs.unbind(-1)
        cos, sin = torch.view_as_real(rotations).unbind(-1)
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    else:
        # One kernel instead of seven: 2 ms against 8 to 10 for [8, 512, 8, 64] with its backward
        # on two CPU cores.
        turned = torch.view_as_real(torch.view_as_complex(pairs) * rotations)
    return turned.flatten(-2).to(x.dtype)
