"""One stream of a corpus: an endless sequence of tokens, BOS document EOS after another.

Shapes: S tokens of a sequence.
"""

import math
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from torchtrain.datasets.corpora import Corpus, Rows
from torchtrain.datasets.round_trip import SURE_CHARACTERS, RoundTrip
from torchtrain.datasets.tokenizer import Tokenizer, encode_documents
from torchtrain.errors import UserError
from torchtrain.logging_utils import logger


class Position(NamedTuple):
    """Where a stream stands: its next sample, and where that begins in the corpus.

    Of two positions of one stream the larger is further on.
    """

    sample: int = 0
    """Number of the next sample, of this stream's."""
    epoch: int = 0
    part: int = 0
    """Part of the corpus."""
    rows_before: int = 0
    """Rows in the parts before."""
    row: int = 0
    """Row in the part."""
    token: int = 0
    """Token in the row's document, BOS being 0."""


Span = tuple[Position, np.ndarray]
"""Tokens, and the position of the first."""


@dataclass
class TokenStream:
    """Stream number `number` of `count`; sample n takes tokens [n·S, n·S+S].

    Of each part it takes the rows `number`, `number` + `count`, … counted over the whole corpus;
    or, with `by_part`, all rows of the parts with these numbers.
    """

    corpus: Corpus
    tokenizer: Tokenizer
    seq_len: int
    number: int
    count: int
    by_part: bool

    def __post_init__(self) -> None:
        self.start = Position()
        """Where to begin; may be set until the first sample is read."""
        self.waiting_since = math.inf
        """When the row was asked for that has not come yet; infinite if none is awaited."""
        self.name = f"{self.corpus.name}, stream {self.number} of {self.count}"
        self.parts = self.corpus.parts
        if self.by_part:
            self.parts = self.corpus.parts[self.number :: self.count]
        self._samples: Iterator[np.ndarray] | None = None
        self._round_trip: RoundTrip | None = RoundTrip(self.name, self.tokenizer)
        self._next = Position()

    def position(self) -> Position:
        """Return the position of the next sample."""
        return self.start if self._samples is None else self._next

    def read(self, number: int) -> np.ndarray:
        """Read sample `number`, int32 `[S + 1]`; samples are read in ascending order.

        Raises:
            UserError: a bad row, or a source that cannot be read, has no document for this stream,
                has other documents than when `start` was saved, or whose text the tokenizer loses.
        """
        if self._samples is None:
            self._next = self.start
            self._samples = self._read_samples()
        assert number >= self._next.sample, "a stream is read forwards"
        while self._next.sample < number:
            next(self._samples)
        return next(self._samples)

    def _read_samples(self) -> Iterator[np.ndarray]:
        """Read the samples from `start` on; at each, `_next` is the position of the one after."""
        size = self.seq_len + 1
        # The tokens that were read and not yet used, document by document.
        held: deque[Span] = deque()
        tokens_held = 0
        for span in self._read_spans():
            held.append(span)
            tokens_held += len(span[1])
            while tokens_held >= size:
                sample = np.concatenate([tokens[:size] for _, tokens in held])[:size]
                _drop(held, self.seq_len)
                tokens_held -= self.seq_len
                begin, _ = held[0]
                self._next = begin._replace(sample=self._next.sample + 1)
                yield sample

    def _read_spans(self) -> Iterator[Span]:
        """Read the documents from `start` on, the first from the token where `start` is."""
        first = self.start._replace(sample=0, token=0)
        documents = self._read_documents(first)
        if first != Position() or self.start.token > 0:
            found, tokens = next(documents)
            if found != first or len(tokens) <= self.start.token:
                raise UserError(
                    f"{self.name} does not give the documents that it gave before the checkpoint"
                )
            yield self.start, tokens[self.start.token :]
        yield from documents

    def _read_documents(self, first: Position) -> Iterator[Span]:
        """Read the documents of this stream from `first` on: their positions and tokens."""
        epoch, first_part, rows_before, first_row = first[1:5]
        has_document = first != Position()  # this epoch
        while True:
            for part in range(first_part, len(self.parts)):
                row = -1
                for row, content in enumerate(self._read_rows(part)):
                    is_own = self.by_part or (rows_before + row - self.number) % self.count == 0
                    if row < first_row or not is_own:
                        continue
                    document = self.corpus.accept(content)
                    if document is not None:
                        has_document = True
                        self._try_round_trip(document.text)
                        (tokens,) = encode_documents(self.tokenizer, [document.text])
                        yield Position(0, epoch, part, rows_before, row), tokens
                rows_before += row + 1
                first_row = 0
            if not has_document:
                raise UserError(
                    f"{self.name} has no document: make data.streams smaller, or the corpus larger"
                )
            self._end_round_trip()
            epoch += 1
            first_part = rows_before = 0
            has_document = False
            logger.info(f"{self.name}: epoch {epoch + 1} begins")

    def _try_round_trip(self, text: str) -> None:
        """Count what the tokenizer loses of the first documents."""
        if self._round_trip is not None:
            self._round_trip.add(text)
            if self._round_trip.characters >= SURE_CHARACTERS:
                self._end_round_trip()

    def _end_round_trip(self) -> None:
        if self._round_trip is not None:
            self._round_trip.say()
            self._round_trip = None

    def _read_rows(self, part: int) -> Rows:
        """Read the rows of a part; what is awaited is known meanwhile."""
        rows = self.parts[part]()
        while True:
            self.waiting_since = time.monotonic()
            row = next(rows, None)
            self.waiting_since = math.inf
            if row is None:
                return
            yield row


def _drop(held: deque[Span], count: int) -> None:
    """Drop the first `count` tokens, of more that are held."""
    while count >= len(held[0][1]):
        count -= len(held.popleft()[1])
    begin, tokens = held.popleft()
    held.appendleft((begin._replace(token=begin.token + count), tokens[count:]))
