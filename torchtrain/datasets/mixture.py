"""Mixtures: several sources, by weight, in one sequence of samples.

The source of sample i and its number there follow from i alone, in O(1): shares are fractions with
a common denominator P, so a pattern of P samples repeats for ever. In every prefix each source has
its share of the samples to within less than one. Each source keeps the order, and the epochs, that
it has alone.

The pattern is the one that R. Tijdeman gives for the chairman assignment problem ("The chairman
assignment problem", Discrete Mathematics 32, 1980): of the sources that may be taken without
getting ahead, the one that must be taken soonest.

Shapes: B samples, P samples of a period.
"""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from itertools import islice

import numpy as np

from torchtrain.datasets.samples import Dataset, Identity
from torchtrain.datasets.token_stream import Position

IN_COMMON = ("tokenizer", "seq_len", "seed")
"""Entries of an identity that all sources share."""


def balanced_pattern(shares: list[Fraction]) -> np.ndarray:
    """Return the source, int64 `[P]`, of each sample of a period.

    P is the common denominator of `shares`, which sum to 1. After n samples source s has been
    taken n · share times, to within 1 − 1/(2k − 2), for k sources.
    """
    assert sum(shares) == 1
    period = math.lcm(*(share.denominator for share in shares))
    weights = [int(share * period) for share in shares]
    slack = max(1, 2 * len(shares) - 2)
    taken = [0] * len(shares)
    pattern = np.empty(period, dtype=np.int64)
    for n in range(period):
        # A source may be taken once that puts it ahead by at most 1 − 1/slack (here times
        # slack · period, in integers), and must be before it falls behind by more. Weights up to
        # 10^5 have deadlines that doubles tell apart.
        chosen, soonest = -1, math.inf
        for source, weight in enumerate(weights):
            deadline = (slack * (taken[source] + 1) - 1) / weight
            is_allowed = slack * (weight * (n + 1) - period * taken[source]) >= period
            if is_allowed and deadline < soonest:
                chosen, soonest = source, deadline
        taken[chosen] += 1
        pattern[n] = chosen
    assert taken == weights
    return pattern


class Mixture(Dataset):
    """Samples of several datasets, of sequences of one length, in a balanced pattern."""

    def __init__(self, datasets: list[Dataset], shares: list[Fraction], seq_len: int) -> None:
        """Mix `datasets` by `shares`, which sum to 1."""
        self.name = "mixture of " + ", ".join(dataset.name for dataset in datasets)
        self.streams = [stream for dataset in datasets for stream in dataset.streams]
        self._datasets = datasets
        self._shares = shares
        self._seq_len = seq_len
        self._pattern = balanced_pattern(shares)
        # Of each source, the indices of its samples in a period.
        self._indices = [np.flatnonzero(self._pattern == s) for s in range(len(datasets))]
        # Of each sample of a period, its number among those of its source.
        self._numbers = np.empty_like(self._pattern)
        for indices in self._indices:
            self._numbers[indices] = np.arange(len(indices))

    def locate(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the source of each sample, and its number there: int64 `[B]` each."""
        periods, indices = np.divmod(sample_ids, len(self._pattern))
        sources = self._pattern[indices]
        per_period = np.array([len(indices) for indices in self._indices])
        return sources, periods * per_period[sources] + self._numbers[indices]

    def count(self, source: int, samples: int) -> int:
        """Return how many of the first `samples` samples are of `source`."""
        periods, rest = divmod(samples, len(self._pattern))
        indices = self._indices[source]
        return periods * len(indices) + int(np.searchsorted(indices, rest))

    def identity(self) -> Identity:
        identity: Identity = {}
        sources = []
        for dataset, share in zip(self._datasets, self._shares, strict=True):
            own: Identity = {"weight": str(share)}
            for name, value in dataset.identity().items():
                (identity if name in IN_COMMON else own)[name] = value
            sources.append(own)
        return {**identity, "sources": sources}

    def try_tokenizer(self) -> None:
        # At once, since each may wait for its source.
        with ThreadPoolExecutor(len(self._datasets)) as pool:
            for _ in pool.map(lambda dataset: dataset.try_tokenizer(), self._datasets):
                pass

    def read(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sources, numbers = self.locate(sample_ids)
        tokens = np.empty((len(sample_ids), self._seq_len), dtype=np.int64)
        labels = np.empty_like(tokens)
        for source in set(sources.tolist()):
            is_own = sources == source
            tokens[is_own], labels[is_own] = self._datasets[source].read(numbers[is_own])
        return tokens, labels

    def stream_of(self, sample_ids: np.ndarray) -> np.ndarray:
        sources, numbers = self.locate(sample_ids)
        streams = np.full_like(sample_ids, -1)
        first = 0
        for source, dataset in enumerate(self._datasets):
            is_own = sources == source
            if dataset.streams:
                streams[is_own] = first + dataset.stream_of(numbers[is_own])
            first += len(dataset.streams)
        return streams

    def resume(self, saved: Identity, positions: Sequence[Position], samples: int) -> None:
        common = {name: saved[name] for name in IN_COMMON if name in saved}
        saved_sources = saved.get("sources", [])
        left = iter(positions)
        for source, dataset in enumerate(self._datasets):
            own = saved_sources[source] if source < len(saved_sources) else {}
            of_source = list(islice(left, own.get("streams", 0)))
            dataset.resume({**common, **own}, of_source, self.count(source, samples))

    def epochs(self, samples: int) -> dict[str, float]:
        epochs: dict[str, float] = {}
        for source, dataset in enumerate(self._datasets):
            epochs |= dataset.epochs(self.count(source, samples))
        return epochs

    def describe(self, samples: int) -> str:
        lines = [f"{len(self._datasets)} sources, in a pattern of {len(self._pattern):,} samples"]
        for source, (dataset, share) in enumerate(zip(self._datasets, self._shares, strict=True)):
            lines.append(f"{float(share):6.2%} {dataset.describe(self.count(source, samples))}")
        return "\n           ".join(lines)
