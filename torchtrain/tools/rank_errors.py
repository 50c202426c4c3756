"""What the ranks of a node write to stderr: passed on as it comes, and listened to.

A collective that takes too long on GPUs is noticed by a thread of PyTorch's, which says so there
and aborts the process. All that the launcher would know of it is SIGABRT.
"""

import os
import re
import select
import threading
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress

NCCL_TIMEOUT = re.compile(
    rb"\[rank(\d+)\]:.*Watchdog caught collective operation timeout: "
    rb"WorkNCCL\(.*OpType=(\w+),.*Timeout\(ms\)=(\d+)\)"
)
END = b"\0"
"""What the launcher writes behind all that the ranks have written."""
BLOCK = 2**16
"""Bytes that are read at once, and kept of a line that does not end."""
LAST_WAIT_S = 5.0


class RankErrors:
    """The stderr of a node's ranks; a terminal for them where it is one for the launcher.

    (But a pipe where the system has no terminal to give.)

    Args:
        output: the file descriptor to which it is passed on.
    """

    def __init__(self, output: int = 2) -> None:
        self.timeouts: dict[int, str] = {}
        """Of the ranks that NCCL's watchdog has ended: which collective took too long."""
        self.sink: int
        """The file descriptor that the ranks get for theirs."""
        self._output = output
        self._has_ended = threading.Event()
        self._source, self.sink = open_like(output)
        threading.Thread(target=self._pass_on, name="ranks' stderr", daemon=True).start()

    def drain(self) -> None:
        """Return when all that the ranks have written so far has been passed on."""
        self._has_ended.clear()
        os.write(self.sink, END)
        self._has_ended.wait(LAST_WAIT_S)

    @contextmanager
    def passed_on(self) -> Iterator[None]:
        """Leave when the ranks' last words have been passed on."""
        try:
            yield
        finally:
            self.drain()

    def _pass_on(self) -> None:
        line = b""
        while data := os.read(self._source, BLOCK):
            text = data.replace(END, b"")
            *lines, line = (line[-BLOCK:] + text).split(b"\n")
            for each in lines:
                self._listen(each)
            self._write(text)
            if END in data:
                self._has_ended.set()

    def _write(self, text: bytes) -> None:
        """Wait for an output that is not read yet, but let no rank wait for one that fails."""
        while text:
            try:
                text = text[os.write(self._output, text) :]
            except BlockingIOError:
                select.select([], [self._output], [])
            except OSError:  # nobody reads it any more, or a disk is full: the next may get there
                return

    def _listen(self, line: bytes) -> None:
        if found := NCCL_TIMEOUT.search(line):
            rank, collective, milliseconds = (group.decode() for group in found.groups())
            took = f"{collective} did not end within {int(milliseconds) / 1000:g} s"
            self.timeouts.setdefault(int(rank), took)


def open_like(output: int) -> tuple[int, int]:
    """Return the two ends of a terminal where `output` is one and another can be had, or a pipe's.

    The first is to be read, the second to be written.
    """
    if os.isatty(output):
        with suppress(OSError):  # as in a container without /dev/pts
            source, sink = os.openpty()
            tty.setraw(sink)  # which leaves the ends of lines to the terminal itself
            return source, sink
    return os.pipe()
