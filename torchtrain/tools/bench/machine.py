"""The machine that a benchmark runs on."""

import os
import platform
from pathlib import Path

import torch

from torchtrain.devices import usable_accelerator
from torchtrain.errors import UserError
from torchtrain.parallelisms.emulated_bf16 import needs_emulation
from torchtrain.utils import count_cores

TELLING_FLAGS = ("amx_bf16", "amx_tile", "avx512_bf16", "avx512f", "avx2")
"""Of /proc/cpuinfo: what a matrix product's speed depends on."""


def find_device(asked: str | None) -> str:
    """Return the device to measure, by default the accelerator where there is one.

    Raises:
        UserError: the one asked for is not here.
    """
    here = usable_accelerator()
    if asked is None:
        return here or "cpu"
    if asked not in ("cpu", here):
        raise UserError(f"--device {asked}: this machine has none that PyTorch can use")
    return asked


def choose_dtype(device: str) -> str:
    """Return the compute precision in which the device's matrix products are fastest."""
    return "float32" if needs_emulation(device, torch.bfloat16) else "bfloat16"


def describe_machine(device: str) -> str:
    """Name the machine, as a figure must to mean something."""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    if device != "cpu":
        return f"{torch.get_device_module(device).get_device_name()}, {versions}"
    name, flags = _read_cpu()
    threads = os.environ.get("OMP_NUM_THREADS")
    limited = "" if threads is None else f", OMP_NUM_THREADS={threads}"
    return f"{name} ({flags}), {count_cores()} cores{limited}, {versions}"


def _read_cpu() -> tuple[str, str]:
    """Return the processor's name and its telling flags (Linux)."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    facts = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    present = facts.get("flags", "").split()
    flags = [flag for flag in TELLING_FLAGS if flag in present]
    return facts.get("model name", platform.processor()), " ".join(flags) or "no such flags"
