"""Causal attention for torch.compile on a CPU: PyTorch's forward, and a faster backward.

The backward of PyTorch's kernel for the CPU multiplies in pieces too small for the matrix units,
and takes a fifth of a compiled step. Here it is the same formulas (Dao et al. 2022,
arXiv:2205.14135, algorithm 4) in batched products that are large, and pointwise operations that the
compiler fuses. Without a compiler these would take longer than PyTorch's kernel.

Letters: B batch, S sequence, H query heads, K key/value heads, C head width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtrain.models.attention import repeat_heads
from torchtrain.models.document_masking import Mask

BLOCKS = 4
"""Blocks of queries. The program unrolls them, so many would take long to compile; few hold more
scores in fp32 at a time."""
SMALLEST_BLOCK = 128
"""Queries per block; with fewer the products are less efficient."""
LONGEST = 1024
"""Longest sequence. Beyond it a block's scores do not fit into the caches, and PyTorch's kernel is
as fast."""


class BlockwiseAttention(nn.Module):
    """Wrap `kernel` so that it has a faster backward where it is compiled on a CPU."""

    def __init__(self, kernel: nn.Module) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor:
        """Take q [B, H, S, C] and k, v [B, K, S, C] to [B, H, S, C]."""
        is_compiled = q.device.type == "cpu" and torch.compiler.is_compiling()
        if not is_compiled or q.shape[2] > LONGEST:
            return self.kernel(q, k, v, mask)
        return BlockwiseCausalAttention.apply(q, *repeat_heads(q, k, v), mask)


class BlockwiseCausalAttention(torch.autograd.Function):
    """Causal attention of q, k, v, each [B, H, S, C], to [B, H, S, C].

    A mask, boolean [B, 1, S, S], narrows the past that each query sees.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> Tensor:
        bias = None
        if mask is not None:
            bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, -torch.inf)
        result, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, is_causal=mask is None, attn_mask=bias
        )
        ctx.save_for_backward(q, k, v, lse, mask)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:  # type: ignore[override]
        return *compute_gradients(grad, *ctx.saved_tensors), None


def compute_gradients(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, a block of queries at a time.

    The scores are computed in fp32: rounded to bf16, an exponential of them would be wrong by
    percents. All else is multiplied in the type of q, as PyTorch's kernel does it.

    Args:
        grad: [B, H, S, C], the gradient of the result.
        q: [B, H, S, C], as k and v.
        k: the keys.
        v: the values.
        lse: [B, H, S], fp32, the log-sum-exps of the scores.
        mask: boolean [B, 1, S, S], what each query sees of its past; None: all of it.
    """
    length, scale = q.shape[2], q.shape[3] ** -0.5
    block = max(SMALLEST_BLOCK, -(-length // BLOCKS))
    wide = torch.promote_types(q.dtype, torch.float32)
    scaled_q, wide_k = q.to(wide) * scale, k.to(wide)
    lse = lse.unsqueeze(-1)
    positions = torch.arange(length, device=q.device)
    grads_q, grad_k, grad_v = [], torch.zeros_like(wide_k), torch.zeros_like(wide_k)
    for start in range(0, length, block):
        end = min(start + block, length)
        queries, keys = slice(start, end), slice(0, end)  # later keys are not seen
        if mask is None:
            is_seen = positions[queries, None] >= positions[None, keys]
        else:
            is_seen = mask[:, :, queries, keys]
        scores = scaled_q[:, :, queries] @ wide_k[:, :, keys].mT
        weights = torch.where(is_seen, torch.exp(scores - lse[:, :, queries]), 0.0)
        grad_weights = (grad[:, :, queries] @ v[:, :, keys].mT).to(wide)
        # The sum is also that of grad times result. From the same rounded numbers, what is left of
        # a weight near 1 is exact.
        mean = (weights * grad_weights).sum(dim=-1, keepdim=True)
        grad_scores = (weights * (grad_weights - mean) * scale).to(q.dtype)
        grads_q.append(grad_scores @ k[:, :, keys])
        unseen = (0, 0, 0, length - end)  # rows of zeros for later keys
        grad_k = grad_k + F.pad(grad_scores.mT @ q[:, :, queries], unseen)
        grad_v = grad_v + F.pad(weights.to(q.dtype).mT @ grad[:, :, queries], unseen)
    return torch.cat(grads_q, dim=2), grad_k.to(q.dtype), grad_v.to(q.dtype)
