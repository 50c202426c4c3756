"""What the options of a run need beside what every run has: packages, a key, folders, kernels.

It is looked for before the run's folder is made and before a checkpoint is read, unless the run is
finished and needs nothing. (What a data source or a tokenizer needs is known where it is opened,
before anything is tokenized.)
"""

import os
import shutil
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from torchtrain.catalog.optimizers import find_optimizer
from torchtrain.config.plans import list_output_folders
from torchtrain.config.schema import Config
from torchtrain.config_manager import JobConfig
from torchtrain.errors import UserError
from torchtrain.exporting import check_export
from torchtrain.kernel_checks import check_kernels, find_device_facts
from torchtrain.log_files import check_packages
from torchtrain.logging_utils import logger
from torchtrain.models.decoder import load_decoder
from torchtrain.profiling import check_snapshots
from torchtrain.ranks import together
from torchtrain.utils import load_attribute, require_package

DARWIN = sys.platform == "darwin"


def check_needs(config: JobConfig, device: torch.device) -> None:
    """Check that all is there that the options ask for. A collective call.

    Raises:
        UserError: something is missing, on this rank.
        PeerFault: on another one.
    """

    def check() -> None:
        check_kernels(config, find_device_facts(device))
        load_decoder(config.model.name)
        load_attribute(
            find_optimizer(config.optimizer.name), f"optimizer.name = {config.optimizer.name!r}"
        )
        check_snapshots(config.profiling, device)
        check_compilers(config, device)
        if dist.get_rank() == 0:
            check_folders(config)
            check_packages(config.metrics)

    together(check)
    check_export(config)


def check_compilers(config: Config, device: torch.device) -> None:
    """Check that there is what PyTorch's compiler needs itself: a compiler of C++, or of C.

    On a CPU it refuses to work without one, even with every kernel in its cache. Triton, which
    writes kernels for a GPU, needs its own only for a kernel that is not there yet.

    Raises:
        UserError: there is none, or no Triton for a GPU.
    """
    compiled = config.compile
    asked_by = []
    if compiled.enable and compiled.components and compiled.backend == "inductor":
        asked_by.append("compile.enable = true")
    if device.type != "cpu" and config.training.document_masking:  # FlexAttention
        asked_by.append("training.document_masking = true")
    for option in asked_by:
        if device.type == "cpu":
            lack = _describe_lack("C++", "CXX", ["clang++" if DARWIN else "g++"])
            if lack is not None:
                raise UserError(f"{option} {lack}")
        else:
            require_package("triton", option)
            lack = _describe_lack("C", "CC", ["gcc", "clang"])
            if lack is not None and os.environ.get("LOCAL_RANK", "0") == "0":
                logger.warning(f"{option} {lack}. Only kernels in Triton's cache can be used")


def _describe_lack(language: str, variable: str, usual: list[str]) -> str | None:
    """Return that a compiler is missing, and what to do, or None."""
    names = [os.environ[variable]] if variable in os.environ else usual
    if any(shutil.which(name) for name in names):
        return None
    return (
        f"needs a compiler of {language}, and there is no {' or '.join(names)}: "
        f"install one, or name another in {variable}"
    )


def check_folders(config: Config) -> None:
    """Check that the folders outside the run's own can be written; none is made.

    Raises:
        UserError: one cannot be made, or not be written.
    """
    is_used = {
        "profiling.save_traces_folder": config.profiling.enable_profiling,
        "profiling.save_memory_snapshot_folder": config.profiling.enable_memory_snapshot,
        "metrics.save_tb_folder": config.metrics.enable_tensorboard,
        "checkpoint.folder": config.checkpoint.enable and not config.checkpoint.load_only,
    }
    for key, folder in list_output_folders(config).items():
        if folder.is_absolute() and is_used[key]:
            _require_writable(folder, f"{key} = {str(folder)!r}")


def _require_writable(folder: Path, given: str) -> None:
    # Not `Path.exists`, which raises where a folder above is closed.
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not os.path.isdir(there):
        raise UserError(f"{given} cannot be written: {str(there)!r} is not a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{given} cannot be written: nothing can be made in {str(there)!r}")
