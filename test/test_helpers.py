"""The helpers of the other tests: one that waits too long or hides a failure costs every test."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import forking
from helpers.forking import Ranks, on_ranks


class EndsBetweenLooks:
    """A rank's process that runs at the first look at its status and has ended at the second."""

    def __init__(self, sentinel):
        self.sentinel = sentinel
        self.looks = 0

    @property
    def exitcode(self):
        self.looks += 1
        return None if self.looks == 1 else 0

    def kill(self):
        pass

    join = kill


@pytest.fixture
def ended():
    """A file descriptor that is ready, as the sentinel of a process that has ended."""
    reading, writing = os.pipe()
    os.close(writing)
    yield reading
    os.close(reading)


def test_a_rank_that_ends_between_two_looks_is_not_waited_for(ended, monkeypatch):
    """Else `finish` waits for nobody until its time is up: two tests once took 240 s so."""
    waited = []

    def wait(sentinels, timeout):
        assert sentinels, "waits for nobody"
        waited.append(sentinels)

    monkeypatch.setattr(forking, "wait", wait)
    ranks = object.__new__(Ranks)
    ranks.processes = [EndsBetweenLooks(ended), EndsBetweenLooks(ended)]
    assert ranks.finish(timeout_s=60) == [0, 0]
    assert waited == [[ended, ended]]


def exit_with(statuses):
    return statuses[int(os.environ["RANK"])]


@pytest.mark.slow
def test_each_rank_has_its_own_exit_status():
    ranks = Ranks(3, exit_with, [0, 3, 0])
    assert ranks.finish(60) == [0, 3, 0]


def wait_for_a_failed_rank():
    if os.environ["RANK"] == "0":
        raise ValueError("the cause")
    signal.pause()


@pytest.mark.slow
def test_when_one_rank_has_failed_the_others_are_ended(monkeypatch):
    monkeypatch.setattr(forking, "GRACE_S", 0.1)
    ranks = Ranks(2, wait_for_a_failed_rank)
    assert ranks.finish(60) == [1, -signal.SIGKILL]
    assert "ValueError: the cause" in ranks.printed


@pytest.mark.slow
def test_what_a_rank_printed_is_in_the_failure():
    with pytest.raises(AssertionError, match=r"(?s)exit statuses .*the cause"):
        on_ranks(1, raise_the_cause)


def raise_the_cause():
    raise ValueError("the cause")


def leave_a_child(file):
    """End while a child runs on that holds every descriptor which it can inherit."""
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    child = subprocess.Popen(sleeper, close_fds=False)
    Path(file).write_text(str(child.pid))


@pytest.mark.slow
def test_a_rank_has_ended_though_its_child_runs_on(tmp_path):
    """Compile workers outlive their rank by a moment and hold what it had open."""
    on_ranks(1, leave_a_child, tmp_path / "pid")
    child = int((tmp_path / "pid").read_text())
    os.kill(child, signal.SIGKILL)  # raises where it has ended: then this test has shown nothing
