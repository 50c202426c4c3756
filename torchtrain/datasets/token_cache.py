"""The token cache: a corpus tokenised once into one memory-mapped array, shared by every process of a host.

    tokens/<key>/tokens.bin         BOS document EOS BOS document EOS …, as uint16 or uint32
    tokens/<key>/manifest.json      what it is; written last, so a folder without it is not a cache
    tokens/<corpus>.seen.json       the files' state when last read, so that an unchanged corpus isn't read again
    tokens/<corpus>.lock            held by the process that reads or builds; its text is how far that is

<key> is the hash of contents, tokenizer and format: the same text elsewhere finds the same cache, changed text another.
A build happens in a folder of its own, is synced, then renamed: killed at any instant it leaves nothing that could be
taken for a cache, and the kernel drops the lock of a process that died.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np

from torchtrain.datasets.corpora import Corpus, Document
from torchtrain.datasets.tokenizer import SentencePieceTokenizer, in_batches
from torchtrain.utils import UserError, fsync_folder, write_durably

FORMAT = 1
"""Goes up when the same documents would be laid down differently."""
SETTLED_NS = 2_000_000_000
"""A file that changed less than this before it was read may change again without another time stamp: file systems
count in up to 2 s."""


@dataclass(frozen=True)
class Manifest:
    """What a finished cache holds."""

    format: int
    source: str
    files: int
    documents: int
    bytes: int
    """Of the documents' text in UTF-8."""
    tokens: int
    dtype: str
    corpus_fingerprint: str
    tokenizer_fingerprint: str


@dataclass(frozen=True)
class TokenCache:
    """A finished cache, open for reading."""

    manifest: Manifest
    tokens: np.ndarray
    """Memory-mapped, read-only `[tokens]`, uint16 or uint32."""


def cache_root(configured: str | None) -> Path:
    """`data.cache_folder`, else torchtrain's folder in the user's cache ($XDG_CACHE_HOME or ~/.cache)."""
    if configured:
        return Path(configured).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the XDG specification: a relative one is to be ignored
        return Path(base, "torchtrain")
    try:
        return Path.home() / ".cache" / "torchtrain"
    except RuntimeError as error:
        raise UserError("this user has no home folder: set data.cache_folder, where the token cache goes") from error


def open_token_cache(
    corpus: Corpus, tokenizer: SentencePieceTokenizer, root: Path, log: Callable[[str], None] = print
) -> TokenCache:
    """The corpus in tokens: opened if it is there, else built, while other processes that ask for it wait.

    Args:
        corpus: What to tokenise.
        tokenizer: Its BOS and EOS go around every document.
        root: The cache folder, see `cache_root`.
        log: Takes the lines that say what happens, when it is more than opening a file.

    Raises:
        UserError: the corpus is empty, unreadable or changes meanwhile, or the folder cannot be written.
    """
    folder = root / "tokens"
    name = _hash([corpus.name, str(corpus.files[0].absolute())])
    seen = folder / f"{name}.seen.json"
    cache = _open_if_unchanged(corpus, tokenizer, seen)
    if cache:
        return cache
    with _cache_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{name}.lock", log) as progress:
            for leftover in folder.glob(f"{name}.building-*"):  # of processes that were killed: the lock is ours
                shutil.rmtree(leftover)
            cache = _open_if_unchanged(corpus, tokenizer, seen)  # another process may have built it meanwhile
            if cache:
                return cache
            contents = _read_through(corpus, seen, progress)
            target = folder / _key(contents.fingerprint(), tokenizer)
            cache = _open(target, log)
            if cache:
                return cache
            log(f"tokenising {corpus.name} ({contents.bytes / 1e6:,.1f} MB) into {target}")
            started = time.monotonic()
            with tempfile.TemporaryDirectory(prefix=f"{name}.building-", dir=folder) as temporary:
                _build(corpus, contents, tokenizer, Path(temporary, "cache"), progress)
                _publish(Path(temporary, "cache"), target)
            cache = _open(target)
            _draw("")
            log(f"tokenised in {time.monotonic() - started:.1f} s")
    assert cache, f"{target} was just built"
    return cache


class _Contents:
    """Adds up what goes by: the fingerprint is the hash of every text with its length, in order."""

    def __init__(self) -> None:
        self.documents = 0
        self.bytes = 0
        self._digest = hashlib.sha256()

    def add(self, text: str) -> None:
        data = text.encode("utf-8")
        self.documents += 1
        self.bytes += len(data)
        self._digest.update(len(data).to_bytes(8, "little"))
        self._digest.update(data)

    def texts(self, documents: Iterable[Document]) -> Iterator[str]:
        for document in documents:
            self.add(document.text)
            yield document.text

    def fingerprint(self) -> str:
        return self._digest.hexdigest()


class _Progress:
    """How far the holder of the lock is: one line, redrawn on a terminal, and kept in the lock's file for others."""

    def __init__(self, lock: IO[str]) -> None:
        self._lock = lock
        self._next = 0.0

    def show(self, text: str) -> None:
        if time.monotonic() < self._next:
            return
        self._next = time.monotonic() + 0.2
        self._lock.seek(0)
        self._lock.truncate()
        self._lock.write(text)
        self._lock.flush()
        _draw(text)


def _draw(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def _hash(parts: Iterable[str]) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode("ascii")).hexdigest()[:32]


def _key(corpus_fingerprint: str, tokenizer: SentencePieceTokenizer) -> str:
    return _hash([str(FORMAT), corpus_fingerprint, tokenizer.fingerprint])


@contextmanager
def _cache_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write the token cache in {str(folder)!r}: {error.strerror or error}. "
            "Make room there, or set data.cache_folder to a folder that can be written"
        ) from error


@contextmanager
def _locked(path: Path, log: Callable[[str], None]) -> Iterator[_Progress]:
    with open(path, "a+", encoding="utf-8") as lock:
        waiting = False
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not waiting:
                    log(f"another process is preparing the token cache: waiting for {path}")
                waiting = True
                lock.seek(0)
                _draw(lock.read(200))
                time.sleep(0.1)
        try:
            yield _Progress(lock)
        finally:
            _draw("")


def _open_if_unchanged(corpus: Corpus, tokenizer: SentencePieceTokenizer, seen: Path) -> TokenCache | None:
    """The cache, without reading the corpus, if every file is in the state in which it was last read through."""
    try:
        remembered = json.loads(seen.read_text(encoding="utf-8"))
        if remembered["state"] != _state(corpus.files)[0]:
            return None
        return _open(seen.parent / _key(remembered["corpus_fingerprint"], tokenizer))
    except (OSError, ValueError, LookupError, TypeError):
        return None  # nothing remembered, or nothing legible: the corpus is read


def _state(files: list[Path]) -> tuple[str, int]:
    """A hash of every file's path, size and times, and the newest of these times (ns since 1970).

    The time of the last status change is among them: a tool that sets the time of modification back can't set that.
    """
    newest = 0
    states = []
    for file in files:
        try:
            stat = os.stat(file)
        except OSError as error:
            raise UserError(f"cannot read {str(file)!r}: {error.strerror}") from error
        newest = max(newest, stat.st_mtime_ns, stat.st_ctime_ns)
        states.append(f"{file.absolute()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}")
    return _hash([str(FORMAT), *states]), newest


def _read_through(corpus: Corpus, seen: Path, progress: _Progress) -> _Contents:
    """The corpus' contents; its files' state is remembered if nobody can have written to them meanwhile."""
    state, newest = _state(corpus.files)
    started = time.time_ns()
    contents = _Contents()
    for _ in contents.texts(corpus.documents()):
        progress.show(f"reading {corpus.name}: {contents.bytes / 1e6:,.0f} MB")
    if contents.documents == 0:
        raise UserError(f"{corpus.name} holds no text: all its files are empty")
    if newest < started - SETTLED_NS and state == _state(corpus.files)[0]:
        write_durably(seen, json.dumps({"state": state, "corpus_fingerprint": contents.fingerprint()}))
    return contents


def _open(folder: Path, log: Callable[[str], None] | None = None) -> TokenCache | None:
    """The cache in `folder`; None if there is none, or (a warning to `log`) a damaged one."""
    if not folder.exists():
        return None
    try:
        manifest = Manifest(**json.loads((folder / "manifest.json").read_text(encoding="utf-8")))
        dtype = np.dtype(manifest.dtype)
        size = os.stat(folder / "tokens.bin").st_size
        if size != manifest.tokens * dtype.itemsize:
            raise ValueError(f"tokens.bin has {size:,} bytes, its manifest says {manifest.tokens * dtype.itemsize:,}")
        return TokenCache(manifest, np.memmap(folder / "tokens.bin", dtype, mode="r"))
    except (OSError, ValueError, TypeError) as error:
        if log:
            log(f"warning: the token cache {folder} is damaged and will be built again: {error}")
        return None


def _build(
    corpus: Corpus, contents: _Contents, tokenizer: SentencePieceTokenizer, built: Path, progress: _Progress
) -> None:
    """Tokenise `corpus`, of which `contents` is known, into the new folder `built`, in memory for a batch at a time."""
    started = time.monotonic()
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    again = _Contents()
    tokens = 0
    built.mkdir()
    with open(built / "tokens.bin", "wb") as file:
        for texts in in_batches(again.texts(corpus.documents())):
            for ids in tokenizer.encode_batch(texts, threads=_cores()):
                file.write(np.concatenate(([tokenizer.bos_id], ids, [tokenizer.eos_id])).astype(dtype).data)
                tokens += len(ids) + 2
            speed = again.bytes / (time.monotonic() - started)
            progress.show(f"tokenising {corpus.name}: {again.bytes / contents.bytes:4.0%}, {speed / 1e6:.1f} MB/s")
        file.flush()
        os.fsync(file.fileno())
    if again.fingerprint() != contents.fingerprint():
        raise UserError(f"{corpus.name} changed while it was read; start again when nothing writes to it")
    manifest = Manifest(
        format=FORMAT,
        source=corpus.name,
        files=len(corpus.files),
        documents=again.documents,
        bytes=again.bytes,
        tokens=tokens,
        dtype=dtype.name,
        corpus_fingerprint=again.fingerprint(),
        tokenizer_fingerprint=tokenizer.fingerprint,
    )
    write_durably(built / "manifest.json", json.dumps(asdict(manifest), indent=2))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _publish(built: Path, target: Path) -> None:
    if _open(target):
        return  # the same text under another name was built meanwhile
    if target.exists():
        shutil.rmtree(target)
    os.rename(built, target)
    fsync_folder(target.parent)
