"""What the launcher hears of its ranks' stderr."""

import os
import select
import subprocess
import sys
import threading
import time
import tty

import pytest

from torchtrain.tools.rank_errors import RankErrors

TIMEOUT = (
    "[rank{rank}]:[E1218 20:27:21.433063423 ProcessGroupNCCL.cpp:629] [Rank 0] Watchdog caught "
    "collective operation timeout: WorkNCCL(SeqNum=1, OpType={name}, NumelIn=131072, "
    "NumelOut=131072, Timeout(ms)={milliseconds}) ran for 600088 milliseconds before timing out.\n"
)
SPEAK = """
import os
import sys

print(sys.stderr.isatty(), file=sys.stderr)
os.write(2, b"half a line, ")
os.write(2, b"and its end\\n")
"""


def speak(errors, code, *arguments):
    """Run a rank that writes to its stderr."""
    subprocess.run([sys.executable, "-c", code, *arguments], stderr=errors.sink, check=True)
    errors.drain()


def read_all(reader, writer):
    """What has been written, at once or bit by bit, to a pipe or a terminal; closes both."""
    os.write(writer, b"END")
    text = b""
    while not text.endswith(b"END"):
        text += os.read(reader, 1000)
    os.close(reader)
    os.close(writer)
    return text.decode().removesuffix("END")


@pytest.mark.parametrize("make", [os.pipe, os.openpty], ids=["pipe", "terminal"])
def test_what_a_rank_writes_is_passed_on_as_it_is(make):
    reader, writer = make()
    is_terminal = os.isatty(writer)
    if is_terminal:
        tty.setraw(writer)
    speak(RankErrors(writer), SPEAK)
    assert read_all(reader, writer) == f"{is_terminal}\nhalf a line, and its end\n"


def test_timeouts_are_heard_by_their_ranks():
    reader, writer = os.pipe()
    errors = RankErrors(writer)
    written = [
        TIMEOUT.format(rank=13, name="_ALLGATHER_BASE", milliseconds=100_000),
        "[rank2]:[E1218 ProcessGroupNCCL.cpp:667] Stack trace of the failed collective\n",
        TIMEOUT.format(rank=2, name="BROADCAST", milliseconds=1500),
        TIMEOUT.format(rank=2, name="ALLREDUCE", milliseconds=9000),  # for want of the first
    ]
    for text in written:
        for half in (text[:100], text[100:]):
            speak(errors, "import os, sys; os.write(2, sys.argv[1].encode())", half)
    assert errors.timeouts == {
        13: "_ALLGATHER_BASE did not end within 100 s",
        2: "BROADCAST did not end within 1.5 s",
    }
    os.close(reader)
    os.close(writer)


def test_ranks_do_not_wait_for_an_output_that_nobody_reads_any_more():
    reader, writer = os.pipe()
    os.close(reader)
    errors = RankErrors(writer)
    speak(errors, "import os; os.write(2, b'lost' * 100000)")
    speak(errors, "import os; os.write(2, b'lost' * 100000)")
    os.close(writer)


def test_ranks_get_a_pipe_where_no_terminal_can_be_had(monkeypatch):
    reader, writer = os.openpty()
    tty.setraw(writer)

    def refuse():
        raise OSError("out of pty devices")

    monkeypatch.setattr(os, "openpty", refuse)
    speak(RankErrors(writer), SPEAK)
    assert read_all(reader, writer) == "False\nhalf a line, and its end\n"


def test_all_comes_through_an_output_that_does_not_block():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    errors = RankErrors(writer)
    code = "import os; os.write(2, b'kept' * 100000)"
    rank = subprocess.Popen([sys.executable, "-c", code], stderr=errors.sink)
    deadline = time.monotonic() + 60
    while select.select([], [writer], [], 0)[1]:  # until it is full, since nobody reads yet
        assert time.monotonic() < deadline
        time.sleep(0.01)
    arrived = []

    def read():
        with open(reader, "rb") as file:
            arrived.append(file.read())

    reading = threading.Thread(target=read)
    reading.start()
    assert rank.wait(60) == 0
    errors.drain()
    os.close(writer)
    reading.join()
    assert arrived == [b"kept" * 100000]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_ranks_do_not_wait_for_a_full_disk():
    full = os.open("/dev/full", os.O_WRONLY)
    speak(RankErrors(full), "import os; os.write(2, b'lost' * 100000)")
    os.close(full)
