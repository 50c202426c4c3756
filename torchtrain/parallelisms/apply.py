"""The one place that fixes the order in which the techniques are applied."""

from collections.abc import Iterable

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from torchtrain.catalog.models import ModelShape
from torchtrain.catalog.schedules import stages_of
from torchtrain.config.layout import plan_stages
from torchtrain.config_manager import JobConfig
from torchtrain.logging_utils import logger
from torchtrain.models.decoder import Decoder
from torchtrain.models.llama import Transformer
from torchtrain.parallelisms.activation_checkpoint import apply_around_blocks, apply_within_blocks
from torchtrain.parallelisms.compile import apply_compile
from torchtrain.parallelisms.context_parallel import apply_context_parallel
from torchtrain.parallelisms.emulated_bf16 import apply_emulated_bf16, needs_emulation
from torchtrain.parallelisms.fsdp import DTYPES, apply_fsdp
from torchtrain.parallelisms.mesh import ParallelDims
from torchtrain.parallelisms.pipeline_parallel import StagePositions
from torchtrain.parallelisms.ring_attention import Ring
from torchtrain.parallelisms.tensor_parallel import apply_tensor_parallel


def build_parts(
    shape: ModelShape, mesh: DeviceMesh, dims: ParallelDims, config: JobConfig
) -> dict[int, Decoder]:
    """This rank's part of the model on the meta device, parallelized: all of it, or by number its pipeline stages."""
    stages = plan_stages(config.parallelism, shape.layer_names)
    rank = mesh["pp"].get_local_rank() if dims.pp > 1 else 0
    parts: dict[int, Decoder] = {}
    for stage in stages_of(
        rank, config.parallelism.pipeline_parallel_schedule, len(stages), dims.pp
    ):
        with torch.device("meta"):
            part = Transformer(shape)
        part.keep(stages[stage])
        part.to(DTYPES[config.training.dtype])
        parallelize(part, mesh, dims, config)
        if stage > 0:
            part.rope = StagePositions(
                part.rope, 1 if config.parallelism.disable_sequence_parallel else dims.tp
            )
        parts[stage] = part
    return parts


def named_weights(parts: Iterable[Decoder]) -> dict[str, nn.Parameter]:
    """The parameters by their names in the whole model; a tied output, which may be a stage's copy, is left out."""
    return {
        name: parameter
        for part in parts
        for name, parameter in part.named_parameters()
        if not (part.shape.tied_embeddings and name == "output.weight")
    }


def parallelize(model: Decoder, mesh: DeviceMesh, dims: ParallelDims, config: JobConfig) -> None:
    """Apply every technique the config asks for, in place, from the innermost to the outermost.

    Tensor and context parallelism change what a block computes on a rank, recomputation of chosen operations wraps its
    forward, compilation traces all of that, recomputation of whole blocks and FSDP's hooks go around.
    """
    if dims.cp > 1:
        ring = Ring.of(mesh["cp"], config.parallelism)
        apply_context_parallel(model, ring, config.parallelism.context_parallel_method)
    if needs_emulation(mesh.device_type, DTYPES[config.training.mixed_precision_param]):
        logger.info(
            "bf16: this processor has no bf16 products; they run in fp32 on bf16 values, rounded as there"
        )
        apply_emulated_bf16(model)
    if dims.tp > 1:
        apply_tensor_parallel(model, mesh["tp"], config.parallelism)
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
