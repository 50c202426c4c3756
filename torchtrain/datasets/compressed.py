"""Bytes of compressed files, and of broken ones all that comes before the break."""

import re
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO, Protocol

import zstandard

from torchtrain.logging_utils import logger
from torchtrain.utils import plural

PIECE = 1 << 14
"""Compressed bytes that are read at a time."""
LARGEST_WINDOW = 1 << 31
"""Of zstd, that of --long=31, its largest."""


class Decompressor(Protocol):
    """Decompresses one gzip member or zstd frame, piece by piece."""

    @property
    def eof(self) -> bool:
        """Whether its end was in what it was given."""

    @property
    def unused_data(self) -> bytes:
        """What came after the end."""

    def decompress(self, data: bytes, /) -> bytes:
        """Go on with these bytes."""


def new_gzip() -> Decompressor:
    """Return what decompresses a gzip member, and checks its sum."""
    return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)


def new_zstd() -> Decompressor:
    """Return what decompresses a zstd frame."""
    return zstandard.ZstdDecompressor(max_window_size=LARGEST_WINDOW).decompressobj()


FORMATS: dict[str, tuple[str, Callable[[], Decompressor], re.Pattern[bytes]]] = {
    ".gz": ("gzip", new_gzip, re.compile(rb"\x1f\x8b\x08[\x00-\x1f]")),
    ".zst": ("zstd", new_zstd, re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")),
}
"""By the ending of a file's name: the format's name, what decompresses a part of it, and how a part
begins (RFC 1952; RFC 8878, with its skippable frames)."""
MAGIC = (b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd")
FAULTS = (zlib.error, zstandard.ZstdError)


def find_format(path: Path, plain: re.Pattern[bytes]) -> str:
    """Return the ending in FORMATS of a file's format, whatever it is called; empty if plain.

    A tool may have decompressed a file on its way, or compressed one, and left its name.

    Args:
        path: of the file.
        plain: what it begins with if it is not compressed; else a name of FORMATS is believed.

    Raises:
        OSError: the file cannot be read.
    """
    with open(path, "rb") as file:
        beginning = file.read(PIECE)
    for ending, (_, _, begins) in FORMATS.items():
        if begins.match(beginning):
            return ending
    named = path.suffix.lower()
    return named if named in FORMATS and not plain.match(beginning) else ""


class CompressedFile:
    """The content of a file of gzip members or zstd frames, one after the other.

    What follows the last of them is left out: zeros, which some tools fill files up with, and with
    a warning anything else, as gzip does.

    Args:
        path: of the file.
        ending: of FORMATS, what its format's files are called.
    """

    def __init__(self, path: Path, ending: str) -> None:
        self.path = path
        self.format, self._new, self._beginning = FORMATS[ending]
        self.fault = ""
        """What is broken, once all that comes before the break has been read."""

    def __iter__(self) -> Iterator[bytes]:
        """Read to the end, or to where the data are broken.

        Raises:
            OSError: the file cannot be read.
        """
        self.fault = ""
        with open(self.path, "rb") as file:
            rest = file.read(PIECE)
            if not rest:
                self.fault = "it is empty"
            while rest:
                rest = yield from self._read_part(file, rest)
                rest = self._find_part(file, rest)

    def _read_part(self, file: IO[bytes], rest: bytes) -> Generator[bytes, None, bytes]:
        """Read the part that begins with `rest`, and return what was read of what follows it."""
        begin = file.tell() - len(rest)
        part = self._new()
        done = 0
        while rest:
            try:
                content = part.decompress(rest)
            except FAULTS as error:
                yield from self._read_to_break(file, begin, file.tell() - len(rest), done)
                self.fault = str(error)
                return b""
            done += len(content)
            yield content
            if part.eof:
                return part.unused_data
            rest = file.read(PIECE)
        self.fault = "it ends too early"
        return b""

    def _read_to_break(
        self, file: IO[bytes], begin: int, last_piece: int, done: int
    ) -> Iterator[bytes]:
        """Read what the piece with the break holds before it.

        A call that fails returns nothing of what it has decompressed. So the part is read anew, and
        this piece byte by byte.

        Args:
            file: open.
            begin: where in it the part begins.
            last_piece: where the piece begins.
            done: bytes of the part's content that have been read before.
        """
        part = self._new()
        file.seek(begin)
        count = 0
        while file.tell() < last_piece:
            count += len(part.decompress(file.read(min(PIECE, last_piece - file.tell()))))
        with suppress(*FAULTS):
            while byte := file.read(1):
                content = part.decompress(byte)
                yield content[max(0, done - count) :]
                count += len(content)

    def _find_part(self, file: IO[bytes], rest: bytes) -> bytes:
        """Return the first bytes of the next part, of which `rest` may be some; none at the end."""
        while not (rest := rest.lstrip(b"\0")):
            rest = file.read(PIECE)
            if not rest:
                return b""
        rest += file.read(PIECE)
        is_cut = len(rest) < 4 and any(magic.startswith(rest) for magic in MAGIC)
        if self._beginning.match(rest) or is_cut:
            return rest
        rest += file.read()
        size = len(rest)
        if self._beginning.search(rest):  # it is not the end: what is damaged is how a part begins
            self.fault = f"no part begins where one has ended, and {plural(size, 'byte')} follow"
            return b""
        logger.warning(
            f"{self.path}: {plural(size, 'byte')} after its {self.format} data are left out"
        )
        return b""


def split_lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Return lines, without their ends, of content that comes in pieces."""
    line: list[bytes] = []
    for piece in pieces:
        first, *others = piece.split(b"\n")
        line.append(first)
        for other in others:
            yield b"".join(line)
            line = [other]
    if any(line):
        yield b"".join(line)
