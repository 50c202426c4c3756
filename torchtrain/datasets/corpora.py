"""Corpora: where documents come from, in an order that depends on nothing but names and contents.

A reader finds its files at once (so that a wrong path is known before anything slow) and gives a `Corpus`, whose
documents can be read as often as needed. In a folder, files are taken recursively, sorted by relative path; hidden
files and folders (a leading dot) are left out; linked folders are followed, each real folder once. Empty documents are
left out too: there is nothing to learn from BOS EOS. Everything else that cannot be read is an error with its place.
"""

import hashlib
import json
import os
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torchtrain.datasets.registry import DATASETS
from torchtrain.utils import UserError, nearest

# Tests, and what is installed beside the library, are not prose worth learning; encodings and lib2to3 are tables.
NOT_LIBRARY = frozenset({"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "dist-packages"})


@dataclass(frozen=True)
class Document:
    """A text to be learned as a whole: it becomes BOS, its tokens, EOS."""

    text: str
    place: str
    """Where it is, `file` or `file:line`, for messages."""


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order."""

    name: str
    """How messages call it."""
    files: list[Path]
    """Every file that is read, in order: when none has changed, neither have the documents."""
    documents: Callable[[], Iterator[Document]]
    """Reads them from the start; raises UserError at the first that cannot be read."""


def open_corpus(dataset: str, dataset_path: str | None, text_key: str) -> Corpus:
    """The corpus of `training.dataset` and `training.dataset_path`.

    Raises:
        UserError: unknown dataset, path missing or of the wrong kind, no file in it.
    """
    if dataset not in DATASETS:
        close = nearest(dataset, DATASETS)
        hint = f" Did you mean {close!r}?" if close else ""
        raise UserError(f"training.dataset = {dataset!r} is unknown; allowed: {', '.join(DATASETS)}.{hint}")
    spec = DATASETS[dataset]
    if spec.needs_path and not dataset_path:
        raise UserError(f"training.dataset = {dataset!r} is {spec.description}: name it in training.dataset_path")
    path = Path(dataset_path).expanduser() if dataset_path else None
    return READERS[spec.reader](path, text_key)


def python_stdlib(root: Path | None, text_key: str) -> Corpus:
    """The `.py` files of the running interpreter's standard library (or of `root`), exact duplicates once.

    Files in another encoding than UTF-8 (PEP 263) are left out. The text differs between Python builds: nothing may
    rely on its tokens.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    files = files_under(root, ".py", leave_out=NOT_LIBRARY) if root.is_dir() else []
    if not files:
        raise UserError(
            f'this Python has no library source in {root}; set training.dataset = "text" and training.dataset_path '
            "to a folder of your own text"
        )
    return Corpus("python_stdlib", files, partial(_distinct_sources, files))


def text_files(path: Path | None, text_key: str) -> Corpus:
    """Every file is one document, kept to the byte (CRLF and a byte order mark survive)."""
    assert path is not None
    files = files_under(path)
    if not files:
        raise UserError(f"training.dataset_path = {str(path)!r} holds no file (hidden ones don't count)")
    return Corpus(f"text {path}", files, partial(_whole_files, files))


def jsonl_files(path: Path | None, text_key: str) -> Corpus:
    """Every line is a JSON object whose `text_key` is one document; blank lines don't count."""
    assert path is not None
    files = files_under(path, ".jsonl")
    if not files:
        raise UserError(f"training.dataset_path = {str(path)!r} holds no .jsonl file (hidden ones don't count)")
    return Corpus(f"jsonl {path} [{text_key}]", files, partial(_json_lines, files, text_key))


READERS: dict[str, Callable[[Path | None, str], Corpus]] = {
    "python_stdlib": python_stdlib,
    "text_files": text_files,
    "jsonl_files": jsonl_files,
}


def files_under(path: Path, suffix: str = "", leave_out: frozenset[str] = frozenset()) -> list[Path]:
    """`path` itself when it is a file, whatever its suffix; else the files below it as the module's docstring says.

    Args:
        path: A file or a folder.
        suffix: Ending of the names that count.
        leave_out: Names of folders not to enter.

    Raises:
        UserError: nothing there, neither a file nor a folder, or a folder that can't be listed.
    """
    if path.is_file():
        return [path]
    if not path.exists():
        raise UserError(f"training.dataset_path = {str(path)!r} does not exist (from {os.getcwd()!r})")
    if not path.is_dir():
        raise UserError(f"training.dataset_path = {str(path)!r} is neither a file nor a folder")
    found: list[Path] = []
    entered: set[str] = set()
    for folder, subfolders, names in os.walk(path, followlinks=True, onerror=_refuse):
        real = os.path.realpath(folder)
        if real in entered:  # a link that leads back
            subfolders.clear()
            continue
        entered.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name not in leave_out)
        candidates = [Path(folder, name) for name in names if name.endswith(suffix) and not name.startswith(".")]
        # Pipes and sockets would block; a dangling link stays, to be named when it is opened.
        found += [file for file in candidates if file.is_file() or not file.exists()]
    return sorted(found, key=lambda file: file.relative_to(path).as_posix())


def _refuse(error: OSError) -> None:
    raise UserError(f"cannot read {error.filename!r}: {error.strerror}")


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {str(file)!r}: {error.strerror}") from error


def _distinct_sources(files: Iterable[Path]) -> Iterator[Document]:
    seen: set[bytes] = set()
    for file in files:
        data = _read(file)
        digest = hashlib.sha256(data).digest()
        if data and digest not in seen:
            seen.add(digest)
            try:
                yield Document(data.decode("utf-8"), str(file))
            except UnicodeDecodeError:
                continue


def _whole_files(files: Iterable[Path]) -> Iterator[Document]:
    for file in files:
        data = _read(file)
        try:
            text = data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{str(file)!r} is not UTF-8 text: byte 0x{data[error.start]:02x} at offset {error.start:,}. "
                "Convert it, or keep files that are not text out of training.dataset_path"
            ) from error
        if text:
            yield Document(text, str(file))


def _json_lines(files: Iterable[Path], text_key: str) -> Iterator[Document]:
    for file in files:
        try:
            with open(file, "rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if number == 1:
                        line = line.removeprefix(b"\xef\xbb\xbf")  # the byte order mark that some editors add
                    if line.strip():
                        place = f"{file}:{number}"
                        text = _text_of_line(line, text_key, place)
                        if text:
                            yield Document(text, place)
        except OSError as error:
            raise UserError(f"cannot read {str(file)!r}: {error.strerror}") from error


def _text_of_line(line: bytes, text_key: str, place: str) -> str:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8: byte 0x{line[error.start]:02x} at column {error.start + 1}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON: {error}") from error
    if not isinstance(row, dict):
        raise UserError(f"{place}: a JSON {type(row).__name__}, but each line must be an object with {text_key!r}")
    if text_key not in row:
        keys = ", ".join(repr(key) for key in list(row)[:8]) or "none"
        raise UserError(f"{place}: no key {text_key!r}, which data.text_key asks for; keys here: {keys}")
    text = row[text_key]
    if not isinstance(text, str):
        raise UserError(f"{place}: {text_key!r} is a {type(text).__name__}, but must be a string")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair, which is no character
        raise UserError(f"{place}: {text_key!r} holds a lone surrogate, \\u{ord(text[error.start]):04x}") from error
    return text
