"""What a rank changes on the disk, told operation by operation before it is done.

Who is told may count, kill the process, or raise the error that the operation is then to have.
Nothing in C is touched: files opened for writing under the folder are Python objects whose `write`
tells first, `os.fsync` is replaced, and the rest are Python's own audit events.
"""

import builtins
import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Operation:
    """One change of a file or folder."""

    kind: str
    """create, write, truncate, fsync, rename, remove, mkdir or rmdir."""
    path: str
    target: str = ""
    """The new name, of a rename."""
    data: bytes = b""
    position: int = 0
    """Where in the file the data go, or the size that it is cut to."""


Tell = Callable[[Operation], None]
NAMED = {"os.remove": "remove", "os.mkdir": "mkdir", "os.rmdir": "rmdir"}
"""Kinds by audit event, of those with a path and, last, the descriptor of its folder."""


def watch(folder: Path, tell: Tell) -> None:
    """Have `tell` called before each operation under `folder`, for the rest of this process."""
    root = str(folder)

    def tell_of(operation: Operation) -> None:
        if operation.path == root or operation.path.startswith(f"{root}/"):
            tell(operation)

    watch_names(tell_of)
    watch_syncs(tell_of)
    watch_writes(root, tell_of)


def watch_names(tell: Tell) -> None:
    """Tell of what makes, renames and removes names."""

    def hear(event: str, arguments: tuple[Any, ...]) -> None:
        if event in NAMED:
            tell(Operation(NAMED[event], absolute(arguments[0], arguments[-1])))
        elif event == "os.rename":
            source = absolute(arguments[0], arguments[2])
            tell(Operation("rename", source, target=absolute(arguments[1], arguments[3])))
        elif event == "os.truncate":
            tell(Operation("truncate", absolute(arguments[0]), position=arguments[1]))
        elif event == "open" and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path, flags = absolute(arguments[0]), arguments[2]
            if flags & os.O_CREAT and not os.path.exists(path):
                tell(Operation("create", path))
            elif flags & os.O_TRUNC:
                tell(Operation("truncate", path))

    sys.addaudithook(hear)


def watch_syncs(tell: Tell) -> None:
    """Tell of each fsync."""
    fsync = os.fsync

    def telling(fd: Any) -> None:
        number = fd if isinstance(fd, int) else fd.fileno()
        tell(Operation("fsync", absolute(number)))
        fsync(fd)

    os.fsync = telling


def watch_writes(root: str, tell: Tell) -> None:
    """Tell of each write to a file under `root` that is opened from now on."""
    plain_open = io.open

    class TellingFile(io.FileIO):
        """A raw file that tells before it writes."""

        def write(self, data: Any) -> int:
            position = self.seek(0, os.SEEK_END) if "a" in self.mode else self.tell()
            tell(Operation("write", absolute(self.fileno()), data=bytes(data), position=position))
            return super().write(data)

        def truncate(self, size: int | None = None) -> int:
            size = self.tell() if size is None else size
            tell(Operation("truncate", absolute(self.fileno()), position=size))
            return super().truncate(size)

    def open_telling(
        file: Any, mode: str = "r", buffering: int = -1, *text: Any, **options: Any
    ) -> Any:
        is_written = any(letter in mode for letter in "wax+")
        if not is_written or not absolute(file).startswith(f"{root}/"):
            return plain_open(file, mode, buffering, *text, **options)
        raw = TellingFile(file, mode.replace("b", "").replace("t", ""))
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, *text, **options)

    io.FileIO = TellingFile  # type: ignore[misc]
    io.open = open_telling  # type: ignore[assignment]
    builtins.open = open_telling  # type: ignore[assignment]


def absolute(path: Any, folder: int = -1) -> str:
    """Return the path of a file, given by name, or name and open folder, or descriptor."""
    if isinstance(path, int):
        with suppress(OSError):
            return os.readlink(f"/proc/self/fd/{path}")
        return ""
    name = os.fsdecode(path)
    if folder is not None and folder >= 0:
        return os.path.join(absolute(folder), name)
    return os.path.abspath(name)
