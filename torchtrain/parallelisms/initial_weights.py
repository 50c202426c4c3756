"""Initial weights: a pure function of (seed, the parameter's full name), whatever the layout.

Each parameter is drawn whole, in fp32, on the training device, from a generator seeded by both;
every rank then keeps its own slice. So any mesh and any world size starts from the same bits, and
no seed checkpoint is needed.
"""

import hashlib

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from torchtrain.models.decoder import Decoder

CUTOFF = 3.0
"""No value lies further from 0 than this many standard deviations."""


def materialize(model: Decoder, device: torch.device, seed: int, *, offload: bool = False) -> None:
    """Give a (sharded) model on the meta device its storage and initial weights, drawn on `device`.

    With `offload` the storage is the host's memory; else it is on `device` too. Buffers are zeros,
    on `device` in any case, since FSDP brings there parameters alone.
    """
    model.to_empty(device="cpu" if offload else device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole = torch.empty(parameter.shape, dtype=torch.float32, device=device)
            fill(whole, model.initial_std(name), seed_generator(name, seed, device))
            copy_slice(parameter, whole)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros_like(buffer, device=device))


def seed_generator(name: str, seed: int, device: torch.device) -> torch.Generator:
    """Return the random generator of the parameter with this full name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def fill(whole: Tensor, std: float | None, generator: torch.Generator) -> None:
    """Fill a whole parameter with ones, or with normal values of this deviation, cut off."""
    if std is None:
        whole.fill_(1.0)
    else:
        nn.init.trunc_normal_(
            whole, mean=0.0, std=std, a=-CUTOFF * std, b=CUTOFF * std, generator=generator
        )


def copy_slice(parameter: Tensor, whole: Tensor) -> None:
    """Cast `whole` into the parameter, or its local slice into a DTensor's local shard.

    Nothing is communicated.
    """
    if not isinstance(parameter, DTensor):
        parameter.copy_(whole)
        return

    def is_cut_last(cut: tuple[int, Placement]) -> bool:
        # FSDP cuts what tensor parallelism, on a later dimension of the mesh, has cut before; a
        # strided shard says so.
        return isinstance(cut[1], _StridedShard)

    mesh = parameter.device_mesh
    for mesh_dim, placement in sorted(enumerate(parameter.placements), key=is_cut_last):
        if isinstance(placement, Shard | _StridedShard):
            # As DTensor cuts: the first shards are full, the last may be smaller or empty.
            length = whole.shape[placement.dim]
            size = -(-length // mesh.size(mesh_dim))
            start = min(mesh.get_local_rank(mesh_dim) * size, length)
            whole = whole.narrow(placement.dim, start, min(size, length - start))
    parameter.to_local().copy_(whole)
