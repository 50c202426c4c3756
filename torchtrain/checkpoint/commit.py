"""What makes a folder a checkpoint: the marker, and what it says of the other files."""

import itertools
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from torchtrain.checkpoint.digests import (
    DIGESTS,
    FORMAT,
    FileRecord,
    is_record,
    make_record,
    new_hasher,
)
from torchtrain.errors import CheckpointError, UserError
from torchtrain.logging_utils import logger
from torchtrain.utils import fsync_folder, remove_if_possible, user_errors, write_durably

MARKER = "complete.json"
STATE = "train_state.json"
INDEX = ".metadata"
TEMPORARY = ".tmp-"
"""What begins so is unfinished or being removed, and is swept at the next start or save."""
OLD_PROBE = "..tmp-probe-"
"""What earlier versions left when they were killed at their start."""


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
    guard: dict[str, Any] | None = None
    """Which steps were skipped, and what decides whether the next are; None in old checkpoints."""
    model_only: bool = False
    """Whether the checkpoint holds the weights alone, so that no run goes on from it."""

    @property
    def has_skips(self) -> bool:
        """Whether steps were skipped: where all were, the optimizer has no state yet."""
        return self.guard is not None and self.guard["skipped"] > 0


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint that was verified whole and is to be loaded."""

    path: Path
    progress: Progress
    """As saved; with `model_only` the run takes only the weights and starts at step 0."""
    model_only: bool
    marker: Marker
    left_out: tuple[str, ...] = ()
    """What of it is not loaded (`checkpoint.exclude_from_loading`)."""


Check = tuple[Callable[[Any], bool], str]
"""Whether the value of an entry can be right, and what it must be, in words."""


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_table(value: Any) -> bool:
    return isinstance(value, dict)


def _is_config(value: Any) -> bool:
    return _is_table(value) and all(map(_is_table, value.values()))


def _are_records(value: Any, file_format: int) -> bool:
    """Check the files of a marker: names without a folder, and a record of each."""
    return (
        _is_table(value)
        and {STATE, INDEX} <= value.keys()
        and all(Path(name).name == name for name in value)
        and all(is_record(record, file_format) for record in value.values())
    )


def _is_guard(value: Any) -> bool:
    """Check what `bad_numbers.StepGuard` has saved; old checkpoints have nothing of it."""
    return value is None or (
        _is_table(value)
        and value.keys() == {"skipped", "in_a_row", "recent"}
        and _is_count(value["skipped"])
        and _is_count(value["in_a_row"])
        and isinstance(value["recent"], list)
    )


def _is_format(value: Any) -> bool:
    return type(value) is int and value in DIGESTS


MARKER_FIELDS: dict[str, Check] = {
    "format": (_is_format, f"a number from 1 to {FORMAT}"),
    "step": (_is_count, "a number of steps"),
    "world_size": (lambda value: _is_count(value) and value > 0, "a number of ranks"),
    "torch": (lambda value: isinstance(value, str), "a version"),
}


def list_marker_fields(version: Any) -> dict[str, Check]:
    """Return what a marker holds, whose format may be damaged."""
    file_format = version if _is_format(version) else FORMAT
    words = "the sizes and digests of a checkpoint's files"
    return MARKER_FIELDS | {"files": (partial(_are_records, file_format=file_format), words)}


STATE_FIELDS: dict[str, Check] = {
    "step": (_is_count, "a number of steps"),
    "tokens_seen": (_is_count, "a number of tokens"),
    "data": (_is_table, "a JSON object"),
    "config": (_is_config, "keys by section"),
    "shape": (lambda value: value is None or _is_table(value), "a JSON object"),
    "guard": (_is_guard, "counts of skipped steps and recent losses and norms"),
    "model_only": (lambda value: isinstance(value, bool), "true or false"),
}


def commit(temporary: Path, target: Path, progress: Progress, files: dict[str, FileRecord]) -> None:
    """Add what rank 0 alone writes to the `files`, the marker last, and rename.

    The other files are synced already.

    Raises:
        CheckpointError: rank 0 does not see what another rank wrote.
    """
    state = json.dumps(asdict(progress), indent=2)
    hasher = new_hasher()
    hasher.update(state.encode())
    files[STATE] = make_record(len(state.encode()), hasher)
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


def inspect(path: Path, step: int | None = None) -> Marker | str:
    """Return the marker of a checkpoint whose files all have the right size, else what is wrong.

    Args:
        path: of its folder.
        step: the one that it must be of; None: any.

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
    content = _read_object(path / MARKER)
    version = content.get("format") if isinstance(content, dict) else None
    if type(version) is int and version > FORMAT:
        raise UserError(
            f"{path} has format {version}; this version of torchtrain reads formats up to {FORMAT}"
        )
    fault = _find_fault(content, Marker, list_marker_fields(version))
    if fault is not None:
        return f"its {MARKER} is damaged: {fault}"
    marker = Marker(**content)
    if step is not None and marker.step != step:
        return f"its {MARKER} is damaged: it is of step {marker.step}"
    return _find_resized(path, marker.files) or marker


def _read_object(path: Path) -> Any:
    """Return what is in a JSON file; where it is not JSON, a text that says what is wrong.

    Raises:
        UserError: it cannot be read.
    """
    with user_errors(f"{path} cannot be read", OSError):
        text = path.read_bytes()
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as fault:
        return f"{type(fault).__name__}: {fault}"


def _find_fault(content: Any, kind: type, checks: Mapping[str, Check]) -> str | None:
    """Say what of a JSON object is missing, unknown or of a wrong type, if anything.

    Args:
        content: from `_read_object`.
        kind: the dataclass that it is to become; only its fields without a default, and the format,
            must be there.
        checks: what their values must be.
    """
    if not isinstance(content, dict):
        return content if isinstance(content, str) else "it is not a JSON object"
    needed = {field.name for field in fields(kind) if field.default is MISSING}
    needed |= checks.keys() & {"format"}
    for name in sorted(needed - content.keys()):
        return f"it has no {name}"
    for name in sorted(content.keys() - checks.keys()):
        return f"it has an unknown entry {name!r}"
    for name, value in content.items():
        is_right, words = checks[name]
        if not is_right(value):
            return f"its entry {name!r} is not {words}"
    return None


def _find_resized(path: Path, files: dict[str, FileRecord]) -> str | None:
    """Say which file is missing or has another size, if any."""
    for name, record in files.items():
        if not (path / name).is_file():
            return f"its file {name} is missing"
        found = (path / name).stat().st_size
        if found != record["bytes"]:
            return f"its file {name} has {found} bytes instead of {record['bytes']}"
    return None


def read_progress(path: Path, marker: Marker) -> Progress | str:
    """Return train_state.json of the checkpoint at `path`, or what is wrong with it.

    Raises:
        UserError: a later version of torchtrain wrote it.
    """
    content = _read_object(path / STATE)
    unknown = sorted(content.keys() - STATE_FIELDS.keys()) if isinstance(content, dict) else []
    if unknown:  # its digest was right
        raise UserError(
            f"{path / STATE} has {', '.join(unknown)}, which this version of torchtrain does not "
            "know: a later one wrote it"
        )
    fault = _find_fault(content, Progress, STATE_FIELDS)
    if fault is not None:
        return f"its {STATE} is damaged: {fault}"
    if content["step"] != marker.step:
        return f"its {STATE} is of step {content['step']}, and its {MARKER} of step {marker.step}"
    return Progress(**content)


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
