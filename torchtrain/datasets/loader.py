"""Batches: the dataset of a run, and the share of each step that a rank reads.

Shapes: B sequences of a microbatch, S tokens of a sequence.

There is no reader process, and no prefetching but of streams (streams.py): else a step's batch comes from the page
cache in well under a millisecond.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from torchtrain.config.layout import BatchPlan
from torchtrain.config.schema import Data, Training, Validation
from torchtrain.config.sources import DataSource, plan_sources
from torchtrain.datasets.documents import require_documents, split_documents
from torchtrain.datasets.mixture import Mixture
from torchtrain.datasets.packing import BestFitDataset
from torchtrain.datasets.prepare import open_source, open_tokens
from torchtrain.datasets.samples import Dataset, PackedDataset, Position
from torchtrain.datasets.streams import StreamDataset
from torchtrain.datasets.token_cache import cache_root
from torchtrain.datasets.tokenizer import Tokenizer
from torchtrain.errors import UserError
from torchtrain.logging_utils import logger


def build_dataset(
    training: Training,
    data: Data,
    tokenizer: Tokenizer,
    seed: int,
    validation: Validation | None = None,
    *,
    log: Callable[[str], None] = print,
) -> Dataset:
    """The dataset of a run, as `training` and `data` name it: one source, or a mixture; less what is held out.

    Every rank calls it; on each host the first builds the token cache while the others wait. No collective is used.

    Raises:
        UserError: whatever is wrong with a source or the cache folder.
    """
    seq_len = training.seq_len

    def build(source: DataSource) -> Dataset:
        if data.streaming and source.dataset != "tokens":  # whose files need no cache
            return StreamDataset(open_source(source, data), tokenizer, seq_len, data.streams)
        cache = open_tokens(source, data, tokenizer, log)
        best_fit = data.packing == "best_fit"
        if training.document_masking or best_fit:
            require_documents(cache, tokenizer)
        if best_fit:
            return BestFitDataset(
                cache, seq_len, seed, tokenizer, cache_root(data.cache_folder), log
            )
        return PackedDataset(cache, seq_len, seed)

    sources = plan_sources(training, data, validation)
    datasets = [build(source) for source in sources]
    if len(datasets) == 1:
        return datasets[0]
    return Mixture(datasets, [source.share for source in sources], seq_len)


@dataclass(frozen=True)
class Microbatch:
    """What one forward takes."""

    tokens: torch.Tensor
    """int64 `[B, S]`."""
    labels: torch.Tensor
    """int64 `[B, S]`; -100 marks a label that does not count."""
    sample_ids: list[int]
    """The global sample index of each row."""
    documents: torch.Tensor | None = None
    """Under document masking, where in its row each token's document begins (models/document_masking.py)."""

    def to(self, device: torch.device) -> "Microbatch":
        """The same with its tensors on this device."""
        return Microbatch(
            self.tokens.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.sample_ids,
            None if self.documents is None else self.documents.to(device, non_blocking=True),
        )


def microbatches(
    tokens: np.ndarray,
    labels: np.ndarray,
    sample_ids: np.ndarray,
    size: int,
    separators: tuple[int, int] | None,
) -> list[Microbatch]:
    """Cut tokens and labels `[B, S]` into microbatches of `size`, with the documents where `separators` are given."""
    arrays = [tokens, labels] + (
        [split_documents(tokens, labels, *separators)] if separators else []
    )
    of_batches = zip(*(torch.from_numpy(array).split(size) for array in arrays), strict=True)
    ids = iter(sample_ids.tolist())
    return [
        Microbatch(tokens, labels, list(islice(ids, size)), *rest)
        for tokens, labels, *rest in of_batches
    ]


STEPS_AHEAD = 4
"""That a streaming loader reads while the run computes: enough to bridge some seconds without a document."""


class DataLoader:
    """A rank's share of every step, a pure function of the step: but for streams it keeps no position to be lost.

    Optimizer step t = 1, 2, … consumes global samples [(t-1)·G, t·G) for a global batch of G; of these, in the order of
    their streams, each data-parallel rank takes a run of G / degree, cut into microbatches. Where a run went on with
    another G (see `resume`), that is counted from the step and the sample at which it did, its origin.

    Of streams, a thread reads the steps to come, in order; so they must be taken one after the other.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch: BatchPlan,
        data_parallel_rank: int,
        separators: tuple[int, int] | None = None,
        stall_timeout_seconds: float = math.inf,
    ) -> None:
        """`separators`, BOS and EOS, are given under document masking alone.

        A stream may take `stall_timeout_seconds` for a document.
        """
        self.dataset, self._separators, self._stall_timeout_s = (
            dataset,
            separators,
            stall_timeout_seconds,
        )
        self.global_batch_size, self._microbatch_size = (
            batch.global_batch_size,
            batch.microbatch_size,
        )
        of_a_rank = batch.microbatch_size * batch.accumulation_steps
        self._mine = slice(data_parallel_rank * of_a_rank, (data_parallel_rank + 1) * of_a_rank)
        self._origin_step, self._origin_sample = 0, 0
        # Of the streams: at the start, and after the last step taken.
        self._begun = self._positions = dataset.positions()
        self._reader = ThreadPoolExecutor(max_workers=1)
        self._ahead: deque[Future[tuple[int, list[Microbatch], dict[str, Position]]]] = deque()

    @property
    def streaming(self) -> bool:
        """Whether a step can fail, or take long, because of what lies outside this machine."""
        return bool(self._begun)

    def samples_before(self, step: int) -> int:
        """The first global sample of `step`, which is the number of those consumed before it."""
        return self._origin_sample + (step - 1 - self._origin_step) * self.global_batch_size

    def step_batches(self, step: int) -> list[Microbatch]:
        """The microbatches of optimizer step `step`, counted from 1.

        Raises:
            UserError: whatever is wrong with a stream, or that it gives nothing any more.
        """
        assert step >= 1
        self._log_epochs(step)
        if not self.streaming:
            return self._read(step)[1]
        while not self.read_ahead(step):
            pass
        read, batches, self._positions = self._ahead.popleft().result()
        assert read == step, "streams are read step by step"
        return batches

    def read_ahead(self, step: int) -> bool:
        """Of streams, begin to read `step` and those after it; whether `step` has come, within a second.

        Raises:
            UserError: whatever is wrong with a stream, or that no document has come for the time allowed.
        """
        while len(self._ahead) <= STEPS_AHEAD:
            self._ahead.append(self._reader.submit(self._read, step + len(self._ahead)))
        wait([self._ahead[0]], timeout=1.0)
        if self._ahead[0].done():
            self._ahead[0].result()
            return True
        since, stream = self.dataset.waiting()
        if time.monotonic() - since >= self._stall_timeout_s:
            raise UserError(
                f"{stream}: no document has come for {self._stall_timeout_s:.0f} s "
                "(data.stall_timeout_seconds allows no more)"
            )
        return False

    def _read(self, step: int) -> tuple[int, list[Microbatch], dict[str, Position]]:
        """The step, its microbatches, and where the streams are after it."""
        sample_ids = np.arange(self.samples_before(step), self.samples_before(step + 1))
        sample_ids = sample_ids[np.argsort(self.dataset.stream_of(sample_ids), kind="stable")]
        mine = sample_ids[self._mine]
        batches = microbatches(
            *self.dataset.read(mine), mine, self._microbatch_size, self._separators
        )
        return step, batches, self.dataset.positions()

    def _log_epochs(self, step: int) -> None:
        """Say which sources begin an epoch in this step, the first aside."""
        before, after = (self.dataset.epochs(self.samples_before(at)) for at in (step, step + 1))
        for name, epochs in after.items():
            begun = math.ceil(epochs)  # the epoch of the last sample read, counted from 1
            if begun > math.ceil(before[name]) and begun > 1:
                logger.info(f"step {step}: epoch {begun} of {name} begins")

    def describe(self, steps: int) -> str:
        """The dataset, and how many epochs of each source a run of `steps` takes."""
        return self.dataset.describe(self.samples_before(steps + 1))

    def positions(self) -> dict[str, Position]:
        """Of the streams that this rank has read, where they are after the last step taken."""
        return {
            name: place for name, place in self._positions.items() if place != self._begun[name]
        }

    def state(self, step: int, of_all_ranks: Iterable[dict[str, Position]] = ()) -> dict[str, Any]:
        """The data state, as JSON, after optimizer step `step`; the same on every rank and for every degree.

        Of a stream that several ranks have read, that one counts which is the furthest: it has read the last sample.

        Args:
            step: The last step taken.
            of_all_ranks: What `positions` gives on each.
        """
        positions = dict(self._begun)
        for of_a_rank in of_all_ranks:
            positions |= {name: max(place, positions[name]) for name, place in of_a_rank.items()}
        return {
            "positions": positions,
            "samples_consumed": self.samples_before(step + 1),
            "origin": [self._origin_step, self._origin_sample],
            "global_batch_size": self.global_batch_size,
            "source": self.dataset.name,
            **self.dataset.identity(),
        }

    def resume(self, saved: dict[str, Any], step: int, accept_changes: bool = False) -> None:
        """Go on after `step` exactly where the `saved` state, of any degree, ended.

        Args:
            saved: What `state` gave after `step`.
            step: The last optimizer step taken.
            accept_changes: Log what has changed, and take the samples that come next by number from the new order.

        Raises:
            UserError: the state is not of `step`, or something has changed; names every difference.
        """
        origin_step, origin_sample = saved.get("origin", (0, 0))
        consumed = origin_sample + (step - origin_step) * saved.get("global_batch_size", 0)
        if saved.get("samples_consumed") != consumed:
            raise UserError(
                f"the data state in the checkpoint is not of step {step}: the samples consumed so far are "
                f"{saved.get('samples_consumed')} in the checkpoint, {consumed} by its step and batch"
            )
        self._origin_step, self._origin_sample = origin_step, origin_sample
        self.dataset.resume({**saved, **saved.get("positions", {})}, consumed)
        self._begun = self._positions = self.dataset.positions()
        changes = self._differences(saved, self.state(step))
        if not changes:
            return
        source = f"the data of step {step} in the checkpoint (from {saved.get('source')})"
        text = "\n".join([f"{source} is not what this run reads:", *changes])
        if not accept_changes:
            raise UserError(
                f"{text}\nGive the run what it had, start a new one in another job.dump_folder, or go on all the same "
                "with checkpoint.accept_changed_data = true"
            )
        self._origin_step, self._origin_sample = step, consumed
        logger.warning(
            f"{text}\ncheckpoint.accept_changed_data allows it. Step {step + 1} reads on from global sample "
            f"{consumed:,} of the new order ({self.dataset.name}): what earlier steps have read may come again, and "
            "some of this epoch be left out"
        )

    def _differences(self, saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
        names = {
            "corpus": "the corpus' contents (training.dataset, training.dataset_path, data.text_key, [validation])",
            "tokenizer": "the tokenizer (model.tokenizer_path)",
            "seq_len": "training.seq_len",
            "seed": "debug.seed",
            "n_samples": "the number of samples in an epoch",
            "packing": "data.packing",
            "streams": "data.streams",
            "global_batch_size": "training.global_batch_size",
        }
        return [
            f"  {names.get(key, key + ' (data.mixture)')}: {saved.get(key, 'none')} in the checkpoint, "
            f"{current.get(key, 'none')} now"
            for key in dict.fromkeys([*names, *saved, *current])
            if key not in ("source", "samples_consumed", "origin", "positions")
            and saved.get(key) != current.get(key)
        ]
