"""No rank outlives its launcher, however early that is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import quick
from helpers.launching import environment, ranks_of, running, wait_for_step

from torchtrain import orphans

ASK = "from torchtrain.orphans import end_with_launcher; end_with_launcher(); print('lives')"
LEFT_S = 10  # for a rank, once its launcher is dead


def ask(**variables):
    """Exit status and output of a process that wishes to end with its launcher."""
    asked = subprocess.run(
        [sys.executable, "-c", ASK],
        env=environment(1, TORCHELASTIC_RUN_ID="test", **variables),
        capture_output=True,
        text=True,
        timeout=60,
    )
    return asked.returncode, asked.stdout


def test_a_rank_whose_parent_is_not_its_launcher_ends():
    assert ask(**{orphans.LAUNCHER_PID: str(os.getpid())}) == (0, "lives\n")
    assert ask(**{orphans.LAUNCHER_PID: str(os.getppid())}) == (-signal.SIGKILL, "")


def test_without_a_launcher_that_names_itself_process_1_is_none(monkeypatch):
    assert ask() == (0, "lives\n")
    monkeypatch.delenv(orphans.LAUNCHER_PID, raising=False)
    monkeypatch.setattr(os, "getppid", lambda: 1)
    same = False
    monkeypatch.setattr(os.path, "samefile", lambda *paths: same)
    assert orphans._is_orphan()
    same = True  # torchrun is process 1, as in a container
    assert not orphans._is_orphan()


def alive(pid):
    """Whether a process is there and not just waiting for its parent to notice its end."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


RUN_A_TOOL = """
import os, subprocess, sys
tool = "import time; from torchtrain.orphans import end_with_rank; end_with_rank(); "
tool += "print('ready', flush=True); time.sleep(60)"
environment = {**os.environ, "TORCHTRAIN_STARTED_BY": str(os.getpid())}
child = subprocess.Popen([sys.executable, "-c", tool], env=environment, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
child.wait()
"""


def test_a_tool_ends_with_the_rank_that_runs_it():
    rank = subprocess.Popen(
        [sys.executable, "-c", RUN_A_TOOL], env=environment(1), stdout=subprocess.PIPE, text=True
    )
    tool = int(rank.stdout.readline())
    assert alive(tool)
    rank.kill()
    rank.wait()
    rank.stdout.close()
    deadline = time.monotonic() + LEFT_S
    while alive(tool):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.slow
def test_the_converter_ends_where_its_rank_is_dead_already():
    """A rank that lives has one that does its work, in test_last_save."""
    convert = [sys.executable, "-m", "torchtrain.tools.convert", "to-hf", "nowhere", "nothing"]
    variables = environment(1, **{orphans.STARTED_BY: "1"})
    ended = subprocess.run(convert, env=variables, capture_output=True, timeout=120)
    assert ended.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_no_rank_is_left_when_the_launcher_is_killed_as_early_as_while_they_start(tmp_path, data):
    """Before they have asked for it."""
    overrides = {**data, "job.dump_folder": tmp_path / "run", "training.steps": 100000}
    with running(2, overrides) as process:
        while len(ranks := ranks_of(process)) < 2:
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.01)
        kill_and_wait_for(process, ranks.values())


@pytest.mark.slow
def test_no_rank_is_left_when_the_launcher_is_killed_while_they_train(tmp_path, data):
    overrides = {**data, "job.dump_folder": tmp_path / "run", "training.steps": 100000}
    with quick.running(1, overrides) as process:
        wait_for_step(lambda: process.poll() is None, tmp_path / "run", 1)
        ranks = process.ranks()
        assert len(ranks) == 1
        kill_and_wait_for(process, ranks)


def kill_and_wait_for(process, ranks):
    """Kill the launcher alone; its ranks end too."""
    os.kill(process.pid, signal.SIGKILL)
    try:
        deadline = time.monotonic() + LEFT_S
        while left := [pid for pid in ranks if alive(pid)]:
            assert time.monotonic() < deadline, f"ranks {left} live on"
            time.sleep(0.05)
    finally:
        for pid in filter(alive, ranks):
            os.kill(pid, signal.SIGKILL)
