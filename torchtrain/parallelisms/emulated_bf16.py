"""bf16 products on processors that have none.

Without AVX-512 or a bf16 unit, PyTorch's CPU kernels multiply bf16 matrices 10 to 200 times slower than fp32 ones. The
same numbers come from widening the bf16 operands to fp32, multiplying with an fp32 sum, and rounding the result to
bf16, which is what a bf16 matrix unit does; so compute precision means the same here as anywhere, at the speed of fp32.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtrain.models.llama import Attention, Transformer


def needs_emulation(device_type: str, param_dtype: torch.dtype) -> bool:
    """Whether this compute precision would fall on PyTorch's slow path: bf16 on a CPU that oneDNN has no kernel for."""
    if device_type != "cpu" or param_dtype != torch.bfloat16:
        return False
    return not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())


def apply_emulated_bf16(model: Transformer) -> None:
    """Let every linear layer and the attention kernel compute in fp32 on bf16 values. Parameter names are unchanged."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.forward = partial(_linear, module)  # type: ignore[method-assign]
        elif isinstance(module, Attention):
            kernel = module.inner_attention
            kernel.forward = partial(_widened, kernel.forward)  # type: ignore[method-assign]


def _linear(module: nn.Linear, x: Tensor) -> Tensor:
    """x [..., in] to [..., out], both in x's dtype."""
    return F.linear(x.float(), module.weight.float()).to(x.dtype)


def _widened(kernel: Callable[[Tensor, Tensor, Tensor], Tensor], q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The attention kernel on q [B, H, S, C], k and v [B, K, S, C], result in q's dtype."""
    return kernel(q.float(), k.float(), v.float()).to(q.dtype)
