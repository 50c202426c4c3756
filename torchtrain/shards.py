"""Which part of a sharded tensor a rank has."""

from collections.abc import Sequence

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

Box = list[tuple[int, int]]
"""Start and length along each dimension."""


def find_local_box(tensor: Tensor) -> Box:
    """Return the part of the whole tensor that this rank's local tensor is."""
    if not isinstance(tensor, DTensor):
        return [(0, length) for length in tensor.shape]
    coordinate = tensor.device_mesh.get_coordinate()
    assert coordinate is not None, "this rank has no part of the tensor"
    return find_box(tensor, coordinate)


def find_box(tensor: DTensor, coordinate: Sequence[int]) -> Box:
    """Return the part of the whole tensor that the rank at this place of its mesh has."""
    box = [(0, length) for length in tensor.shape]

    def is_cut_last(cut: tuple[int, Placement]) -> bool:
        # FSDP cuts what tensor parallelism, on a later dimension of the mesh, has cut before; a
        # strided shard says so.
        return isinstance(cut[1], _StridedShard)

    mesh = tensor.device_mesh
    for mesh_dim, placement in sorted(enumerate(tensor.placements), key=is_cut_last):
        if isinstance(placement, Shard | _StridedShard):
            # As DTensor cuts: the first shards are full, the last may be smaller or empty.
            start, length = box[placement.dim]
            size = -(-length // mesh.size(mesh_dim))
            skipped = min(coordinate[mesh_dim] * size, length)
            box[placement.dim] = (start + skipped, min(size, length - skipped))
    return box


def find_sharding(tensor: Tensor) -> tuple[tuple[DeviceMesh, int], ...]:
    """Return the mesh with each of its dimensions whose ranks hold different parts.

    A tensor that is whole has none. Process groups would not do as keys: they are equal by
    identity alone, so that ranks could come to different numbers of sums.
    """
    if not isinstance(tensor, DTensor):
        return ()
    sharded = []
    for dim, placement in enumerate(tensor.placements):
        assert not placement.is_partial(), "the tensor is not reduced yet"
        if not placement.is_replicate():
            sharded.append((tensor.device_mesh, dim))
    return tuple(sharded)


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a tensor, sharing its memory; all of one that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
