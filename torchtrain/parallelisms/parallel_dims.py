"""The device mesh: how the ranks of a run are arranged."""

from dataclasses import dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchtrain.config_manager import Parallelism, data_parallel_degree


@dataclass(frozen=True)
class ParallelDims:
    """Degrees of each dimension of the mesh; their product is the world size."""

    dp_replicate: int
    """Copies of the sharded model, their gradients all-reduced (HSDP; plain replication where dp_shard is 1)."""
    dp_shard: int
    """Ranks that share one copy of parameters, gradients and optimizer states (FSDP)."""

    @classmethod
    def from_config(cls, parallelism: Parallelism, world_size: int) -> "ParallelDims":
        """Resolve -1 to what is left; the config check has already refused what cannot be."""
        data_parallel = data_parallel_degree(parallelism, world_size)
        replicate = parallelism.data_parallel_replicate_degree
        return cls(dp_replicate=replicate, dp_shard=data_parallel // replicate)

    @property
    def data_parallel(self) -> int:
        """Ranks that read different samples."""
        return self.dp_replicate * self.dp_shard

    def build_mesh(self, device_type: str) -> DeviceMesh:
        """A mesh with the dimensions `dp_replicate` (only where it is above 1) and `dp_shard`."""
        if self.dp_replicate > 1:
            return init_device_mesh(
                device_type, (self.dp_replicate, self.dp_shard), mesh_dim_names=("dp_replicate", "dp_shard")
            )
        return init_device_mesh(device_type, (self.dp_shard,), mesh_dim_names=("dp_shard",))

    def describe(self) -> str:
        """The layout in words, for the start-up line."""
        ranks = self.data_parallel
        if ranks == 1:
            return "one process"
        if self.dp_replicate == 1:
            return f"FSDP: parameters, gradients and optimizer states sharded over {ranks} ranks"
        if self.dp_shard == 1:
            return f"replication: the whole model on each of {ranks} ranks"
        return f"HSDP: {self.dp_replicate} replicas of the model, each sharded over {self.dp_shard} ranks"
