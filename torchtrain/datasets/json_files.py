"""Documents in JSON: a line each, or the elements of an array; plain or compressed."""

import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

from torchtrain.datasets.compressed import CompressedFile, find_format, split_lines
from torchtrain.datasets.corpora import (
    KINDS_OF_VALUES,
    BadRow,
    Row,
    Rows,
    as_row,
    no_field,
    not_utf8,
)
from torchtrain.utils import user_errors

NAMES = re.compile(r"\.(jsonl|ndjson|json)(\.gz|\.zst)?$", re.IGNORECASE)
"""What the names of files in JSON end with."""
MAY_BE_WHOLE = re.compile(r"\.json(\.gz|\.zst)?$", re.IGNORECASE)
"""And of those that may hold one value on several lines, an array or an object."""
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""Some editors add one."""
BEGINNING = re.compile(rb"(\xef\xbb\xbf)?\s*[{\[]")
"""How a plain file begins."""
PIECE = 1 << 16
"""Bytes of a plain file that are read at a time."""
OF_A_CUT_ROW = frozenset({"broken JSON", "invalid UTF-8", "not an object"})
"""What a row can look like whose end is missing."""
SPACE = re.compile(r"[ \t\r\n]*")
"""What may stand between the words of JSON (RFC 8259, section 2)."""


def read_json(file: Path, text_key: str) -> Rows:
    """Read the rows of a file: its lines or, by its name and content, the elements of an array.

    Whether it is compressed its content says first, and then its name.

    Blank lines do not count. An array is read as a whole before its first row.

    Raises:
        UserError: the file cannot be read.
    """
    with user_errors(f"cannot read {str(file)!r}", OSError):
        ending = find_format(file, BEGINNING)
    compressed = CompressedFile(file, ending) if ending else None
    last = 0
    held: Row | None = None
    for number, row in _read_rows(file, compressed, text_key):
        if held is not None:
            yield held
        last, held = number, row
    is_cut = compressed is not None and compressed.fault != ""
    if is_cut and isinstance(held, BadRow) and held.kind in OF_A_CUT_ROW:
        last -= 1  # its rest is lost
    elif held is not None:
        yield held
    if compressed is not None and compressed.fault:
        problem = f"the {compressed.format} data is broken from here on ({compressed.fault})"
        location = f"{file}:{last + 1}"
        yield BadRow(f"broken {compressed.format}", location, f"{problem}; the rest is not read")


def _read_rows(
    file: Path, compressed: CompressedFile | None, text_key: str
) -> Iterator[tuple[int, Row]]:
    """Read rows with their numbers: of their line, or in the array."""
    with user_errors(f"cannot read {str(file)!r}", OSError):
        lines = split_lines(compressed or _read_pieces(file))
        first = next(lines, b"").removeprefix(BYTE_ORDER_MARK)
        blank = 0
        while not first.strip() and (following := next(lines, None)) is not None:
            first, blank = following, blank + 1
        lines = chain([first], lines)
        may_be_whole = MAY_BE_WHOLE.search(file.name) is not None
        if may_be_whole and first.lstrip().startswith(b"["):
            yield from _read_array(b"\n".join(lines), file, text_key)
            return
        if may_be_whole and not _is_object(first):
            content = list(lines)
            whole = b"\n".join(content)
            if _is_object(whole):
                yield 1, _row_of_line(whole, text_key, f"{file}:1")
                return
            lines = iter(content)
        for number, line in enumerate(lines, start=blank + 1):
            if line.strip():
                yield number, _row_of_line(line, text_key, f"{file}:{number}")


def _read_pieces(file: Path) -> Iterator[bytes]:
    with open(file, "rb") as content:
        while piece := content.read(PIECE):
            yield piece


def _is_object(content: bytes) -> bool:
    try:
        return isinstance(json.loads(content), dict)
    except (ValueError, RecursionError):
        return False


def _read_array(content: bytes, file: Path, text_key: str) -> Iterator[tuple[int, Row]]:
    """Read the elements of an array one by one, up to where it is broken."""
    text = content.decode("utf-8", "surrogateescape")  # an element that is not UTF-8 is a bad row
    del content
    decoder = json.JSONDecoder()
    place = _skip_space(text, text.index("[") + 1)
    number = 0
    while not text.startswith("]", place):
        number += 1
        location = f"{file}:{number}"
        begin = place
        try:
            if number > 1:
                begin = _skip_comma(text, place)
            value, place = decoder.raw_decode(text, begin)
        except (ValueError, RecursionError) as error:
            yield number, BadRow("broken JSON", location, f"not JSON from here on: {error}")
            return
        yield number, _row_of_element(value, text[begin:place], text_key, location)
        place = _skip_space(text, place)
    if text[place + 1 :].strip():
        problem = "not JSON: more follows the end of the array"
        yield number + 1, BadRow("broken JSON", f"{file}:{number + 1}", problem)


def _skip_space(text: str, place: int) -> int:
    space = SPACE.match(text, place)
    assert space is not None  # it matches nothing too
    return space.end()


def _skip_comma(text: str, place: int) -> int:
    if not text.startswith(",", place):
        raise ValueError(f"a comma or the array's end is missing after char {place - 1:,}")
    return _skip_space(text, place + 1)


def _row_of_element(value: object, source: str, text_key: str, location: str) -> Row:
    try:
        source.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeDecodeError as error:
        return not_utf8(error, location)
    return _row_of_value(value, "element", text_key, location)


def _row_of_line(line: bytes, text_key: str, location: str) -> Row:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return not_utf8(error, location)
    except (ValueError, RecursionError) as error:
        return BadRow("broken JSON", location, f"not JSON: {error}")
    return _row_of_value(value, "line", text_key, location)


def _row_of_value(value: object, what: str, text_key: str, location: str) -> Row:
    if not isinstance(value, dict):
        kind = KINDS_OF_VALUES[type(value)]
        problem = f"the {what} is {kind}, but must be an object with {text_key!r}"
        return BadRow("not an object", location, problem)
    if text_key not in value:
        return no_field(text_key, location, value)
    return as_row(value[text_key], location, repr(text_key))
