"""What a run saves, when, and how long it is kept."""

import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

import torchtrain.checkpoint.commit as commit
import torchtrain.checkpoint.state as state
from torchtrain.checkpoint.asynchronous import BackgroundWriter
from torchtrain.checkpoint.commit import TEMPORARY, Marker, Progress
from torchtrain.checkpoint.state import Weights
from torchtrain.checkpoint.storage import time_writing, write_tensors
from torchtrain.config.schema import Checkpoint
from torchtrain.errors import BadNumbers, CheckpointError, PeerFault, Stopped, UserError
from torchtrain.logging_utils import logger
from torchtrain.ranks import gathered, on_rank_zero, patient_group, together
from torchtrain.utils import expand_user, fsync_folder, make_folder, user_errors, writing

T = TypeVar("T")


class Saver:
    """Saves the checkpoints of one run.

    All ranks call its methods together. Rank 0 alone decides what exists, since ranks can disagree
    about that on a shared file system; an error on any rank is raised on all.

    Args:
        config: the config's section.
        run_folder: `job.dump_folder`, whose lock the caller holds; `checkpoint.folder` is relative
            to it.
    """

    def __init__(self, config: Checkpoint, run_folder: Path) -> None:
        self.config = config
        self.folder = run_folder / expand_user(config.folder)
        # Not training's group: DCP's messages never mix with training's, stay off the accelerator,
        # and may wait for a slow disk for hours where training's own timeout is short.
        self.group = patient_group()
        self.background: BackgroundWriter | None = None
        if config.enable and not config.load_only and config.async_mode != "disabled":
            self.background = BackgroundWriter(pinned=config.async_mode == "async_with_pinned_mem")
        self.saved_at = time.monotonic()
        self.save_seconds = 0.0
        """What the last save has taken; before the first one an estimate, see `prepare`."""

    def should_save(self, step: int, last_step: int, *, stopping: bool = False) -> bool:
        """Return whether a checkpoint is due after this step, counted from 1."""
        if not self.config.enable or self.config.load_only:
            return False
        first = step == 1 and self.config.enable_first_step_checkpoint
        is_turn = step == last_step or step % self.config.interval == 0
        return self._is_time() or first or stopping or is_turn

    def prepare(self, weights: Weights, optimizer: Optimizer, *, estimate: bool = False) -> None:
        """Find out before training what would fail at the first save, and sweep the folder.

        Args:
            weights: this rank's.
            optimizer: over the same parameters.
            estimate: estimate how long a save will take: all ranks write a small part of it at
                once, and the slowest counts. Where one rank wants it, all do so. Else each makes an
                empty file.

        Raises:
            UserError: the folder cannot be written, is not seen by all ranks, or lacks room for two
                checkpoints; or the optimizer keeps what a checkpoint cannot hold.
        """
        self.saved_at = time.monotonic()
        if not self.config.enable or self.config.load_only:
            return
        sizes = merge(self._together(lambda: state.measure(weights, optimizer)), self.group)
        needed = 2 * sum(sizes.values())
        if self.config.last_save_in_hf:
            needed += sum(size for name, size in sizes.items() if name.startswith("model/"))
        probe = self._on_rank_zero(lambda: self._write_probe(needed))
        try:
            self._together(lambda: self._look_for(probe))
        finally:
            if dist.get_rank() == 0:
                probe.unlink(missing_ok=True)
        is_timed = any(gathered(estimate, self.group))
        share = is_timed * sum(sizes.values()) // dist.get_world_size()
        seconds = self._together(lambda: time_writing(self._name_probe(), share))
        self.save_seconds = max(gathered(seconds, self.group))

    def save(
        self,
        weights: Weights,
        optimizer: Optimizer,
        progress: Progress,
        *,
        is_last: bool = False,
        stopping: bool = False,
    ) -> None:
        """Write `step-N`, unless it is complete already, and remove what is no longer kept.

        The run's last one is of the weights alone with `last_save_model_only`. The state has been
        copied when this returns, and the rest is done beside training; but not with `async_mode`
        disabled, of a save after which the run ends, or where the host lacks memory for the copy.

        A save that fails removes its temporary folder and leaves earlier checkpoints as they are.
        (Should only the very last sync fail, after the rename, `step-N` stays: it is complete, if
        perhaps not yet safe from a power cut.)

        Raises:
            CheckpointError, OSError: on all ranks, naming the rank that failed; with
                `on_save_error = "continue"` only where the run ends with it.
        """
        self.finish()
        self.saved_at = time.monotonic()
        with self._failing(must_succeed=is_last or stopping):
            model_only = is_last and self.config.last_save_model_only
            progress = progress.model_copy(update={"model_only": model_only})
            background = None if is_last or stopping else self.background
            self._save(weights, optimizer, progress, background)

    def poll(self) -> None:
        """Report a save beside training that has ended. Costs nothing without one.

        Raises:
            CheckpointError, OSError: as `save`.
        """
        if self.background is not None and self.background.has_ended(self.group):
            self.finish()

    def finish(self, *, must_succeed: bool = False) -> None:
        """Wait for a save beside training.

        Raises:
            CheckpointError, OSError: as `save`; in any case if it `must_succeed`.
        """
        if self.background is not None and not self.background.is_idle:
            with self._failing(must_succeed=must_succeed):
                self.background.finish()

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Finish what is being saved before the run ends, unless it crashes."""
        try:
            yield
        except Stopped:
            self.finish(must_succeed=True)
            raise
        except BadNumbers:
            try:
                self.finish(must_succeed=True)
            except (CheckpointError, OSError, PeerFault) as fault:
                logger.warning(f"the save that was under way failed too: {fault}")
            raise
        self.finish(must_succeed=True)

    def _is_time(self) -> bool:
        """Return whether `interval_minutes` have passed on any rank's clock.

        Only then it costs a collective of one number.
        """
        minutes = self.config.interval_minutes
        if minutes is None:
            return False
        is_time = torch.tensor(int(time.monotonic() - self.saved_at >= 60 * minutes))
        dist.all_reduce(is_time, op=dist.ReduceOp.MAX, group=self.group)
        return bool(is_time.item())

    def path(self, step: int) -> Path:
        """Return the folder of the checkpoint after this step."""
        return self.folder / f"step-{step}"

    def _together(self, action: Callable[[], T]) -> T:
        return together(action, self.group)

    def _on_rank_zero(self, action: Callable[[], T]) -> T:
        return on_rank_zero(action, self.group)

    def _list_complete(self) -> list[int]:
        """Return the steps that are complete, newest first."""
        steps, _ = commit.list_steps(self.folder)
        return [step for step in steps if isinstance(commit.inspect(self.path(step), step), Marker)]

    @contextmanager
    def _failing(self, *, must_succeed: bool) -> Iterator[None]:
        """Let training go on after a failed save, if `on_save_error` says so."""
        try:
            yield
        except (CheckpointError, OSError, PeerFault) as fault:
            is_user_error = isinstance(fault, PeerFault) and fault.is_user_error
            if must_succeed or is_user_error or self.config.on_save_error == "stop":
                raise
            logger.warning(
                f"{fault}. Training goes on (checkpoint.on_save_error); the next save is tried in "
                "its turn, and the last complete checkpoint is kept until then"
            )

    def _save(
        self,
        weights: Weights,
        optimizer: Optimizer,
        progress: Progress,
        background: BackgroundWriter | None,
    ) -> None:
        target = self.path(progress.step)
        temporary = self._on_rank_zero(lambda: self._begin(target, progress.step))
        if temporary is None:
            logger.info(f"{target} exists already and is complete; not written again")
            return
        with removing(temporary):
            tensors = self._together(lambda: self._list_saved(weights, optimizer, progress))
            if background is None or not background.has_room(tensors, self.group):
                self._write(temporary, target, progress, self.group, tensors)
                return
            write = partial(self._write, temporary, target, progress, background.group)
            background.start(write, self._together(lambda: background.copy(tensors)))
        stalled = time.monotonic() - self.saved_at
        logger.info(f"saving {target} beside training, which stood still for {stalled:.2f} s")

    def _write(
        self,
        temporary: Path,
        target: Path,
        progress: Progress,
        group: dist.ProcessGroup,
        tensors: dict[str, Tensor],
    ) -> None:
        """Write, commit, retire. A collective call of all ranks, in one thread of each."""
        with removing(temporary):
            files = merge(write_tensors(temporary, tensors, group), group)
            on_rank_zero(lambda: commit.commit(temporary, target, progress, files), group)
        size = sum(record["bytes"] for record in files.values()) / 2**20
        self.save_seconds = time.monotonic() - self.saved_at
        logger.info(f"saved {target} ({size:,.1f} MiB) in {self.save_seconds:.1f} s")
        on_rank_zero(lambda: self._retire(progress.step), group)

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
        make_folder(self.folder)
        commit.sweep(self.folder)

    def _write_probe(self, needed: int) -> Path:
        """Write a file for the other ranks to see, and require room for `needed` bytes."""
        with user_errors(f"checkpoints cannot be written to {self.folder}", OSError):
            self._make_folder()
            free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise UserError(
                f"{self.folder} has {free / 2**30:.2f} GiB free, but two checkpoints need "
                f"{needed / 2**30:.2f} GiB: the last is kept until the next is complete. Make "
                "room, choose another checkpoint.folder, or turn checkpoint.enable off."
            )
        probe = self._name_probe()
        with writing(probe):
            probe.write_text("seen by every rank?")
            fsync_folder(self.folder)
        return probe

    def _name_probe(self) -> Path:
        """Return a new name, which the sweep finds."""
        return self.folder / f"{TEMPORARY}probe-{uuid.uuid4().hex}"

    def _look_for(self, probe: Path) -> None:
        if not probe.exists():
            raise UserError(
                f"{self.folder} must be on a file system that all ranks share: this one sees no "
                "probe file"
            )

    def _begin(self, target: Path, step: int) -> Path | None:
        """Make a temporary folder; None: the step is complete already. Set aside an incomplete."""
        self._make_folder()
        if target.exists():
            found = commit.inspect(target, step)
            if isinstance(found, Marker):
                return None
            commit.set_aside_unusable(target, found)
        temporary = self.folder / f"{TEMPORARY}{target.name}-{uuid.uuid4().hex}"
        temporary.mkdir()
        return temporary

    def _retire(self, newest: int) -> None:
        """Remove complete checkpoints beyond the `keep_latest_k` latest and those of `keep_every`.

        A failure is no reason to end the run.
        """
        if self.config.keep_latest_k == 0:
            return
        try:
            older = [step for step in self._list_complete() if step < newest]
            for step in older[self.config.keep_latest_k - 1 :]:
                if self.config.keep_every and step % self.config.keep_every == 0:
                    continue
                commit.remove(self.path(step))
        except (OSError, UserError) as fault:
            logger.warning(f"old checkpoints in {self.folder} could not be removed: {fault}")


def merge(entries: dict[str, T], group: dist.ProcessGroup) -> dict[str, T]:
    """Return the entries of all ranks; one that several ranks have comes once."""
    by_rank = gathered(entries, group)
    return {name: entry for of_rank in by_rank for name, entry in of_rank.items()}


@contextmanager
def removing(temporary: Path) -> Iterator[None]:
    """Remove what a failed save has written."""
    try:
        yield
    except BaseException:
        if dist.get_rank() == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise
