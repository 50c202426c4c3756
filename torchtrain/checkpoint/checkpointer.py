"""Which checkpoints a run has: saving, choosing what to resume from, loading, retiring."""

import os
import re
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

import torchtrain.checkpoint.commit as commit
import torchtrain.checkpoint.state as state
from torchtrain.checkpoint.commit import MARKER, STATE, Marker, Progress, Source
from torchtrain.checkpoint.foreign import (
    Foreign,
    is_dcp_folder,
    open_hf_source,
    open_torchtitan_source,
)
from torchtrain.checkpoint.hf_folder import CONFIG as HF_CONFIG
from torchtrain.checkpoint.state import Weights
from torchtrain.checkpoint.storage import list_entries, read_index, read_tensors, write_tensors
from torchtrain.config.schema import Checkpoint
from torchtrain.errors import SharedUserError, UserError
from torchtrain.logging_utils import logger
from torchtrain.ranks import gathered, on_rank_zero, patient_group, together
from torchtrain.utils import expand_user, first_few, fsync_folder, user_errors, write_durably

TEMPORARY = ".tmp-"
"""What begins so is unfinished or being removed, and is swept at the next start or save."""

WEIGHTS_ALONE = (
    "it holds the weights alone (checkpoint.last_save_model_only), which can start another run, by "
    "checkpoint.initial_load_path"
)

T = TypeVar("T")


class Checkpointer:
    """Saves and loads the checkpoints of one run.

    All ranks call its methods together, except for `should_save`. Rank 0 alone decides what exists,
    since ranks can disagree about that on a shared file system; an error on any rank is raised on
    all.

    Args:
        config: the config's section.
        run_folder: `job.dump_folder`, whose lock the caller holds; `checkpoint.folder` is relative
            to it.
    """

    def __init__(self, config: Checkpoint, run_folder: Path) -> None:
        self.config = config
        self.folder = run_folder / config.folder
        # A group of its own: DCP's messages never mix with training's, stay off the accelerator,
        # and may wait for a slow disk for hours where training's own timeout is short.
        self.group = patient_group()

    def should_save(self, step: int, last_step: int, *, stopping: bool = False) -> bool:
        """Return whether a checkpoint is due after this step, counted from 1."""
        if not self.config.enable or self.config.load_only:
            return False
        first = step == 1 and self.config.enable_first_step_checkpoint
        return first or stopping or step == last_step or step % self.config.interval == 0

    def prepare(self, weights: Weights, optimizer: Optimizer) -> None:
        """Find out before training what would fail at the first save, and sweep the folder.

        Raises:
            UserError: the folder cannot be written, is not seen by all ranks, or lacks room for two
                checkpoints; or the optimizer keeps what a checkpoint cannot hold.
        """
        if not self.config.enable or self.config.load_only:
            return
        sizes = self._merge(self._together(lambda: state.measure(weights, optimizer)))
        needed = 2 * sum(sizes.values())
        if self.config.last_save_in_hf:
            needed += sum(size for name, size in sizes.items() if name.startswith("model/"))
        probe = self._on_rank_zero(lambda: self._write_probe(needed))
        try:
            self._together(lambda: self._look_for(probe))
        finally:
            if dist.get_rank() == 0:
                probe.unlink(missing_ok=True)

    def save(
        self,
        weights: Weights,
        optimizer: Optimizer,
        progress: Progress,
        *,
        is_last: bool = False,
    ) -> None:
        """Write `step-N`, unless it is complete already, and remove what is no longer kept.

        The run's last one is of the weights alone with `last_save_model_only`.

        A save that fails removes its temporary folder and leaves earlier checkpoints as they are.
        (Should only the very last sync fail, after the rename, `step-N` stays: it is complete, if
        perhaps not yet safe from a power cut.)

        Raises:
            CheckpointError, OSError: on all ranks, naming the rank that failed.
        """
        started = time.monotonic()
        target = self.path(progress.step)
        temporary = self._on_rank_zero(lambda: self._begin(target))
        if temporary is None:
            logger.info(f"{target} exists already and is complete; not written again")
            return
        if is_last and self.config.last_save_model_only:
            progress = replace(progress, model_only=True)
        try:
            tensors = self._together(lambda: self._list_saved(weights, optimizer, progress))
            files = self._merge(write_tensors(temporary, tensors, self.group))
            self._on_rank_zero(lambda: commit.commit(temporary, target, progress, files))
        except BaseException:
            if dist.get_rank() == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            raise
        size = sum(record["bytes"] for record in files.values()) / 2**20
        logger.info(f"saved {target} ({size:,.1f} MiB) in {time.monotonic() - started:.1f} s")
        self._on_rank_zero(lambda: self._retire(progress.step))

    def find(self, last_step: int = 0) -> Source | Foreign | None:
        """Choose what this run resumes from, verified to the last byte; None: it starts at step 0.

        The run's own newest complete checkpoint, or `load_step`; where the run has none yet,
        `initial_load_path`. A damaged one of the run's own is set aside by a rename, with a
        warning, and the next older one is taken; so it is where the newest holds the weights alone
        and is not that of the run's `last_step`.

        Raises:
            UserError: `load_step` or `initial_load_path` is missing, damaged or another program's,
                or the run has checkpoints of which none is complete (a start at step 0 would hide
                that), or has what it takes to go on.
        """
        if not self.config.enable:
            return None
        steps, names = self._on_rank_zero(self._list)
        if self.config.load_step >= 0:
            return self._find_step(self.config.load_step, last_step)
        for step in steps:
            found = self.verify(self.path(step))
            if isinstance(found, Source) and found.progress.model_only and step < last_step:
                logger.warning(f"{found.path} is passed over: {WEIGHTS_ALONE}")
                continue
            if isinstance(found, Source):
                if self.config.initial_load_path:
                    logger.info(
                        "checkpoint.initial_load_path is not used: this run has checkpoints of "
                        "its own"
                    )
                return found
            self._reject(self.path(step), found)
        if names:
            raise SharedUserError(
                f"{self.folder} holds {', '.join(names)}, but none of them is a complete "
                "checkpoint to go on from. Training does not start over silently: move that folder "
                "away, or choose another job.dump_folder."
            )
        if not self.config.initial_load_path:
            return None
        return self._find_initial(expand_user(self.config.initial_load_path))

    def verify(self, path: Path, *, model_only: bool = False) -> Source | str:
        """Return the checkpoint at `path`, or what is wrong with it; it is left as it is.

        Rank 0 looks at names and sizes, then each rank hashes a share of the files.
        """
        marker = self._on_rank_zero(lambda: commit.inspect(path))
        if isinstance(marker, str):
            return marker
        share = sorted(marker.files)[dist.get_rank() :: dist.get_world_size()]
        altered = self._together(lambda: commit.find_altered(path, share, marker))
        for fault in gathered(altered, self.group):
            if fault is not None:
                return fault
        progress = self._on_rank_zero(lambda: commit.read_progress(path))
        if marker.step != progress.step:
            raise SharedUserError(f"{path}: {MARKER} and {STATE} are of different checkpoints")
        return Source(path=path, progress=progress, model_only=model_only, marker=marker)

    def load_foreign(self, source: Foreign, weights: Weights) -> None:
        """Fill this rank's parameters in place with another program's weights.

        Raises:
            UserError: they are not this model's.
            CheckpointError: reading failed.
        """
        started = time.monotonic()
        taken = source.load(weights, self.group)
        logger.info(f"loaded {source.path} in {time.monotonic() - started:.1f} s: {taken}")

    def load(self, source: Source, weights: Weights, optimizer: Optimizer | None) -> None:
        """Fill the weights in place and, unless only they are wanted, the rest of the state.

        Learning rate and other settings are not in the file: they come from the config. Going back
        to an earlier step (`load_step`) sets the run's later checkpoints aside as superseded: the
        steps they stand for are taken again.

        Args:
            source: from `find`.
            weights: this rank's, sharded and materialized; their values are overwritten.
            optimizer: over the same parameters; None loads only the weights.

        Raises:
            UserError: the checkpoint's tensors are not this model's, or its index is not what DCP
                writes.
            CheckpointError: reading failed; names the ranks.
        """
        started = time.monotonic()
        if source.model_only:
            optimizer = None
        metadata = self._together(lambda: read_index(source.path, source.marker.files))
        entries = list_entries(metadata)
        tensors = self._together(lambda: state.list_training_state(weights, optimizer, entries))
        everyones: set[str] = set().union(*gathered(list(tensors), self.group))
        converted = self._together(
            lambda: state.check_tensors(source, entries, tensors, everyones, optimizer)
        )
        random: dict[str, Tensor] = {}
        if optimizer is not None and source.marker.world_size == dist.get_world_size():
            random = state.list_random_states(weights, entries)
        read_tensors(source.path, metadata, tensors | random, self.group)
        if optimizer is not None:
            state.take_numbers(weights, optimizer, tensors)
            state.set_random_states(random)
        if converted:
            logger.info(f"{source.path}: weights are converted: {first_few(converted)}")
        if not random and optimizer is not None:
            logger.info(
                f"random states are not restored: they were saved by "
                f"{source.marker.world_size} ranks, or on other devices"
            )
        what = "model alone" if optimizer is None else "model and optimizer"
        seconds = time.monotonic() - started
        step = source.progress.step
        logger.info(f"loaded {source.path} (step {step}, {what}) in {seconds:.1f} s")
        is_own = source.path.parent == self.folder
        if is_own and optimizer is not None and not self.config.load_only:
            self._on_rank_zero(lambda: self._supersede(step))

    def _together(self, action: Callable[[], T]) -> T:
        return together(action, self.group)

    def _on_rank_zero(self, action: Callable[[], T]) -> T:
        return on_rank_zero(action, self.group)

    def _merge(self, entries: dict[str, T]) -> dict[str, T]:
        """Return the entries of all ranks; one that several ranks have comes once."""
        by_rank = gathered(entries, self.group)
        return {name: entry for of_rank in by_rank for name, entry in of_rank.items()}

    def path(self, step: int) -> Path:
        """Return the folder of the checkpoint after this step."""
        return self.folder / f"step-{step}"

    def _list(self) -> tuple[list[int], list[str]]:
        """Return the steps that have a folder, newest first, and all names, those set aside too."""
        names = sorted(path.name for path in self.folder.glob("step-*"))
        steps = [int(name[5:]) for name in names if re.fullmatch(r"step-(0|[1-9]\d*)", name)]
        return sorted(steps, reverse=True), names

    def _list_complete(self) -> list[int]:
        """Return the steps that are complete, newest first."""
        steps, _ = self._list()
        return [step for step in steps if isinstance(commit.inspect(self.path(step)), Marker)]

    # Saving

    def _list_saved(
        self, weights: Weights, optimizer: Optimizer, progress: Progress
    ) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint by their names."""
        if progress.model_only:
            return state.list_exported(weights, self.config.export_dtype)
        return (
            state.list_weights(weights)
            | state.list_states(weights, optimizer)
            | state.list_random_states(weights)
        )

    def _make_folder(self) -> None:
        """Make the folder, and remove what dead runs left unfinished in it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        fsync_folder(self.folder.parent)
        for leftover in self.folder.glob(f"{TEMPORARY}*"):
            if leftover.is_dir():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.unlink(missing_ok=True)

    def _write_probe(self, needed: int) -> Path:
        """Write a file for the other ranks to see, and require room for `needed` bytes."""
        with user_errors(f"checkpoints cannot be written to {self.folder}", OSError):
            self._make_folder()
            probe = self.folder / f"{TEMPORARY}probe-{uuid.uuid4().hex}"
            write_durably(probe, "")
            free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise UserError(
                f"{self.folder} has {free / 2**30:.2f} GiB free, but two checkpoints need "
                f"{needed / 2**30:.2f} GiB: the last is kept until the next is complete. Make "
                "room, choose another checkpoint.folder, or turn checkpoint.enable off."
            )
        return probe

    def _look_for(self, probe: Path) -> None:
        if not probe.exists():
            raise UserError(
                f"{self.folder} must be on a file system that all ranks share: this one sees no "
                "probe file"
            )

    def _begin(self, target: Path) -> Path | None:
        """Make a temporary folder; None: the step is complete already. Set aside an incomplete."""
        self._make_folder()
        if target.exists():
            found = commit.inspect(target)
            if isinstance(found, Marker):
                return None
            commit.set_aside_unusable(target, found)
        temporary = self.folder / f"{TEMPORARY}{target.name}-{uuid.uuid4().hex}"
        temporary.mkdir()
        return temporary

    def _retire(self, newest: int) -> None:
        """Remove complete checkpoints beyond the `keep_latest_k` latest.

        A failure is no reason to end the run.
        """
        if self.config.keep_latest_k == 0:
            return
        try:
            older = [step for step in self._list_complete() if step < newest]
            for step in older[self.config.keep_latest_k - 1 :]:
                path = self.path(step)
                doomed = self.folder / f"{TEMPORARY}removed-{step}-{uuid.uuid4().hex}"
                (path / MARKER).unlink()
                fsync_folder(path)
                os.rename(path, doomed)
                shutil.rmtree(doomed)
        except (OSError, UserError) as fault:
            logger.warning(f"old checkpoints in {self.folder} could not be removed: {fault}")

    # Finding

    def _find_step(self, step: int, last_step: int) -> Source:
        """Return the checkpoint of `checkpoint.load_step`."""
        path = self.path(step)
        found = self.verify(path)
        if isinstance(found, Source) and found.progress.model_only and step < last_step:
            found = WEIGHTS_ALONE
        if isinstance(found, Source):
            return found
        complete = self._on_rank_zero(self._list_complete)
        there = ", ".join(str(other) for other in sorted(complete) if other != step)
        raise SharedUserError(
            f"checkpoint.load_step = {step} cannot be loaded from {path}: {found}. "
            f"Complete steps in {self.folder}: {there or 'none'}."
        )

    def _find_initial(self, path: Path) -> Source | Foreign:
        """Return the checkpoint, or other program's weights, of `checkpoint.initial_load_path`."""
        given = f"checkpoint.initial_load_path = {str(path)!r}"
        if self.config.initial_load_in_hf:
            with user_errors(given, UserError):
                return self._together(lambda: open_hf_source(path))
        if self._on_rank_zero(lambda: is_dcp_folder(path)):
            self._require_model_only(
                given, "another program's, of which only the weights can be taken"
            )
            with user_errors(given, UserError):
                return self._together(lambda: open_torchtitan_source(path))
        found = self.verify(path, model_only=self.config.initial_load_model_only)
        if isinstance(found, Source):
            if found.progress.model_only:
                self._require_model_only(given, "a checkpoint of the weights alone")
            return found
        hint = ""
        if (path / HF_CONFIG).exists():
            hint = f" It has {HF_CONFIG}: for a Hugging Face folder set initial_load_in_hf = true."
        raise SharedUserError(
            f"{given} cannot be used: {found}. It must be the step folder of a complete "
            f"checkpoint, such as outputs/checkpoint/step-1000.{hint}"
        )

    def _require_model_only(self, given: str, what: str) -> None:
        if not self.config.initial_load_model_only:
            raise SharedUserError(
                f"{given} is {what}: set checkpoint.initial_load_model_only = true"
            )

    def _reject(self, path: Path, fault: str) -> None:
        """Set a damaged checkpoint aside, or only pass it over where nothing may be written."""
        if self.config.load_only:
            logger.warning(f"the checkpoint {path} is skipped: {fault}")
        else:
            self._on_rank_zero(lambda: commit.set_aside_unusable(path, fault))

    def _supersede(self, step: int) -> None:
        """Set aside the checkpoints of steps that are taken again."""
        steps, _ = self._list()
        for later in steps:
            if later > step:
                path = self.path(later)
                target = commit.set_aside(path, "superseded")
                logger.warning(
                    f"this run resumes from step {step}: its {path.name} is now {target.name}"
                )
