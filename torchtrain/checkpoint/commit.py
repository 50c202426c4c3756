"""What makes a folder a checkpoint: the marker, and what it says of the other files."""

import itertools
import json
import os
import re
import shutil
import uuid
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
import torch.distributed as dist
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from torchtrain.checkpoint.digests import FORMAT, FileRecord, is_record, make_record, new_hasher
from torchtrain.config.schema import Checkpoint
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
FILES = "the sizes and digests of a checkpoint's files"
GUARD = "counts of skipped steps and recent losses and norms"
Count = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]


class Content(BaseModel):
    """A JSON object of strict types; a field's description says what it must be, in messages."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


T = TypeVar("T", bound=Content)


class Marker(Content):
    """The content of complete.json."""

    step: Annotated[Count, Field(description="a number of steps")]
    world_size: Annotated[int, Field(ge=1, description="a number of ranks")]
    """Number of ranks that saved it."""
    torch: Annotated[str, Field(description="a version")]
    """Version of torch that saved it."""
    files: Annotated[dict[str, FileRecord], Field(description=FILES)]
    """By file name."""
    format: Annotated[int, Field(ge=1, le=FORMAT, description=f"a number from 1 to {FORMAT}")]


class GuardState(Content):
    """What `bad_numbers.StepGuard` has saved."""

    skipped: Count
    in_a_row: Count
    recent: list[Any]


class Progress(Content):
    """The state of a run beside tensors, train_state.json. JSON must hold all of it."""

    step: Annotated[Count, Field(description="a number of steps")]
    """Optimizer steps taken."""
    tokens_seen: Annotated[Count, Field(description="a number of tokens")]
    """Tokens of all ranks so far."""
    data: Annotated[dict[str, Any], Field(description="a JSON object")]
    """The data state: sample position and fingerprints."""
    config: Annotated[dict[str, dict[str, Any]], Field(description="keys by section")]
    """The resolved config by section, to be compared with the next launch's."""
    shape: Annotated[dict[str, Any] | None, Field(description="a JSON object")] = None
    """The resolved shape of the model; None in old checkpoints, whose config tells it."""
    guard: Annotated[GuardState | None, Field(description=GUARD)] = None
    """Which steps were skipped, and what decides whether the next are; None in old checkpoints."""
    steps: Annotated[Count | None, Field(description="a number of steps")] = None
    """Steps of the whole run, as planned; None in old checkpoints, whose config tells it."""
    max_lr: Annotated[Rate | None, Field(description="a learning rate")] = None
    """The largest learning rate; None in old checkpoints, whose config tells it."""
    model_only: Annotated[bool, Field(description="true or false")] = False
    """Whether the checkpoint holds the weights alone, so that no run goes on from it."""

    @property
    def has_skips(self) -> bool:
        """Whether steps were skipped: where all were, the optimizer has no state yet."""
        return self.guard is not None and self.guard.skipped > 0


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


def commit(temporary: Path, target: Path, progress: Progress, files: dict[str, FileRecord]) -> None:
    """Add what rank 0 alone writes to the `files`, the marker last, and rename.

    The other files are synced already.

    Raises:
        CheckpointError: rank 0 does not see what another rank wrote.
    """
    state = json.dumps(progress.model_dump(), indent=2)
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
        format=FORMAT,
    )
    write_durably(temporary / MARKER, json.dumps(marker.model_dump(), indent=2))
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
    marker = _parse(content, Marker)
    if isinstance(marker, Marker) and not _are_records(marker):
        marker = f"its entry 'files' is not {FILES}"
    if isinstance(marker, str):
        return f"its {MARKER} is damaged: {marker}"
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


def _parse(content: Any, kind: type[T]) -> T | str:
    """Return a JSON object as this kind, or what of it is missing, unknown or wrong.

    Args:
        content: from `_read_object`.
        kind: only its fields without a default must be there.
    """
    if not isinstance(content, dict):
        return content if isinstance(content, str) else "it is not a JSON object"
    known = kind.model_fields
    needed = {name for name, field in known.items() if field.is_required()}
    for name in sorted(needed - content.keys()):
        return f"it has no {name}"
    for name in sorted(content.keys() - known.keys()):
        return f"it has an unknown entry {name!r}"
    try:
        return kind(**content)
    except ValidationError as fault:
        wrong = {each["loc"][0] for each in fault.errors()}
        name = next(name for name in content if name in wrong)
        return f"its entry {name!r} is not {known[name].description}"


def _are_records(marker: Marker) -> bool:
    """Check the files of a marker: names without a folder, and a record of each."""
    return (
        {STATE, INDEX} <= marker.files.keys()
        and all(Path(name).name == name for name in marker.files)
        and all(is_record(record, marker.format) for record in marker.files.values())
    )


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
    known = Progress.model_fields.keys()
    unknown = sorted(content.keys() - known) if isinstance(content, dict) else []
    if unknown:  # its digest was right
        raise UserError(
            f"{path / STATE} has {', '.join(unknown)}, which this version of torchtrain does not "
            "know: a later one wrote it"
        )
    progress = _parse(content, Progress)
    if isinstance(progress, str):
        return f"its {STATE} is damaged: {progress}"
    if progress.step != marker.step:
        return f"its {STATE} is of step {progress.step}, and its {MARKER} of step {marker.step}"
    return progress


def list_steps(folder: Path) -> tuple[list[int], list[str]]:
    """Return the steps that have a folder, newest first, and all names, those set aside too."""
    names = sorted(path.name for path in folder.glob("step-*"))
    steps = [int(name[5:]) for name in names if re.fullmatch(r"step-(0|[1-9]\d*)", name)]
    return sorted(steps, reverse=True), names


def peek(config: Checkpoint, folder: Path) -> Progress | None:
    """Return what `Checkpointer.peek` does, without ranks.

    Args:
        config: the config's section.
        folder: of the run's checkpoints.
    """
    if not config.enable:
        return None
    newest = list_steps(folder)[0][:1]
    with suppress(UserError, OSError):  # `Checkpointer.find` says it
        for step in newest if config.load_step < 0 else [config.load_step]:
            path = folder / f"step-{step}"
            marker = inspect(path, step)
            if isinstance(marker, Marker):
                progress = read_progress(path, marker)
                return progress if isinstance(progress, Progress) else None
    return None


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
