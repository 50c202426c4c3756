"""Processes that import before they are told which ranks they are."""

import os
import signal
import subprocess
import sys
from contextlib import closing

import pytest
from helpers.launching import TIMEOUT_S, environment

from torchtrain.installation import PROGRAM
from torchtrain.orphans import LAUNCHER_PID
from torchtrain.tools import standby
from torchtrain.tools.restarts import Handler
from torchtrain.tools.standby import Standbys

TELLS = """
import os, sys
print(__name__, sys.argv[1:], os.environ["RANK"], os.environ.get("GONE"), "torch" in sys.modules)
print(open("/proc/self/cmdline").read().split(chr(0))[1:4])
print(sys.path)
sys.exit(3)
"""


@pytest.fixture
def command(tmp_path, monkeypatch):
    """A rank's command, whose program tells what it is."""
    for name, value in environment(1).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(LAUNCHER_PID, str(os.getpid()))
    (tmp_path / "train.py").write_text(TELLS)
    return [sys.executable, "-u", str(tmp_path / "train.py"), "--a.b", "c d"]


@pytest.fixture
def without_torch(tmp_path, monkeypatch):
    """What is started cannot import torch: it waits as well, and seconds earlier."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "torch.py").write_text("raise ImportError")
    paths = [str(tmp_path / "bare"), os.environ["PYTHONPATH"]]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))


def handle(command, standbys, capfd, stdout=None):
    """The exit status and the lines of a rank that torchrun's handler starts."""
    handler = Handler(
        entrypoint=command[0],
        args=tuple(command[1:]),
        env={"LOCAL_RANK": "0", "RANK": "7"},
        stdout=stdout,
        stderr=None,
        local_rank_id=0,
        numa_options=None,
        standbys=standbys,
    )
    status = handler.proc.wait(TIMEOUT_S)
    return status, capfd.readouterr().out.splitlines()


def test_one_that_waits_becomes_the_rank(command, capfd, monkeypatch):
    monkeypatch.setenv("GONE", "before the rank is started")
    with closing(Standbys(command, 1)) as standbys:
        standbys.start(first_rank=5)
        monkeypatch.delenv("GONE")
        status, (told, words, _) = handle(command, standbys, capfd)
    assert status == 3
    assert told == "__main__ ['--a.b', 'c d'] 7 None True"
    assert words.startswith(f"['-u', '{standby.__file__}', ")


@pytest.mark.parametrize("why", ["none waits", "another command", "it has died"])
def test_else_a_rank_is_a_new_process(command, capfd, why):
    other = [*command[:-1], "another"]
    with closing(Standbys(other if why == "another command" else command, 1)) as standbys:
        if why != "none waits":
            standbys.start(first_rank=7)
        if why == "it has died":
            standbys.waiting[0].process.kill()
            standbys.waiting[0].process.wait()
        status, (told, words, _) = handle(command, standbys, capfd)
        assert not standbys.waiting, "what is of no use is ended"
    assert status == 3
    assert told == "__main__ ['--a.b', 'c d'] 7 None False"
    assert words == f"['-u', '{command[2]}', '--a.b']"


def test_a_rank_whose_output_goes_to_a_file_is_a_new_process(command, capfd, tmp_path):
    """PET_REDIRECTS, of torchrun's: one that waits has its output already."""
    with closing(Standbys(command, 1)) as standbys:
        standbys.start(first_rank=7)
        status, lines = handle(command, standbys, capfd, stdout=str(tmp_path / "out"))
        standbys.start()
        assert not standbys.waiting, "none would ever become a rank"
    assert (status, lines) == (3, [])
    assert (tmp_path / "out").read_text().startswith("__main__ ['--a.b', 'c d'] 7 None False")


def test_modules_are_looked_for_where_a_new_process_does(
    command, without_torch, capfd, tmp_path, monkeypatch
):
    """Not in the working directory, where a file may have the name of a package."""
    monkeypatch.chdir(tmp_path.parent)
    with closing(Standbys(command, 1)) as standbys:
        _, (_, _, of_new) = handle(command, standbys, capfd)
        standbys.start(first_rank=7)
        _, (_, words, of_standby) = handle(command, standbys, capfd)
    assert "standby" in words
    assert of_standby == of_new


STARTS = """
import sys
from torchtrain.tools import launch

def report(standbys, first_rank, at_most=None):
    print(first_rank, at_most, "pydantic" in sys.modules, flush=True)

launch.Standbys.start = report
launch.meet = lambda *given: 0
sys.exit(launch.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("is_refused", [True, False])
def test_one_rank_alone_begins_its_imports_before_the_config_is_read(is_refused):
    """What a refused config of very many ranks has started is one process."""
    options = ["--training.lowest", "1"] if is_refused else ["--training.global_batch_size", "600"]
    command = [sys.executable, "-c", STARTS, *options]
    launched = subprocess.run(
        command,
        cwd=PROGRAM,
        env=environment(600),
        text=True,
        capture_output=True,
        timeout=TIMEOUT_S,
    )
    starts = launched.stdout.splitlines()
    if is_refused:
        assert (launched.returncode, starts) == (2, ["0 1 False"]), launched.stderr
    else:
        assert (launched.returncode, starts) == (0, ["0 1 False", "0 None True"]), launched.stderr


def test_the_first_starts_alone_and_the_others_later(command, without_torch):
    with closing(Standbys(command, 3)) as standbys:
        standbys.start(0, at_most=1)
        assert list(standbys.waiting) == [0]
        first = standbys.waiting[0].process
        standbys.start(0)
        assert list(standbys.waiting) == [0, 1, 2]
        assert standbys.waiting[0].process is first


@pytest.mark.parametrize("refused", ["pipe", "fork"])
def test_where_the_host_refuses_there_are_none(command, monkeypatch, refused):
    tried = []

    def refuse(*given, **options):
        tried.append(given)
        raise OSError(24, "Too many open files")

    with closing(Standbys(command, 2)) as standbys:
        if refused == "pipe":
            monkeypatch.setattr(os, "pipe", refuse)
        else:
            monkeypatch.setattr(subprocess, "Popen", refuse)
        before = len(os.listdir("/proc/self/fd"))
        standbys.start()
        standbys.start()
        assert not standbys.waiting
        assert len(tried) == 1, "it is not asked again and again"
        assert len(os.listdir("/proc/self/fd")) == before


def test_another_command_than_theirs_ends_them_for_good(command, capfd):
    with closing(Standbys([*command[:-1], "another"], 2)) as standbys:
        standbys.start()
        processes = [standby.process for standby in standbys.waiting.values()]
        handle(command, standbys, capfd)
        standbys.start()
        assert not standbys.waiting
        assert all(process.poll() is not None for process in processes)


def test_those_that_nobody_needs_end(command):
    standbys = Standbys(command, 2)
    standbys.start()
    processes = [standby.process for standby in standbys.waiting.values()]
    standbys.start()
    assert processes == [standby.process for standby in standbys.waiting.values()]
    standbys.close()
    assert [process.poll() for process in processes] == [-signal.SIGKILL] * 2


ASK_WHAT_IS_LEFT = """
import importlib, sys
from torchtrain.tools.standby import IMPORTS
for name in IMPORTS:
    importlib.import_module(name)
before = set(sys.modules)
assert "train" not in before and "torchtrain.loss" not in before
import train
print([name for name in sys.modules if name not in before and name.startswith("torch.")])
"""


def test_all_of_torch_that_a_rank_imports_is_there(command):
    asked = [sys.executable, "-c", ASK_WHAT_IS_LEFT]
    told = subprocess.run(asked, stdout=subprocess.PIPE, text=True, timeout=TIMEOUT_S, check=True)
    assert told.stdout == "[]\n"


def test_without_an_environment_it_leaves(command, without_torch):
    read_end, write_end = os.pipe()
    module = ["-m", "torchtrain.tools.standby", str(read_end)]
    process = subprocess.Popen([sys.executable, *module, *command[2:]], pass_fds=[read_end])
    os.close(write_end)
    os.close(read_end)
    assert process.wait(TIMEOUT_S) == 0
