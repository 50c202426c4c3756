"""The device mesh: how the ranks of a run are arranged."""

from dataclasses import asdict

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchtrain.config.layout import Degrees

DIMENSIONS = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
"""The outermost first; their degrees multiply to the world size. A technique that uses the ranks of
these in another way has a mesh of its own, made from them as FSDP's is."""


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
            has_experts: whether the model has layers with experts.
        """
        self.degrees = degrees
        self.device_type = device_type
        self.sequence_shards = sequence_shards
        kept = [name for name in DIMENSIONS if self.has(name) or name == "dp_shard"]
        sizes = [self._degree(name) for name in kept]
        self._mesh = init_device_mesh(device_type, tuple(sizes), mesh_dim_names=tuple(kept))
        self.fsdp = self._build_fsdp()
        self._experts = self._build_experts() if has_experts else None

    def _build_fsdp(self) -> DeviceMesh:
        """Return FSDP's mesh: one dimension that shards, before it one that replicates."""
        shard = "dp_shard"
        if self.has("cp"):
            shard = "dp_shard_cp"
            self._mesh["dp_shard", "cp"]._flatten(shard)
        return self._mesh["dp_replicate", shard] if self.has("dp_replicate") else self._mesh[shard]

    def _build_experts(self) -> DeviceMesh | None:
        """Return the mesh of the experts, where the ranks that shard or share them are others.

        Under tensor parallelism they always are: its ranks have different tokens there.
        """
        degrees = self.degrees
        if degrees.ep == 1 and degrees.tp == 1:
            return None
        sizes = (degrees.pp, degrees.dp_replicate, degrees.expert_shard, degrees.ep)
        names = ("pp", "dp_replicate", "expert_shard", "ep")
        return init_device_mesh(self.device_type, sizes, mesh_dim_names=names)

    @property
    def fsdp_experts(self) -> DeviceMesh:
        """FSDP's mesh for the experts: one dimension that shards, before it one that replicates."""
        if self._experts is None:
            return self.fsdp
        if self.has("dp_replicate"):
            return self._experts["dp_replicate", "expert_shard"]
        return self._experts["expert_shard"]

    @property
    def experts(self) -> DeviceMesh | None:
        """The one-dimensional mesh of the ranks that share the experts; None: each has them all."""
        if self._experts is None or self.degrees.ep == 1:
            return None
        return self._experts["ep"]

    @property
    def sequence_groups(self) -> list[dist.ProcessGroup]:
        """The groups of ranks that share the sequences of a sparse layer."""
        groups = [self.group("cp"), self.group("tp")]
        return [group for group in groups if group is not None]

    def has(self, name: str) -> bool:
        """Check whether several ranks share this dimension."""
        return self._degree(name) > 1

    def _degree(self, name: str) -> int:
        return asdict(self.degrees)[name]

    def get(self, name: str) -> DeviceMesh:
        """Return the one-dimensional mesh of the ranks along this dimension."""
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
        groups = [*self._mesh.get_all_groups(), *self.fsdp.get_all_groups()]
        return groups if self._experts is None else [*groups, *self._experts.get_all_groups()]
