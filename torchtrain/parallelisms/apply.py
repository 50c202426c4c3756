"""The one place that fixes the order in which the techniques are applied."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from torchtrain.catalog.models import ModelShape
from torchtrain.catalog.schedules import stages_of
from torchtrain.config.schema import (
    ActivationCheckpoint,
    Compile,
    Float8Linear,
    Parallelism,
    Training,
)
from torchtrain.dtypes import DTYPES
from torchtrain.logging_utils import logger
from torchtrain.models.decoder import Decoder
from torchtrain.parallelisms.activation_checkpoint import apply_around_blocks, apply_within_blocks
from torchtrain.parallelisms.compile import apply_compile
from torchtrain.parallelisms.context_parallel import apply_context_parallel
from torchtrain.parallelisms.emulated_bf16 import apply_emulated_bf16, needs_emulation
from torchtrain.parallelisms.expert_parallel import apply_expert_parallel
from torchtrain.parallelisms.float8 import apply_float8, find_compiler_options
from torchtrain.parallelisms.fsdp import apply_fsdp
from torchtrain.parallelisms.mesh import Mesh
from torchtrain.parallelisms.pipeline_parallel import StagePositions
from torchtrain.parallelisms.ring_attention import Ring
from torchtrain.parallelisms.tensor_parallel import apply_tensor_parallel


@dataclass(frozen=True, kw_only=True)
class Techniques:
    """The sections of the config that say how a model is parallelized."""

    training: Training
    parallelism: Parallelism
    activation_checkpoint: ActivationCheckpoint
    compile: Compile
    float8: Float8Linear | None = None
    """None: linear layers multiply in the compute precision."""
    fsdp: bool = True
    """Whether FSDP is applied, which training needs also on one rank."""


def find_own_stages(stages: list[list[str]], schedule: str, mesh: Mesh) -> dict[int, list[str]]:
    """Return the layer names of this rank's pipeline stages, by the stages' numbers."""
    numbers = stages_of(mesh.rank_along("pp"), schedule, len(stages), mesh.degrees.pp)
    return {number: stages[number] for number in numbers}


def build_parts(
    model_class: type[Decoder],
    shape: ModelShape,
    stages: dict[int, list[str]],
    mesh: Mesh,
    techniques: Techniques,
) -> dict[int, Decoder]:
    """Build this rank's part of the model on the meta device, parallelized.

    Args:
        model_class: of the whole model.
        shape: of the whole model.
        stages: the layer names of this rank's pipeline stages, by their numbers; without a
            pipeline stage 0 alone, with all of them.
        mesh: the ranks of the run.
        techniques: how to parallelize.

    Returns:
        The model of each stage, by its number.
    """
    parts: dict[int, Decoder] = {}
    for stage, layer_names in stages.items():
        with torch.device("meta"):
            part = model_class(shape)
        part.keep(layer_names)
        part.to(DTYPES[techniques.training.dtype])
        parallelize(part, mesh, techniques)
        if stage > 0:
            part.rope = StagePositions(part.rope, mesh.sequence_shards)
        parts[stage] = part
    return parts


def parallelize(model: Decoder, mesh: Mesh, techniques: Techniques) -> None:
    """Apply every technique the config asks for, in place, from the innermost to the outermost.

    Tensor and context parallelism change what a block computes on a rank, recomputation of chosen
    operations wraps its forward, compilation traces all of that, recomputation of whole blocks and
    FSDP's hooks go around. A ring replaces the attention kernel itself, so it comes before what
    wraps one.
    """
    training = techniques.training
    parallelism = techniques.parallelism
    if mesh.has("cp"):
        ring = Ring.of(mesh.get("cp"), parallelism)
        apply_context_parallel(model, ring, parallelism.context_parallel_method)
    if techniques.float8 is not None:
        apply_float8(model, techniques.float8, mesh.degrees.tp)
    if needs_emulation(mesh.device_type, DTYPES[training.mixed_precision_param]):
        logger.info(
            "bf16: no native support on this CPU; emulated by fp32 products rounded to bf16"
        )
        apply_emulated_bf16(model)
    if mesh.has("tp"):
        apply_tensor_parallel(model, mesh.get("tp"), parallelism)
    apply_expert_parallel(model, mesh)
    apply_within_blocks(model, techniques.activation_checkpoint)
    if techniques.compile.enable and "model" in techniques.compile.components:
        options = find_compiler_options(techniques.float8)
        apply_compile(model, techniques.compile.backend, options)
    apply_around_blocks(model, techniques.activation_checkpoint)
    if not techniques.fsdp:
        return
    reshard = parallelism.fsdp_reshard_after_forward
    if mesh.has("pp") and reshard == "default":
        # Gathering again for each microbatch would cost more than a stage's parameters weigh; and
        # where the backward is split, PyTorch's FSDP then trains wrongly, so that the config check
        # refuses "always" there.
        reshard = "never"
    apply_fsdp(model, mesh, training, reshard)


def collect_weights(parts: Iterable[Decoder]) -> dict[str, nn.Parameter]:
    """Return the parameters by their names in the whole model.

    A tied output, which may be a stage's copy, is left out.
    """
    weights = {}
    for part in parts:
        for name, parameter in part.named_parameters():
            is_copy = part.shape.tied_embeddings and name == "output.weight"
            if not is_copy:
                weights[name] = parameter
    return weights


def collect_buffers(parts: Iterable[Decoder]) -> dict[str, Tensor]:
    """Return the buffers that belong to the model's state by their names in the whole model."""
    buffers = {}
    for part in parts:
        names = part.state_dict().keys()
        buffers.update({name: each for name, each in part.named_buffers() if name in names})
    return buffers
