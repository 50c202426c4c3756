"""The machine that the smoke run ran on, as an issue must name it."""

import platform
import subprocess
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch
from helpers.launching import ROOT

import torchtrain
from torchtrain.tools.bench.machine import describe_machine as describe_cpu


def describe_machine(device: str) -> list[str]:
    """Return lines that name the commit, the devices, the driver and the versions."""
    lines = [f"torchtrain {torchtrain.__version__} ({find_commit()}), device {device}"]
    if device == "cpu":
        return [*lines, describe_cpu("cpu")]
    for index in range(torch.cuda.device_count()):
        card = torch.cuda.get_device_properties(index)
        lines.append(
            f"device {index}: {card.name}, {card.total_memory / 2**30:.1f} GiB, capability "
            f"{card.major}.{card.minor}, {card.multi_processor_count} multiprocessors"
        )
    return [*lines, ", ".join(f"{name} {value}" for name, value in find_versions().items())]


def find_versions() -> dict[str, str]:
    """Return the versions of what a run on CUDA is made of."""
    versions = {
        "driver": find_driver(),
        "torch": torch.__version__,
        "CUDA": str(torch.version.cuda or torch.version.hip),
        "cuDNN": str(torch.backends.cudnn.version()),
        "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
        "Triton": "none",
        "Python": platform.python_version(),
    }
    with suppress(PackageNotFoundError):
        versions["Triton"] = version("triton")
    return versions


def find_driver() -> str:
    """Return the driver's version, as nvidia-smi says it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    with suppress(OSError, subprocess.SubprocessError):
        said = subprocess.check_output(query, text=True, timeout=60)
        return ", ".join(sorted(set(said.split())))
    return "unknown"


def find_commit() -> str:
    """Return the checkout's commit, and whether files differ from it."""
    try:
        said = subprocess.check_output(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, text=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return "no git checkout"
    return said.strip()
