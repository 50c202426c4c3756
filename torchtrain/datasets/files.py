"""Corpora in files: texts, JSON lines, parquet, and this Python's own library.

In a folder, files are taken recursively in the order of their relative paths; hidden files and
folders (a leading dot) are left out; linked folders are followed, each real folder once. Parquet
and compressed files are read by pyarrow, which the package `datasets` brings.
"""

import hashlib
import io
import json
import os
import sysconfig
from collections.abc import Iterable
from functools import partial
from itertools import chain
from pathlib import Path
from typing import IO

from torchtrain.catalog.datasets import describe_path
from torchtrain.datasets.corpora import (
    KINDS_OF_VALUES,
    BadRow,
    Corpus,
    Part,
    Row,
    Rows,
    as_row,
    no_field,
    not_utf8,
)
from torchtrain.errors import UserError
from torchtrain.utils import user_errors

# Tests and what is installed beside the library are not prose worth learning; encodings and
# lib2to3 are tables.
NOT_LIBRARY = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "dist-packages"}
)
JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
PARQUET = (".parquet",)
SUFFIXES = {"jsonl": JSON_LINES, "parquet": PARQUET}
"""Endings of the file names that count in a folder; of other datasets, every file counts."""
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


def read_stdlib(root: Path | None = None) -> Corpus:
    """Return the `.py` files of this Python's library (or of `root`), exact duplicates once.

    Files in an encoding other than UTF-8 (PEP 263) are left out. The text differs between builds
    of Python: nothing may rely on its tokens.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    files = files_under(root, (".py",), leave_out=NOT_LIBRARY) if root.is_dir() else []
    if not files:
        raise UserError(
            f'this Python has no library source in {root}; set training.dataset = "text" and '
            "training.dataset_path to text of your own"
        )
    return Corpus("python_stdlib", files, [partial(_distinct_sources, files)])


def read_files(dataset: str, path: Path, text_key: str, option: str = "training.dataset") -> Corpus:
    """Return the file `path`, or the files in it, as `text`, `jsonl`, `parquet` or `mixed`.

    A text is one document, kept to the byte (CRLF and a byte order mark survive). Each JSON line
    is an object whose `text_key` is a document (blank lines do not count); so is each row of a
    parquet file. Mixed files are told apart by their names.

    Raises:
        UserError: no such file or folder, or no file in it that counts; names the `option`.
    """
    suffixes = SUFFIXES.get(dataset, ("",))
    files = files_under(path, suffixes, option=option)
    if not files:
        names = ", ".join(f"*{suffix}" for suffix in suffixes)
        raise UserError(
            f"{describe_path(option, path)} holds no file that counts as {dataset} ({names})"
        )
    key = "" if dataset == "text" else f" [{text_key}]"
    return Corpus(
        name=f"{dataset} {path}{key}",
        files=files,
        parts=[_reader(dataset, file, text_key) for file in files],
        kind=dataset + key,
    )


def _reader(dataset: str, file: Path, text_key: str) -> Part:
    is_mixed = dataset == "mixed"
    if dataset == "jsonl" or (is_mixed and file.name.endswith(JSON_LINES)):
        return partial(_json_lines, file, text_key)
    if dataset == "parquet" or (is_mixed and file.name.endswith(PARQUET)):
        return partial(_parquet_rows, file, text_key)
    return partial(_whole_file, file)


def files_under(
    path: Path,
    suffixes: tuple[str, ...] = ("",),
    leave_out: frozenset[str] = frozenset(),
    option: str = "training.dataset",
) -> list[Path]:
    """Return `path` itself if it is a file, whatever its name; else the files below it.

    Args:
        path: a file or a folder.
        suffixes: endings of the names that count.
        leave_out: names of folders not to enter.
        option: names the dataset, for messages.

    Raises:
        UserError: neither a file nor a folder, or a folder that cannot be listed.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{describe_path(option, path)} is neither a file nor a folder")
    found: list[Path] = []
    entered: set[str] = set()
    for folder, subfolders, names in os.walk(path, followlinks=True, onerror=_refuse):
        real = os.path.realpath(folder)
        if real in entered:  # a link that leads back
            subfolders.clear()
            continue
        entered.add(real)
        subfolders[:] = [
            name for name in subfolders if not name.startswith(".") and name not in leave_out
        ]
        subfolders.sort()
        for name in names:
            if name.startswith(".") or not name.endswith(suffixes):
                continue
            file = Path(folder, name)
            # Pipes and sockets would block; a dangling link stays, to be named when it is opened.
            if file.is_file() or not file.exists():
                found.append(file)
    return sorted(found, key=lambda file: file.relative_to(path).as_posix())


def _refuse(error: OSError) -> None:
    raise UserError(f"cannot read {error.filename!r}: {error.strerror}")


def _distinct_sources(files: Iterable[Path]) -> Rows:
    seen: set[bytes] = set()
    for row in chain.from_iterable(map(_whole_file, files)):
        if isinstance(row, BadRow) or not row.text:
            continue
        digest = hashlib.sha256(row.text.encode("utf-8")).digest()
        if digest not in seen:
            seen.add(digest)
            yield row


def _whole_file(file: Path) -> Rows:
    with user_errors(f"cannot read {str(file)!r}", OSError):
        content = file.read_bytes()
    yield as_row(content, str(file), "the file")


def _json_lines(file: Path, text_key: str) -> Rows:
    compression = COMPRESSIONS.get(file.suffix)
    number = 0
    try:
        with open(file, "rb") as raw:
            for number, line in enumerate(_decompressed(raw, compression), start=1):
                if number == 1:  # some editors add a byte order mark
                    line = line.removeprefix(b"\xef\xbb\xbf")
                if line.strip():
                    yield _row_of_line(line, text_key, f"{file}:{number}")
    except OSError as error:
        yield _broken(compression, file, number + 1, error)


def _decompressed(raw: IO[bytes], compression: str | None) -> Iterable[bytes]:
    if compression is None:
        return raw
    import pyarrow

    # A small buffer, since one that meets a break loses what is in it.
    stream = pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), compression)
    return io.BufferedReader(stream, 1 << 13)


def _row_of_line(line: bytes, text_key: str, location: str) -> Row:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return not_utf8(error, location)
    except (ValueError, RecursionError) as error:
        return BadRow("broken JSON", location, f"not JSON: {error}")
    if not isinstance(row, dict):
        kind = KINDS_OF_VALUES[type(row)]
        problem = f"the line is {kind}, but must be an object with {text_key!r}"
        return BadRow("not an object", location, problem)
    if text_key not in row:
        return no_field(text_key, location, row)
    return as_row(row[text_key], location, repr(text_key))


def _parquet_rows(file: Path, text_key: str) -> Rows:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with open(file, "rb") as raw:
            table = pyarrow.parquet.ParquetFile(raw)
            names = table.schema_arrow.names
            if text_key not in names:
                yield no_field(text_key, str(file), names)
                return
            batches = table.iter_batches(1024, columns=[text_key])
            values = chain.from_iterable(batch.column(0) for batch in batches)
            for number, value in enumerate(values, start=1):
                location = f"{file}:{number}"
                try:
                    yield as_row(value.as_py(), location, repr(text_key))
                except UnicodeDecodeError as error:
                    yield not_utf8(error, location)
    except (pyarrow.ArrowException, OSError) as error:
        yield _broken("parquet", file, number + 1, error)


def _broken(compression: str | None, file: Path, row: int, error: Exception) -> BadRow:
    """Return the bad row that stands for the rest of a file whose content is damaged.

    Raises:
        UserError: it is the file that cannot be read; damage has no error number.
    """
    if isinstance(error, OSError) and error.errno is not None:
        raise UserError(f"cannot read {str(file)!r}: {error.strerror}") from error
    problem = f"the {compression} data is broken from here on ({error}); the rest is not read"
    return BadRow(f"broken {compression}", f"{file}:{row}", problem)
