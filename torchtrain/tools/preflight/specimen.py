"""The layers of a run that differ from each other, one of each, on fake tensors.

A rank of a group that is not there builds them: the real model with the real techniques, cut down
to one block of each kind. Fake tensors have shapes, types and a device, but no memory, and every
operation of the model runs on them, collectives too.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import gcd
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes

from torchtrain.catalog.models import ModelShape
from torchtrain.config.layout import Degrees
from torchtrain.config.plans import RunPlan
from torchtrain.config.schema import (
    ActivationCheckpoint,
    Compile,
    Config,
    Parallelism,
    Router,
    Training,
)
from torchtrain.models.decoder import Decoder, load_decoder
from torchtrain.parallelisms.apply import Techniques, build_parts
from torchtrain.parallelisms.expert_parallel import find_sparse
from torchtrain.parallelisms.mesh import Mesh

ENDS = ["tok_embeddings", "norm", "output"]
SHARING = {
    "disable_sequence_parallel",
    "disable_loss_parallel",
    "context_parallel_method",
    "context_parallel_load_balancer",
    "context_parallel_rotate_method",
}
"""What of [parallelism], beside the degrees, changes what a block computes on a rank."""


@dataclass(frozen=True)
class Kind:
    """What sets a block apart from another one."""

    is_sparse: bool
    is_recomputed: bool
    """Whether the backward computes it again as a whole."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """Everything that what a layer takes depends on: runs that agree in it share their traces."""

    family: str
    shape: ModelShape
    degrees: Degrees
    """Those of the ranks that share a layer's work, and as few others as there can be."""
    sequence_shards: int
    sequences: int
    """B, of one forward of a rank."""
    seq_len: int
    """S, of the whole sequence."""
    device_type: str
    training: str
    """The sections as JSON, without what has no part in it."""
    parallelism: str
    activation_checkpoint: str
    router: str
    forces_balance: bool
    compiles_loss: bool

    @classmethod
    def of(cls, config: Config, plan: RunPlan, device_type: str) -> "Request":
        """Return what a run's layers depend on."""
        degrees = plan.degrees
        shares = degrees.cp * degrees.tp
        alone = replace(
            degrees, pp=1, dp_replicate=1, dp_shard=degrees.ep // gcd(degrees.ep, shares)
        )
        training = Training(
            dtype=config.training.mixed_precision_param,  # as FSDP gathers the weights
            document_masking=config.training.document_masking,
        )
        loss = config.compile.enable and "loss" in config.compile.components
        return cls(
            family=config.model.name,
            shape=plan.shape,
            degrees=alone,
            sequence_shards=plan.sequence_shards,
            sequences=(
                plan.batch.microbatch_size
                if plan.pipeline is None
                else plan.pipeline.microbatch_size
            ),
            seq_len=config.training.seq_len,
            device_type=device_type,
            training=training.model_dump_json(),
            parallelism=config.parallelism.model_dump_json(include=SHARING),
            activation_checkpoint=config.activation_checkpoint.model_dump_json(),
            router=config.router.model_dump_json(),
            forces_balance=config.debug.moe_force_load_balance,
            compiles_loss=loss,
        )

    @property
    def dtype(self) -> str:
        """The type that layers compute in."""
        return self.read_training().dtype

    def read_training(self) -> Training:
        """Return the section [training], as far as it counts here."""
        return Training.model_validate_json(self.training)

    def kind_of(self, layer: int) -> Kind:
        """Return the kind of a block, by its number in the whole model."""
        section = ActivationCheckpoint.model_validate_json(self.activation_checkpoint)
        every = section.recomputed_blocks
        return Kind(self.shape.is_sparse(layer), every is not None and layer % every == 0)

    def choose_blocks(self) -> dict[Kind, int]:
        """Return the first block of each kind that the model has."""
        chosen: dict[Kind, int] = {}
        for layer in range(self.shape.n_layers):
            chosen.setdefault(self.kind_of(layer), layer)
        return chosen


@contextmanager
def fake_ranks(rank: int, ranks: int) -> Iterator[None]:
    """Be one of so many ranks that are not there.

    Raises:
        RuntimeError: this process is a rank of a real group.
    """
    if dist.is_initialized():
        raise RuntimeError("preflight cannot run in a process that has joined a group")
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def fake_tensors(rows: int) -> Iterator[None]:
    """Let new tensors be fake.

    Where the model asks for the numbers in one of them, they are rows of experts, or of ranks with
    experts, which then share `rows` rows evenly.
    """

    def share_rows(counts: FakeTensor) -> Any:
        if counts.dim() > 1:
            return [share_rows(each) for each in counts]
        share, rest = divmod(rows, len(counts))
        return [share + 1 if index < rest else share for index in range(len(counts))]

    with FakeTensorMode(), patch.object(FakeTensor, "tolist", share_rows), whole_shapes_unseen():
        yield


@contextmanager
def whole_shapes_unseen() -> Iterator[None]:
    """Let DTensor work out the shapes of whole tensors out of sight of what counts tensors.

    It runs each operation once more on fake tensors that are whole. Among ours they would look like
    tensors of the run. A torch that names the place otherwise is left as it is.
    """
    name = "_propagate_tensor_meta_non_cached"
    work_out = vars(ShardingPropagator).get(name)
    if work_out is None:
        yield
        return

    def work_out_unseen(propagator: ShardingPropagator, schema: Any) -> Any:
        with _disable_current_modes():
            return work_out(propagator, schema)

    with patch.object(ShardingPropagator, name, work_out_unseen):
        yield


def build_specimen(request: Request) -> tuple[Decoder, Mesh]:
    """Build one block of each kind, the embedding and the output, without memory and without FSDP.

    The process must be one of `fake_ranks`. Weights are in the compute precision, as FSDP gathers
    them; nothing is compiled.
    """
    degrees = request.degrees
    mesh = Mesh(
        degrees,
        "cpu",
        sequence_shards=request.sequence_shards,
        has_experts=request.shape.n_experts > 0,
    )
    mesh.device_type = request.device_type  # of the run's: whether it has products in bf16
    sharing = Parallelism.model_validate_json(request.parallelism)
    techniques = Techniques(
        training=request.read_training(),
        parallelism=sharing,
        activation_checkpoint=ActivationCheckpoint.model_validate_json(
            request.activation_checkpoint
        ),
        compile=Compile(enable=False),
        fsdp=False,
    )
    names = [f"layers.{layer}" for layer in request.choose_blocks().values()]
    stages = {0: [*ENDS, *names]}
    part = build_parts(load_decoder(request.family), request.shape, stages, mesh, techniques)[0]
    router = Router.model_validate_json(request.router)
    for sparse in find_sparse(part):
        sparse.router.balance_weight = router.balance_loss_weight
        sparse.router.z_weight = router.z_loss_weight
        sparse.router.forces_balance = request.forces_balance
    return part, mesh


def make_fake(part: Decoder) -> None:
    """Give a model on the meta device fake tensors of the CPU; called within `fake_tensors`."""
    for module in part.modules():
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(fake_like(weight)))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=buffer.dtype))
    part.tie()
    for sparse in find_sparse(part):
        size = sparse.shape.n_experts + 3
        sparse.router.totals = torch.empty(size, dtype=torch.float64)


def fake_like(weight: torch.Tensor) -> torch.Tensor:
    """Return a fake tensor of the weight's shape, sharded as it is."""
    if not isinstance(weight, DTensor):
        return torch.empty(weight.shape, dtype=weight.dtype)
    part = torch.empty(weight._local_tensor.shape, dtype=weight.dtype)
    return DTensor.from_local(
        part,
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )


def rank_with_most(degrees: Degrees) -> int:
    """Return the rank that has the most: of uneven shares the first, of a sequence the last."""
    return (degrees.cp - 1) * degrees.tp
