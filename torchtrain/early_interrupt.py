"""Ctrl-C, or the end of its time, before there is anything to save: one line, at once.

The exit status is 130, or 75. Imports no torch, so that it covers torch's import too.
"""

import fcntl
import math
import os
import signal
import sys
import threading
import time
from types import FrameType

from torchtrain.errors import TRY_AGAIN
from torchtrain.logging_utils import clear_progress

LEAVING_S = 5.0
"""Seconds before the end of its time at which a process that has nothing to save leaves."""
SKEW_S = 1.0
"""How far apart the ranks' ends may be."""
ENDINGS = {
    signal.SIGINT: ("by SIGINT", 128 + signal.SIGINT),
    signal.SIGALRM: ("at the end of its time", TRY_AGAIN),
}
"""What ends a process that is watched: how it says so, and its exit status."""


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
    former = signal.set_wakeup_fd(writer)
    if former != -1:  # of an earlier call, whose thread this ends
        os.close(former)
    threading.Thread(target=_watch, args=(reader, before), daemon=True).start()


def end_in_time(deadline: float) -> None:
    """End this process, if it is watched, just before `deadline`, by `time.monotonic`.

    The kernel keeps the time, so that a rank that waits in C++ ends too.
    """
    if math.isfinite(deadline):
        signal.signal(signal.SIGALRM, _leave_to_thread)
        left = deadline - LEAVING_S - time.monotonic()
        signal.setitimer(signal.ITIMER_REAL, max(left, 0.001))  # 0 would mean never


def await_end(deadline: float) -> None:
    """Let `end_in_time` end this process if that is near.

    A rank can fail for want of another one that has left a moment before.
    """
    if time.monotonic() > deadline - LEAVING_S - SKEW_S:
        time.sleep(2 * SKEW_S)


def end_watch() -> None:
    """Leave SIGINT to a handler that has been set meanwhile, and the time to the caller."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    writer = signal.set_wakeup_fd(-1)
    if writer != -1:
        os.close(writer)


def _leave_to_thread(number: int, frame: FrameType | None) -> None:
    """Handle a signal: without a handler in Python nothing is written to the pipe."""


def _watch(reader: int, before: str) -> None:
    while number := os.read(reader, 1):
        if number[0] in ENDINGS:
            cause, status = ENDINGS[signal.Signals(number[0])]
            if os.environ.get("RANK", "0") == "0":
                clear_progress()
                print(f"stopped {cause} before {before}", file=sys.stderr, flush=True)
            os._exit(status)
    os.close(reader)
