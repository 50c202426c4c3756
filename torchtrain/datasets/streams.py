"""Streams: documents that become tokens while a run reads them, without a cache.

There are V streams, as `data.streams` says, whatever the number of ranks: sample i is number i div V of stream i mod V.
A stream is an endless row of tokens, BOS document EOS after another, of which sample n takes tokens [n·S, n·S+S]. Its
documents are v, v+V, … of the corpus; or, of a hub's dataset whose files V divides, all of the files v, v+V, …, so that
no other stream has to read them. Documents come in the corpus' order, and each stream begins its next epoch by itself.

So what a sample holds follows from the corpus, the tokenizer, S, V and i. To find it without reading all that comes
before, a checkpoint has every stream's position.

Shapes: B samples, S tokens of a sequence.
"""

import math
import os
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from torchtrain.datasets.corpora import Corpus, LeftOut, Rows
from torchtrain.datasets.samples import Dataset, Position
from torchtrain.datasets.token_cache import short_hash
from torchtrain.datasets.tokenizer import Tokenizer
from torchtrain.errors import UserError
from torchtrain.logging_utils import logger
from torchtrain.utils import reading


class StreamDataset(Dataset):
    """Samples of a corpus that is read from its beginning to its end, again and again.

    The samples of a stream can only be asked for in ascending order. Those that are not asked for are read all the
    same, so a rank should take as few streams as it can, see `stream_of`.
    """

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, seq_len: int, streams: int) -> None:
        """Deal `corpus` out to so many `streams`; nothing is read yet."""
        self.name = corpus.name
        self._identity: dict[str, Any] = {"corpus": _corpus_identity(corpus), "streams": streams}
        self._identity |= {"tokenizer": tokenizer.fingerprint, "seq_len": seq_len}
        corpus = replace(
            corpus, left_out=LeftOut(told=lambda row: logger.warning(f"{corpus.name}: {row}"))
        )
        self._by_part = corpus.even_parts and len(corpus.parts) % streams == 0
        self._streams = [
            _Stream(corpus, tokenizer, seq_len, v, streams, self._by_part) for v in range(streams)
        ]

    def identity(self) -> dict[str, Any]:
        return dict(self._identity)

    def stream_of(self, sample_ids: np.ndarray) -> np.ndarray:
        return sample_ids % len(self._streams)

    def read(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        numbers, streams = np.divmod(sample_ids, len(self._streams))
        rows = [
            self._streams[v].read(number)
            for number, v in zip(numbers.tolist(), streams, strict=True)
        ]
        sequences = np.stack(rows).astype(np.int64)
        return np.ascontiguousarray(sequences[:, :-1]), np.ascontiguousarray(sequences[:, 1:])

    def positions(self) -> dict[str, Position]:
        return {f"stream {v}": stream.position() for v, stream in enumerate(self._streams)}

    def resume(self, saved: dict[str, Any], samples: int) -> None:
        same = all(saved.get(key) == self._identity[key] for key in ("corpus", "streams"))
        for v, stream in enumerate(self._streams):
            if same:
                stream.start[1:] = saved[f"stream {v}"][1:]
                if saved["tokenizer"] != self._identity["tokenizer"]:
                    stream.start[-1] = 0
            stream.start[0] = -((v - samples) // len(self._streams))

    def waiting(self) -> tuple[float, str]:
        since, v = min((stream.waiting_since, v) for v, stream in enumerate(self._streams))
        return since, f"{self.name}, stream {v} of {len(self._streams)}"

    def describe(self, samples: int) -> str:
        count, parts = len(self._streams), len(self._streams[0].parts)
        dealt = f"{parts} of its files" if self._by_part else f"1 document in {count}"
        return f"{self.name}: read as it comes, in {count} streams, to each {dealt}"


class _Stream:
    """One of them."""

    def __init__(
        self,
        corpus: Corpus,
        tokenizer: Tokenizer,
        seq_len: int,
        number: int,
        streams: int,
        by_part: bool,
    ) -> None:
        self.parts = corpus.parts[number::streams] if by_part else corpus.parts
        self.start: Position = [0] * 6
        """Where to begin: the number of its next sample; and of its first token the epoch, the part of the corpus, the
        rows in the parts before, the row in the part, and the place among the row's tokens."""
        self.waiting_since = math.inf
        """When the row that has not come yet was asked for."""
        self._corpus, self._tokenizer, self._seq_len = corpus, tokenizer, seq_len
        self._number, self._every = number, 1 if by_part else streams
        self._name = f"{corpus.name}, stream {number} of {streams}"
        self._documents: Iterator[tuple[Position, np.ndarray]] | None = None
        self._held: deque[tuple[Position, np.ndarray]] = (
            deque()
        )  # the documents of the tokens read and not yet used
        self._next_sample = self._offset = self._left = (
            0  # the place in the first of them, and tokens from there on
        )

    def position(self) -> Position:
        """Of the next sample."""
        return (
            [self._next_sample, *self._held[0][0], self._offset] if self._documents else self.start
        )

    def read(self, number: int) -> np.ndarray:
        """Sample `number`, int32 `[S + 1]`.

        Raises:
            UserError: a row that is no document, or a source that can't be read, has none for this stream, or has
                other documents than when `start` was saved.
        """
        if self._documents is None:
            self._next_sample, *place, self._offset = self.start
            self._documents = self._from(place)
            self._left = -self._offset
            if any(self.start[1:]):
                self._hold_next()
                if self._held[0][0] != place or self._left <= 0:
                    raise UserError(
                        f"{self._name} does not give the documents that it gave before the checkpoint"
                    )
        assert number >= self._next_sample, "a stream is read forwards"
        while self._next_sample < number:
            self._sample()
        return self._sample()

    def _hold_next(self) -> None:
        assert self._documents is not None
        self._held.append(next(self._documents))
        self._left += len(self._held[-1][1])

    def _sample(self) -> np.ndarray:
        while self._left <= self._seq_len:
            self._hold_next()
        pieces, begin, missing = [], self._offset, self._seq_len + 1
        for _, tokens in self._held:
            pieces.append(tokens[begin : begin + missing])
            begin, missing = 0, missing - len(pieces[-1])
        self._next_sample += 1
        self._offset += self._seq_len
        self._left -= self._seq_len
        while self._offset >= len(self._held[0][1]):
            self._offset -= len(self._held.popleft()[1])
        return np.concatenate(pieces)

    def _from(self, place: Position) -> Iterator[tuple[Position, np.ndarray]]:
        """The place (epoch, part, rows in the parts before, row) and the tokens of every document from `place` on."""
        bos, eos = [self._tokenizer.bos_id], [self._tokenizer.eos_id]
        epoch, first_part, before, first_row = place
        found = any(place)  # whether this epoch has had a document
        while True:
            for part in range(first_part, len(self.parts)):
                row = -1
                for row, content in enumerate(self._rows(part)):
                    is_mine = row >= first_row and (before + row - self._number) % self._every == 0
                    if is_mine and (document := self._corpus.accepted(content)):
                        found = True
                        (ids,) = self._tokenizer.encode_batch([document.text])
                        yield (
                            [epoch, part, before, row],
                            np.concatenate([bos, ids, eos], dtype=np.int32),
                        )
                before += row + 1
                first_row = 0
            if not found:
                raise UserError(
                    f"{self._name} has no document: make data.streams smaller, or the corpus larger"
                )
            epoch, first_part, before, found = epoch + 1, 0, 0, False
            logger.info(f"{self._name}: epoch {epoch + 1} begins")

    def _rows(self, part: int) -> Rows:
        rows = self.parts[part]()
        while True:
            self.waiting_since = time.monotonic()
            row = next(rows, None)
            self.waiting_since = math.inf
            if row is None:
                return
            yield row


def _corpus_identity(corpus: Corpus) -> str:
    """Of a hub's dataset the name and revision; of files their names and sizes, wherever they lie: nothing is read."""
    if not corpus.files:
        return f"{corpus.name} {corpus.revision or ''}".strip()
    files = [file.absolute() for file in corpus.files]
    root = os.path.commonpath([file.parent for file in files])
    with reading(corpus.name):
        sizes = [f"{os.path.relpath(file, root)} {os.stat(file).st_size}" for file in files]
    return short_hash([corpus.how, *sizes])
