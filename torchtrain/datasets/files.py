"""Corpora in files: texts, JSON lines, parquet, and this Python's own library.

In a folder, files are taken recursively in the order of their relative paths; hidden files and
folders (a leading dot) are left out; linked folders are followed, each real folder once. Parquet is
read by pyarrow, which the package `datasets` brings.
"""

import hashlib
import os
import re
import sysconfig
from collections.abc import Iterable
from functools import partial
from itertools import chain
from pathlib import Path

from torchtrain.catalog.datasets import describe_path
from torchtrain.datasets import json_files
from torchtrain.datasets.corpora import (
    BadRow,
    Corpus,
    Part,
    Rows,
    as_row,
    no_field,
    not_utf8,
)
from torchtrain.errors import UserError
from torchtrain.utils import first_few, require_package, user_errors

# Tests and what is installed beside the library are not prose worth learning; encodings and
# lib2to3 are tables.
NOT_LIBRARY = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "dist-packages"}
)
PARQUET = re.compile(r"\.parquet$", re.IGNORECASE)
PYTHON = re.compile(r"\.py$")
ANY = re.compile("")
COUNTING = {"jsonl": json_files.NAMES, "parquet": PARQUET}
"""What the names of files that count in a folder end with; of other datasets, every file counts."""
ENDINGS = {"jsonl": "*.jsonl, *.ndjson or *.json, also with .gz or .zst", "parquet": "*.parquet"}
"""The same for messages."""


def read_stdlib(root: Path | None = None) -> Corpus:
    """Return the `.py` files of this Python's library (or of `root`), exact duplicates once.

    Files in an encoding other than UTF-8 (PEP 263) are left out. The text differs between builds
    of Python: nothing may rely on its tokens.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    files = files_under(root, PYTHON, leave_out=NOT_LIBRARY) if root.is_dir() else []
    if not files:
        raise UserError(
            f'this Python has no library source in {root}; set training.dataset = "text" and '
            "training.dataset_path to text of your own"
        )
    return Corpus("python_stdlib", files, [partial(_distinct_sources, files)])


def read_files(dataset: str, path: Path, text_key: str, option: str = "training.dataset") -> Corpus:
    """Return the file `path`, or the files in it, as `text`, `jsonl`, `parquet` or `mixed`.

    A text is one document, kept to the byte (CRLF and a byte order mark survive). Each JSON line
    is an object whose `text_key` is a document (blank lines do not count); so is each element of an
    array in JSON, and each row of a parquet file. Mixed files are told apart by their names.

    Raises:
        UserError: no such file or folder, or no file in it that counts; names the `option`.
    """
    other: list[str] = []
    files = files_under(path, COUNTING.get(dataset, ANY), option=option, other=other)
    if not files:
        endings = f" ({ENDINGS[dataset]})" if dataset in ENDINGS else ""
        there = f"; there are {first_few(other)}" if other else ""
        raise UserError(
            f"{describe_path(option, path)} holds no file that counts as {dataset}{endings}{there}"
        )
    key = "" if dataset == "text" else f" [{text_key}]"
    return Corpus(
        name=f"{dataset} {path}{key}",
        files=files,
        other_files=other,
        parts=[_reader(dataset, file, text_key) for file in files],
        kind=dataset + key,
    )


def _reader(dataset: str, file: Path, text_key: str) -> Part:
    is_mixed = dataset == "mixed"
    if dataset == "jsonl" or (is_mixed and json_files.NAMES.search(file.name)):
        return partial(json_files.read_json, file, text_key)
    if dataset == "parquet" or (is_mixed and PARQUET.search(file.name)):
        require_package("pyarrow", f"the parquet file {str(file)!r}")
        return partial(_parquet_rows, file, text_key)
    return partial(_whole_file, file)


def files_under(
    path: Path,
    counting: re.Pattern[str] = ANY,
    leave_out: frozenset[str] = frozenset(),
    option: str = "training.dataset",
    other: list[str] | None = None,
) -> list[Path]:
    """Return `path` itself if it is a file, whatever its name; else the files below it.

    Args:
        path: a file or a folder.
        counting: found in the names of files that count.
        leave_out: names of folders not to enter.
        option: names the dataset, for messages.
        other: takes the relative paths, sorted, of all that does not count: files of other names,
            hidden ones, hidden folders with a slash, pipes and sockets.

    Raises:
        UserError: neither a file nor a folder, or a folder that cannot be listed.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{describe_path(option, path)} is neither a file nor a folder")
    found: list[str] = []
    passed_over: list[str] = []
    entered: set[str] = set()
    for folder, subfolders, names in os.walk(path, followlinks=True, onerror=_refuse):
        real = os.path.realpath(folder)
        if real in entered:  # a link that leads back
            subfolders.clear()
            continue
        entered.add(real)
        # As text, which is faster than a Path: a corpus may have very many files.
        prefix = os.path.join(folder, "").removeprefix(os.path.join(path, ""))
        hidden = [name for name in subfolders if name.startswith(".")]
        passed_over += [f"{prefix}{name}/" for name in hidden]
        subfolders[:] = sorted({*subfolders} - {*hidden} - leave_out)
        for name in names:
            file = os.path.join(folder, name)
            counts = counting.search(name) and not name.startswith(".")
            # Pipes and sockets would block; a dangling link stays, to be named when it is opened.
            is_read = counts and (os.path.isfile(file) or not os.path.exists(file))
            (found if is_read else passed_over).append(f"{prefix}{name}")
    if other is not None:
        other += sorted(passed_over)
    return [path / name for name in sorted(found)]


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
        yield _broken_parquet(file, number + 1, error)


def _broken_parquet(file: Path, row: int, error: Exception) -> BadRow:
    """Return the bad row that stands for the rest of a file whose content is damaged.

    Raises:
        UserError: it is the file that cannot be read; damage has no error number.
    """
    if isinstance(error, OSError) and error.errno is not None:
        raise UserError(f"cannot read {str(file)!r}: {error.strerror}") from error
    problem = f"the parquet data is broken from here on ({error}); the rest is not read"
    return BadRow("broken parquet", f"{file}:{row}", problem)
