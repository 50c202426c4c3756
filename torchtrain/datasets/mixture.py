"""Mixtures: several sources, by weight, in one row of samples.

The source of sample i and its number there follow from i alone, in O(1): shares are fractions with a common denominator
P, so a pattern of P samples can repeat for ever. In every prefix of the row each source has its share of the samples to
within less than one. Each source keeps the order, and the epochs, that it has alone.

The pattern is the one that R. Tijdeman gives for the chairman assignment problem ("The chairman assignment problem",
Discrete Mathematics 32, 1980): of the sources that may be taken without running ahead, the one that must be soonest.
"""

import math
from fractions import Fraction
from typing import Any

import numpy as np

from torchtrain.datasets.samples import Dataset, Position

OF_THE_RUN = ("tokenizer", "seq_len", "seed")
"""What sources have in common, in a dataset's identity."""


def balanced_pattern(shares: list[Fraction]) -> np.ndarray:
    """The source, int64 `[P]`, of each sample of a period; P is the common denominator of `shares`, which sum to 1.

    After n samples source s has been taken n · share to within 1 − 1/(2k − 2), for k sources.
    """
    assert sum(shares) == 1
    period = math.lcm(*(share.denominator for share in shares))
    weights = [int(share * period) for share in shares]
    slack = max(1, 2 * len(shares) - 2)
    taken = [0] * len(shares)
    pattern = np.empty(period, dtype=np.int64)
    for n in range(period):
        # A source may be taken once that puts it ahead by at most 1 − 1/slack (here times slack · period, in integers),
        # and must be before it falls behind by more. Weights up to 10^5 have deadlines that doubles tell apart.
        may = [
            s for s, w in enumerate(weights) if slack * (w * (n + 1) - period * taken[s]) >= period
        ]
        chosen = min(may, key=lambda s: ((slack * (taken[s] + 1) - 1) / weights[s], s))
        taken[chosen] += 1
        pattern[n] = chosen
    assert taken == weights
    return pattern


class Mixture(Dataset):
    """Samples of several datasets, each of sequences of the same length, in a balanced pattern."""

    def __init__(self, datasets: list[Dataset], shares: list[Fraction], seq_len: int) -> None:
        """Mix `datasets` by `shares`, which sum to 1."""
        self.name = "mixture of " + ", ".join(dataset.name for dataset in datasets)
        self._datasets = datasets
        self._shares = shares
        self._seq_len = seq_len
        self._pattern = balanced_pattern(shares)
        self._places = [
            np.flatnonzero(self._pattern == s) for s in range(len(datasets))
        ]  # in the period
        self._ranks = np.empty_like(self._pattern)  # of each place, among those of its source
        for places in self._places:
            self._ranks[places] = np.arange(len(places))

    def locate(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each sample, and its number there: int64 `[B]` each."""
        periods, places = np.divmod(sample_ids, len(self._pattern))
        sources = self._pattern[places]
        in_a_period = np.array([len(places) for places in self._places])
        return sources, periods * in_a_period[sources] + self._ranks[places]

    def count(self, source: int, samples: int) -> int:
        """How many of the first `samples` samples are of `source`."""
        periods, rest = divmod(samples, len(self._pattern))
        places = self._places[source]
        return periods * len(places) + int(np.searchsorted(places, rest))

    def identity(self) -> dict[str, Any]:
        identity: dict[str, Any] = {}
        for number, (dataset, share) in enumerate(
            zip(self._datasets, self._shares, strict=True), start=1
        ):
            identity[f"weight of source {number}"] = str(share)
            for name, value in dataset.identity().items():
                identity[name if name in OF_THE_RUN else f"{name} of source {number}"] = value
        return identity

    def read(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sources, numbers = self.locate(sample_ids)
        tokens = np.empty((len(sample_ids), self._seq_len), dtype=np.int64)
        labels = np.empty_like(tokens)
        for source in np.unique(sources):
            rows = sources == source
            tokens[rows], labels[rows] = self._datasets[source].read(numbers[rows])
        return tokens, labels

    def stream_of(self, sample_ids: np.ndarray) -> np.ndarray:
        sources, numbers = self.locate(sample_ids)
        streams = np.stack([dataset.stream_of(numbers) for dataset in self._datasets])[
            sources, np.arange(len(sources))
        ]
        return np.where(streams < 0, streams, (sources << 32) + streams)

    def positions(self) -> dict[str, Position]:
        return {
            f"{name} of source {number}": position
            for number, dataset in enumerate(self._datasets, start=1)
            for name, position in dataset.positions().items()
        }

    def resume(self, saved: dict[str, Any], samples: int) -> None:
        common = {name: value for name, value in saved.items() if name in OF_THE_RUN}
        for source, dataset in enumerate(self._datasets):
            tail = f" of source {source + 1}"
            own = {
                name.removesuffix(tail): value
                for name, value in saved.items()
                if name.endswith(tail)
            }
            dataset.resume({**common, **own}, self.count(source, samples))

    def waiting(self) -> tuple[float, str]:
        return min(dataset.waiting() for dataset in self._datasets)

    def epochs(self, samples: int) -> dict[str, float]:
        return {
            name: epochs
            for source, dataset in enumerate(self._datasets)
            for name, epochs in dataset.epochs(self.count(source, samples)).items()
        }

    def describe(self, samples: int) -> str:
        lines = [f"{len(self._datasets)} sources, in a pattern of {len(self._pattern):,} samples"]
        for source, (dataset, share) in enumerate(zip(self._datasets, self._shares, strict=True)):
            lines.append(f"{float(share):6.2%} {dataset.describe(self.count(source, samples))}")
        return "\n           ".join(lines)
