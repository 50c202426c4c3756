"""Corpora: documents in an order that depends on nothing but names and contents.

A corpus consists of parts (a file, a file of the hub, or all there is), a part of rows (a whole
file, a line, a row of a table), and a row is a document or a bad row. Readers (files.py, hub.py)
find the parts at once, so that a wrong path is known before anything slow; documents are read
later, and as often as needed. Empty documents are skipped: there is nothing to learn from BOS EOS.
A bad row is an error with its location or, with `data.on_bad_row = "skip"`, skipped and counted.
A file that cannot be opened is always an error.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Literal

from torchtrain.errors import UserError
from torchtrain.logging_utils import logger
from torchtrain.utils import plural

LOCATIONS_KEPT = 5
NAMED = 16
"""At most so many files that are not read are named."""

KINDS_OF_VALUES: dict[type, str] = {
    str: "a string",
    type(None): "null",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
    bytes: "bytes",
}
"""What messages call a value, in the words of JSON and of tables."""

Side = Literal["training", "validation"]


@dataclass(frozen=True)
class Document:
    """A text to be learned as a whole: it becomes BOS if any, its tokens, EOS."""

    text: str
    location: str
    """Where it is, `file` or `file:line` (`file:row`), for messages."""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be a document."""

    kind: str
    """The kind of fault, under which it is counted."""
    location: str
    problem: str
    """What is wrong, and what was expected."""


Row = Document | BadRow
Rows = Iterator[Row]
Part = Callable[[], Rows]
"""Reads the rows of one part from its start."""


@dataclass
class Skipped:
    """The rows that the latest reading of a corpus skipped, empty ones among them."""

    log_as: str = ""
    """The corpus' name, to log the first rows at once; empty: do not log them."""
    counts: Counter[str] = field(default_factory=Counter)
    """Number of rows by kind."""
    locations: list[str] = field(default_factory=list)
    """Locations of the first."""

    def add(self, kind: str, location: str) -> None:
        """Count one."""
        self.counts[kind] += 1
        if len(self.locations) < LOCATIONS_KEPT:
            self.locations.append(f"{location} ({kind})")
            if self.log_as:
                logger.warning(f"{self.log_as}: left out {self.locations[-1]}")

    def describe(self) -> str:
        """Return one line: how many of which kind, and where the first are."""
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.counts.items()))
        return (
            f"left out {plural(self.counts.total(), 'row')}: {kinds}; "
            f"the first: {', '.join(self.locations)}"
        )


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order."""

    name: str
    """Name in messages."""
    files: list[Path]
    """Every file that is read, in order: while none changes, the documents stay the same."""
    parts: Sequence[Part]
    """UserError at a file that cannot be opened."""
    other_files: list[str] = field(default_factory=list)
    """What else is in the folder, and not read: paths in it."""
    even_parts: bool = False
    """Whether the parts are of about the same size, and each is better read by one stream."""
    kind: str = ""
    """How the files are read: the kind of dataset and the field of the text."""
    revision: str | None = None
    """Without files: changes whenever the documents may have; None if that is unknowable."""
    on_bad_row: Literal["error", "skip"] = "error"
    skipped: Skipped = field(default_factory=Skipped)

    def describe_other_files(self) -> str:
        """Say which files of its folder are not read; empty if all are."""
        if not self.other_files:
            return ""
        named = ", ".join(self.other_files[:NAMED])
        more = f" and {len(self.other_files) - NAMED:,} more" * (len(self.other_files) > NAMED)
        return f"{self.name}: {plural(len(self.other_files), 'file')} not read: {named}{more}"

    def rows(self) -> Rows:
        """Read all rows from the start."""
        for part in self.parts:
            yield from part()

    def documents(self) -> Iterator[Document]:
        """Read the documents from the start.

        Raises:
            UserError: a bad row, unless those are skipped, or a file that cannot be opened.
        """
        self.skipped.counts.clear()
        self.skipped.locations.clear()
        for row in self.rows():
            document = self.accept(row)
            if document is not None:
                yield document

    def accept(self, row: Row) -> Document | None:
        """Return the row if it is a document to learn from; else skip and count it.

        Raises:
            UserError: a bad row, unless those are skipped.
        """
        if isinstance(row, BadRow):
            if self.on_bad_row == "error":
                raise UserError(
                    f'{row.location}: {row.problem} (data.on_bad_row = "skip" leaves such rows out)'
                )
            self.skipped.add(row.kind, row.location)
            return None
        if not row.text:
            self.skipped.add("empty", row.location)
            return None
        return row


def as_row(value: object, location: str, what: str) -> Row:
    """Return the document whose text is `value`; bytes, as some tables hold them, are UTF-8."""
    if isinstance(value, bytes):
        try:
            return Document(value.decode("utf-8"), location)
        except UnicodeDecodeError as error:
            return not_utf8(error, location)
    if not isinstance(value, str):
        kind = KINDS_OF_VALUES.get(type(value), type(value).__name__)
        return BadRow("not a string", location, f"{what} is {kind}, but must be a string")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON can spell half of a surrogate pair, which is not a character.
        half = f"\\u{ord(value[error.start]):04x}"
        return BadRow("lone surrogate", location, f"{what} holds a lone surrogate, {half}")
    return Document(value, location)


def not_utf8(error: UnicodeDecodeError, location: str) -> BadRow:
    """Return the bad row for bytes that are not UTF-8."""
    byte = error.object[error.start]
    problem = f"not UTF-8: 0x{byte:02x} in byte {error.start + 1:,}; convert it, or remove it"
    return BadRow("invalid UTF-8", location, problem)


def no_field(text_key: str, location: str, names: Iterable[str]) -> BadRow:
    """Return the bad row for a row, or a table, with fields `names` but not `text_key`."""
    there = ", ".join(repr(name) for name in islice(names, 8)) or "none"
    problem = f"no {text_key!r}, which data.text_key asks for; fields here: {there}"
    return BadRow("no text field", location, problem)


def split_corpus(corpus: Corpus, share: float, side: Side) -> Corpus:
    """Return the documents held out for validation, about `share` of all, or those that are left.

    A document's hash decides, so it stays on its side whatever else comes or goes, and identical
    documents are on the same side. The lowest hash is always held out, and the highest never. Bad
    rows stay with training.

    Raises:
        UserError: (when read) there are fewer than two distinct documents.
    """
    find_border = cache(partial(_find_border, corpus, share))  # an unchanged corpus isn't read

    def rows(part: Part) -> Rows:
        border = find_border()
        for row in part():
            is_held_out = isinstance(row, Document) and row.text != "" and _hash(row) < border
            if is_held_out == (side == "validation"):
                yield row

    what = "the" if side == "validation" else "without"
    parts = [partial(rows, part) for part in corpus.parts]
    return _one_side(corpus, f"{what} {share} held out", parts)


def _one_side(corpus: Corpus, what: str, parts: Sequence[Part]) -> Corpus:
    """Return a corpus that reads `parts` instead, and counts by itself what it skips."""
    return replace(corpus, name=f"{corpus.name}, {what}", parts=parts, skipped=Skipped())


def _find_border(corpus: Corpus, share: float) -> int:
    """Return the hash below which documents are held out; reads until it is certain."""
    wanted = int(share * 2**64)
    lowest = 2**64
    highest = -1
    for row in corpus.rows():
        if isinstance(row, Document) and row.text:
            lowest = min(lowest, _hash(row))
            highest = max(highest, _hash(row))
            if lowest < wanted <= highest:
                return wanted
    if lowest >= highest:
        raise UserError(
            f"{corpus.name} has fewer than two distinct documents, so none can be held out for "
            "validation: add some, or name others in validation.dataset"
        )
    return lowest + 1 if wanted <= lowest else highest


def _hash(document: Document) -> int:
    """Return a number in 0 .. 2^64 - 1, evenly distributed."""
    return int.from_bytes(hashlib.sha256(document.text.encode("utf-8")).digest()[:8], "big")


def split_text(corpus: Corpus, share: float, side: Side) -> Corpus:
    """Return the last lines of a single text, at least `share` of its bytes, or the lines before.

    Raises:
        UserError: (when read) the text has only one line.
    """

    def rows() -> Rows:
        for row in corpus.rows():
            if isinstance(row, Document) and row.text:
                kept, held_out = _cut_text(row, share)
                yield replace(row, text=held_out if side == "validation" else kept)
            elif side == "training":
                yield row

    what = "the last" if side == "validation" else "without the last"
    return _one_side(corpus, f"{what} {share} of its bytes held out", [rows])


def _cut_text(document: Document, share: float) -> tuple[str, str]:
    """Cut after the last line that leaves `share` of the bytes, or else after the first line."""
    data = document.text.encode("utf-8")
    target = len(data) - max(1, int(share * len(data)))
    cut = data.rfind(b"\n", 0, target) + 1
    if cut == 0:
        cut = data.find(b"\n") + 1
    if cut in (0, len(data)):
        raise UserError(
            f"{document.location} has only one line, so its last part cannot be held out for "
            "validation: break it into lines, or name other documents in validation.dataset"
        )
    return data[:cut].decode("utf-8"), data[cut:].decode("utf-8")
