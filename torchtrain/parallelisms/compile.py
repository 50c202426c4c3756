"""torch.compile, a block at a time: the blocks share one program, so a deep model compiles as fast as a shallow one."""

import torch

from torchtrain.models.llama import Transformer


def apply_compile(model: Transformer, backend: str) -> None:
    """Compile each block's forward. FSDP's hooks run around it, outside the graph; parameter names are unchanged."""
    for block in model.layers.values():
        block.forward = torch.compile(block.forward, backend=backend, fullgraph=True, dynamic=False)  # type: ignore[method-assign]
