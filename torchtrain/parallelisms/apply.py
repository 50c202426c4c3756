"""The one place that fixes the order in which the techniques are applied."""

import torch
from torch.distributed.device_mesh import DeviceMesh

from torchtrain.config_manager import JobConfig
from torchtrain.logging_utils import logger
from torchtrain.models.llama import Transformer
from torchtrain.parallelisms.activation_checkpoint import apply_around_blocks, apply_within_blocks
from torchtrain.parallelisms.compile import apply_compile
from torchtrain.parallelisms.context_parallel import apply_context_parallel
from torchtrain.parallelisms.emulated_bf16 import apply_emulated_bf16, needs_emulation
from torchtrain.parallelisms.fsdp import apply_fsdp
from torchtrain.parallelisms.parallel_dims import ParallelDims
from torchtrain.parallelisms.tensor_parallel import apply_tensor_parallel

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parallelize(model: Transformer, mesh: DeviceMesh, dims: ParallelDims, config: JobConfig) -> None:
    """Apply every technique the config asks for, in place, from the innermost to the outermost.

    Tensor and context parallelism change what a block computes on a rank, recomputation of chosen operations wraps its
    forward, compilation traces all of that, recomputation of whole blocks and FSDP's hooks go around.
    """
    parallelism = config.parallelism
    param_dtype = DTYPES[config.training.mixed_precision_param]
    if needs_emulation(mesh.device_type, param_dtype):
        logger.info("bf16: this processor has no bf16 products; they run in fp32 on bf16 values, rounded as there")
        apply_emulated_bf16(model)
    if dims.tp > 1:
        apply_tensor_parallel(
            model,
            mesh["tp"],
            sequence_parallel=not parallelism.disable_sequence_parallel,
            loss_parallel=not parallelism.disable_loss_parallel,
            async_tp=parallelism.enable_async_tensor_parallel,
        )
    if dims.cp > 1:
        apply_context_parallel(
            model,
            mesh["cp"],
            method=parallelism.context_parallel_method,
            rotate=parallelism.context_parallel_rotate_method,
            load_balancer=parallelism.context_parallel_load_balancer,
        )
    apply_within_blocks(model, config.activation_checkpoint)
    if config.compile.enable and "model" in config.compile.components:
        apply_compile(model, config.compile.backend)
    apply_around_blocks(model, config.activation_checkpoint)
    apply_fsdp(
        model,
        dims.fsdp_mesh(mesh),
        param_dtype=param_dtype,
        reduce_dtype=DTYPES[config.training.mixed_precision_reduce],
        reshard_after_forward=parallelism.fsdp_reshard_after_forward,
        cpu_offload=config.training.enable_cpu_offload,
    )
