"""A process that dies at any operation on a file."""

import os
import signal
import sys
from collections.abc import Collection
from pathlib import Path

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir")
"""Python's audit events of operations on files."""


class Crash:
    """An audit hook that lets some operations on a folder pass and then none.

    It is as if the process had died there; with `die` it does.
    """

    def __init__(self, folder: Path, die: bool = False, events: Collection[str] = EVENTS):
        self.folder = str(folder)
        self.events = events
        self.die = die
        self.left: int | None = None
        self.seen: list[tuple[str, str]] = []
        sys.addaudithook(self)

    def __call__(self, event, arguments):
        if self.left is None or event not in self.events or self.folder not in str(arguments[0]):
            return
        self.seen.append((event, str(arguments[0])))
        self.left -= 1
        if self.left < 0:
            if self.die:
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(5, "crashed")
