"""Initial weights: a pure function of (seed, the parameter's full name), whatever the layout.

Each parameter is drawn whole, in fp32, on the training device, from a generator seeded by both; every rank then keeps
its own slice. So any mesh and any world size starts from the same bits, and no seed checkpoint is needed.
"""

import hashlib

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from torchtrain.models.llama import Transformer

CUTOFF = 3.0
"""No value lies further from 0 than this many standard deviations."""


def materialise(model: Transformer, device: torch.device, seed: int, offload: bool = False) -> None:
    """Give a (sharded) model on the meta device its storage and its initial weights, drawn on `device`.

    With `offload` the storage is the host's memory; else it is on `device` too.
    """
    model.to_empty(device="cpu" if offload else device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _copy_slice(parameter, draw(model, name, parameter.shape, device, seed))


def draw(
    model: Transformer, name: str, shape: torch.Size, device: torch.device, seed: int
) -> Tensor:
    """The whole parameter `name` in fp32 on `device`."""
    std = model.initial_std(name)
    whole = torch.empty(shape, dtype=torch.float32, device=device)
    if std is None:
        return whole.fill_(1.0)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return nn.init.trunc_normal_(
        whole, mean=0.0, std=std, a=-CUTOFF * std, b=CUTOFF * std, generator=generator
    )


def _copy_slice(parameter: Tensor, whole: Tensor) -> None:
    """Cast `whole` into the parameter, or its local slice into a DTensor's local shard; nothing is communicated."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(whole)
        return
    mesh = parameter.device_mesh
    # FSDP cuts what tensor parallelism, on a later dimension of the mesh, has cut before; a strided shard says so.
    cuts = sorted(
        enumerate(parameter.placements), key=lambda cut: isinstance(cut[1], _StridedShard)
    )
    for mesh_dim, placement in cuts:
        if isinstance(placement, Shard | _StridedShard):
            # As DTensor cuts: the first pieces are full, the last may be smaller or empty.
            length = whole.shape[placement.dim]
            size = -(-length // mesh.size(mesh_dim))
            start = min(mesh.get_local_rank(mesh_dim) * size, length)
            whole = whole.narrow(placement.dim, start, min(size, length - start))
    parameter.to_local().copy_(whole)
