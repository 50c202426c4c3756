"""The cache folder: where it is, its locks, and facts about files that are costly to find out."""

import fcntl
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from torchtrain.errors import NotWritable, UserError
from torchtrain.logging_utils import clear_progress, draw_progress, logger
from torchtrain.utils import (
    describe_os_error,
    expand_user,
    remove_unfinished,
    user_errors,
    write_durably,
)

SETTLED_NS = 2_000_000_000
"""A file that changed less than this before it was read may change again without another time
stamp: file systems count in steps of up to 2 s."""
LOGGED_EVERY_S = 30.0
"""Time between lines of progress where there is no terminal."""
PATIENCE_S = 1.0
"""A shorter wait for a lock is not worth a line."""


def cache_root(configured: str | None) -> Path:
    """Return `data.cache_folder`, or else torchtrain's folder in the user's cache.

    That is in $XDG_CACHE_HOME or ~/.cache.

    Raises:
        UserError: nothing is configured, and the user has no home folder.
    """
    if configured:
        return expand_user(configured).absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):  # the XDG specification: a relative one is to be ignored
        return Path(base, "torchtrain")
    try:
        return Path.home() / ".cache" / "torchtrain"
    except RuntimeError as error:
        raise UserError("this user has no home folder: set data.cache_folder") from error


def short_hash(texts: Iterable[str]) -> str:
    """Return a hash of the texts and of the borders between them, 32 hexadecimal digits."""
    return hashlib.sha256(json.dumps(list(texts)).encode("ascii")).hexdigest()[:32]


class Progress:
    """How far the holder of a lock is: one line, redrawn on a terminal, else logged now and then.

    It is kept in the lock's file too, for those who wait; without a lock nobody does.
    """

    def __init__(self, lock: IO[str] | None = None) -> None:
        self._lock = lock
        self._next = 0.0
        self._next_logged = time.monotonic() + LOGGED_EVERY_S

    def show(self, text: str) -> None:
        """Say how far it is; cheap enough for every document."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + 0.2
        if self._lock is not None:
            self._lock.seek(0)
            self._lock.truncate()
            self._lock.write(text)
            self._lock.flush()
        draw_progress(text)
        if now > self._next_logged and not sys.stderr.isatty():
            self._next_logged = now + LOGGED_EVERY_S
            logger.info(text)


@contextmanager
def locked(folder: Path, name: str) -> Iterator[Progress]:
    """Hold the lock `name` in `folder`, creating the folder.

    Raises:
        NotWritable: the lock cannot be made.
        UserError: an OSError inside.
    """
    lock = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.lock"
        # The text names files, whose names may be any bytes.
        with open(path, "a+", encoding="utf-8", errors="backslashreplace") as lock:
            _wait_for(lock)
            yield Progress(lock)
    except OSError as error:
        fault = UserError if lock is not None else NotWritable
        raise fault(
            f"cannot write in {str(folder)!r}: {error.strerror or error}. Make room there, or set "
            "data.cache_folder to a folder that can be written"
        ) from error
    finally:
        clear_progress()


def _wait_for(lock: IO[str]) -> None:
    """Take the lock; meanwhile show how far its holder is."""
    started = time.monotonic()
    is_told = False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not is_told and time.monotonic() - started >= PATIENCE_S:
                is_told = True
                logger.info(f"waiting for the process that prepares the token cache ({lock.name})")
            lock.seek(0)
            draw_progress(lock.read(200))
            time.sleep(0.1)


def read_json(path: Path) -> dict[str, Any]:
    """Return the table in this file; an empty one where there is nothing legible."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def load_facts(path: Path, state: str) -> dict[str, Any]:
    """Return the facts in `path` if they were found in this `state`; else an empty table."""
    facts = read_json(path)
    return facts if facts.pop("state", None) == state else {}


def find_facts(
    name: str,
    path: Path,
    find_state: Callable[[], tuple[str, int]],
    find: Callable[[], dict[str, Any]],
) -> dict[str, Any]:
    """Return the facts in `path`, or find and keep them if the state is not that of `path`.

    The caller holds the lock under which `path` is written, or cannot write it.

    Args:
        name: what the facts are about, for messages.
        path: where they are kept.
        find_state: its state now, as `files_state` gives it.
        find: finds the facts.

    Raises:
        UserError: the state changes meanwhile.
    """
    state, newest = find_state()
    started = time.time_ns()
    known = load_facts(path, state)
    if known:
        return known
    remove_unfinished(path)
    facts = find()
    if find_state()[0] != state:
        raise UserError(f"{name} changed while it was read; start again when nothing writes to it")
    if newest < started - SETTLED_NS:
        try:
            write_durably(path, json.dumps({"state": state, **facts}))
        except OSError as error:
            logger.warning(
                f"{path} cannot be written: {describe_os_error(error)}. So {name} is read through "
                "at every start"
            )
    return facts


def files_state(files: list[Path]) -> tuple[str, int]:
    """Return a hash of every file's path, size and times, and the newest of the times.

    The time of the last status change is among them, since a tool that sets the time of
    modification back cannot set that. Times are in ns since 1970.
    """
    newest = 0
    states = []
    for file in files:
        with user_errors(f"cannot read {str(file)!r}", OSError):
            stat = os.stat(file)
        newest = max(newest, stat.st_mtime_ns, stat.st_ctime_ns)
        states.append(
            f"{file.absolute()} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns} {stat.st_ino}"
        )
    return short_hash(["state", *states]), newest
