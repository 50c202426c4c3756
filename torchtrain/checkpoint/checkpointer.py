"""Checkpoints: complete or not there, loadable on any layout, and nothing in them is ever executed.

A checkpoint is the folder `checkpoint/step-N`:

    __R_0.distcp        the tensors, or slices of them, that rank R wrote
    .metadata           the index of torch's distributed checkpoint (DCP): which slice of which tensor lies where
    train_state.json    what is no tensor: step, tokens seen, data state, resolved config
    complete.json       the marker: size and SHA-256 of every other file

Tensors are stored by name: `model/<parameter>`, `optimizer/<parameter>/<state>`, `rng/<rank>/<device type>`.

How a save commits. Everything goes into a fresh folder `.tmp-step-N-<random>`, hashed on its way to the disk and
synced; the marker is the last file; one rename to `step-N`, synced, is the commit. Since a rename is atomic, `step-N`
has its marker from its first instant, and a crash before leaves a `.tmp-` folder that nothing takes for a checkpoint.
Where a rename is not atomic (some network and object stores copy), or after half a copy by hand, the sizes and digests
in the marker tell. Removal goes the other way: the marker first, then the name, then the contents.

Why not DCP alone: it has no notion of complete, writes over a checkpoint in place, syncs a file before flushing it,
never syncs a folder, and its index is a pickle, which runs code when it is loaded. The digests find damage; they prove
nothing about who wrote the files, hence the restricted unpickler.
Source: https://docs.pytorch.org/docs/stable/distributed.checkpoint.html and the code of `torch.distributed.checkpoint`.
"""

import hashlib
import io
import itertools
import json
import os
import pickle
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.storage import WriteResult
from torch.optim import Optimizer

from torchtrain.config.schema import Checkpoint
from torchtrain.errors import CheckpointError, SharedUserError, UserError
from torchtrain.logging_utils import logger
from torchtrain.ranks import gathered, on_rank_zero, patient_group, together
from torchtrain.utils import expanded, fsync_folder, write_durably

FORMAT = 1
MARKER, STATE, INDEX = "complete.json", "train_state.json", ".metadata"
TEMPORARY = ".tmp-"  # whatever begins so is unfinished or being removed, and is swept at the next start or save

T = TypeVar("T")
Weights = Mapping[str, nn.Parameter]
"""Of a rank, by their names in the whole model, as sharded: what the optimizer updates. Tied ones come once."""


@dataclass(frozen=True)
class Progress:
    """What of a run is no tensor. Everything in it must survive a trip through JSON."""

    step: int
    """Optimizer steps taken."""
    tokens_seen: int
    """Tokens of all ranks up to here."""
    data: dict[str, Any]
    """The data state: sample position and fingerprints."""
    config: dict[str, Any]
    """The resolved config by section, to be compared with the next launch's."""


@dataclass(frozen=True)
class Marker:
    """The content of complete.json."""

    step: int
    world_size: int
    """Number of ranks that saved it."""
    torch: str
    """Version of torch that saved it."""
    files: dict[str, dict[str, Any]]
    """By file name: `bytes` and `sha256`."""
    format: int = FORMAT


@dataclass(frozen=True)
class Source:
    """A checkpoint that was verified whole and is to be loaded."""

    path: Path
    progress: Progress
    """As saved; with `model_only` the run takes the weights alone and starts at step 0."""
    model_only: bool
    marker: Marker


class Checkpointer:
    """Saves and loads the checkpoints of one run. All methods but `should_save` are called by all ranks together.

    Rank 0 alone decides what exists, since ranks can disagree about that on a shared file system; an error on any
    rank is raised on all.

    Args:
        config: the config's section.
        run_folder: `job.dump_folder`, whose lock the caller holds; `checkpoint.folder` is relative to it.
    """

    def __init__(self, config: Checkpoint, run_folder: Path) -> None:
        self.config = config
        self.folder = run_folder / config.folder
        # A group of its own: DCP's messages never mix with training's, stay off the accelerator, and may wait for a
        # slow disk for hours where training's own timeout is short.
        self.group = patient_group()

    def should_save(self, step: int, last_step: int, stopping: bool = False) -> bool:
        """Whether a checkpoint is due after this step (counted from 1): at each interval, the end, an early stop."""
        if not self.config.enable or self.config.load_only:
            return False
        first = step == 1 and self.config.enable_first_step_checkpoint
        return first or stopping or step == last_step or step % self.config.interval == 0

    def prepare(self, weights: Weights, optimizer: Optimizer) -> None:
        """Find out before training what would fail at the first save, and remove what dead runs left unfinished.

        Raises:
            UserError: the folder cannot be written, is not seen by all ranks, or lacks room for two checkpoints.
        """
        if not self.config.enable or self.config.load_only:
            return
        tensors = _state_tensors(weights, optimizer)
        sizes = gathered({name: tensor.nbytes for name, tensor in tensors.items()}, self.group)
        needed = 2 * sum({name: size for part in sizes for name, size in part.items()}.values())
        probe = self._on_rank_zero(lambda: self._write_probe(needed))
        try:
            self._together(lambda: self._look_for(probe))
        finally:
            if dist.get_rank() == 0:
                probe.unlink(missing_ok=True)

    def save(self, weights: Weights, optimizer: Optimizer, progress: Progress) -> None:
        """Write `step-N` and remove what `keep_latest_k` no longer keeps; nothing to do if `step-N` is complete.

        A save that fails removes its temporary folder and leaves earlier checkpoints as they are. (Should only the very
        last sync fail, after the rename, `step-N` stays: it is complete, if perhaps not yet safe from a power cut.)

        Raises:
            CheckpointError, OSError: on all ranks, naming the rank that failed.
        """
        started = time.monotonic()
        temporary = self._on_rank_zero(lambda: self._begin(progress.step))
        if temporary is None:
            logger.info(
                f"{self._path(progress.step)} is already there, complete: not written again"
            )
            return
        try:
            tensors = self._together(
                lambda: {**_state_tensors(weights, optimizer), **_rng_tensors(weights)}
            )
            parts = gathered(self._write(temporary, tensors), self.group)
            files = {name: record for part in parts for name, record in part.items()}
            self._on_rank_zero(lambda: self._commit(temporary, progress, files))
        except BaseException:
            if dist.get_rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        size = sum(record["bytes"] for record in files.values()) / 2**20
        logger.info(
            f"saved {self._path(progress.step)} ({size:,.1f} MiB) in {time.monotonic() - started:.1f} s"
        )
        self._on_rank_zero(lambda: self._retire(progress.step))

    def find(self) -> Source | None:
        """Choose what this run continues from, verified to the last byte; None means a start at step 0.

        The run's own newest complete checkpoint, or `load_step`; where the run has none yet, `initial_load_path`.
        A damaged one of the run's own is set aside by a rename, with a warning, and the next older one is taken.

        Raises:
            UserError: `load_step` or `initial_load_path` is missing or damaged, or the run has checkpoints of which
                none is complete (a start at step 0 would hide that).
        """
        if not self.config.enable:
            return None
        steps, names = self._on_rank_zero(self._list)
        if self.config.load_step >= 0:
            return self._find_step(self.config.load_step, steps)
        for step in steps:
            found = self._verify(self._path(step))
            if isinstance(found, Source):
                if self.config.initial_load_path:
                    logger.info(
                        "checkpoint.initial_load_path is not used: this run has checkpoints of its own"
                    )
                return found
            self._reject(self._path(step), found)
        if names:
            raise SharedUserError(
                f"{self.folder} holds {', '.join(names)}, but none of them is a complete checkpoint. "
                "Training does not start over silently: move that folder away, or choose another job.dump_folder."
            )
        if not self.config.initial_load_path:
            return None
        path = expanded(self.config.initial_load_path)
        found = self._verify(path, self.config.initial_load_model_only)
        if isinstance(found, str):
            raise SharedUserError(
                f"checkpoint.initial_load_path = {str(path)!r} cannot be used: {found}. "
                "It must be the step folder of a complete checkpoint, such as outputs/checkpoint/step-1000."
            )
        return found

    def load(self, source: Source, weights: Weights, optimizer: Optimizer | None) -> None:
        """Fill in place the weights and, unless the weights alone are wanted, optimizer states and random states.

        Learning rate and other hyperparameters are not in the file: they come from the config. Going back to an
        earlier step (`load_step`) sets the run's later checkpoints aside as superseded: the steps they stand for are
        taken again.

        Args:
            source: from `find`.
            weights: this rank's, sharded and materialised; their values are overwritten.
            optimizer: over the same parameters; None loads the weights alone.

        Raises:
            UserError: the checkpoint's tensors are not this model's, or its index is not what DCP writes.
            CheckpointError: reading failed; names the ranks.
        """
        started = time.monotonic()
        optimizer = None if source.model_only else optimizer
        metadata = self._together(lambda: _read_index(source))
        everyones = set().union(*gathered(list(weights), self.group))
        tensors = self._together(
            lambda: _tensors_to_load(source, metadata, weights, everyones, optimizer)
        )
        planner = DefaultLoadPlanner(flatten_state_dict=False)
        with _plain_faults(f"reading {source.path}"):
            dcp.load(
                tensors,
                storage_reader=_Reader(source.path, metadata),
                planner=planner,
                process_group=self.group,
            )
        random = {
            key.split("/")[2]: tensor for key, tensor in tensors.items() if key.startswith("rng/")
        }
        for kind, state in random.items():
            _random(kind).set_rng_state(state)
        if not random and optimizer is not None:
            logger.info(
                f"random states are not restored: {source.marker.world_size} ranks or other devices saved them"
            )
        what = "model alone" if optimizer is None else "model and optimizer"
        seconds = time.monotonic() - started
        logger.info(
            f"loaded {source.path} (step {source.progress.step}, {what}) in {seconds:.1f} s"
        )
        if (
            optimizer is not None
            and not self.config.load_only
            and source.path.parent == self.folder
        ):
            self._on_rank_zero(lambda: self._supersede(source.progress.step))

    def _together(self, action: Callable[[], T]) -> T:
        return together(action, self.group)

    def _on_rank_zero(self, action: Callable[[], T]) -> T:
        return on_rank_zero(action, self.group)

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step}"

    def _list(self) -> tuple[list[int], list[str]]:
        """Steps that have a folder, newest first, and all names that were a checkpoint once, those set aside too."""
        names = sorted(path.name for path in self.folder.glob("step-*"))
        steps = [int(name[5:]) for name in names if re.fullmatch(r"step-(0|[1-9]\d*)", name)]
        return sorted(steps, reverse=True), names

    # Saving

    def _make_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        fsync_folder(self.folder.parent)
        for leftover in self.folder.glob(f"{TEMPORARY}*"):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)

    def _write_probe(self, needed: int) -> Path:
        try:
            self._make_folder()
            probe = self.folder / f"{TEMPORARY}probe-{uuid.uuid4().hex}"
            write_durably(probe, "")
            free = shutil.disk_usage(self.folder).free
        except OSError as fault:
            raise UserError(
                f"checkpoints cannot be written to {self.folder}: {fault.strerror}"
            ) from fault
        if free < needed:
            raise UserError(
                f"{self.folder} has {free / 2**30:.2f} GiB free, but two checkpoints need {needed / 2**30:.2f} GiB: "
                "the last is kept until the next is complete. Make room, choose another checkpoint.folder, or turn "
                "checkpoint.enable off."
            )
        return probe

    def _look_for(self, probe: Path) -> None:
        if not probe.exists():
            raise UserError(
                f"{self.folder} must be on a file system that all ranks share: this one sees no probe file"
            )

    def _begin(self, step: int) -> Path | None:
        """A fresh temporary folder; None if this step is there already. What is there in pieces is set aside."""
        self._make_folder()
        if self._path(step).exists():
            found = _inspect(self._path(step))
            if isinstance(found, Marker):
                return None
            _warn_set_aside(self._path(step), found)
        temporary = self.folder / f"{TEMPORARY}step-{step}-{uuid.uuid4().hex}"
        temporary.mkdir()
        return temporary

    def _write(self, temporary: Path, tensors: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
        """Write this rank's share of the tensors; returns size and digest of each file it wrote."""
        writer, planner = _Writer(temporary), DefaultSavePlanner(flatten_state_dict=False)
        with _plain_faults(f"writing {temporary}"):
            dcp.save(tensors, storage_writer=writer, planner=planner, process_group=self.group)
        return writer.files.written

    def _commit(
        self, temporary: Path, progress: Progress, files: dict[str, dict[str, Any]]
    ) -> None:
        """Add what rank 0 alone writes, the marker last, and rename. The tensors' files are synced already."""
        state = json.dumps(asdict(progress), indent=2)
        files[STATE] = {
            "bytes": len(state.encode()),
            "sha256": hashlib.sha256(state.encode()).hexdigest(),
        }
        write_durably(temporary / STATE, state)  # and with it the folder, so all names in it
        for name, record in files.items():
            size = (temporary / name).stat().st_size if (temporary / name).exists() else None
            if size != record["bytes"]:
                raise CheckpointError(
                    f"{name} was written with {record['bytes']} bytes, but rank 0 finds {size or 'nothing'}: "
                    f"is {self.folder} on a file system that all ranks share?"
                )
        marker = Marker(progress.step, dist.get_world_size(), torch.__version__, files)
        write_durably(temporary / MARKER, json.dumps(asdict(marker), indent=2))
        os.rename(temporary, self._path(progress.step))
        fsync_folder(self.folder)

    def _retire(self, newest: int) -> None:
        """Remove complete checkpoints beyond the `keep_latest_k` latest. A failure is no reason to end the run."""
        if self.config.keep_latest_k == 0:
            return
        try:
            complete = [
                step for step in self._list()[0] if isinstance(_inspect(self._path(step)), Marker)
            ]
            for step in [step for step in complete if step < newest][
                self.config.keep_latest_k - 1 :
            ]:
                doomed = self.folder / f"{TEMPORARY}removed-{step}-{uuid.uuid4().hex}"
                (self._path(step) / MARKER).unlink()
                fsync_folder(self._path(step))
                os.rename(self._path(step), doomed)
                shutil.rmtree(doomed)
        except (OSError, UserError) as fault:
            logger.warning(f"old checkpoints in {self.folder} could not be removed: {fault}")

    # Finding

    def _find_step(self, step: int, steps: list[int]) -> Source:
        found = self._verify(self._path(step)) if step in steps else "it is not there"
        if isinstance(found, str):
            complete = self._on_rank_zero(
                lambda: [s for s in steps if isinstance(_inspect(self._path(s)), Marker)]
            )
            there = ", ".join(str(s) for s in sorted(complete) if s != step) or "none"
            raise SharedUserError(
                f"checkpoint.load_step = {step} cannot be loaded from {self._path(step)}: {found}. "
                f"Complete steps in {self.folder}: {there}."
            )
        return found

    def _verify(self, path: Path, model_only: bool = False) -> Source | str:
        """The checkpoint, or what is wrong with it: rank 0 looks at names and sizes, then each rank hashes a share."""
        marker = self._on_rank_zero(lambda: _inspect(path))
        if isinstance(marker, str):
            return marker
        share = sorted(marker.files)[dist.get_rank() :: dist.get_world_size()]
        for fault in gathered(
            self._together(lambda: _first_altered(path, share, marker)), self.group
        ):
            if fault is not None:
                return fault
        progress = self._on_rank_zero(lambda: _read_state(path))
        if marker.step != progress.step:
            raise SharedUserError(f"{path}: {MARKER} and {STATE} are of different checkpoints")
        return Source(path, progress, model_only, marker)

    def _reject(self, path: Path, fault: str) -> None:
        if self.config.load_only:
            logger.warning(f"the checkpoint {path} is passed over: {fault}")
        else:
            self._on_rank_zero(lambda: _warn_set_aside(path, fault))

    def _supersede(self, step: int) -> None:
        for later in self._list()[0]:
            if later > step:
                target = _set_aside(self._path(later), "superseded")
                logger.warning(
                    f"this run goes on from step {step}: its {self._path(later).name} is now {target.name}"
                )


# Tensors and their names


def _state_tensors(weights: Weights, optimizer: Optimizer | None) -> dict[str, Tensor]:
    """The weights, sharing their memory, and Adam's states; those not there yet are made as its first step would."""
    tensors = {f"model/{name}": weight.detach() for name, weight in weights.items()}
    if optimizer is None:
        return tensors
    names = {parameter: name for name, parameter in weights.items()}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            if not state:
                device = (
                    parameter.device
                    if group["fused"] or group["capturable"]
                    else torch.device("cpu")
                )
                state["step"] = torch.zeros((), dtype=torch.float32, device=device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
            tensors.update(
                {f"optimizer/{names[parameter]}/{key}": value for key, value in state.items()}
            )
    return tensors


def _rng_tensors(weights: Weights) -> dict[str, Tensor]:
    """This rank's random states, as bytes. (Training draws nothing after initialisation; a later feature may.)"""
    kinds = dict.fromkeys(["cpu", next(iter(weights.values())).device.type])
    return {f"rng/{dist.get_rank()}/{kind}": _random(kind).get_rng_state() for kind in kinds}


def _random(kind: str) -> Any:
    """The module that has the random state of this type of device."""
    return torch if kind == "cpu" else torch.get_device_module(kind)


def _tensors_to_load(
    source: Source,
    metadata: Metadata,
    weights: Weights,
    everyones: set[str],
    optimizer: Optimizer | None,
) -> dict[str, Tensor]:
    """The tensors to read into, after checking that the checkpoint has them, all of them and none that no rank has."""
    tensors, kinds = (
        _state_tensors(weights, optimizer),
        ["model"] if optimizer is None else ["model", "optimizer"],
    )
    entries = _tensor_entries(metadata)
    saved = {key for key in entries if key.split("/")[0] in kinds}
    parameter = re.compile(r"model/(.*)|optimizer/(.*)/[^/]*")
    unknown = {
        key
        for key in saved
        if (at := parameter.fullmatch(key)) is None or (at[1] or at[2]) not in everyones
    }
    common = [(key, entries[key], tensors[key]) for key in sorted(saved & tensors.keys())]
    reshaped = _unlike((key, list(entry.size), list(tensor.shape)) for key, entry, tensor in common)
    retyped = _unlike((key, entry.properties.dtype, tensor.dtype) for key, entry, tensor in common)
    faults = {
        "lacks": sorted(tensors.keys() - saved),
        "has, unknown to this model,": sorted(unknown),
        "has in another shape": reshaped,
        "has in another precision": retyped if optimizer is not None else [],
    }
    if any(faults.values()):
        text = "; ".join(f"it {verb} {_first_few(keys)}" for verb, keys in faults.items() if keys)
        raise UserError(
            f"{source.path} is not a checkpoint of this model: {text}. Compare [model] and training.dtype."
        )
    if retyped:
        logger.info(f"{source.path}: weights are converted: {_first_few(retyped)}")
    random = _rng_tensors(weights)
    fits = all(key in entries and entries[key].size == state.shape for key, state in random.items())
    if optimizer is not None and fits and source.marker.world_size == dist.get_world_size():
        tensors.update(random)
    return tensors


def _unlike(pairs: Iterable[tuple[str, Any, Any]]) -> list[str]:
    return [f"{key} {there} instead of {here}" for key, there, here in pairs if there != here]


def _first_few(items: list[str]) -> str:
    return ", ".join(items[:4]) + (f" and {len(items) - 4} more" if len(items) > 4 else "")


# Files


def _inspect(path: Path) -> Marker | str:
    """The marker of a checkpoint whose files all have the right size, or in words what is wrong.

    Raises:
        UserError: written by a later version of torchtrain, so nothing can be said about it.
    """
    if not path.is_dir():
        return "it is not there"
    if not (path / MARKER).exists():
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
    for name, size in sizes.items():
        if not (path / name).is_file():
            return f"its file {name} is missing"
        if (path / name).stat().st_size != size:
            return f"its file {name} has {(path / name).stat().st_size} bytes instead of {size}"
    return marker


def _first_altered(path: Path, names: Iterable[str], marker: Marker) -> str | None:
    for name in names:
        digest = hashlib.sha256()
        with open(path / name, "rb") as file:
            while chunk := file.read(2**22):
                digest.update(chunk)
        if digest.hexdigest() != marker.files[name]["sha256"]:
            return f"its file {name} is damaged: the SHA-256 is not the one it was written with"
    return None


def _set_aside(path: Path, word: str) -> Path:
    """Rename to `step-N.<word>`, or with a number after it where that is taken; no such name counts as a checkpoint."""
    names = (f"{path.name}.{word}" + (f"-{n}" if n > 1 else "") for n in itertools.count(1))
    target = next(path.with_name(name) for name in names if not path.with_name(name).exists())
    path.rename(target)
    fsync_folder(path.parent)
    return target


def _warn_set_aside(path: Path, fault: str) -> None:
    target = _set_aside(path, "damaged" if (path / MARKER).exists() else "incomplete")
    logger.warning(f"the checkpoint {path} is not usable and was renamed to {target.name}: {fault}")


def _read_state(path: Path) -> Progress:
    try:
        return Progress(**json.loads((path / STATE).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as fault:
        raise UserError(f"{path / STATE} is not what torchtrain writes: {fault}") from fault


class _HashingFile(io.BufferedWriter):
    """A new file that hashes what passes through, and on closing is flushed and then synced."""

    def __init__(self, path: str | os.PathLike) -> None:
        super().__init__(io.FileIO(path, "xb"))
        self.sha256 = hashlib.sha256()
        self.count = 0

    def write(self, data: Any) -> int:
        written = super().write(data)
        self.sha256.update(data)
        self.count += written
        return written

    def close(self) -> None:
        if self.closed:
            return
        try:
            self.flush()
            os.fsync(self.fileno())
        finally:
            super().close()


class _HashingFileSystem(FileSystem):
    """DCP's way to the disk while saving; `written` holds size and digest of each file by its name."""

    def __init__(self) -> None:
        self.written: dict[str, dict[str, Any]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:  # type: ignore[override]
        assert mode == "wb"
        with _HashingFile(path) as file:
            yield file
        self.written[Path(path).name] = {"bytes": file.count, "sha256": file.sha256.hexdigest()}

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.written[Path(new_path).name] = self.written.pop(Path(path).name)


class _Writer(dcp.FileSystemWriter):
    """One thread and one file a rank, through the hashing file system, which also does the syncing."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            path, single_file_per_rank=True, sync_files=False, thread_count=1, overwrite=False
        )
        self.fs = self.files = _HashingFileSystem()

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the index. DCP has been seen to swallow a writer's error, so what was written is counted first."""
        planned = sum(len(entry.chunks) for entry in _tensor_entries(metadata).values())
        written = sum(map(len, results))
        if written != planned:
            raise CheckpointError(f"DCP wrote {written} of {planned} slices to {self.path}")
        super().finish(metadata, results)

    def storage_meta(self) -> StorageMeta:
        """Nothing: the path of the temporary folder says nothing later, and would be one more class to unpickle."""
        return StorageMeta()


class _Reader(dcp.FileSystemReader):
    """Reads by an index that was unpickled and checked before."""

    def __init__(self, path: Path, metadata: Metadata) -> None:
        super().__init__(path)
        self.metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata


@contextmanager
def _plain_faults(doing: str) -> Iterator[None]:
    """DCP raises the faults of all ranks on all ranks, as a BaseException with stacks; say it in a line."""
    try:
        yield
    except dcp.CheckpointException as fault:
        causes = [
            f"rank {rank}: {type(e).__name__}: {e}"
            for rank, (e, _) in sorted(fault.failures.items())
        ]
        raise CheckpointError(f"{doing} failed on {'; '.join(causes)}") from fault


# The index


class _IndexUnpickler(pickle.Unpickler):
    """Knows the classes of which DCP's index of tensors is made, and no function that does anything."""

    ALLOWED: ClassVar = {
        "torch": "Size",
        "torch.serialization": "_get_layout",  # looks a name up in a table
        "torch.distributed.checkpoint.filesystem": "_StorageInfo",
        "torch.distributed.checkpoint.metadata": "Metadata MetadataIndex StorageMeta ChunkStorageMetadata "
        "TensorStorageMetadata TensorProperties _MEM_FORMAT_ENCODING",
    }

    def find_class(self, module: str, name: str) -> Any:
        if name in self.ALLOWED.get(module, "").split() or (
            module == "torch" and isinstance(vars(torch).get(name), torch.dtype)
        ):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(
            f"it asks for {module}.{name}, which no index of tensors needs"
        )


def _tensor_entries(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """The index's entries by key. An entry of raw bytes is refused: DCP would unpickle it without restriction."""
    entries = {}
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise pickle.UnpicklingError(f"its entry {key!r} is no tensor")
        entries[key] = entry
    return entries


def _read_index(source: Source) -> Metadata:
    """DCP's index, unpickled with restriction. The tensors themselves DCP reads with `torch.load(weights_only=True)`.

    Raises:
        UserError: it holds anything but tensors in the checkpoint's own files.
    """
    path = source.path / INDEX
    content = path.read_bytes()
    try:
        metadata = _IndexUnpickler(io.BytesIO(content)).load()
        _tensor_entries(metadata)
        outside = {
            info.relative_path for info in metadata.storage_data.values()
        } - source.marker.files.keys()
    except Exception as fault:  # a pickle that was tampered with can raise anything
        raise UserError(f"{path} is refused, and nothing in it was run: {fault}") from fault
    if outside:
        raise UserError(
            f"{path} is refused: it points to files that are not the checkpoint's: {sorted(outside)}"
        )
    return metadata
