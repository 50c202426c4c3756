"""Which device a rank trains on, and why a GPU that is there is not used."""

import os
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from torchtrain.errors import UserError
from torchtrain.utils import first_few, plural

DEVICE_FILES = Path("/dev")
"""Where the drivers of GPUs put a file for each."""

VISIBLE_DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
"""Environment variables that choose among a machine's GPUs."""

NO_DEVICES = ("", "-1", "NoDevFiles")
"""What they are set to where no GPU is to be seen; the last one by Slurm."""


def usable_accelerator() -> str | None:
    """Return the type of this machine's accelerator, or None: train on the CPU.

    Training can use one that has a communication backend of its own, such as NCCL. (Apple's GPUs
    have none, and no fp64.)
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # why there is none: `describe_unused_gpus` says it, once
        accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return None
    backend = dist.Backend.default_device_backend_map.get(accelerator.type, "gloo")
    return None if backend == "gloo" else accelerator.type


def describe_unused_gpus() -> str | None:
    """Say which GPUs of this machine PyTorch cannot use, and why.

    Call it where there is no usable accelerator.

    Returns:
        One line, or None: the machine has no GPU, or all are hidden by CUDA_VISIBLE_DEVICES= or the
        like, on purpose.
    """
    if any(os.environ.get(name) in NO_DEVICES for name in VISIBLE_DEVICES):
        return None
    pattern = "kfd" if torch.version.hip else "nvidia[0-9]*"
    files = sorted(map(str, DEVICE_FILES.glob(pattern)))
    if not files:
        return None
    return (
        f"training on the CPU, since PyTorch cannot use {first_few(files)}: "
        f"{_find_cause(files)}. To train on the CPU on purpose, set CUDA_VISIBLE_DEVICES="
    )


def _find_cause(files: list[str]) -> str:
    """Say why PyTorch cannot use the GPUs with these device files."""
    accelerator = torch.accelerator.current_accelerator()
    if accelerator is None:
        return f"torch {torch.__version__} is a build without GPUs"
    if not any(os.access(file, os.R_OK | os.W_OK) for file in files):
        return "no permission to read and write them"
    try:
        torch.get_device_module(accelerator).init()
    except RuntimeError as fault:
        return str(fault).splitlines()[0].rstrip(".")
    return "it does not say why"


def choose_device(accelerator: str | None) -> torch.device:
    """Return the device of this rank: the accelerator that its LOCAL_RANK names, or the CPU.

    A launcher such as srun can let each rank see one accelerator alone, which is then its own.
    (Ranks that torchrun starts all see the same ones.)

    Args:
        accelerator: the type of the machine's, or None.

    Raises:
        UserError: the rank sees too few, or many without a LOCAL_RANK to choose.
    """
    if accelerator is None:
        return torch.device("cpu")
    visible = torch.accelerator.device_count()
    if visible == 1 and not dist.is_torchelastic_launched():
        return torch.device(accelerator, 0)
    if "LOCAL_RANK" not in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            f"LOCAL_RANK is not set, but this rank sees {plural(visible, 'accelerator')}, as "
            "others on its node may: set it to the number of this rank on its node, or let each "
            "rank see one of its own alone"
        )
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= visible:
        raise UserError(
            f"LOCAL_RANK = {local_rank}, but this rank sees {plural(visible, 'accelerator')}: "
            "start no more ranks on a node than it has, or let each rank see one of its own alone"
        )
    return torch.device(accelerator, local_rank)
