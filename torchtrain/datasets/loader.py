"""Batches: documents packed into sequences, and the share of each step that a rank reads.

Shapes: B sequences of a microbatch, S tokens of a sequence.

There is no reader process and no prefetching: a step's batch comes from the page cache in well under a millisecond.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from torchtrain.config_manager import Data, Training
from torchtrain.datasets.corpora import open_corpus
from torchtrain.datasets.data_order import locate
from torchtrain.datasets.token_cache import TokenCache, cache_root, open_token_cache
from torchtrain.datasets.tokenizer import SentencePieceTokenizer
from torchtrain.utils import UserError


class PackedDataset:
    """A token cache cut into sequences: sequence j holds tokens [j·S, j·S+S] and overlaps the next by one.

    The corpus' last tokens, too few for a sequence, are dropped. Documents follow each other without a border, so EOS
    predicts the BOS of the next; no label is -100.
    """

    def __init__(self, cache: TokenCache, seq_len: int, seed: int) -> None:
        """Cut `cache` into sequences of `seq_len` tokens, in the order of `seed`.

        Raises:
            UserError: the corpus is shorter than one sequence.
        """
        self.manifest = cache.manifest
        self.seq_len = seq_len
        self.seed = seed
        self._tokens = cache.tokens
        self.n_samples = (len(self._tokens) - 1) // seq_len
        if self.n_samples == 0:
            raise UserError(
                f"{self.manifest.source} has {len(self._tokens):,} tokens, but training.seq_len = {seq_len:,} needs "
                f"{seq_len + 1:,} for one sequence. Add text, or make the sequences shorter"
            )

    def identity(self) -> dict[str, Any]:
        """What fixes the samples and their order, as JSON: two runs with equal identities read the same."""
        return {
            "corpus": self.manifest.corpus_fingerprint,
            "tokenizer": self.manifest.tokenizer_fingerprint,
            "seq_len": self.seq_len,
            "seed": self.seed,
            "n_samples": self.n_samples,
        }

    @property
    def fingerprint(self) -> str:
        """`identity` in one string; ranks compare it, since they may see different files."""
        return " ".join(f"{name}={value}" for name, value in self.identity().items())

    def describe(self) -> str:
        """One line for the start of a run."""
        dropped = len(self._tokens) - 1 - self.n_samples * self.seq_len
        return (
            f"{self.manifest.source}: {self.manifest.documents:,} documents in {self.manifest.files:,} files, "
            f"{self.manifest.bytes / 1e6:,.2f} MB, {self.manifest.tokens:,} tokens; an epoch is {self.n_samples:,} "
            f"samples of {self.seq_len:,} tokens (the last {dropped:,} tokens dropped)"
        )

    def read(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels, int64 `[B, S]` each, of global samples `[B]`; a label is the token after."""
        starts = locate(sample_ids, self.n_samples, self.seed) * self.seq_len
        sequences = np.empty((len(starts), self.seq_len + 1), dtype=np.int64)
        for row, start in zip(sequences, starts, strict=True):
            row[:] = self._tokens[start : start + self.seq_len + 1]
        # Copies: views of the one array would be passed on with a row stride of S + 1.
        return sequences[:, :-1].copy(), sequences[:, 1:].copy()


def build_dataset(
    training: Training,
    data: Data,
    tokenizer: SentencePieceTokenizer,
    seed: int,
    *,
    log: Callable[[str], None] = print,
) -> PackedDataset:
    """The dataset of a run, from `training.dataset`, `dataset_path`, `seq_len`, `data.cache_folder` and `text_key`.

    Every rank calls it; on each host the first builds the token cache while the others wait. No collective is used.

    Raises:
        UserError: whatever is wrong with the corpus or the cache folder.
    """
    corpus = open_corpus(training.dataset, training.dataset_path, data.text_key)
    cache = open_token_cache(corpus, tokenizer, cache_root(data.cache_folder), log)
    return PackedDataset(cache, training.seq_len, seed)


@dataclass(frozen=True)
class Microbatch:
    """What one forward takes."""

    tokens: torch.Tensor
    """int64 `[B, S]`."""
    labels: torch.Tensor
    """int64 `[B, S]`; -100 marks a label that does not count."""
    sample_ids: list[int]
    """The global sample index of each row."""


class DataLoader:
    """A rank's share of every step, a pure function of the step: it keeps no position, so there is none to lose.

    Optimizer step t = 1, 2, … consumes global samples [(t-1)·G, t·G) for a global batch of G; of these, each
    data-parallel rank takes a run of G / degree, cut into microbatches.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        global_batch_size: int,
        data_parallel_rank: int,
        data_parallel_degree: int,
        microbatch_size: int,
    ) -> None:
        """Sizes count sequences; `microbatch_size` divides global_batch_size / data_parallel_degree."""
        assert 0 <= data_parallel_rank < data_parallel_degree
        assert global_batch_size % (data_parallel_degree * microbatch_size) == 0
        self.dataset = dataset
        self.global_batch_size = global_batch_size
        self._per_rank = global_batch_size // data_parallel_degree
        self._rank = data_parallel_rank
        self._microbatch_size = microbatch_size

    def step_batches(self, step: int) -> list[Microbatch]:
        """The microbatches of optimizer step `step`, counted from 1."""
        assert step >= 1
        first = (step - 1) * self.global_batch_size + self._rank * self._per_rank
        sample_ids = np.arange(first, first + self._per_rank)
        tokens, labels = (torch.from_numpy(array) for array in self.dataset.read(sample_ids))
        size = self._microbatch_size
        return [
            Microbatch(tokens[at : at + size], labels[at : at + size], sample_ids[at : at + size].tolist())
            for at in range(0, self._per_rank, size)
        ]

    def state(self, step: int) -> dict[str, Any]:
        """The data state, as JSON, after optimizer step `step`; the same on every rank and for every degree."""
        return {
            "samples_consumed": step * self.global_batch_size,
            "global_batch_size": self.global_batch_size,
            "source": self.dataset.manifest.source,
            **self.dataset.identity(),
        }

    def check_state(self, saved: dict[str, Any], step: int) -> None:
        """Refuse to go on after `step` unless this loader continues exactly the order of the `saved` state.

        Raises:
            UserError: names every difference.
        """
        current = self.state(step)
        names = {
            "corpus": "the corpus' contents (training.dataset, training.dataset_path, data.text_key)",
            "tokenizer": "the tokenizer (model.tokenizer_path)",
            "seq_len": "training.seq_len",
            "seed": "debug.seed",
            "n_samples": "the number of samples in an epoch",
            "global_batch_size": "training.global_batch_size",
            "samples_consumed": "the samples consumed so far",
        }
        different = [key for key in names if saved.get(key) != current[key]]
        if different:
            lines = [f"  {names[key]}: {saved.get(key)} in the checkpoint, {current[key]} now" for key in different]
            raise UserError(
                f"the data of step {step} in the checkpoint (from {saved.get('source')}) can't be continued:\n"
                + "\n".join(lines)
                + "\nGive the run what it had, or start a new one in another job.dump_folder"
            )
