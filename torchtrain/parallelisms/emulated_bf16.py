"""bf16 products on processors that have none.

Without AVX-512 or a bf16 unit, PyTorch's CPU kernels multiply bf16 matrices 8 to 150 times slower
than fp32 ones. The same numbers come from widening the bf16 operands to fp32, multiplying with an
fp32 sum, and rounding the result to bf16, which is what a bf16 matrix unit does. So the compute
precision means the same here as anywhere, at the speed of fp32.

Letters: B batch, S sequence, H query heads, K key/value heads, C head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtrain.models.decoder import Decoder
from torchtrain.models.document_masking import Mask
from torchtrain.models.moe import Experts


def needs_emulation(device_type: str, param_dtype: torch.dtype) -> bool:
    """Check whether the compute precision is bf16 on a CPU that oneDNN has no bf16 kernel for."""
    if device_type != "cpu" or param_dtype != torch.bfloat16:
        return False
    has_onednn = torch.backends.mkldnn.is_available()
    return not (has_onednn and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def apply_emulated_bf16(model: Decoder) -> None:
    """Let linear layers, experts and attention kernels compute in fp32 on bf16 values, in place.

    Parameter names are unchanged. Classes are replaced, not forwards: to torch.compile all layers
    then look alike and share one program.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = WidenedLinear
        elif type(module) is Experts:
            module.__class__ = WidenedExperts
    model.replace_attention_kernels(WidenedAttention)


class WidenedLinear(nn.Linear):
    """A linear layer with its products and sums in fp32, its result in the input's type."""

    def forward(self, x: Tensor) -> Tensor:
        """Take x [..., in] to [..., out]."""
        return F.linear(x.float(), self.weight.float()).to(x.dtype)


class WidenedExperts(Experts):
    """Experts with the products and sums of each matrix in fp32, its result in the rows' type."""

    def multiply(self, rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        """Multiply each expert's rows by the transpose of its matrix."""
        return super().multiply(rows.float(), weights.float(), counts).to(rows.dtype)


class WidenedAttention(nn.Module):
    """The attention kernel in fp32, its result in q's type."""

    def __init__(self, kernel: nn.Module) -> None:
        super().__init__()
        self.kernel = kernel

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor:
        """Take q [B, H, S, C] and k, v [B, K, S, C] to [B, H, S, C]."""
        return self.kernel(q.float(), k.float(), v.float(), mask).to(q.dtype)
