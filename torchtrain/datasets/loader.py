"""Batches: the dataset of a run, and the share of each step that a rank reads.

There is no reader process, and no prefetching except for streams (read_ahead.py): otherwise a
step's batch comes from the page cache in well under a millisecond.

Shapes: B sequences of a microbatch, S tokens of a sequence.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from torchtrain.config.layout import BatchPlan
from torchtrain.config.schema import Data, Training, Validation
from torchtrain.config.sources import DataSource, plan_sources
from torchtrain.datasets.cache_folder import cache_root
from torchtrain.datasets.data_state import DataState, differences, upgrade
from torchtrain.datasets.documents import Separators, require_documents, split_documents
from torchtrain.datasets.mixture import Mixture
from torchtrain.datasets.open import open_source, open_tokens
from torchtrain.datasets.packing import BestFitDataset
from torchtrain.datasets.read_ahead import ReadAhead
from torchtrain.datasets.samples import Dataset, PackedDataset
from torchtrain.datasets.streams import StreamDataset
from torchtrain.datasets.token_stream import Position
from torchtrain.datasets.tokenizer import Tokenizer
from torchtrain.errors import UserError
from torchtrain.logging_utils import logger


def build_dataset(
    training: Training,
    data: Data,
    tokenizer: Tokenizer,
    seed: int,
    validation: Validation | None = None,
) -> Dataset:
    """Build the dataset of a run: one source, or a mixture, without what is held out.

    Every rank calls it; on each host the first builds the token cache while the others wait. It is
    not a collective call.

    Raises:
        UserError: whatever is wrong with a source or the cache folder.
    """
    sources = plan_sources(training, data, validation)
    datasets = [_build_source(source, training, data, tokenizer, seed) for source in sources]
    if len(datasets) == 1:
        return datasets[0]
    return Mixture(datasets, [source.share for source in sources], training.seq_len)


def _build_source(
    source: DataSource, training: Training, data: Data, tokenizer: Tokenizer, seed: int
) -> Dataset:
    seq_len = training.seq_len
    if data.streaming and source.dataset != "tokens":  # a token file needs no cache anyhow
        return StreamDataset(open_source(source, data), tokenizer, seq_len, data.streams)
    cache = open_tokens(source, data, tokenizer)
    is_best_fit = data.packing == "best_fit"
    if training.document_masking or is_best_fit:
        require_documents(cache, tokenizer)
    if is_best_fit:
        return BestFitDataset(cache, seq_len, seed, tokenizer, cache_root(data.cache_folder))
    return PackedDataset(cache, seq_len, seed)


@dataclass(frozen=True)
class Microbatch:
    """What one forward takes."""

    tokens: torch.Tensor
    """int64 `[B, S]`."""
    labels: torch.Tensor
    """int64 `[B, S]`; IGNORE_INDEX marks a label that is not valid."""
    sample_ids: list[int]
    """The global sample index of each sequence."""
    documents: torch.Tensor | None = None
    """Under document masking, int64 `[B, S]`: where in its sequence each token's document begins
    (models/document_masking.py)."""

    def to(self, device: torch.device) -> "Microbatch":
        """Return the same with its tensors on this device, without waiting for it."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            pinned = tensor if device.type == "cpu" else tensor.pin_memory()
            return pinned.to(device, non_blocking=True)  # out of other memory, it would wait

        documents = None if self.documents is None else move(self.documents)
        return Microbatch(move(self.tokens), move(self.labels), self.sample_ids, documents)


def microbatches(
    tokens: np.ndarray,
    labels: np.ndarray,
    sample_ids: np.ndarray,
    size: int,
    separators: Separators | None,
) -> list[Microbatch]:
    """Cut tokens and labels, int64 `[B, S]`, into microbatches of `size` sequences.

    With `separators`, the ids of BOS and EOS, they know their documents.
    """
    documents = None
    if separators is not None:
        documents = torch.from_numpy(split_documents(tokens, labels, *separators))
    batches = []
    for start in range(0, len(sample_ids), size):
        own = slice(start, start + size)
        batch = Microbatch(
            tokens=torch.from_numpy(tokens[own]),
            labels=torch.from_numpy(labels[own]),
            sample_ids=sample_ids[own].tolist(),
            documents=None if documents is None else documents[own],
        )
        batches.append(batch)
    return batches


@dataclass
class DataLoader:
    """A rank's share of every step, which is a pure function of the step.

    Optimizer step t = 1, 2, … consumes global samples [(t-1)·G, t·G) for a global batch of G; of
    these, in the order of their streams, each data-parallel rank takes G / degree in a row, cut
    into microbatches. Where a run resumed with another G (see `resume`), that is counted from the
    step and the sample at which it did, its origin.

    Streams are read by a thread, ahead and in order, so their steps must be read in order too.
    Nothing is read at first.
    """

    dataset: Dataset
    batch: BatchPlan
    """Sizes of global batch and microbatch."""
    data_rank: int
    """Which share of the batch this rank reads."""
    separators: Separators | None = None
    """The ids of BOS and EOS under document masking."""
    stall_timeout_seconds: float = math.inf
    """How long a stream may give no document."""

    def __post_init__(self) -> None:
        share = self.batch.microbatch_size * self.batch.accumulation_steps
        self._own = slice(self.data_rank * share, (self.data_rank + 1) * share)
        self._origin = {"step": 0, "sample": 0}
        # Of the streams: at the start, and after the last step read.
        self._first_positions = self._positions = self._find_positions()
        self._ahead = ReadAhead(self._read_step, self.dataset.streams, self.stall_timeout_seconds)

    def samples_before(self, step: int) -> int:
        """Return the number of samples before `step`, which is the first one of `step`."""
        steps = step - 1 - self._origin["step"]
        return self._origin["sample"] + steps * self.batch.global_batch_size

    def read(
        self,
        step: int,
        waiting: Callable[[], AbstractContextManager[None]] = nullcontext,
        stop_reason: Callable[[], int] = int,
    ) -> list[Microbatch]:
        """Read this rank's microbatches of optimizer step `step`, counted from 1.

        A collective call where there are streams: the ranks wait for the slowest.

        Args:
            step: the step.
            waiting: goes around the time that this rank waits for its own data.
            stop_reason: why this rank is to stop, 0 if it is not; ends a wait for streams.

        Raises:
            UserError: whatever is wrong with a stream of this rank.
            PeerFault: or of another one.
            Stopped: a rank was to stop while one waited; the step is not read.
        """
        if self.dataset.streams:
            self._ahead.wait_for_all(step, waiting, stop_reason)
        with waiting():
            return self.step_batches(step)

    def step_batches(self, step: int) -> list[Microbatch]:
        """Read this rank's microbatches of `step`, whatever other ranks do.

        Raises:
            UserError: whatever is wrong with a stream.
        """
        assert step >= 1
        self._log_epochs(step)
        read = self._ahead.take if self.dataset.streams else self._read_step
        batches, self._positions = read(step)
        return batches

    def _read_step(self, step: int) -> tuple[list[Microbatch], list[Position]]:
        """Return the microbatches of `step`, and where the streams stand after it."""
        sample_ids = np.arange(self.samples_before(step), self.samples_before(step + 1))
        streams = self.dataset.stream_of(sample_ids)
        own = sample_ids[np.argsort(streams, kind="stable")][self._own]
        tokens, labels = self.dataset.read(own)
        batches = microbatches(tokens, labels, own, self.batch.microbatch_size, self.separators)
        return batches, self._find_positions()

    def _find_positions(self) -> list[Position]:
        return [stream.position() for stream in self.dataset.streams]

    def _log_epochs(self, step: int) -> None:
        """Say which sources begin an epoch in this step, except the first."""
        before = self.dataset.epochs(self.samples_before(step))
        after = self.dataset.epochs(self.samples_before(step + 1))
        for name, epochs in after.items():
            begun = math.ceil(epochs)  # the epoch of the last sample read, counted from 1
            if begun > math.ceil(before[name]) and begun > 1:
                logger.info(f"step {step}: epoch {begun} of {name} begins")

    def describe(self, steps: int) -> str:
        """Return what the dataset holds, and the epochs of each source in a run of `steps`."""
        return self.dataset.describe(self.samples_before(steps + 1))

    def positions(self) -> dict[int, Position]:
        """Return where the streams stand that this rank has read, by their numbers."""
        first = self._first_positions
        return {v: position for v, position in enumerate(self._positions) if position != first[v]}

    def state(self, step: int, by_rank: Sequence[dict[int, Position]] = ()) -> DataState:
        """Return the data state after `step`, as JSON; the same on every rank.

        Of a stream that several ranks have read, the position that is furthest on counts: that
        rank has read the last sample.

        Args:
            step: the last optimizer step taken.
            by_rank: what `positions` gives on each rank.
        """
        positions = list(self._first_positions)
        for own in by_rank:
            for number, position in own.items():
                positions[number] = max(position, positions[number])
        return {
            "samples_consumed": self.samples_before(step + 1),
            "origin": self._origin,
            "global_batch_size": self.batch.global_batch_size,
            "name": self.dataset.name,
            "dataset": self.dataset.identity(),
            "positions": [position._asdict() for position in positions],
        }

    def continue_at(self, step: int, sample: int) -> None:
        """Read on after `step`, where nothing has been read yet, at this global sample."""
        self._origin = {"step": step, "sample": sample}

    def resume(self, saved: DataState, step: int, *, accept_changes: bool = False) -> None:
        """Resume after `step` exactly where the `saved` state, of any layout, ended.

        Args:
            saved: what `state` gave after `step`.
            step: the last optimizer step taken.
            accept_changes: log what has changed, and read on in the new order at the same sample
                number.

        Raises:
            UserError: the state is not of `step`, or something has changed; names every difference.
        """
        saved = upgrade(saved)
        origin = saved.get("origin", {"step": 0, "sample": 0})
        consumed = origin["sample"] + (step - origin["step"]) * saved["global_batch_size"]
        if saved["samples_consumed"] != consumed:
            raise UserError(
                f"the data state in the checkpoint is not of step {step}: the samples consumed so "
                f"far are {saved['samples_consumed']} in the checkpoint, {consumed} by its "
                "step and batch"
            )
        self._origin = origin
        positions = [Position(**position) for position in saved["positions"]]
        self.dataset.resume(saved["dataset"], positions, consumed)
        self._first_positions = self._positions = self._find_positions()
        changes = differences(saved, self.state(step))
        if not changes:
            return
        what = f"the data of step {step} in the checkpoint (from {saved['name']})"
        text = "\n".join([f"{what} is not what this run reads:", *changes])
        if not accept_changes:
            raise UserError(
                f"{text}\nGive the run what it had, start a new one in another job.dump_folder, "
                "or resume anyway with checkpoint.accept_changed_data = true"
            )
        self._origin = {"step": step, "sample": consumed}
        logger.warning(
            f"{text}\ncheckpoint.accept_changed_data allows it. Step {step + 1} reads on from "
            f"global sample {consumed:,} of the new order ({self.dataset.name}): "
            "what earlier steps have read may come again, and some of this epoch be left out"
        )
