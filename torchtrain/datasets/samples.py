"""Samples: what a loader reads by number, whatever they come from.

Shapes: B samples, S tokens of a sequence.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from torchtrain.datasets.data_order import locate
from torchtrain.datasets.token_cache import TokenCache
from torchtrain.datasets.token_stream import Position, TokenStream
from torchtrain.errors import UserError
from torchtrain.utils import IGNORE_INDEX, plural

Identity = dict[str, Any]
"""What fixes samples and their order, as JSON: numbers and strings by name. A mixture's has
`sources`, the list of its sources' own, each with its `weight`."""


class Dataset(Protocol):
    """An endless sequence of samples; sample i depends on `identity` and i alone."""

    name: str
    """Name in messages."""
    streams: Sequence[TokenStream] = ()
    """Streams that samples are read from, which is only possible in ascending order; else none."""

    def identity(self) -> Identity:
        """Return what fixes the samples and their order: equal identities, equal samples."""

    def read(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Read tokens and labels, int64 `[B, S]` each, of samples `[B]`.

        A label of IGNORE_INDEX is not valid.
        """

    def try_tokenizer(self) -> None:
        """Try whether the tokenizer keeps the text, where that was not done as it was tokenized.

        Raises:
            UserError: most is lost.
        """
        return

    def describe(self, samples: int) -> str:
        """Return one line per source: what it holds, and the epochs of a run of `samples`."""

    def epochs(self, samples: int) -> dict[str, float]:
        """Return how often `samples` samples go through each source; streams count themselves."""
        return {}

    def stream_of(self, sample_ids: np.ndarray) -> np.ndarray:
        """Return the stream, int64 `[B]`, of samples `[B]`; -1 where there is none."""
        return np.full_like(sample_ids, -1)

    def resume(self, saved: Identity, positions: Sequence[Position], samples: int) -> None:
        """Set the streams, if any, to where they stood after `samples` samples.

        Args:
            saved: the identity of the dataset that the positions are of.
            positions: of its streams, in order.
            samples: number of samples that were read, which is the next one's number.
        """
        return

    @property
    def fingerprint(self) -> str:
        """The identity as text; ranks compare it, since they may see different files."""
        return " ".join(f"{name}={value}" for name, value in flatten(self.identity()).items())


def flatten(identity: Identity) -> dict[str, Any]:
    """Return the entries of an identity by names such as "corpus" or "corpus of source 1"."""
    entries = {name: value for name, value in identity.items() if name != "sources"}
    for number, source in enumerate(identity.get("sources", []), start=1):
        for name, value in source.items():
            entries[f"{name} of source {number}"] = value
    return entries


class PackedDataset(Dataset):
    """Tokens cut into sequences: sequence j holds tokens [j·S, j·S+S] and overlaps the next by one.

    The last tokens, too few for a sequence, are dropped or, with `keep_rest`, filled up with
    labels of IGNORE_INDEX. Nothing separates documents, so EOS predicts the BOS of the next.
    """

    def __init__(
        self, cache: TokenCache, seq_len: int, seed: int, *, keep_rest: bool = False
    ) -> None:
        """Cut `cache` into sequences of `seq_len` tokens, in the order of `seed`.

        Raises:
            UserError: the corpus is shorter than one sequence.
        """
        self.manifest = cache.manifest
        self.name = cache.manifest.source
        self.seq_len = seq_len
        self.seed = seed
        self._tokens = cache.tokens
        labels = len(self._tokens) - 1
        self.n_samples = -(-labels // seq_len) if keep_rest else labels // seq_len
        dropped = max(0, labels - self.n_samples * seq_len)
        self._remark = f"the last {plural(dropped, 'token')} dropped"
        if self.n_samples <= 0:
            raise UserError(
                f"{self.name} has {plural(len(self._tokens), 'token')}, but training.seq_len = "
                f"{seq_len:,} needs {seq_len + 1:,} for one sequence. Add text, or make the "
                "sequences shorter"
            )

    def identity(self) -> Identity:
        return {
            "corpus": self.manifest.corpus_fingerprint,
            "tokenizer": self.manifest.tokenizer_fingerprint,
            "seq_len": self.seq_len,
            "seed": self.seed,
            "n_samples": self.n_samples,
        }

    def read(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        starts = locate(sample_ids, self.n_samples, self.seed) * self.seq_len
        sequences = np.full((len(starts), self.seq_len + 1), IGNORE_INDEX, dtype=np.int64)
        for sequence, start in zip(sequences, starts, strict=True):
            tokens = self._tokens[start : start + self.seq_len + 1]
            sequence[: len(tokens)] = tokens
        return np.maximum(sequences[:, :-1], 0), np.ascontiguousarray(sequences[:, 1:])

    def epochs(self, samples: int) -> dict[str, float]:
        return {self.name: samples / self.n_samples}

    def describe(self, samples: int) -> str:
        return (
            f"{self.manifest.describe()}; an epoch is {plural(self.n_samples, 'sample')} of "
            f"{self.seq_len:,} tokens ({self._remark}); the run takes "
            f"{samples / self.n_samples:,.2f} epochs"
        )
