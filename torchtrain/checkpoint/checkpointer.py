"""Which checkpoints a run has: choosing what to resume from, and loading it."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from torch.optim import Optimizer

import torchtrain.checkpoint.commit as commit
import torchtrain.checkpoint.state as state
from torchtrain.checkpoint.commit import Progress, Source
from torchtrain.checkpoint.digests import find_altered
from torchtrain.checkpoint.foreign import (
    Foreign,
    is_dcp_folder,
    open_hf_source,
    open_torchtitan_source,
)
from torchtrain.checkpoint.hf_folder import CONFIG as HF_CONFIG
from torchtrain.checkpoint.saving import Saver
from torchtrain.checkpoint.state import Weights
from torchtrain.checkpoint.storage import find_contradiction, list_entries, read_index, read_tensors
from torchtrain.errors import SharedUserError, UserError
from torchtrain.logging_utils import logger
from torchtrain.ranks import gathered
from torchtrain.utils import expand_user, first_few, user_errors

WEIGHTS_ALONE = (
    "it holds the weights alone (checkpoint.last_save_model_only), which can start another run, by "
    "checkpoint.initial_load_path"
)

CountSteps = Callable[[Progress], int]


class Checkpointer(Saver):
    """Saves the checkpoints of one run, chooses the one to resume from, and loads it.

    Arguments, and how ranks call its methods, are `Saver`'s.
    """

    def find(self, count_steps: CountSteps = lambda saved: 0) -> Source | Foreign | None:
        """Choose what this run resumes from, verified to the last byte; None: it starts at step 0.

        The run's own newest complete checkpoint, or `load_step`; where the run has none yet,
        `initial_load_path`. A damaged one of the run's own is set aside by a rename, with a
        warning, and the next older one is taken; so it is where the newest holds the weights alone
        and is not that of the run's last step. What dead runs left unfinished is removed.

        Args:
            count_steps: from what a checkpoint says of itself to the steps of a run that goes on
                from it.

        Raises:
            UserError: `load_step` or `initial_load_path` is missing, damaged or another program's,
                or the run has checkpoints, but none that is complete and can be resumed from (a
                start at step 0 would hide that).
        """
        if not self.config.enable:
            return None
        if not self.config.load_only:
            self._on_rank_zero(lambda: commit.sweep(self.folder))
        steps, names = self._on_rank_zero(lambda: commit.list_steps(self.folder))
        if self.config.load_step >= 0:
            return self._find_step(self.config.load_step, count_steps)
        for step in steps:
            found = self.verify(self.path(step), step)
            if isinstance(found, Source) and _is_short(found.progress, count_steps):
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

    def peek(self) -> Progress | None:
        """Return what `find` may take of the run's own, by what that says of itself.

        It is neither hashed nor changed. None: there is none, or it can be seen to be damaged.
        """
        return self._on_rank_zero(lambda: commit.peek(self.config, self.folder))

    def verify(
        self, path: Path, step: int | None = None, *, model_only: bool = False
    ) -> Source | str:
        """Return the checkpoint at `path`, or what is wrong with it; it is left as it is.

        Rank 0 looks at names and sizes, then each rank hashes a share of the files.

        Args:
            path: of its folder.
            step: the one that it must be of; None: any.
            model_only: whether only the weights are wanted.

        Raises:
            UserError: a later version or another program wrote it, it cannot be read, or its index
                would run code.
        """
        marker = self._on_rank_zero(lambda: commit.inspect(path, step))
        if isinstance(marker, str):
            return marker
        share = sorted(marker.files)[dist.get_rank() :: dist.get_world_size()]
        altered = self._together(lambda: find_altered(path, marker.files, share, marker.format))
        for fault in gathered(altered, self.group):
            if fault is not None:
                return fault
        progress = self._on_rank_zero(lambda: commit.read_progress(path, marker))
        if isinstance(progress, str):
            return progress
        fault = self._on_rank_zero(lambda: find_contradiction(path, marker))
        if fault is not None:
            return fault
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

    def load(
        self,
        source: Source,
        weights: Weights,
        optimizer: Optimizer | None,
        changed_states: str = "",
    ) -> None:
        """Fill the weights in place and, unless only they are wanted, the rest of the state.

        Learning rate and other settings are not in the file: they come from the config. Going back
        to an earlier step (`load_step`) sets the run's later checkpoints aside as superseded: the
        steps they stand for are taken again.

        Args:
            source: from `find`.
            weights: this rank's, sharded and materialized; their values are overwritten.
            optimizer: over the same parameters; None loads only the weights.
            changed_states: as in `check_tensors`.

        Raises:
            UserError: the checkpoint's tensors are not this model's, or its index is not what DCP
                writes.
            CheckpointError: reading failed; names the ranks.
        """
        started = time.monotonic()
        if source.model_only or "optimizer" in source.left_out:
            optimizer = None
        metadata = self._together(lambda: read_index(source.path, source.marker.files))
        entries = list_entries(metadata)
        has_states = any(name.startswith("optimizer/") for name in entries)
        stateful = optimizer if has_states or not source.progress.has_skips else None
        tensors = self._together(lambda: state.list_training_state(weights, stateful, entries))
        everyones: set[str] = set().union(*gathered(list(tensors), self.group))
        converted = self._together(
            lambda: state.check_tensors(
                source, entries, tensors, everyones, optimizer, changed_states
            )
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

    def _find_step(self, step: int, count_steps: CountSteps) -> Source:
        """Return the checkpoint of `checkpoint.load_step`."""
        path = self.path(step)
        found = self.verify(path, step)
        if isinstance(found, Source) and _is_short(found.progress, count_steps):
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
            return replace(found, left_out=tuple(self.config.exclude_from_loading))
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
        steps, _ = commit.list_steps(self.folder)
        for later in steps:
            if later > step:
                path = self.path(later)
                target = commit.set_aside(path, "superseded")
                logger.warning(
                    f"this run resumes from step {step}: its {path.name} is now {target.name}"
                )


def _is_short(saved: Progress, count_steps: CountSteps) -> bool:
    """Check whether a checkpoint holds the weights alone, before the end of the run."""
    return saved.model_only and saved.step < count_steps(saved)
