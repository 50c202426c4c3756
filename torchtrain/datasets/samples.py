"""Samples: what a loader reads by number, whatever they come from.

Shapes: B samples, S tokens of a sequence.
"""

import math
from typing import Any, Protocol

import numpy as np

from torchtrain.datasets.data_order import locate
from torchtrain.datasets.token_cache import TokenCache
from torchtrain.errors import UserError

Position = list[int]
"""Where a stream stands (streams.py), its first number that of its next sample: of two, the larger one is further."""


class Dataset(Protocol):
    """An endless row of samples; which one stands at number i depends on `identity` and i alone."""

    name: str
    """How messages call it."""

    def identity(self) -> dict[str, Any]:
        """What fixes the samples and their order, as flat JSON: two runs with equal identities read the same."""

    def read(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels, int64 `[B, S]` each, of samples `[B]`; a label of -100 does not count."""

    def epochs(self, samples: int) -> dict[str, float]:
        """How often the first `samples` samples go through each source, by its name; streams count by themselves."""
        return {}

    def describe(self, samples: int) -> str:
        """What it holds, for the start of a run, and how many epochs the run's `samples` take; a line a source."""

    # What follows concerns streams alone (streams.py), whose samples can only be read in ascending order.

    def stream_of(self, sample_ids: np.ndarray) -> np.ndarray:
        """The stream, int64 `[B]`, of samples `[B]`; -1 where there is none, and any order will do."""
        return np.full_like(sample_ids, -1)

    def positions(self) -> dict[str, Position]:
        """Where every stream stands, after what has been read."""
        return {}

    def resume(self, saved: dict[str, Any], samples: int) -> None:
        """Go on with sample number `samples` where the identity and the positions in `saved` say, those that still fit.

        Streams of another corpus, or of another number, begin anew.
        """
        return

    def waiting(self) -> tuple[float, str]:
        """Since when (`time.monotonic`) it waits for a document of a stream, and of which; infinite if it does not."""
        return math.inf, self.name

    @property
    def fingerprint(self) -> str:
        """`identity` in one string; ranks compare it, since they may see different files."""
        return " ".join(f"{name}={value}" for name, value in self.identity().items())


class PackedDataset(Dataset):
    """Tokens cut into sequences: sequence j holds tokens [j·S, j·S+S] and overlaps the next by one.

    The last tokens, too few for a sequence, are dropped, or with `keep_rest` filled up with labels of -100. Documents
    follow each other without a border, so EOS predicts the BOS of the next.
    """

    def __init__(self, cache: TokenCache, seq_len: int, seed: int, keep_rest: bool = False) -> None:
        """Cut `cache` into sequences of `seq_len` tokens, in the order of `seed`.

        Raises:
            UserError: the corpus is shorter than one sequence.
        """
        self.manifest = cache.manifest
        self.name = cache.manifest.source
        self.seq_len = seq_len
        self.seed = seed
        self._tokens = cache.tokens
        self.n_samples = (len(self._tokens) - 1 + (seq_len - 1 if keep_rest else 0)) // seq_len
        self._remark = (
            f"the last {max(0, len(self._tokens) - 1 - self.n_samples * seq_len):,} tokens dropped"
        )
        if self.n_samples <= 0:
            raise UserError(
                f"{self.name} has {len(self._tokens):,} tokens, but training.seq_len = {seq_len:,} needs "
                f"{seq_len + 1:,} for one sequence. Add text, or make the sequences shorter"
            )

    def identity(self) -> dict[str, Any]:
        return {
            "corpus": self.manifest.corpus_fingerprint,
            "tokenizer": self.manifest.tokenizer_fingerprint,
            "seq_len": self.seq_len,
            "seed": self.seed,
            "n_samples": self.n_samples,
        }

    def read(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        starts = locate(sample_ids, self.n_samples, self.seed) * self.seq_len
        sequences = np.full((len(starts), self.seq_len + 1), -100, dtype=np.int64)
        for row, start in zip(sequences, starts, strict=True):
            there = self._tokens[start : start + self.seq_len + 1]
            row[: len(there)] = there
        return np.maximum(sequences[:, :-1], 0), np.ascontiguousarray(sequences[:, 1:])

    def epochs(self, samples: int) -> dict[str, float]:
        return {self.name: samples / self.n_samples}

    def describe(self, samples: int) -> str:
        return (
            f"{self.manifest.describe()}; an epoch is {self.n_samples:,} samples of {self.seq_len:,} tokens "
            f"({self._remark}); the run takes {samples / self.n_samples:,.2f} epochs"
        )
