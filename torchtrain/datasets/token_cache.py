"""The token cache: a corpus tokenised once into one memory-mapped array, shared by every process of a host.

    tokens/<key>/tokens.bin         BOS document EOS BOS document EOS …, as uint16 or uint32
    tokens/<key>/manifest.json      what it is; written last, so a folder without it is not a cache
    tokens/<corpus>.seen.json       the corpus' state and contents when last read: an unchanged one isn't read again
    tokens/<corpus>.lock            held by the process that reads or builds; its text is how far that is
    tokens/<corpus>.building-<key>/ a build in the making: progress.json says how much of cache/tokens.bin counts

<key> is the hash of contents, tokenizer and format: the same text elsewhere finds the same cache, changed text another.
A build happens in a folder of its own, is synced, then renamed: killed at any instant it leaves nothing that could be
taken for a cache, and the kernel drops the lock of a process that died.

Tokens are made shard by shard, each some megabytes of documents, and written in order: so any number of processes
makes the same bytes as one, and a build that was killed goes on after its last shard. Shards are units of work alone:
a finished cache is one array, and reading it needs no index.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from torchtrain.datasets.corpora import Corpus, Document
from torchtrain.datasets.tokenizer import Tokenizer, in_batches
from torchtrain.errors import UserError
from torchtrain.utils import cores, expanded, fsync_folder, reading, write_durably

FORMAT = 1
"""Goes up when the same documents would be laid down differently."""
SETTLED_NS = 2_000_000_000
"""A file that changed less than this before it was read may change again without another time stamp: file systems
count in up to 2 s."""
LOGGED_EVERY_S = 30.0
"""How often a log file bears a line of progress."""
SHARD_CHARACTERS = 1 << 23
"""A shard ends with the document that reaches this: some seconds of work for one core, little enough to lose."""


@dataclass(frozen=True)
class Manifest:
    """What a finished cache, or a token file, holds."""

    source: str
    files: int
    documents: int | None
    """None where a token file doesn't say."""
    bytes: int | None
    """Of the documents' text in UTF-8; None for a token file."""
    tokens: int
    dtype: str
    corpus_fingerprint: str
    tokenizer_fingerprint: str
    left_out: dict[str, int] = field(default_factory=dict)
    """Rows that became no document, by kind."""
    left_out_places: list[str] = field(default_factory=list)
    """The first of them."""
    format: int = FORMAT

    def describe(self) -> str:
        """What is known, in words."""
        known = [f"{self.tokens:,} tokens"]
        if self.bytes is not None:
            known.insert(0, f"{self.bytes / 1e6:,.2f} MB")
        if self.documents is not None:
            known.insert(0, f"{self.documents:,} documents in {self.files:,} files")
        return f"{self.source}: {', '.join(known)}"


@dataclass(frozen=True)
class TokenCache:
    """A finished cache, or a token file, open for reading."""

    manifest: Manifest
    tokens: np.ndarray
    """Memory-mapped, read-only `[tokens]`, of an integer type."""


Shards = Iterator[list[str]]
"""Texts, shard by shard."""
Encode = Callable[[Shards], Iterator[tuple[int, bytes]]]
"""Turns each shard, in order, into its number of documents and its tokens as they go into the file."""


def cache_root(configured: str | None) -> Path:
    """`data.cache_folder`, else torchtrain's folder in the user's cache ($XDG_CACHE_HOME or ~/.cache)."""
    if configured:
        return expanded(configured).absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the XDG specification: a relative one is to be ignored
        return Path(base, "torchtrain")
    try:
        return Path.home() / ".cache" / "torchtrain"
    except RuntimeError as error:
        raise UserError(
            "this user has no home folder: set data.cache_folder, where the token cache goes"
        ) from error


def open_token_cache(
    corpus: Corpus,
    tokenizer: Tokenizer,
    root: Path,
    log: Callable[[str], None] = print,
    encode: Encode | None = None,
) -> TokenCache:
    """The corpus in tokens: opened if it is there, else built, while other processes that ask for it wait.

    Args:
        corpus: What to tokenise.
        tokenizer: Its BOS and EOS go around every document.
        root: The cache folder, see `cache_root`.
        log: Takes the lines that say what happens, when it is more than opening a file.
        encode: How shards are encoded; by default in this process, on all cores.

    Raises:
        UserError: the corpus is empty, unreadable or changes meanwhile, or the folder cannot be written.
    """
    folder = root / "tokens"
    name = short_hash([corpus.name, *(str(file.absolute()) for file in corpus.files[:1])])
    seen = folder / f"{name}.seen.json"
    fingerprint = remembered(seen, corpus_state(corpus)[0]).get("fingerprint")
    cache = _open(folder / _key(fingerprint, tokenizer)) if fingerprint else None
    if cache:
        return cache  # and nothing was written, for which this user may have no right
    with locked(folder, name, log) as progress:
        state, read = partial(corpus_state, corpus), partial(_read_through, corpus, progress, log)
        contents = found_out(corpus.name, seen, state, read)
        key = _key(contents["fingerprint"], tokenizer)
        target, building = folder / key, folder / f"{name}.building-{key}"
        cache = _open(target, log)
        for leftover in folder.glob(
            f"{name}.building-*"
        ):  # of processes that were killed: the lock is ours
            if cache or leftover != building:
                shutil.rmtree(leftover)
        if cache:
            return cache
        log(f"tokenising {corpus.name} ({contents['bytes'] / 1e6:,.1f} MB) into {target}")
        started = time.monotonic()
        try:
            _build(
                corpus,
                contents,
                tokenizer,
                building,
                progress,
                encode or partial(encode_here, tokenizer),
            )
        except BaseException:
            if not (building / "progress.json").exists():  # nothing to go on from
                shutil.rmtree(building)
            raise
        with locked(
            folder, "publish", log
        ):  # the same text may be there under another name, and lock
            _publish(building, target)
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

    def texts(self, documents: Iterable[Document]) -> Iterator[str]:
        for document in documents:
            data = document.text.encode("utf-8")
            self.documents += 1
            self.bytes += len(data)
            self._digest.update(len(data).to_bytes(8, "little"))
            self._digest.update(data)
            yield document.text

    def facts(self) -> dict[str, Any]:
        return {
            "fingerprint": self._digest.hexdigest(),
            "documents": self.documents,
            "bytes": self.bytes,
        }


class Progress:
    """How far the holder of the lock is: one line, redrawn on a terminal, and kept in the lock's file for others.

    Without a terminal it is logged, now and then.
    """

    def __init__(self, lock: IO[str], log: Callable[[str], None]) -> None:
        self._lock = lock
        self._log = log
        self._next = 0.0
        self._next_logged = time.monotonic() + LOGGED_EVERY_S

    def show(self, text: str) -> None:
        """Say how far it is; cheap enough for every document."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + 0.2
        self._lock.seek(0)
        self._lock.truncate()
        self._lock.write(text)
        self._lock.flush()
        _draw(text)
        if now > self._next_logged and not sys.stderr.isatty():
            self._next_logged = now + LOGGED_EVERY_S
            self._log(text)


def _draw(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


def short_hash(parts: Iterable[str]) -> str:
    return hashlib.sha256(json.dumps(list(parts)).encode("ascii")).hexdigest()[:32]


def _key(corpus_fingerprint: str, tokenizer: Tokenizer) -> str:
    return short_hash([str(FORMAT), corpus_fingerprint, tokenizer.fingerprint])


@contextmanager
def locked(folder: Path, name: str, log: Callable[[str], None]) -> Iterator[Progress]:
    """Hold the lock `name` in `folder`, which is made; the system's faults in what is done there become the user's."""
    path = folder / f"{name}.lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(
            path, "a+", encoding="utf-8", errors="backslashreplace"
        ) as lock:  # names of files may be any bytes
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
            yield Progress(lock, log)
    except OSError as error:
        raise UserError(
            f"cannot write the token cache in {str(folder)!r}: {error.strerror or error}. "
            "Make room there, or set data.cache_folder to a folder that can be written"
        ) from error
    finally:
        _draw("")


def _read_json(path: Path) -> dict[str, Any]:
    """The table in this file; an empty one where there is nothing legible."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def remembered(seen: Path, state: str) -> dict[str, Any]:
    """What was found out in this `state` and written into `seen`, if anything."""
    facts = _read_json(seen)
    return facts if facts.get("state") == state else {}


def found_out(
    name: str, seen: Path, state: Callable[[], tuple[str, int]], read: Callable[[], dict[str, Any]]
) -> dict[str, Any]:
    """What `read` says of `name`: asked for again when the `state` (see `files_state`) isn't that written into `seen`.

    Raises:
        UserError: the state changes meanwhile.
    """
    before, newest = state()
    started = time.time_ns()
    known = remembered(seen, before)
    if known:
        return known
    facts = {"state": before, **read()}
    if state()[0] != before:
        raise UserError(f"{name} changed while it was read; start again when nothing writes to it")
    if newest < started - SETTLED_NS:
        write_durably(seen, json.dumps(facts))
    return facts


def files_state(files: list[Path]) -> tuple[str, int]:
    """A hash of every file's path, size and times, and the newest of these times (ns since 1970).

    The time of the last status change is among them: a tool that sets the time of modification back can't set that.
    """
    newest = 0
    states = []
    for file in files:
        with reading(repr(str(file))):
            stat = os.stat(file)
        newest = max(newest, stat.st_mtime_ns, stat.st_ctime_ns)
        states.append(
            f"{file.absolute()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
        )
    return short_hash(["state", *states]), newest


def corpus_state(corpus: Corpus) -> tuple[str, int]:
    """The same of a corpus, with its revision and what it does with bad rows; one that can't tell has just changed."""
    state, newest = files_state(corpus.files)
    if not corpus.files and corpus.revision is None:
        newest = time.time_ns()
    return short_hash([state, corpus.revision or "", corpus.on_bad_row]), newest


def _read_through(corpus: Corpus, progress: Progress, log: Callable[[str], None]) -> dict[str, Any]:
    contents = _Contents()
    for _ in contents.texts(corpus.documents()):
        progress.show(f"reading {corpus.name}: {contents.bytes / 1e6:,.0f} MB")
    left_out = corpus.left_out.describe() if corpus.left_out.counts else ""
    if contents.documents == 0:
        raise UserError(f"{corpus.name} holds no text" + (f" ({left_out})" if left_out else ""))
    if left_out:
        log(f"{corpus.name}: {left_out}")
    return contents.facts()


def _open(folder: Path, log: Callable[[str], None] | None = None) -> TokenCache | None:
    """The cache in `folder`; None if there is none, or (a warning to `log`) a damaged one."""
    if not folder.exists():
        return None
    try:
        manifest = Manifest(**json.loads((folder / "manifest.json").read_text(encoding="utf-8")))
        dtype = np.dtype(manifest.dtype)
        size = os.stat(folder / "tokens.bin").st_size
        if size != manifest.tokens * dtype.itemsize:
            raise ValueError(
                f"tokens.bin has {size:,} bytes, its manifest says {manifest.tokens * dtype.itemsize:,}"
            )
        return TokenCache(manifest, np.memmap(folder / "tokens.bin", dtype, mode="r"))
    except (OSError, ValueError, TypeError) as error:
        if log:
            log(f"warning: the token cache {folder} is damaged and will be built again: {error}")
        return None


def dtype_for(tokenizer: Tokenizer) -> np.dtype:
    """The smallest unsigned type, of two or four bytes, that holds every id."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


def encode_shard(tokenizer: Tokenizer, texts: list[str], threads: int) -> tuple[int, bytes]:
    """What an `Encode` makes of one shard."""
    dtype, bos, eos = dtype_for(tokenizer), [tokenizer.bos_id], [tokenizer.eos_id]
    encoded = tokenizer.encode_batch(texts, threads=threads)
    return len(texts), b"".join(
        np.concatenate((bos, ids, eos)).astype(dtype).tobytes() for ids in encoded
    )


def encode_here(tokenizer: Tokenizer, shards: Shards) -> Iterator[tuple[int, bytes]]:
    """The `Encode` of one process: threads share each shard."""
    return (encode_shard(tokenizer, texts, threads=cores()) for texts in shards)


def _build(
    corpus: Corpus,
    contents: dict[str, Any],
    tokenizer: Tokenizer,
    building: Path,
    progress: Progress,
    encode: Encode,
) -> None:
    """Tokenise `corpus`, of which `contents` is known, into `building`, going on after the shards that are there."""
    dtype = dtype_for(tokenizer)
    documents, tokens = _already_done(building, dtype.itemsize)
    started, start = time.monotonic(), documents
    again = _Contents()
    missing = islice(again.texts(corpus.documents()), documents, None)
    (building / "cache").mkdir(parents=True, exist_ok=True)
    with open(building / "cache" / "tokens.bin", "ab") as file:
        file.truncate(tokens * dtype.itemsize)
        for of_shard, data in encode(in_batches(missing, SHARD_CHARACTERS)):
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            documents += of_shard
            tokens += len(data) // dtype.itemsize
            write_durably(
                building / "progress.json", json.dumps({"documents": documents, "tokens": tokens})
            )
            share = documents / contents["documents"]
            speed = (documents - start) / (time.monotonic() - started)  # documents a second
            left = timedelta(seconds=round((contents["documents"] - documents) / speed))
            progress.show(
                f"tokenising {corpus.name}: [{'#' * int(20 * share):.<20}] {share:4.0%}, "
                f"{speed * contents['bytes'] / contents['documents'] / 1e6:.1f} MB/s, {left} left"
            )
    if again.facts()["fingerprint"] != contents["fingerprint"]:
        (building / "progress.json").unlink(missing_ok=True)
        raise UserError(
            f"{corpus.name} changed while it was read; start again when nothing writes to it"
        )
    manifest = Manifest(
        source=corpus.name,
        files=len(corpus.files),
        documents=again.documents,
        bytes=again.bytes,
        tokens=tokens,
        dtype=dtype.name,
        corpus_fingerprint=contents["fingerprint"],
        tokenizer_fingerprint=tokenizer.fingerprint,
        left_out=dict(corpus.left_out.counts),
        left_out_places=corpus.left_out.places,
    )
    write_durably(building / "cache" / "manifest.json", json.dumps(asdict(manifest), indent=2))


def _already_done(building: Path, itemsize: int) -> tuple[int, int]:
    """Documents and tokens that an earlier build has finished."""
    done, tokens = _read_json(building / "progress.json"), building / "cache" / "tokens.bin"
    if done and tokens.exists() and tokens.stat().st_size >= done["tokens"] * itemsize:
        return done["documents"], done["tokens"]
    return 0, 0


def _publish(building: Path, target: Path) -> None:
    if not _open(target):  # else the same text under another name was built meanwhile
        if target.exists():
            shutil.rmtree(target)
        os.rename(building / "cache", target)
        fsync_folder(target.parent)
    shutil.rmtree(building)
