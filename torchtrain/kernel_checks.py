"""What a config asks of the kernels of a device: the config check itself knows no device.

The limits are those of PyTorch's kernels for GPUs: FlexAttention's, in
torch/_inductor/kernel/flex/flex_attention.py; flash attention's and memory-efficient attention's,
in aten/src/ATen/native/transformers/cuda/sdp_utils.cpp; the compiler's, in
torch/_inductor/compile_fx.py; float8's, in aten/src/ATen/native/cuda/ScaledBlas.cpp.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from torchtrain.config.model_checks import describe_head_width
from torchtrain.config.plans import plan_shape
from torchtrain.config.schema import Config
from torchtrain.errors import UserError
from torchtrain.logging_utils import logger
from torchtrain.utils import import_package, require_package

LEAST_MASKED_WIDTH = 16
LARGEST_FLASH_WIDTH = 256
ASKS_FOR_FLOAT8 = 'model.converters = ["quantize.linear.float8"]'
RING_MULTIPLES = {"bfloat16": 8, "float32": 4}
"""What a head width must be a multiple of, by compute precision."""


@dataclass(frozen=True)
class DeviceFacts:
    """What decides which kernels a device has."""

    type: str
    """Such as "cpu" or "cuda"."""
    name: str
    """The maker's."""
    has_bf16: bool
    """Whether it computes in bf16 by itself; else PyTorch emulates some of it."""
    has_float8: bool = False
    """Whether it multiplies matrices in float8."""


def find_device_facts(device: torch.device) -> DeviceFacts:
    """Return the facts of a rank's device."""
    if device.type == "cpu":
        name = f"CPU with {torch.backends.cpu.get_cpu_capability()}"
        return DeviceFacts(type="cpu", name=name, has_bf16=True)  # see emulated_bf16.py
    module = torch.get_device_module(device)
    least = (9, 4) if torch.version.hip else (8, 9)
    return DeviceFacts(
        type=device.type,
        name=module.get_device_name(device),
        has_bf16=module.is_bf16_supported(including_emulation=False),
        has_float8=device.type == "cuda" and module.get_device_capability(device) >= least,
    )


def check_kernels(config: Config, facts: DeviceFacts) -> None:
    """Check that the device has the kernels that the config asks for; warn of slow ones.

    Raises:
        UserError: it lacks some; all of them, one per line.
    """
    faults = list(_check_float8(config, facts))
    if facts.type != "cpu":
        faults += _check_gpu_kernels(config, facts)
    if faults:
        raise UserError("\n".join(faults))


def _check_gpu_kernels(config: Config, facts: DeviceFacts) -> list[str]:
    return [
        *_check_masks(config, facts),
        *_check_ring(config, facts),
        *_check_precision(config, facts),
    ]


def import_float8() -> Any:
    """Return torchao's module for float8.

    Raises:
        UserError: it cannot be imported.
    """
    require_package("torchao", ASKS_FOR_FLOAT8)
    # Each is a warning as it is imported: that kernels do not load which training does not use,
    # and what it should no longer call.
    with _only_errors("torchao", "torch.utils._pytree"):
        return import_package("torchao.float8", ASKS_FOR_FLOAT8)


@contextmanager
def _only_errors(*names: str) -> Iterator[None]:
    """Keep these loggers' warnings from the screen inside the context."""
    levels = {each: each.level for each in map(logging.getLogger, names)}
    for each in levels:
        each.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for each, level in levels.items():
            each.setLevel(level)


def _check_float8(config: Config, facts: DeviceFacts) -> Iterator[str]:
    """Yield why linear layers cannot compute in float8; warn where they are slower for it."""
    if not config.model.converters:
        return
    import_float8()
    if config.quantize_linear_float8.emulate:
        return
    if not facts.has_float8:
        yield (
            f"{ASKS_FOR_FLOAT8}: {facts.name} has no float8, which NVIDIA's cards have from "
            "compute capability 8.9 on, AMD's from 9.4 on; set model.converters = [], or, to try "
            "it out, quantize.linear.float8.emulate = true"
        )
    elif not (config.compile.enable and "model" in config.compile.components):
        logger.warning(
            "float8 without compile.enable: casts to float8 run by themselves, and cost more time "
            "than the products save"
        )


def _check_masks(config: Config, facts: DeviceFacts) -> Iterator[str]:
    """Yield what FlexAttention, which masks documents, cannot compute."""
    shape = plan_shape(config.model)
    if config.training.document_masking and shape.width_per_head < LEAST_MASKED_WIDTH:
        yield (
            f"training.document_masking = true: {describe_head_width(shape)}, and on a GPU "
            f"({facts.name}) the heads must be at least {LEAST_MASKED_WIDTH} wide; set "
            "model.head_width or model.n_heads, or train without masks"
        )


def _check_ring(config: Config, facts: DeviceFacts) -> Iterator[str]:
    """Yield what the kernels of ring attention cannot compute.

    (The plain kernel's limits do not matter: PyTorch pads its heads, or takes another.)
    """
    if not _has_ring(config):
        return
    shape = plan_shape(config.model)
    precision = config.training.mixed_precision_param
    multiple = RING_MULTIPLES[precision]
    allowed = f"a multiple of {multiple}"
    is_allowed = shape.width_per_head % multiple == 0
    if precision == "bfloat16":
        allowed += f" and at most {LARGEST_FLASH_WIDTH}"
        is_allowed = is_allowed and shape.width_per_head <= LARGEST_FLASH_WIDTH
    if not is_allowed:
        degree = config.parallelism.context_parallel_degree
        yield (
            f"parallelism.context_parallel_degree = {degree}: {describe_head_width(shape)}, and "
            f"on a GPU ({facts.name}) ring attention in {precision} needs {allowed}; set "
            'parallelism.context_parallel_method = "ulysses", or another head width'
        )


def _check_precision(config: Config, facts: DeviceFacts) -> Iterator[str]:
    """Yield what does not work with emulated bf16; warn where everything does, but slowly."""
    if config.training.mixed_precision_param != "bfloat16" or facts.has_bf16:
        return
    compiled = config.compile
    users = []
    if compiled.enable and "model" in compiled.components and compiled.backend == "inductor":
        users.append("compile.enable = true")
    if _has_ring(config):
        users.append('parallelism.context_parallel_method = "ring"')
    given = f'training.mixed_precision_param = "bfloat16": {facts.name} has no bf16'
    advice = 'training.mixed_precision_param = "float32"'
    for user in users:
        yield f"{given}, which {user} needs; set {advice}"
    if not users:
        logger.warning(
            f"{given}: products are emulated, and attention holds the scores of all pairs of "
            f"positions; {advice} avoids both"
        )


def _has_ring(config: Config) -> bool:
    """Check whether attention goes around a ring of ranks."""
    parallelism = config.parallelism
    return parallelism.context_parallel_degree > 1 and parallelism.context_parallel_method == "ring"
