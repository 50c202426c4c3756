"""bf16 products on processors that have none.

Without AVX-512 or a bf16 unit, PyTorch's CPU kernels multiply bf16 matrices 8 to 150 times slower than fp32 ones. The
same numbers come from widening the bf16 operands to fp32, multiplying with an fp32 sum, and rounding the result to
bf16, which is what a bf16 matrix unit does; so compute precision means the same here as anywhere, at the speed of fp32.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtrain.models.llama import Attention, BlockMask, Transformer


def needs_emulation(device_type: str, param_dtype: torch.dtype) -> bool:
    """Whether this compute precision would fall on PyTorch's slow path: bf16 on a CPU that oneDNN has no kernel for."""
    if device_type != "cpu" or param_dtype != torch.bfloat16:
        return False
    return not (
        torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


def apply_emulated_bf16(model: Transformer) -> None:
    """Let every linear layer and the attention kernel compute in fp32 on bf16 values. Parameter names are unchanged.

    Classes are exchanged, not forwards: to torch.compile all layers then look alike and share one program.
    """
    for module in list(model.modules()):
        if type(module) is nn.Linear:
            module.__class__ = WidenedLinear
        elif isinstance(module, Attention):
            module.inner_attention = WidenedAttention(module.inner_attention)


class WidenedLinear(nn.Linear):
    """x [..., in] to [..., out], both in x's dtype, the products and sums in fp32."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        return F.linear(x.float(), self.weight.float()).to(x.dtype)


class WidenedAttention(nn.Module):
    """The attention kernel in fp32, its result in q's dtype."""

    def __init__(self, kernel: nn.Module) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None = None
    ) -> Tensor:
        """q [B, H, S, C]; k, v [B, K, S, C]; to [B, H, S, C]."""
        return self.kernel(q.float(), k.float(), v.float(), mask).to(q.dtype)
