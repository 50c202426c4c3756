"""What makes a folder a checkpoint: the marker, and what it says of the other files."""

import hashlib
import itertools
import json
import os
import shutil
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypedDict

import torch
import torch.distributed as dist

from torchtrain.errors import CheckpointError, UserError
from torchtrain.logging_utils import logger
from torchtrain.utils import fsync_folder, remove_if_possible, user_errors, write_durably

FORMAT = 1
MARKER = "complete.json"
STATE = "train_state.json"
INDEX = ".metadata"
TEMPORARY = ".tmp-"
"""What begins so is unfinished or being removed, and is swept at the next start or save."""
OLD_PROBE = "..tmp-probe-"
"""What earlier versions left when they were killed at their start."""


class FileRecord(TypedDict):
    """What the marker says of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Marker:
    """The content of complete.json."""

    step: int
    world_size: int
    """Number of ranks that saved it."""
    torch: str
    """Version of torch that saved it."""
    files: dict[str, FileRecord]
    """By file name."""
    format: int = FORMAT


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The state of a run beside tensors, train_state.json. JSON must hold all of it."""

    step: int
    """Optimizer steps taken."""
    tokens_seen: int
    """Tokens of all ranks so far."""
    data: dict[str, Any]
    """The data state: sample position and fingerprints."""
    config: dict[str, Any]
    """The resolved config by section, to be compared with the next launch's."""
    shape: dict[str, Any] | None = None
    """The resolved shape of the model; None in old checkpoints, whose config tells it."""
    model_only: bool = False
    """Whether the checkpoint holds the weights alone, so that no run goes on from it."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint that was verified whole and is to be loaded."""

    path: Path
    progress: Progress
    """As saved; with `model_only` the run takes only the weights and starts at step 0."""
    model_only: bool
    marker: Marker


def commit(temporary: Path, target: Path, progress: Progress, files: dict[str, FileRecord]) -> None:
    """Add what rank 0 alone writes to the `files`, the marker last, and rename.

    The other files are synced already.

    Raises:
        CheckpointError: rank 0 does not see what another rank wrote.
    """
    state = json.dumps(asdict(progress), indent=2)
    digest = hashlib.sha256(state.encode()).hexdigest()
    files[STATE] = {"bytes": len(state.encode()), "sha256": digest}
    write_durably(temporary / STATE, state)  # which syncs the folder, so all names in it
    for name, record in files.items():
        path = temporary / name
        size = path.stat().st_size if path.exists() else None
        if size != record["bytes"]:
            raise CheckpointError(
                f"{name} was written with {record['bytes']} bytes, but rank 0 finds "
                f"{size or 'nothing'}: is {target.parent} on a file system that all ranks share?"
            )
    marker = Marker(
        step=progress.step,
        world_size=dist.get_world_size(),
        torch=torch.__version__,
        files=files,
    )
    write_durably(temporary / MARKER, json.dumps(asdict(marker), indent=2))
    os.rename(temporary, target)
    fsync_folder(target.parent)


def inspect(path: Path) -> Marker | str:
    """Return the marker of a checkpoint whose files all have the right size, else what is wrong.

    Raises:
        UserError: a later version of torchtrain or another program wrote it, so nothing can be
            said about it.
    """
    if not path.is_dir():
        return "it is not there"
    if not (path / MARKER).exists():
        if (path / INDEX).exists() and not (path / STATE).exists():
            raise UserError(
                f"{path} is not a torchtrain checkpoint: it has {INDEX}, the index of torch's "
                f"distributed checkpoints, but neither {STATE} nor {MARKER}. torchtitan's "
                "checkpoints look like this: a new run takes the weights of one by "
                "checkpoint.initial_load_path"
            )
        return f"it has no {MARKER}, so it was never finished or is half removed"
    try:
        content = json.loads((path / MARKER).read_text(encoding="utf-8"))
        version = content["format"]
        sizes = {
            name: int(record["bytes"])
            for name, record in content["files"].items()
            if record["sha256"]
        }
        marker = Marker(**content) if version == FORMAT else None
    except (ValueError, TypeError, KeyError, AttributeError) as fault:
        return f"its {MARKER} is damaged ({type(fault).__name__}: {fault})"
    if marker is None:
        raise UserError(
            f"{path} has format {version}; this version of torchtrain reads format {FORMAT}"
        )
    if not {STATE, INDEX} <= sizes.keys() or any(Path(name).name != name for name in sizes):
        return f"its {MARKER} is damaged: it does not name the files of a checkpoint"
    return _find_resized(path, sizes) or marker


def _find_resized(path: Path, sizes: dict[str, int]) -> str | None:
    """Say which file is missing or has another size, if any."""
    for name, size in sizes.items():
        if not (path / name).is_file():
            return f"its file {name} is missing"
        found = (path / name).stat().st_size
        if found != size:
            return f"its file {name} has {found} bytes instead of {size}"
    return None


def find_altered(path: Path, names: Iterable[str], marker: Marker) -> str | None:
    """Hash these files, and say which is not what was written, if any."""
    for name in names:
        digest = hashlib.sha256()
        with open(path / name, "rb") as file:
            while chunk := file.read(2**22):
                digest.update(chunk)
        if digest.hexdigest() != marker.files[name]["sha256"]:
            return f"its file {name} is damaged: its SHA-256 is not the one it was written with"
    return None


def read_progress(path: Path) -> Progress:
    """Read train_state.json of the checkpoint at `path`.

    Raises:
        UserError: it is not what torchtrain writes.
    """
    with user_errors(f"{path / STATE} is not what torchtrain writes", ValueError, TypeError):
        return Progress(**json.loads((path / STATE).read_text(encoding="utf-8")))


def set_aside(path: Path, word: str) -> Path:
    """Rename to `step-N.<word>`, with a number where that is taken: no checkpoint's name."""
    for number in itertools.count(1):
        suffix = f"-{number}" if number > 1 else ""
        target = path.with_name(f"{path.name}.{word}{suffix}")
        if not target.exists():
            break
    path.rename(target)
    fsync_folder(path.parent)
    return target


def set_aside_unusable(path: Path, fault: str) -> None:
    """Rename a checkpoint that cannot be used, and warn."""
    target = set_aside(path, "damaged" if (path / MARKER).exists() else "incomplete")
    logger.warning(f"the checkpoint {path} is not usable and was renamed to {target.name}: {fault}")


def remove(path: Path) -> None:
    """Remove a checkpoint.

    It loses its name at once, by a rename that is synced before anything in it is deleted: a crash
    at any instant leaves it whole, or something to sweep.
    """
    doomed = path.with_name(f"{TEMPORARY}removed-{path.name}-{uuid.uuid4().hex}")
    os.rename(path, doomed)
    fsync_folder(path.parent)
    shutil.rmtree(doomed)


def sweep(folder: Path) -> None:
    """Remove what dead runs left unfinished; what cannot be removed now is left for later."""
    for leftover in [*folder.glob(f"{TEMPORARY}*"), *folder.glob(f"{OLD_PROBE}*")]:
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            remove_if_possible(leftover)
