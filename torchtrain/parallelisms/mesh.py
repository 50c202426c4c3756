"""The device mesh: how the ranks of a run are arranged."""

from dataclasses import asdict, dataclass

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from torchtrain.config.layout import plan_degrees
from torchtrain.config.schema import Parallelism


@dataclass(frozen=True)
class ParallelDims:
    """Degrees of each dimension of the mesh, the outermost first; their product is the world size."""

    pp: int
    """Ranks that share the layers (pipeline): the outermost, since they talk least."""
    dp_replicate: int
    """Copies of the sharded model, their gradients all-reduced (HSDP; plain replication where dp_shard is 1)."""
    dp_shard: int
    """Ranks that share one copy of parameters, gradients and optimizer states (FSDP)."""
    cp: int = 1
    """Ranks that share each sequence; FSDP shards over them too."""
    tp: int = 1
    """Ranks that share each matrix product: the innermost, since they talk most."""

    @classmethod
    def from_config(cls, parallelism: Parallelism, world_size: int) -> "ParallelDims":
        """Resolve -1 to what is left; the config check has already refused what cannot be."""
        return cls(
            pp=parallelism.pipeline_parallel_degree,
            dp_replicate=parallelism.data_parallel_replicate_degree,
            dp_shard=plan_degrees(parallelism, world_size).dp_shard,
            cp=parallelism.context_parallel_degree,
            tp=parallelism.tensor_parallel_degree,
        )

    @property
    def data_parallel(self) -> int:
        """Ranks that read different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def ranks_a_stage(self) -> int:
        """Ranks that share the work on one sample in one stage: in the last one all of them have its loss."""
        return self.cp * self.tp

    @property
    def ranks_a_sample(self) -> int:
        """Ranks that share the work on one sample: all of them read it."""
        return self.pp * self.ranks_a_stage

    def data_rank(self, rank: int) -> int:
        """Which of the `data_parallel` shares of a batch this rank reads; all `ranks_a_sample` read the same."""
        return rank // self.ranks_a_stage % self.data_parallel

    def build_mesh(self, device_type: str) -> DeviceMesh:
        """A mesh of the dimensions above 1, and `dp_shard` always."""
        kept = {
            name: degree
            for name, degree in asdict(self).items()
            if degree > 1 or name == "dp_shard"
        }
        return init_device_mesh(device_type, tuple(kept.values()), mesh_dim_names=tuple(kept))

    def fsdp_mesh(self, mesh: DeviceMesh) -> DeviceMesh:
        """The part of the mesh that FSDP sees: one dimension that shards, and before it one that replicates."""
        shard = "dp_shard"
        if self.cp > 1:
            shard = "dp_shard_cp"
            mesh["dp_shard", "cp"]._flatten(shard)
        return mesh["dp_replicate", shard] if self.dp_replicate > 1 else mesh[shard]

    def describe(self) -> str:
        """The layout in words, for the start-up line."""
        degrees = {
            "pipeline parallel: {} ranks share the layers": self.pp,
            "{} replicas": self.dp_replicate,
            "FSDP: parameters, gradients and optimizer states sharded over {} ranks": self.dp_shard
            * self.cp,
            "context parallel: {} ranks share each sequence": self.cp,
            "tensor parallel: {} ranks share each matrix product": self.tp,
        }
        return (
            "; ".join(text.format(degree) for text, degree in degrees.items() if degree > 1)
            or "one process"
        )
