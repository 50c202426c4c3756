"""The last checkpoint in Hugging Face's form too (`checkpoint.last_save_in_hf`).

The tool does it, in a process of its own on rank 0's host: it holds one file's tensors at a time,
whatever training has left in this one.
"""

import os
import subprocess
import sys
from pathlib import Path

import torchtrain
from torchtrain.catalog.models import TRANSFORMER, find_family
from torchtrain.config.plans import plan_shape
from torchtrain.config_manager import JobConfig
from torchtrain.errors import CheckpointError, UserError
from torchtrain.logging_utils import logger
from torchtrain.models.hf_config import find_architecture
from torchtrain.orphans import STARTED_BY
from torchtrain.ranks import on_rank_zero, patient_group, together
from torchtrain.utils import require_package, user_errors

HF_FOLDER = "hf"
"""In the checkpoint's folder: where that goes, it goes too."""

CONVERSION_NEEDS = {"tokenizers": "tokenizers", "google.protobuf": "protobuf"}
"""Packages by module; protobuf reads SentencePiece's models."""


def check_export(config: JobConfig) -> None:
    """Check, before training, that Hugging Face has a model that computes the same.

    Raises:
        UserError: it has none, or a package is missing that the conversion needs.
    """
    if not wants_export(config):
        return

    def check() -> None:
        for module, package in CONVERSION_NEEDS.items():
            require_package(module, "checkpoint.last_save_in_hf = true", package)
        with user_errors("checkpoint.last_save_in_hf = true", UserError):
            if find_family(config.model.name).model != TRANSFORMER:
                raise UserError(f"Hugging Face does not have the models of {config.model.name!r}")
            find_architecture(plan_shape(config.model))

    together(check)


def wants_export(config: JobConfig) -> bool:
    """Return whether the run ends with an export."""
    section = config.checkpoint
    return section.enable and section.last_save_in_hf and not section.load_only


def export_last(config: JobConfig, checkpoint: Path) -> None:
    """Convert the run's last checkpoint, unless that was done before. A collective call.

    Raises:
        UserError, CheckpointError: it failed; the checkpoint is complete nevertheless.
    """
    if wants_export(config):
        on_rank_zero(lambda: _convert(checkpoint, config.checkpoint.export_dtype), patient_group())


def _convert(checkpoint: Path, dtype: str | None) -> None:
    target = checkpoint / HF_FOLDER
    if target.exists():
        return
    package = Path(torchtrain.__file__).parents[1]
    command = [sys.executable, "-m", "torchtrain.tools.convert", "to-hf"]
    command += [str(checkpoint), str(target)]
    if dtype is not None:
        command += ["--dtype", dtype]
    paths = [str(package), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    environment[STARTED_BY] = str(os.getpid())  # a rank that is killed leaves no converter behind
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        kind = UserError if done.returncode == 2 else CheckpointError
        raise kind(
            f"{checkpoint} is complete, but could not be converted to Hugging Face's form: "
            f"{done.stderr.strip()}. When that is mended, start the run again, or "
            f"python -m torchtrain.tools.convert to-hf {checkpoint} FOLDER"
        )
    logger.info(done.stdout.strip())
