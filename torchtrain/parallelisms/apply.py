"""The one place that fixes the order in which the techniques are applied."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from torchtrain.config_manager import JobConfig, check_batch, plan_stages
from torchtrain.logging_utils import logger
from torchtrain.models.flavors import ModelShape
from torchtrain.models.llama import Transformer
from torchtrain.parallelisms.activation_checkpoint import apply_around_blocks, apply_within_blocks
from torchtrain.parallelisms.compile import apply_compile
from torchtrain.parallelisms.context_parallel import apply_context_parallel
from torchtrain.parallelisms.emulated_bf16 import apply_emulated_bf16, needs_emulation
from torchtrain.parallelisms.fsdp import DTYPES, apply_fsdp
from torchtrain.parallelisms.parallel_dims import ParallelDims
from torchtrain.parallelisms.pipeline_parallel import Pipeline, PipelinePlan, StagePositions
from torchtrain.parallelisms.tensor_parallel import apply_tensor_parallel
from torchtrain.pipeline_stages import SCHEDULES, stages_of
from torchtrain.utils import SharedUserError, UserError


def build_parts(shape: ModelShape, mesh: DeviceMesh, dims: ParallelDims, config: JobConfig) -> dict[int, Transformer]:
    """This rank's part of the model on the meta device, parallelized: all of it, or by number its pipeline stages."""
    stages = plan_stages(config.parallelism, shape.pieces)
    mine = [0]
    if dims.pp > 1:
        schedule = config.parallelism.pipeline_parallel_schedule
        mine = stages_of(mesh["pp"].get_local_rank(), schedule, len(stages), dims.pp)
    parts = {}
    for stage in mine:
        with torch.device("meta"):
            part = Transformer(shape)
        part.keep(stages[stage])
        part.to(DTYPES[config.training.dtype])
        parallelize(part, mesh, dims, config)
        if stage > 0:
            part.rope = StagePositions(part.rope, 1 if config.parallelism.disable_sequence_parallel else dims.tp)
        parts[stage] = part
    return parts


def named_weights(parts: Iterable[Transformer]) -> dict[str, nn.Parameter]:
    """The parameters by their names in the whole model; a tied output, which may be a stage's copy, is left out."""
    return {
        name: parameter
        for part in parts
        for name, parameter in part.named_parameters()
        if not (part.shape.tied_embeddings and name == "output.weight")
    }


def build_pipeline(
    parts: dict[int, Transformer],
    mesh: DeviceMesh,
    dims: ParallelDims,
    config: JobConfig,
    microbatch_size: int,
    device: torch.device,
    sequence_losses: Callable[[Tensor, Tensor], Tensor],
) -> Pipeline:
    """The pipeline of these stages, over batches of the batch plan's `microbatch_size` sequences.

    Those of a validation are of its own size.

    Raises:
        UserError: the schedule cannot run such a batch. The config check has refused what the config says of it, but
            not what a checkpoint does.
    """
    parallelism, shape = config.parallelism, next(iter(parts.values())).shape
    schedule, size = parallelism.pipeline_parallel_schedule, parallelism.pipeline_parallel_microbatch_size
    stages = len(plan_stages(parallelism, shape.pieces))
    compiled = config.compile.enable and "model" in config.compile.components
    try:
        check_batch(parallelism, microbatch_size, stages)
    except UserError as fault:
        raise SharedUserError(
            f"{fault}; with training.global_batch_size = -1 the global batch is the checkpoint's. Change "
            "parallelism.pipeline_parallel_microbatch_size, training.local_batch_size or the data-parallel degree"
        ) from None

    def plan(sequences: int, seq_len: int) -> PipelinePlan:
        mine = seq_len // dims.cp
        return PipelinePlan(
            schedule,
            stages,
            last_rank=next(rank for rank in range(dims.pp) if stages - 1 in stages_of(rank, schedule, stages, dims.pp)),
            microbatches=sequences // size,
            microbatch_size=size,
            seq_len=mine,
            activation_shape=(mine if parallelism.disable_sequence_parallel else mine // dims.tp, shape.dim),
            dtype=DTYPES[config.training.mixed_precision_param],
            whole_backward=SCHEDULES[schedule].splits_backward
            and (compiled or config.activation_checkpoint.mode != "none"),
        )

    training, validation = config.training, config.validation
    sizes = (validation.local_batch_size or microbatch_size, validation.seq_len or training.seq_len)
    plans = plan(microbatch_size, training.seq_len), plan(*sizes)
    return Pipeline(parts, *plans, mesh.get_group("pp"), device, sequence_losses)


def parallelize(model: Transformer, mesh: DeviceMesh, dims: ParallelDims, config: JobConfig) -> None:
    """Apply every technique the config asks for, in place, from the innermost to the outermost.

    Tensor and context parallelism change what a block computes on a rank, recomputation of chosen operations wraps its
    forward, compilation traces all of that, recomputation of whole blocks and FSDP's hooks go around.
    """
    if needs_emulation(mesh.device_type, DTYPES[config.training.mixed_precision_param]):
        logger.info("bf16: this processor has no bf16 products; they run in fp32 on bf16 values, rounded as there")
        apply_emulated_bf16(model)
    if dims.tp > 1:
        apply_tensor_parallel(model, mesh["tp"], config.parallelism)
    if dims.cp > 1:
        apply_context_parallel(model, mesh["cp"], config.parallelism)
    apply_within_blocks(model, config.activation_checkpoint)
    if config.compile.enable and "model" in config.compile.components:
        apply_compile(model, config.compile.backend)
    apply_around_blocks(model, config.activation_checkpoint)
    reshard = config.parallelism.fsdp_reshard_after_forward
    if dims.pp > 1 and reshard == "default":
        # Gathering again for each microbatch would cost more than a stage's parameters weigh; and where the backward is
        # split, PyTorch's FSDP then trains wrongly, so that the config check refuses "always" there.
        reshard = "never"
    apply_fsdp(model, dims.fsdp_mesh(mesh), config.training, reshard)
