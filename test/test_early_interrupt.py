"""Ctrl-C before the first step: one line, status 130, no traceback, wherever the rank stands."""

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from helpers.launching import ROOT, TIMEOUT_S, environment, find_free_port, options

STOPPED = "stopped by SIGINT before the first step\n"

# Imported while the config is read, as torch is afterwards: it does not return.
WAITING_FILE = """
import pathlib
import time

pathlib.Path(__file__).with_suffix(".begun").touch()
time.sleep(600)
"""


def start(arguments, **variables):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        env=environment(1, **variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def interrupt(process):
    """Return what the process printed after Ctrl-C, and its exit status."""
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=TIMEOUT_S)
    return printed, process.returncode


def wait_until(happened, process):
    deadline = time.monotonic() + TIMEOUT_S
    while not happened():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "says"), [("0", STOPPED), ("1", "")])
def test_while_something_is_imported(tmp_path, rank, says):
    (tmp_path / "waiting.py").write_text(WAITING_FILE)
    given = options({"experimental.custom_import": tmp_path / "waiting.py"})
    process = start(given, RANK=rank)
    wait_until((tmp_path / "waiting.begun").exists, process)
    assert interrupt(process) == (says, 130)


def listens(port):
    with socket.socket() as client:
        return client.connect_ex(("localhost", port)) == 0


@pytest.mark.slow
def test_while_it_waits_for_other_ranks(data):
    """No handler in Python runs there: the call that waits is C++."""
    port = find_free_port()
    process = start(
        options(data),
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="2",
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
    )
    wait_until(lambda: listens(port), process)
    assert interrupt(process) == (STOPPED, 130)


def test_a_run_that_trains_has_its_own_way_to_stop():
    """Once a StopRequest is there, the thread that ends the process is gone."""
    code = (
        "import os, signal, threading, torchtrain.early_interrupt as early\n"
        "early.end_on_interrupt('the end')\n"
        "noted = []\n"
        "signal.signal(signal.SIGINT, lambda number, frame: noted.append(number))\n"
        "early.end_watch()\n"
        "early.end_watch()\n"
        "[t.join() for t in threading.enumerate() if t is not threading.main_thread()]\n"
        "signal.raise_signal(signal.SIGINT)\n"
        "assert noted == [2]\n"
    )
    command = [sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, env=environment, check=True, timeout=TIMEOUT_S)
