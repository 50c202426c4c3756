"""Corpora: where documents come from, in an order that depends on nothing but names and contents.

A reader finds its files at once (so that a wrong path is known before anything slow) and gives a `Corpus`, whose
documents can be read as often as needed. In a folder, files are taken recursively, sorted by relative path; hidden
files and folders (a leading dot) are left out; linked folders are followed, each real folder once. Empty documents are
left out too: there is nothing to learn from BOS EOS. A row that cannot be a document is an error with its place, or,
with `data.on_bad_row = "skip"`, left out and counted. A file that cannot be opened is always an error.

Compressed files and parquet are read by pyarrow, which the package `datasets` brings; hubs by `datasets` itself
(https://huggingface.co/docs/datasets/package_reference/loading_methods).
"""

import hashlib
import io
import json
import os
import sysconfig
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, Literal

from torchtrain.catalog.custom_import import user_location
from torchtrain.catalog.datasets import (
    DATASETS,
    HubSource,
    Texts,
    find_dataset,
    source_file,
)
from torchtrain.errors import UserError
from torchtrain.utils import expanded, nearest, reading

# Tests, and what is installed beside the library, are not prose worth learning; encodings and lib2to3 are tables.
NOT_LIBRARY = frozenset(
    {"test", "tests", "idlelib", "lib2to3", "encodings", "site-packages", "dist-packages"}
)
JSON_LINES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
PLACES_NAMED = 5
HUB_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Document:
    """A text to be learned as a whole: it becomes BOS, its tokens, EOS."""

    text: str
    place: str
    """Where it is, `file` or `file:line` (`file:row`), for messages."""


@dataclass(frozen=True)
class BadRow:
    """What stands where a document should."""

    kind: str
    """Under which it is counted."""
    place: str
    problem: str
    """In words, with what was expected."""


Rows = Iterator[Document | BadRow]


@dataclass(frozen=True)
class LeftOut:
    """The rows that the latest reading of a corpus left out, empty ones among them."""

    counts: Counter[str] = field(default_factory=Counter)
    """By kind."""
    places: list[str] = field(default_factory=list)
    """The first of them."""
    told: Callable[[str], None] = lambda text: None
    """Called with each of these at once."""

    def add(self, kind: str, place: str) -> None:
        """Count one."""
        self.counts[kind] += 1
        if len(self.places) < PLACES_NAMED:
            self.places.append(f"{place} ({kind})")
            self.told(f"left out {self.places[-1]}")

    def describe(self) -> str:
        """One line."""
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in sorted(self.counts.items()))
        return (
            f"left out {self.counts.total():,} rows: {kinds}; the first: {', '.join(self.places)}"
        )


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order."""

    name: str
    """How messages call it."""
    files: list[Path]
    """Every file that is read, in order: when none has changed, neither have the documents."""
    parts: Sequence[Callable[[], Rows]]
    """What it consists of, in order: each reads one from its start; UserError at a file that cannot be opened."""
    even_parts: bool = False
    """Whether all parts are of about the same size, and better read by few."""
    how: str = ""
    """Of files, what says how they are read: their kind, the field of the text."""
    revision: str | None = None
    """Where there are no files, what changes whenever the documents may have; None if nobody can know."""
    on_bad_row: Literal["error", "skip"] = "error"
    left_out: LeftOut = field(default_factory=LeftOut)

    def rows(self) -> Rows:
        """All from the start."""
        return (row for part in self.parts for row in part())

    def documents(self) -> Iterator[Document]:
        """The documents from the start; raises UserError at the first that cannot be read, unless that is skipped."""
        self.left_out.counts.clear()
        self.left_out.places.clear()
        return filter(None, map(self.accepted, self.rows()))

    def accepted(self, row: Document | BadRow) -> Document | None:
        """The row if it is a document to learn from; else it is left out and counted, or a UserError."""
        if isinstance(row, Document) and row.text:
            return row
        if isinstance(row, BadRow) and self.on_bad_row == "error":
            raise UserError(
                f'{row.place}: {row.problem} (data.on_bad_row = "skip" leaves such rows out)'
            )
        self.left_out.add(row.kind if isinstance(row, BadRow) else "empty", row.place)
        return None


def open_corpus(
    dataset: str,
    dataset_path: str | None,
    text_key: str,
    on_bad_row: Literal["error", "skip"] = "error",
    streaming: bool = False,
) -> Corpus:
    """The corpus of `training.dataset`, `training.dataset_path` and of [data] `text_key`, `on_bad_row`, `streaming`.

    Raises:
        UserError: unknown dataset, path missing or of the wrong kind, no file in it; hub that cannot be reached.
    """
    spec = find_dataset(dataset, dataset_path)
    path = expanded(dataset_path) if dataset_path else None
    if spec.texts is not None:
        corpus = custom_corpus(dataset, spec.texts, dataset_path)
    elif spec.hub is not None:
        corpus = hub_corpus(spec.hub, path, text_key, streaming)
    elif path is None:
        corpus = python_stdlib()
    elif dataset == "tokens":
        raise UserError(
            f"training.dataset_path = {dataset_path!r} is a token file, which has no text"
        )
    else:
        corpus = file_corpus(dataset, path, text_key)
    return replace(corpus, on_bad_row=on_bad_row)


def split_corpus(corpus: Corpus, share: float, side: Literal["training", "validation"]) -> Corpus:
    """The part of `corpus` that is held out for validation, about `share` of its documents, or the part that is left.

    A document's hash decides, so that it stays on its side whatever else comes or goes, and identical ones are on the
    same. The lowest hash is always held out, and the highest never. Rows that are no documents go with training's.

    Raises:
        UserError: (when read) there are fewer than two distinct documents.
    """
    border: list[int] = []  # found when it is first needed: an unchanged corpus isn't read

    def find_border() -> int:
        wanted = int(share * 2**64)
        lowest, highest = 2**64, -1
        for row in corpus.rows():
            if isinstance(row, Document) and row.text:
                lowest, highest = min(lowest, _hash(row)), max(highest, _hash(row))
                if lowest < wanted <= highest:
                    return wanted
        if lowest >= highest:
            raise UserError(
                f"{corpus.name} has fewer than two distinct documents, so none can be held out for validation: add "
                "some, or name others in validation.dataset"
            )
        return lowest + 1 if wanted <= lowest else highest

    def rows(part: Callable[[], Rows]) -> Rows:
        if not border:
            border.append(find_border())
        for row in part():
            held_out = isinstance(row, Document) and row.text != "" and _hash(row) < border[0]
            if held_out == (side == "validation"):
                yield row

    what = "the" if side == "validation" else "without"
    name = f"{corpus.name}, {what} {share} held out"
    return replace(
        corpus, name=name, parts=[partial(rows, part) for part in corpus.parts], left_out=LeftOut()
    )


def _hash(document: Document) -> int:
    """In 0 .. 2^64 - 1, evenly."""
    return int.from_bytes(hashlib.sha256(document.text.encode("utf-8")).digest()[:8], "big")


def python_stdlib(root: Path | None = None) -> Corpus:
    """The `.py` files of the running interpreter's standard library (or of `root`), exact duplicates once.

    Files in another encoding than UTF-8 (PEP 263) are left out. The text differs between Python builds: nothing may
    rely on its tokens.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    files = files_under(root, (".py",), leave_out=NOT_LIBRARY) if root.is_dir() else []
    if not files:
        raise UserError(
            f'this Python has no library source in {root}; set training.dataset = "text" and training.dataset_path '
            "to a folder of your own text"
        )
    return Corpus("python_stdlib", files, [partial(_distinct_sources, files)])


def file_corpus(dataset: str, path: Path, text_key: str) -> Corpus:
    """The file `path`, or the files in it, as `text`, `jsonl`, `parquet` or `mixed`.

    A text is one document, kept to the byte (CRLF and a byte order mark survive). Of JSON lines each is an object whose
    `text_key` is a document (blank ones don't count), of parquet each row. Mixed files are told apart by their names.
    """
    suffixes = {"jsonl": JSON_LINES, "parquet": (".parquet",)}.get(dataset, ("",))
    files = files_under(path, suffixes)
    if not files:
        names = ", ".join(f"*{suffix}" for suffix in suffixes)
        raise UserError(
            f"training.dataset_path = {str(path)!r} holds no file that counts as {dataset} ({names})"
        )

    def part(file: Path) -> Callable[[], Rows]:
        if dataset == "jsonl" or (dataset == "mixed" and file.name.endswith(JSON_LINES)):
            return partial(_json_lines, file, text_key)
        if dataset == "parquet" or (dataset == "mixed" and file.name.endswith(".parquet")):
            return partial(_parquet_rows, file, text_key)
        return partial(_whole_file, file)

    key = "" if dataset == "text" else f" [{text_key}]"
    return Corpus(
        f"{dataset} {path}{key}", files, [part(file) for file in files], how=dataset + key
    )


def custom_corpus(name: str, texts: Texts, dataset_path: str | None) -> Corpus:
    """What the user's function yields; a fault inside it is the user's, with the number of the document it was at.

    The state of its own file and of the files in `dataset_path` tells whether documents may have changed. Without a
    path nothing can: then they are read once at every start.
    """
    files = []
    if dataset_path and expanded(dataset_path).exists():
        files = [source_file(texts), *files_under(expanded(dataset_path))]

    def rows() -> Rows:
        number = 0
        try:
            for number, text in enumerate(texts(dataset_path), start=1):
                yield _checked(text, f"{name}:{number}", "what it yields")
        except UserError:
            raise
        except (Exception, SystemExit) as error:
            problem = f"{user_location(error)}: {type(error).__name__}: {error}"
            raise UserError(f"{name}, after document {number}: {problem}") from error

    return Corpus(" ".join(filter(None, [name, dataset_path])), files, [rows], how=name)


def hub_corpus(
    source: HubSource, path: Path | None, text_key: str, streaming: bool = False
) -> Corpus:
    """A dataset of the Hugging Face Hub at its newest revision, or a local folder that `datasets` can read.

    With `streaming` nothing is downloaded beforehand, and each of its files is a part.

    Raises:
        UserError: the hub cannot be reached, or has no such dataset.
    """
    if path and not path.is_dir():
        raise UserError(
            f"training.dataset_path = {str(path)!r} must be a folder, a copy of {source.repository}"
        )
    here = expanded(source.repository)
    local = path or (here if here.is_dir() else None)
    where = str(local or source.repository)
    how = f"{source.config or 'default'} {source.split} [{text_key}]"
    name = f"{where} {how}"
    files = files_under(local) if local else []
    revision = None if local else _hub_revision(source)

    @contextmanager
    def faults_named() -> Iterator[None]:
        try:
            yield
        except UserError:
            raise
        except (
            Exception
        ) as error:  # of the hub, the network, the file formats, the package's own: no common base
            lines = [line for line in str(error.__cause__ or error).splitlines() if line.strip()]
            raise UserError(
                f"{name} cannot be read: {lines[0] if lines else repr(error)}"
            ) from error

    def load() -> Any:
        dataset = _load(where, local is not None, source, revision, streaming)
        fields = dataset.column_names or list(
            next(iter(dataset), [text_key])
        )  # a stream may not know them
        if text_key not in fields:
            raise UserError(f"{name}: {_no_field(text_key, where, fields).problem}")
        return dataset.select_columns([text_key])  # the other fields are not even read

    def rows(load: Callable[[], Any], place: str) -> Rows:
        with faults_named():
            for number, row in enumerate(load(), start=1):
                yield _checked(row[text_key], f"{place}:{number}", repr(text_key))

    parts = [partial(rows, load, f"{where} {source.split}")]
    if streaming:
        with faults_named():
            dataset = load()
        count = dataset.num_shards
        shards = [partial(dataset.shard, count, shard) for shard in range(count)]
        parts = [
            partial(rows, shard, f"{where} {source.split}, file {n}")
            for n, shard in enumerate(shards, start=1)
        ]
    return Corpus(
        name, files, parts, streaming, how, None if revision is None else f"{where}@{revision}"
    )


def _hub_revision(source: HubSource) -> str | None:
    """The commit of a dataset that `source` asks for; None under HF_HUB_OFFLINE=1, when any downloaded one is used.

    Asked for first, with one request, since `datasets` itself tries for half a minute when there is no network.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository = source.repository
    at = f" at {source.revision!r}" if source.revision else ""
    given = f"training.dataset: {repository!r}{at} of the Hugging Face Hub"
    try:
        return HfApi().dataset_info(repository, revision=source.revision, timeout=HUB_TIMEOUT_S).sha
    except OfflineModeIsEnabled:
        return None
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        close = nearest(repository, [name for name in DATASETS if "/" in name])
        hint = f"; did you mean {close}?" if close else ""
        raise UserError(
            f"{given} does not exist, or is not open to you (see `hf auth login`){hint}"
        ) from error
    except Exception as error:  # its HTTP library has changed before, and the errors with it
        raise UserError(
            f"{given} cannot be reached ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}). "
            "Set training.dataset_path to a local copy, or HF_HUB_OFFLINE=1 to use what was downloaded before"
        ) from error


def _load(
    where: str, is_local: bool, source: HubSource, revision: str | None, streaming: bool
) -> Any:
    import datasets

    if is_local and (
        Path(where, "state.json").exists() or Path(where, "dataset_dict.json").exists()
    ):
        saved = datasets.load_from_disk(where)
        saved = saved[source.split] if isinstance(saved, datasets.DatasetDict) else saved
        return saved.to_iterable_dataset() if streaming else saved
    config = source.config
    if is_local and config not in datasets.get_dataset_config_names(where):
        config = None  # files of one split, copied without the description that names its configs
    return datasets.load_dataset(
        where, config, split=source.split, revision=revision, streaming=streaming
    )


def files_under(
    path: Path, suffixes: tuple[str, ...] = ("",), leave_out: frozenset[str] = frozenset()
) -> list[Path]:
    """`path` itself when it is a file, whatever its suffix; else the files below it as the module's docstring says.

    Args:
        path: A file or a folder.
        suffixes: Endings of the names that count.
        leave_out: Names of folders not to enter.

    Raises:
        UserError: nothing there, neither a file nor a folder, or a folder that can't be listed.
    """
    if path.is_file():
        return [path]
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
        subfolders[:] = sorted(
            name for name in subfolders if not name.startswith(".") and name not in leave_out
        )
        candidates = [
            Path(folder, name)
            for name in names
            if name.endswith(suffixes) and not name.startswith(".")
        ]
        # Pipes and sockets would block; a dangling link stays, to be named when it is opened.
        found += [file for file in candidates if file.is_file() or not file.exists()]
    return sorted(found, key=lambda file: file.relative_to(path).as_posix())


def _refuse(error: OSError) -> None:
    raise UserError(f"cannot read {error.filename!r}: {error.strerror}")


def _distinct_sources(files: Iterable[Path]) -> Rows:
    seen: set[bytes] = set()
    for row in (row for file in files for row in _whole_file(file)):
        digest = (
            hashlib.sha256(row.text.encode("utf-8")).digest()
            if isinstance(row, Document) and row.text
            else None
        )
        if digest and digest not in seen:
            seen.add(digest)
            yield row


def _whole_file(file: Path) -> Rows:
    with reading(repr(str(file))):
        content = file.read_bytes()
    try:
        yield Document(content.decode("utf-8"), str(file))
    except UnicodeDecodeError as error:
        yield _not_utf8(error, str(file))


def _json_lines(file: Path, text_key: str) -> Rows:
    compression = COMPRESSIONS.get(file.suffix)
    number = 0
    try:
        with open(file, "rb") as raw:
            for number, line in enumerate(_decompressed(raw, compression), start=1):
                if number == 1:
                    line = line.removeprefix(
                        b"\xef\xbb\xbf"
                    )  # the byte order mark that some editors add
                if line.strip():
                    yield _row_of_line(line, text_key, f"{file}:{number}")
    except OSError as error:
        yield _broken(compression, file, number + 1, error)


def _decompressed(raw: IO[bytes], compression: str | None) -> Iterable[bytes]:
    if compression is None:
        return raw
    import pyarrow

    # A small buffer, since one that meets a break loses what is in it.
    return io.BufferedReader(
        pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), compression), 1 << 13
    )


def _row_of_line(line: bytes, text_key: str, place: str) -> Document | BadRow:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return _not_utf8(error, place)
    except (ValueError, RecursionError) as error:
        return BadRow("broken JSON", place, f"not JSON: {error}")
    if not isinstance(row, dict):
        problem = f"a JSON {type(row).__name__}, but each line must be an object with {text_key!r}"
        return BadRow("no object", place, problem)
    return (
        _checked(row[text_key], place, repr(text_key))
        if text_key in row
        else _no_field(text_key, place, row)
    )


def _parquet_rows(file: Path, text_key: str) -> Rows:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with open(file, "rb") as raw:
            table = pyarrow.parquet.ParquetFile(raw)
            if text_key not in table.schema_arrow.names:
                yield _no_field(text_key, str(file), table.schema_arrow.names)
                return
            values = (
                value
                for batch in table.iter_batches(1024, columns=[text_key])
                for value in batch.column(0)
            )
            for number, value in enumerate(values, start=1):
                try:
                    yield _checked(value.as_py(), f"{file}:{number}", repr(text_key))
                except UnicodeDecodeError as error:
                    yield _not_utf8(error, f"{file}:{number}")
    except (pyarrow.ArrowException, OSError) as error:
        yield _broken("parquet", file, number + 1, error)


def _broken(format: str | None, file: Path, row: int, error: Exception) -> BadRow:
    """What stands for the rest of a file whose content is at fault; pyarrow's faults have no number of the system's.

    Raises:
        UserError: it is the file that cannot be read.
    """
    if isinstance(error, OSError) and error.errno is not None:
        raise UserError(f"cannot read {str(file)!r}: {error.strerror}") from error
    problem = f"the {format} data is broken from here on ({error}); nothing after it can be read"
    return BadRow(f"broken {format}", f"{file}:{row}", problem)


def _not_utf8(error: UnicodeDecodeError, place: str) -> BadRow:
    problem = f"not UTF-8: 0x{error.object[error.start]:02x} in byte {error.start + 1:,}; convert it, or keep it out"
    return BadRow("invalid UTF-8", place, problem)


def _no_field(text_key: str, place: str, names: Iterable[str]) -> BadRow:
    there = ", ".join(repr(name) for name in islice(names, 8)) or "none"
    return BadRow(
        "no text field",
        place,
        f"no {text_key!r}, which data.text_key asks for; fields here: {there}",
    )


def _checked(text: object, place: str, what: str) -> Document | BadRow:
    if not isinstance(text, str):
        return BadRow(
            "not a string", place, f"{what} is a {type(text).__name__}, but must be a string"
        )
    try:
        text.encode("utf-8")
    except (
        UnicodeEncodeError
    ) as error:  # JSON can spell half of a surrogate pair, which is no character
        return BadRow(
            "lone surrogate",
            place,
            f"{what} holds a lone surrogate, \\u{ord(text[error.start]):04x}",
        )
    return Document(text, place)
