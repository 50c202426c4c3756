"""Causal self-attention with grouped queries, its kernel a module of its own.

Letters: B batch, S sequence, D model width, H query heads, K key/value heads, C head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtrain.catalog.models import ModelShape
from torchtrain.models.document_masking import Mask, attend_masked
from torchtrain.models.rotary import rotate


class Attention(nn.Module):
    """Causal self-attention.

    With K < H each key/value head serves H/K query heads (Ainslie et al. 2023, arXiv:2305.13245).
    Qwen3 (arXiv:2505.09388) normalizes each head of q and k.
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.head_width = shape.width_per_head
        q_width = shape.n_heads * self.head_width
        kv_width = shape.n_kv_heads * self.head_width
        self.wq = nn.Linear(shape.dim, q_width, bias=False)
        self.wk = nn.Linear(shape.dim, kv_width, bias=False)
        self.wv = nn.Linear(shape.dim, kv_width, bias=False)
        self.wo = nn.Linear(q_width, shape.dim, bias=False)
        self.q_norm = nn.RMSNorm(self.head_width, eps=shape.norm_eps) if shape.qk_norm else None
        self.k_norm = nn.RMSNorm(self.head_width, eps=shape.norm_eps) if shape.qk_norm else None
        self.inner_attention: nn.Module = CausalAttention()

    def forward(self, x: Tensor, rotations: Tensor, mask: Mask | None = None) -> Tensor:
        """Take x [B, S, D] and rotations [S, 1, C/2], complex, to [B, S, D]."""
        q = self.wq(x).unflatten(-1, (-1, self.head_width))  # [B, S, H, C]
        k = self.wk(x).unflatten(-1, (-1, self.head_width))  # [B, S, K, C]
        v = self.wv(x).unflatten(-1, (-1, self.head_width))  # [B, S, K, C]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, rotations), rotate(k, rotations)
        q, k, v = (states.transpose(1, 2) for states in (q, k, v))  # heads before positions
        mixed = self.inner_attention(q, k, v, mask)  # [B, H, S, C]
        return self.wo(mixed.transpose(1, 2).flatten(2))


class CausalAttention(nn.Module):
    """The kernel alone: softmax(q kᵀ / √C), masked to the past, times v."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor:
        """Take q [B, H, S, C] and k, v [B, K, S, C] to [B, H, S, C]; a mask narrows the past."""
        if mask is not None:
            return attend_masked(q, k, v, mask)
        if not kernel_shares_heads(q):
            k, v = repeat_heads(q, k, v)
        # Asked for only where heads are shared: not every CUDA kernel of PyTorch knows the flag.
        is_grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=is_grouped)


def kernel_shares_heads(q: Tensor) -> bool:
    """Check whether the kernel for such queries takes fewer key/value heads than query heads.

    A GPU's for fp32, memory-efficient attention, does not (PyTorch 2.11 to 2.13): given them as
    they are, PyTorch would write down all S x S scores.
    """
    return q.device.type == "cpu" or q.dtype != torch.float32


def repeat_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat each head of k and v, [B, K, S, C] to [B, H, S, C], for kernels that can't share."""
    share = q.shape[1] // k.shape[1]
    if share == 1:
        return k, v
    return k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
