"""The one place that fixes the order in which the techniques are applied."""

import torch
from torch.distributed.device_mesh import DeviceMesh

from torchtrain.config_manager import JobConfig
from torchtrain.logging_utils import logger
from torchtrain.models.llama import Transformer
from torchtrain.parallelisms.activation_checkpoint import apply_activation_checkpoint
from torchtrain.parallelisms.compile import apply_compile
from torchtrain.parallelisms.emulated_bf16 import apply_emulated_bf16, needs_emulation
from torchtrain.parallelisms.fsdp import apply_fsdp

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def parallelize(model: Transformer, mesh: DeviceMesh, config: JobConfig) -> None:
    """Apply every technique the config asks for, in place, from the innermost to the outermost.

    Recomputation wraps a block's forward, compilation traces the recomputation with it, and FSDP's hooks go around
    the compiled block.
    """
    param_dtype = DTYPES[config.training.mixed_precision_param]
    if needs_emulation(mesh.device_type, param_dtype):
        logger.info("bf16: this processor has no bf16 products; they run in fp32 on bf16 values, rounded as there")
        apply_emulated_bf16(model)
    if config.activation_checkpoint.mode == "full":
        apply_activation_checkpoint(model)
    if config.compile.enable and "model" in config.compile.components:
        apply_compile(model, config.compile.backend)
    apply_fsdp(
        model,
        mesh,
        param_dtype=param_dtype,
        reduce_dtype=DTYPES[config.training.mixed_precision_reduce],
        reshard_after_forward=config.parallelism.fsdp_reshard_after_forward,
    )
