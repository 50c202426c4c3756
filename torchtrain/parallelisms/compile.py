"""torch.compile, one block at a time.

The blocks share one program, so a deep model compiles as fast as a shallow one.
"""

import torch

from torchtrain.models.decoder import Decoder


def apply_compile(model: Decoder, backend: str) -> None:
    """Compile each block's forward in place.

    FSDP's hooks run around it, outside the graph; parameter names are unchanged.
    """
    for block in model.layers.values():
        block.forward = torch.compile(  # type: ignore[method-assign]
            block.forward, backend=backend, fullgraph=True, dynamic=False
        )
