"""The device mesh: how the ranks of a run are arranged."""

from dataclasses import asdict

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchtrain.config.layout import Degrees

DIMENSIONS = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""The outermost first; their degrees multiply to the world size. A technique that uses the ranks of
these in another way has a mesh of its own: FSDP's is made from them, the experts' beside them."""
EXPERT_DIMENSIONS = ("pp", "dp_replicate", "expert_shard", "ep")
"""The ranks along "dp_shard", "cp" and "tp" in another grid: neighbors share the experts, and FSDP
shards each of them over "expert_shard"."""


class Mesh:
    """The ranks of the run, arranged by its degrees, and this rank's place among them.

    A dimension of degree 1 has no group, but "dp_shard" always has: FSDP also runs on one rank.
    """

    def __init__(
        self,
        degrees: Degrees,
        device_type: str,
        *,
        sequence_shards: int = 1,
        has_experts: bool = False,
    ) -> None:
        """Build the mesh; a collective call.

        Args:
            degrees: they multiply to the world size.
            device_type: of the computation.
            sequence_shards: into how many shards sequence parallelism splits a rank's sequences
                between the blocks.
            has_experts: whether any layer of the model is sparse.
        """
        self.degrees = degrees
        self.device_type = device_type
        self.sequence_shards = sequence_shards
        kept = [name for name in DIMENSIONS if self.has(name) or name == "dp_shard"]
        sizes = [self._degree(name) for name in kept]
        self._mesh = init_device_mesh(device_type, tuple(sizes), mesh_dim_names=tuple(kept))
        self.fsdp = self._build_fsdp()
        self._expert_mesh = self._build_expert_mesh() if has_experts else None

    def _build_fsdp(self) -> DeviceMesh:
        """Return FSDP's mesh: one dimension that shards, before it one that replicates."""
        shard = "dp_shard"
        if self.has("cp"):
            shard = "dp_shard_cp"
            self._mesh["dp_shard", "cp"]._flatten(shard)
        return self._mesh["dp_replicate", shard] if self.has("dp_replicate") else self._mesh[shard]

    def _build_expert_mesh(self) -> DeviceMesh | None:
        """Return the experts' own mesh; None where the dense layers' FSDP serves them as well."""
        if not (self.has("ep") or self.has("tp")):
            return None
        kept = [name for name in EXPERT_DIMENSIONS if self.has(name) or name == "expert_shard"]
        sizes = [self._degree(name) for name in kept]
        return init_device_mesh(self.device_type, tuple(sizes), mesh_dim_names=tuple(kept))

    @property
    def expert_fsdp(self) -> DeviceMesh | None:
        """FSDP's mesh of the experts where they have one of their own, like `fsdp`."""
        if self._expert_mesh is None:
            return None
        shard = "expert_shard"
        names = ("dp_replicate", shard) if self.has("dp_replicate") else shard
        return self._expert_mesh[names]

    def has(self, name: str) -> bool:
        """Check whether several ranks share this dimension."""
        return self._degree(name) > 1

    def _degree(self, name: str) -> int:
        return self.degrees.expert_shard if name == "expert_shard" else asdict(self.degrees)[name]

    def get(self, name: str) -> DeviceMesh:
        """Return the one-dimensional mesh of the ranks along this dimension."""
        if name == "ep":
            assert self._expert_mesh is not None
            return self._expert_mesh[name]
        return self._mesh[name]

    def group(self, name: str) -> dist.ProcessGroup | None:
        """Return the process group of the ranks along the dimension; None at degree 1."""
        return self._mesh.get_group(name) if self.has(name) else None

    def rank_along(self, name: str) -> int:
        """Return this rank's coordinate in the dimension."""
        return self._mesh.get_local_rank(name) if self.has(name) else 0

    @property
    def data_rank(self) -> int:
        """Which of the `degrees.data_parallel` shares of a batch this rank reads."""
        replica = self.rank_along("dp_replicate")
        return replica * self.degrees.dp_shard + self.rank_along("dp_shard")

    def all_groups(self) -> list[dist.ProcessGroup]:
        """Return every process group that this rank communicates in while training."""
        meshes = [self._mesh, self.fsdp]
        if self._expert_mesh is not None:
            meshes.append(self._expert_mesh)
        return [group for mesh in meshes for group in mesh.get_all_groups()]
