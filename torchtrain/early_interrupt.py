"""Ctrl-C before there is anything to save: one line, exit status 130, no traceback, at once.

Imports no torch, so that it covers torch's import too.
"""

import fcntl
import os
import signal
import sys
import threading
from types import FrameType

from torchtrain.logging_utils import clear_progress


def end_on_interrupt(before: str) -> None:
    """End this process when SIGINT comes `before` something, until `end_watch` is called.

    Of several ranks, rank 0 alone says so.

    Python runs a signal's handler between two instructions of the main thread, which can stand in a
    call for minutes, as when it waits for other nodes. The interpreter writes the signal's number
    to a pipe in that case too, and a thread reads it.
    """
    reader, writer = os.pipe()
    fcntl.fcntl(writer, fcntl.F_SETFL, os.O_NONBLOCK)  # as the interpreter wants it
    signal.signal(signal.SIGINT, _leave_to_thread)
    signal.set_wakeup_fd(writer)
    threading.Thread(target=_watch, args=(reader, before), daemon=True).start()


def end_watch() -> None:
    """Leave SIGINT to a handler that has been set meanwhile."""
    writer = signal.set_wakeup_fd(-1)
    if writer != -1:
        os.close(writer)


def _leave_to_thread(number: int, frame: FrameType | None) -> None:
    """Handle SIGINT: without a handler in Python nothing is written to the pipe."""


def _watch(reader: int, before: str) -> None:
    while number := os.read(reader, 1):
        if number[0] == signal.SIGINT:
            if os.environ.get("RANK", "0") == "0":
                clear_progress()
                print(f"stopped by SIGINT before {before}", file=sys.stderr, flush=True)
            os._exit(128 + signal.SIGINT)
    os.close(reader)
