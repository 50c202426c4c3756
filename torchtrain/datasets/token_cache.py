"""The token cache: a corpus tokenized once into one memory-mapped array, shared by all processes.

    tokens/<key>/tokens.bin         BOS document EOS BOS document EOS …, as uint16 or uint32
    tokens/<key>/manifest.json      what it is; written last: a folder without it is not a cache
    tokens/<corpus>.seen.json       state and contents of the corpus when it was last read: while
                                    the state stays the same it is not read again
    tokens/<corpus>.lock            held by the process that reads or builds; says how far it is
    tokens/<corpus>.building-<key>/ a build in progress: progress.json says how much of
                                    cache/tokens.bin counts

<key> is the hash of contents, tokenizer and format: the same text elsewhere finds the same cache,
changed text another. A build happens in a folder of its own, is synced, then renamed: killed at
any instant it leaves nothing that could be taken for a cache, and the kernel releases the lock of
a process that died.

Tokens are made shard by shard, each some megabytes of documents, and written in order: so any
number of processes makes the same bytes as one, and a build that was killed resumes after its last
shard. Shards are units of work alone: a finished cache is one array and needs no index.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from torchtrain.datasets.cache_folder import (
    Progress,
    files_state,
    find_facts,
    load_facts,
    locked,
    read_json,
    short_hash,
)
from torchtrain.datasets.corpora import Corpus, Document
from torchtrain.datasets.round_trip import RoundTrip, describe_loss, try_beginning
from torchtrain.datasets.tokenizer import Tokenizer, encode_documents, in_batches
from torchtrain.errors import NotWritable, UserError
from torchtrain.logging_utils import logger
from torchtrain.utils import count_cores, fsync_folder, plural, remove_unfinished, write_durably

FORMAT = 1
"""Bump when the on-disk layout changes."""
MANIFEST = "manifest.json"
SHARD_CHARACTERS = 1 << 23
"""A shard ends with the document that reaches this: some seconds of work for one core, little
enough to lose."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a finished cache, or a token file, holds."""

    source: str
    """Name of the corpus."""
    files: int
    documents: int | None = None
    """None where a token file doesn't say."""
    bytes: int | None = None
    """Of the documents' text in UTF-8; None for a token file."""
    tokens: int
    dtype: str
    corpus_fingerprint: str
    tokenizer_fingerprint: str
    left_out: dict[str, int] = field(default_factory=dict)
    """Skipped rows by kind."""
    left_out_places: list[str] = field(default_factory=list)
    """Locations of the first."""
    characters_sampled: int | None = None
    """Of the text, whose round trip was tried; None where none was, as by earlier versions."""
    characters_lost: int = 0
    """Of these, which the tokenizer cannot represent."""
    lost_examples: list[str] = field(default_factory=list)
    """The most frequent of those."""
    format: int = FORMAT

    def describe(self) -> str:
        """Return what is known, in words."""
        content = plural(self.tokens, "token")
        if self.documents is not None and self.bytes is not None:
            documents = f"{plural(self.documents, 'document')} in {plural(self.files, 'file')}"
            content = f"{documents}, {self.bytes / 1e6:,.2f} MB, {content}"
        if self.characters_sampled and self.characters_lost:
            content += f", {self.characters_lost / self.characters_sampled:.2%} of characters lost"
        return f"{self.source}: {content}"


@dataclass(frozen=True)
class TokenCache:
    """A finished cache, or a token file, open for reading."""

    manifest: Manifest
    tokens: np.ndarray
    """Memory-mapped, read-only `[tokens]`, of an integer type."""


Shards = Iterator[list[str]]
"""Texts, shard by shard."""
Encode = Callable[[Shards], Iterator[tuple[int, bytes]]]
"""From each shard, in order, to its number of documents and its tokens as the file holds them."""


@dataclass
class _Contents:
    """What reading a corpus through shows."""

    documents: int = 0
    bytes: int = 0
    fingerprint: str = ""
    """Hash of every text with its length, in order; empty until the last was read."""

    def read(self, documents: Iterable[Document]) -> Iterator[str]:
        """Hand on the texts of the documents, and add them up."""
        digest = hashlib.sha256()
        for document in documents:
            data = document.text.encode("utf-8")
            self.documents += 1
            self.bytes += len(data)
            digest.update(len(data).to_bytes(8, "little"))
            digest.update(data)
            yield document.text
        self.fingerprint = digest.hexdigest()


def open_token_cache(
    corpus: Corpus, tokenizer: Tokenizer, root: Path, encode: Encode | None = None
) -> TokenCache:
    """Open the tokens of a corpus, or build them while other processes that ask for them wait.

    Args:
        corpus: what to tokenize.
        tokenizer: its BOS and EOS go around every document.
        root: the cache folder, see `cache_root`.
        encode: how shards are encoded; unset: in this process, on all cores.

    Raises:
        UserError: the corpus is empty, unreadable or changes meanwhile, the tokenizer loses most of
            its text, or the folder cannot be written.
    """
    folder = root / "tokens"
    name = short_hash([corpus.name, *(str(file.absolute()) for file in corpus.files[:1])])
    known = load_facts(folder / f"{name}.seen.json", corpus_state(corpus)[0])
    cache = _load(folder / _key(known["fingerprint"], tokenizer)) if known else None
    if cache is None:  # else nothing is written, which this user may not be allowed to
        cache = _find_or_build(corpus, tokenizer, folder, name, encode)
    # Another corpus may have been read first, with the same text.
    manifest = replace(cache.manifest, source=corpus.name, files=len(corpus.files))
    if manifest.characters_sampled is None:
        manifest = _try_anew(corpus, tokenizer, folder, manifest)
    if manifest.characters_sampled and manifest.characters_lost:
        sampled, lost = manifest.characters_sampled, manifest.characters_lost
        logger.warning(f"{corpus.name}: {describe_loss(sampled, lost, manifest.lost_examples)}")
    return TokenCache(manifest, cache.tokens)


def _find_or_build(
    corpus: Corpus, tokenizer: Tokenizer, folder: Path, name: str, encode: Encode | None
) -> TokenCache:
    """Read the corpus through, unless it is known, and open its tokens or build them.

    Where nothing can be written, what others have finished is used all the same.
    """

    def find_contents(progress: Progress) -> _Contents:
        read = partial(_read_through, corpus, progress)
        seen = folder / f"{name}.seen.json"
        return _Contents(**find_facts(corpus.name, seen, partial(corpus_state, corpus), read))

    try:
        with locked(folder, name) as progress:
            contents = find_contents(progress)
            target = folder / _key(contents.fingerprint, tokenizer)
            building = folder / f"{name}.building-{target.name}"
            cache = _load(target, warn=True)
            for leftover in folder.glob(f"{name}.building-*"):  # of processes that were killed
                if cache or leftover != building:
                    shutil.rmtree(leftover)
            if cache is None:
                encode = encode or partial(encode_here, tokenizer)
                _Build(corpus, contents, tokenizer, building, target).run(encode, progress)
                cache = _load(target)
    except NotWritable as fault:
        if not _has_tokens_of(tokenizer, folder):
            raise
        logger.warning(
            f"{fault}. So {corpus.name} is read through, to look for tokens of the same text"
        )
        cache = _load(folder / _key(find_contents(Progress()).fingerprint, tokenizer))
        if cache is None:
            raise
    assert cache is not None, f"{corpus.name} was just tokenized"
    return cache


def _has_tokens_of(tokenizer: Tokenizer, folder: Path) -> bool:
    """Return whether there is a finished cache that this tokenizer has made."""
    return any(
        read_json(manifest).get("tokenizer_fingerprint") == tokenizer.fingerprint
        for manifest in folder.glob(f"*/{MANIFEST}")
    )


def _try_anew(corpus: Corpus, tokenizer: Tokenizer, folder: Path, manifest: Manifest) -> Manifest:
    """Add to a manifest of an earlier version what the tokenizer loses, and keep it if possible.

    Raises:
        UserError: it loses most.
    """
    logger.info(f"{corpus.name}: trying what the tokenizer loses, which its cache does not say")
    manifest = replace(manifest, **try_beginning(corpus, tokenizer).findings())
    path = folder / _key(manifest.corpus_fingerprint, tokenizer) / MANIFEST
    with suppress(OSError):  # else it is tried at every start
        write_durably(path, json.dumps(asdict(manifest), indent=2))
    return manifest


def _key(corpus_fingerprint: str, tokenizer: Tokenizer) -> str:
    return short_hash([str(FORMAT), corpus_fingerprint, tokenizer.fingerprint])


def corpus_state(corpus: Corpus) -> tuple[str, int]:
    """Return a hash that changes whenever the documents may have, and the time of the last change.

    If the state of a corpus is unknowable, treat it as changed now.
    """
    state, newest = files_state(corpus.files)
    if not corpus.files and corpus.revision is None:
        newest = time.time_ns()
    return short_hash([state, corpus.revision or "", corpus.on_bad_row]), newest


def _read_through(corpus: Corpus, progress: Progress) -> dict[str, Any]:
    contents = _Contents()
    for _ in contents.read(corpus.documents()):
        progress.show(f"reading {corpus.name}: {contents.bytes / 1e6:,.0f} MB")
    skipped = corpus.skipped.describe() if corpus.skipped.counts else ""
    if contents.documents == 0:
        raise UserError(f"{corpus.name} holds no text" + (f" ({skipped})" if skipped else ""))
    if skipped:
        logger.warning(f"{corpus.name}: {skipped}")
    return asdict(contents)


def _load(folder: Path, *, warn: bool = False) -> TokenCache | None:
    """Return the cache in `folder`; None if there is none, or a damaged one (with a warning)."""
    if not folder.exists():
        return None
    try:
        manifest = Manifest(**json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
        dtype = np.dtype(manifest.dtype)
        size = os.stat(folder / "tokens.bin").st_size
        expected = manifest.tokens * dtype.itemsize
        if size != expected:
            raise ValueError(f"tokens.bin has {size:,} bytes, its manifest says {expected:,}")
        return TokenCache(manifest, np.memmap(folder / "tokens.bin", dtype, mode="r"))
    except (OSError, ValueError, TypeError) as error:
        if warn:
            logger.warning(f"the token cache {folder} is damaged and will be rebuilt: {error}")
        return None


def dtype_for(tokenizer: Tokenizer) -> np.dtype:
    """Return the smallest unsigned type, of two or four bytes, that holds every id."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)


def encode_shard(tokenizer: Tokenizer, texts: list[str], threads: int) -> tuple[int, bytes]:
    """Return the number of documents of one shard, and its tokens as the file holds them."""
    tokens = np.concatenate(encode_documents(tokenizer, texts, threads))
    return len(texts), tokens.astype(dtype_for(tokenizer)).tobytes()


def encode_here(tokenizer: Tokenizer, shards: Shards) -> Iterator[tuple[int, bytes]]:
    """Encode in one process, whose threads share each shard (an `Encode`)."""
    return (encode_shard(tokenizer, texts, threads=count_cores()) for texts in shards)


@dataclass(frozen=True)
class _Build:
    """A cache to build in the folder `building`, which then becomes `target`."""

    corpus: Corpus
    contents: _Contents
    """Of the corpus, as it was read before."""
    tokenizer: Tokenizer
    building: Path
    target: Path

    def run(self, encode: Encode, progress: Progress) -> None:
        """Build, resuming after the shards that are there."""
        size = f"{self.contents.bytes / 1e6:,.1f} MB"
        logger.info(f"tokenizing {self.corpus.name} ({size}) into {self.target}")
        started = time.monotonic()
        try:
            self._tokenize(encode, progress)
        except BaseException:
            if not (self.building / "progress.json").exists():  # nothing to resume from
                shutil.rmtree(self.building)
            raise
        # The same text may have another name, and so another lock.
        with locked(self.target.parent, "publish"):
            _publish(self.building, self.target)
        logger.info(f"tokenized in {time.monotonic() - started:.1f} s")

    def _tokenize(self, encode: Encode, progress: Progress) -> None:
        itemsize = dtype_for(self.tokenizer).itemsize
        contents, round_trip = _Contents(), RoundTrip(self.corpus.name, self.tokenizer)
        cache = self.building / "cache"
        cache.mkdir(parents=True, exist_ok=True)
        with open(cache / "tokens.bin", "ab") as file:
            finished = read_json(self.building / "progress.json")
            documents, tokens = finished.get("documents", 0), finished.get("tokens", 0)
            if file.tell() < tokens * itemsize:
                documents = tokens = 0
            file.truncate(tokens * itemsize)
            texts = round_trip.watch(contents.read(self.corpus.documents()))
            missing = islice(texts, documents, None)
            first, started = documents, time.monotonic()
            for number, data in encode(in_batches(missing, SHARD_CHARACTERS)):
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                documents += number
                tokens += len(data) // itemsize
                finished = {"documents": documents, "tokens": tokens}
                write_durably(self.building / "progress.json", json.dumps(finished))
                per_second = (documents - first) / (time.monotonic() - started)
                progress.show(self._describe_progress(documents, per_second))
        if contents != self.contents:
            (self.building / "progress.json").unlink(missing_ok=True)
            raise UserError(
                f"{self.corpus.name} changed while it was read; start again when nothing writes "
                "to it"
            )
        self._write_manifest(tokens, round_trip)

    def _describe_progress(self, documents: int, documents_per_second: float) -> str:
        share = documents / self.contents.documents
        share_per_second = documents_per_second / self.contents.documents
        speed = share_per_second * self.contents.bytes / 1e6
        left = timedelta(seconds=round((1 - share) / share_per_second))
        bar = "#" * int(20 * share)
        done = f"[{bar:.<20}] {share:4.0%}, {speed:.1f} MB/s"
        return f"tokenizing {self.corpus.name}: {done}, {left} left"

    def _write_manifest(self, tokens: int, round_trip: RoundTrip) -> None:
        manifest = Manifest(
            source=self.corpus.name,
            files=len(self.corpus.files),
            documents=self.contents.documents,
            bytes=self.contents.bytes,
            tokens=tokens,
            dtype=dtype_for(self.tokenizer).name,
            corpus_fingerprint=self.contents.fingerprint,
            tokenizer_fingerprint=self.tokenizer.fingerprint,
            left_out=dict(self.corpus.skipped.counts),
            left_out_places=self.corpus.skipped.locations,
            **round_trip.findings(),
        )
        text = json.dumps(asdict(manifest), indent=2)
        path = self.building / "cache" / MANIFEST
        remove_unfinished(path)  # the rest of `building` is not published
        write_durably(path, text)


def _publish(building: Path, target: Path) -> None:
    if _load(target) is None:  # else the same text under another name was built meanwhile
        if target.exists():
            shutil.rmtree(target)
        os.rename(building / "cache", target)
        fsync_folder(target.parent)
    shutil.rmtree(building)
