"""torch.compile, one block at a time.

The blocks share one program, so a deep model compiles as fast as a shallow one. Of a sparse block
the attention, the norms and the shared experts are compiled: how many rows an expert has is known
only when a router has decided.
"""

import warnings
from typing import Any

import torch
from torch import nn

from torchtrain.models.attention import CausalAttention
from torchtrain.models.cpu_attention import BlockwiseAttention
from torchtrain.models.decoder import Decoder
from torchtrain.models.moe import SparseFeedForward


def silence_compiler() -> None:
    """Keep every rank from printing a warning of the compiler that is of no concern here.

    It is of complex operators. Of the rotations, which are complex, a compiled block only takes a
    view as real numbers.
    """
    complex_operators = "Torchinductor does not support code generation for complex operators"
    warnings.filterwarnings("ignore", message=complex_operators)


def apply_compile(model: Decoder, backend: str, options: dict[str, Any] | None = None) -> None:
    """Compile the forward of each block, or of the parts of a sparse one, in place.

    FSDP's hooks run around it, outside the graph; parameter names are unchanged.

    Args:
        model: to be compiled.
        backend: of torch.compile.
        options: of Inductor's, which count for these programs alone; other backends have none.
    """
    if backend == "inductor":  # others fuse nothing
        model.replace_attention_kernels(choose_kernel)
    kept = options if options and backend == "inductor" else None
    for block in model.layers.values():
        for module in find_compilable(block):
            module.forward = torch.compile(  # type: ignore[method-assign]
                module.forward, backend=backend, fullgraph=True, dynamic=False, options=kept
            )


def choose_kernel(kernel: nn.Module) -> nn.Module:
    """Return the kernel of plain attention with the backward for a CPU; any other as it is."""
    return BlockwiseAttention(kernel) if type(kernel) is CausalAttention else kernel


def find_compilable(module: nn.Module) -> list[nn.Module]:
    """Return the largest modules whose programs do not depend on what a router decides."""
    is_fixed = not any(isinstance(each, SparseFeedForward) for each in module.modules())
    if is_fixed:
        return [module]
    if isinstance(module, SparseFeedForward):
        return [] if module.shared_experts is None else [module.shared_experts]
    return [found for child in module.children() for found in find_compilable(child)]
