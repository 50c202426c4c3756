"""Batches: the dataset of a run, and the share of each step that a rank reads.

Shapes: B sequences of a microbatch, S tokens of a sequence.

There is no reader process and no prefetching: a step's batch comes from the page cache in well under a millisecond.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch

from torchtrain.config_manager import Data, Training, Validation, plan_sources
from torchtrain.datasets.documents import require_documents, split_documents
from torchtrain.datasets.mixture import Mixture
from torchtrain.datasets.packing import BestFitDataset
from torchtrain.datasets.prepare import open_tokens
from torchtrain.datasets.samples import Dataset, PackedDataset
from torchtrain.datasets.token_cache import cache_root
from torchtrain.datasets.tokenizer import Tokenizer
from torchtrain.logging_utils import logger
from torchtrain.utils import UserError


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
    sources = plan_sources(training, data, validation)
    caches = [open_tokens(source, data, tokenizer, log) for source in sources]
    best_fit = data.packing == "best_fit"
    if training.document_masking or best_fit:
        for cache in caches:
            require_documents(cache, tokenizer)
    datasets: list[Dataset] = [
        BestFitDataset(cache, training.seq_len, seed, tokenizer, cache_root(data.cache_folder), log)
        if best_fit
        else PackedDataset(cache, training.seq_len, seed)
        for cache in caches
    ]
    if len(datasets) == 1:
        return datasets[0]
    return Mixture(datasets, [source.share for source in sources], training.seq_len)


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
    tokens: np.ndarray, labels: np.ndarray, sample_ids: np.ndarray, size: int, separators: tuple[int, int] | None
) -> list[Microbatch]:
    """Cut tokens and labels `[B, S]` into microbatches of `size`, with the documents where `separators` are given."""
    arrays = [tokens, labels] + ([split_documents(tokens, labels, *separators)] if separators else [])
    of_batches = zip(*(torch.from_numpy(array).split(size) for array in arrays), strict=True)
    ids = iter(sample_ids.tolist())
    return [Microbatch(tokens, labels, list(islice(ids, size)), *rest) for tokens, labels, *rest in of_batches]


class DataLoader:
    """A rank's share of every step, a pure function of the step: it keeps no position, so there is none to lose.

    Optimizer step t = 1, 2, … consumes global samples [(t-1)·G, t·G) for a global batch of G; of these, each
    data-parallel rank takes a run of G / degree, cut into microbatches. Where a run went on with another G (see
    `resume`), that is counted from the step and the sample at which it did, its origin.
    """

    def __init__(
        self,
        dataset: Dataset,
        global_batch_size: int,
        data_parallel_rank: int,
        data_parallel_degree: int,
        microbatch_size: int,
        separators: tuple[int, int] | None = None,
    ) -> None:
        """Sizes count sequences; `microbatch_size` divides global_batch_size / data_parallel_degree.

        `separators`, BOS and EOS, are given under document masking alone.
        """
        assert 0 <= data_parallel_rank < data_parallel_degree
        assert global_batch_size % (data_parallel_degree * microbatch_size) == 0
        self.dataset = dataset
        self.global_batch_size = global_batch_size
        self._per_rank = global_batch_size // data_parallel_degree
        self._rank = data_parallel_rank
        self._microbatch_size = microbatch_size
        self._separators = separators
        self._origin_step, self._origin_sample = 0, 0

    def samples_before(self, step: int) -> int:
        """The first global sample of `step`, which is the number of those consumed before it."""
        return self._origin_sample + (step - 1 - self._origin_step) * self.global_batch_size

    def step_batches(self, step: int) -> list[Microbatch]:
        """The microbatches of optimizer step `step`, counted from 1."""
        assert step >= 1
        self._log_epochs(step)
        first = self.samples_before(step) + self._rank * self._per_rank
        sample_ids = np.arange(first, first + self._per_rank)
        return microbatches(*self.dataset.read(sample_ids), sample_ids, self._microbatch_size, self._separators)

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

    def state(self, step: int) -> dict[str, Any]:
        """The data state, as JSON, after optimizer step `step`; the same on every rank and for every degree."""
        return {
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
        changes = self._differences(saved, self.state(step))
        if not changes:
            return
        heading = f"the data of step {step} in the checkpoint (from {saved.get('source')})"
        if not accept_changes:
            raise UserError(
                "\n".join([f"{heading} can't be continued:", *changes])
                + "\nGive the run what it had, start a new one in another job.dump_folder, or go on all the same with "
                "checkpoint.accept_changed_data = true"
            )
        self._origin_step, self._origin_sample = step, consumed
        lines = [f"{heading} is not what this run reads, which checkpoint.accept_changed_data allows:", *changes]
        lines.append(
            f"  Step {step + 1} reads on from global sample {consumed:,} of the new order ({self.dataset.name}): "
            "what earlier steps have read may come again, and some of this epoch be left out"
        )
        logger.warning("\n".join(lines))

    def _differences(self, saved: dict[str, Any], current: dict[str, Any]) -> list[str]:
        names = {
            "corpus": "the corpus' contents (training.dataset, training.dataset_path, data.text_key, [validation])",
            "tokenizer": "the tokenizer (model.tokenizer_path)",
            "seq_len": "training.seq_len",
            "seed": "debug.seed",
            "n_samples": "the number of samples in an epoch",
            "packing": "data.packing",
            "global_batch_size": "training.global_batch_size",
        }
        return [
            f"  {names.get(key, key + ' (data.mixture)')}: {saved.get(key, 'none')} in the checkpoint, "
            f"{current.get(key, 'none')} now"
            for key in dict.fromkeys([*names, *saved, *current])
            if key not in ("source", "samples_consumed", "origin") and saved.get(key) != current.get(key)
        ]
