"""The launcher, and what happens when something fails: one message, the right exit status."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import patch

import pytest
from helpers import forking, quick
from helpers.forking import be_launcher, on_ranks, run_trainer, train
from helpers.installed import install_wheel
from helpers.launching import (
    ROOT,
    TIMEOUT_S,
    environment,
    kill_group,
    launched,
    metrics,
    options,
    wait_for_step,
)
from helpers.sameness import curve

from torchtrain.attempts import ENDED
from torchtrain.tools import launch

pytestmark = pytest.mark.slow


def launch_script(script, arguments, cwd, ranks=1, **extra):
    process = subprocess.Popen(
        [str(script), *arguments],
        cwd=cwd,
        env=environment(
            ranks, PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", **extra
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        kill_group(process)
    return process.returncode, output


STOP = """
import os
import signal
from torchtrain import attempts

real = attempts.begin_step


def begin_step(step):
    real(step)
    if step == 3 and os.environ["RANK"] == "1":
        os.kill(os.getpid(), signal.SIGSTOP)


attempts.begin_step = begin_step  # before train.py imports it
"""


@pytest.fixture(scope="module", autouse=True)
def stopped(tmp_path_factory, data):
    """The launch of a run of which one rank is stopped; it runs beside all others."""
    folder = tmp_path_factory.mktemp("stopped")
    (folder / "stop.py").write_text(STOP)
    overrides = {
        **data,
        "job.dump_folder": folder / "run",
        "training.steps": 100000,
        "comm.train_timeout_seconds": 5,
        "experimental.custom_import": folder / "stop.py",
    }
    with quick.running(2, overrides) as launch:
        yield launch


@pytest.fixture(scope="module")
def forked(tmp_path_factory, data):
    """What one and two forked ranks print, and their curve."""
    found = {}
    for ranks in (1, 2):
        folder = tmp_path_factory.mktemp("forked") / "run"
        printed = train(ranks, {**data, "job.dump_folder": folder})
        assert len(metrics(folder)) == 4
        found[ranks] = printed, curve(folder)
    return found


def test_script_works_from_anywhere_and_from_a_path_with_spaces(tmp_path, data, forked):
    """And what it starts trains as the other tests' forked ranks do, to the bit."""
    copy = tmp_path / "a path with spaces"
    copy.mkdir()
    for name in ("train.py", "run_llama_train.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, copy / name)
    for name in ("torchtrain", "train_configs"):
        shutil.copytree(ROOT / name, copy / name)
    chosen = {**data, "job.config_file": None, "job.dump_folder": "run here"}
    status, output = launch_script(
        copy / "run_llama_train.sh",
        options(chosen),
        tmp_path,
        PYTHONPATH="",
        CONFIG_FILE="train_configs/debug_model.toml",
    )
    assert status == 0, output
    assert curve(tmp_path / "run here") == forked[1][1]
    status, output = launch_script(copy / "run_llama_train.sh", ["--training.stepz", "3"], tmp_path)
    assert status == 2
    assert output.count("stepz") == 1
    assert "training.steps" in output


TELL = """
import json, os, torchtrain

if os.environ.get("RANK") == "1":
    with open({!r}, "w") as file:
        json.dump([torchtrain.__file__, dict(os.environ)], file)
"""


def test_the_installed_command_trains_and_stops_as_the_script_does(tmp_path, data, forked):
    """From its wheel, by the name of a config, in a folder that holds another torchtrain."""
    installed = install_wheel(tmp_path / "installed")
    other = tmp_path / "elsewhere" / "torchtrain"
    shutil.copytree(installed.packages / "torchtrain", other)
    (tmp_path / "tell.py").write_text(TELL.format(str(tmp_path / "told")))
    given = {
        **data,
        "job.config_file": "debug_model.toml",
        "job.dump_folder": "run here",
        "training.steps": 100000,
        "lr_scheduler.total_steps": 4,
        "experimental.custom_import": tmp_path / "tell.py",
    }
    process = subprocess.Popen(
        [installed.script, *options(given)],
        cwd=tmp_path / "elsewhere",
        env=installed.environment(2),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for_step(lambda: process.poll() is None, tmp_path / "elsewhere" / "run here", 4)
        name = Path(f"/proc/{process.pid}/comm").read_text()
        assert name != "torchtrain\n", "pkill -USR1 torchtrain would end it"
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=TIMEOUT_S)
    finally:
        kill_group(process)
    assert process.returncode == 128 + signal.SIGINT, output
    assert curve(tmp_path / "elsewhere" / "run here")[:4] == forked[2][1]
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {"run here", "torchtrain"}
    where, variables = json.loads((tmp_path / "told").read_text())
    assert Path(where).is_relative_to(installed.packages)
    set_up: dict[str, str] = {}
    launch.set_up_environment(2, set_up, on_cpu=True)
    for name in ("GLIBC_TUNABLES", "GOMP_SPINCOUNT"):
        assert variables[name] == set_up[name], name


def test_plain_python_runs_the_same_job_as_one_process(tmp_path, data, forked):
    subprocess.run(
        [
            sys.executable,
            str(ROOT / "train.py"),
            *options({**data, "job.dump_folder": tmp_path / "plain"}),
        ],
        env={k: v for k, v in environment(1).items() if k != "NGPU"},
        check=True,
        timeout=TIMEOUT_S,
        capture_output=True,
    )
    assert curve(tmp_path / "plain") == forked[1][1]


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        ({"NGPU": "0"}, "NGPU = '0': must be a whole number, at least 1"),
        ({"NGPU": "zwei"}, "NGPU = 'zwei': must be a whole number, at least 1"),
        ({"NGPU": "2", "LOG_RANK": "0,2"}, "LOG_RANK = '0,2': must be ranks from 0 to 1"),
        ({"NNODES": "2", "NODE_RANK": "2"}, "NODE_RANK = '2': must be a whole number from 0 to 1"),
    ],
)
def test_an_impossible_environment_is_one_line_that_names_it(capfd, variables, text):
    with patch.dict(os.environ, environment(1) | variables, clear=True):
        assert launch.main([]) == 2
    error = capfd.readouterr().err
    assert error.startswith(text)
    assert error.count("\n") == 1


def test_a_users_module_that_imports_torch_finds_it_silent_in_the_launcher(tmp_path, data):
    """Its C++ part reads at its import how much to say, of a store that does not answer yet."""
    (tmp_path / "own.py").write_text(
        "import os\nfrom pathlib import Path\n"
        f'Path({str(tmp_path / "told")!r}).write_text(os.environ["TORCH_CPP_LOG_LEVEL"])\n'
    )
    given = options(
        {**data, "experimental.custom_import": tmp_path / "own.py", "training.steps": 0}
    )
    with patch.dict(os.environ, environment(1), clear=True):
        os.environ.pop("TORCH_CPP_LOG_LEVEL", None)
        with pytest.raises(SystemExit):
            launch.main(given)
        assert "TORCH_CPP_LOG_LEVEL" not in os.environ
    assert (tmp_path / "told").read_text() == "FATAL"


def test_config_fault_is_one_message_before_any_rank_exists(tmp_path, data):
    output = launched(
        3, {**data, "job.dump_folder": tmp_path / "run", "training.global_batch_size": 8}, expect=2
    )
    assert "Traceback" not in output
    assert output.count("global_batch_size") >= 1
    assert not (tmp_path / "run").exists()


def test_fault_found_by_the_ranks_is_one_message_too(tmp_path, data):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": 3}\n')
    overrides = {
        **data,
        "training.dataset": "jsonl",
        "training.dataset_path": bad,
        "job.dump_folder": tmp_path / "run",
    }
    output = train(2, overrides, expect=2)  # launched in test_restarts
    assert output.count("bad.jsonl:2") == 1
    assert "Traceback" not in output
    output = train(
        2, {**data, "model.vocab_size": 100, "job.dump_folder": tmp_path / "run"}, expect=2
    )
    assert output.count("model.vocab_size = 100") == 1
    output = train(
        2, {**data, "model.tokenizer_path": bad, "job.dump_folder": tmp_path / "run"}, expect=2
    )
    assert "bad.jsonl" in output
    assert "Traceback" not in output


def test_folder_in_use_is_refused(tmp_path, data):
    endless = {**data, "job.dump_folder": tmp_path / "run", "training.steps": 100000}
    with forking.running(1, endless) as run:
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            assert run.alive(), run.printed
            time.sleep(0.1)
        output = train(1, endless, expect=2)
        assert "in use by process" in output


NCCL_TIMEOUT = """\
[rank1]:[E1218 20:27:21.433063423 ProcessGroupNCCL.cpp:629] [Rank 0] Watchdog caught collective \
operation timeout: WorkNCCL(SeqNum=64, OpType=ALLREDUCE, NumelIn=1, NumelOut=1, \
Timeout(ms)=100000) ran for 100088 milliseconds before timing out.
terminate called after throwing an instance of 'c10::DistBackendError'
"""

ABORT = f"""
import os
import resource
import sys
from pathlib import Path
from torchtrain import attempts

real = attempts.begin_step


def begin_step(step):
    real(step)
    if os.environ["RANK"] == "1" and Path(FILE).exists():
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.stderr.write({NCCL_TIMEOUT!r})
        sys.stderr.flush()
        os.abort()


attempts.begin_step = begin_step  # before train.py imports it
"""


def test_a_rank_that_nccls_watchdog_ends_ends_the_run_quickly_with_what_took_too_long(
    tmp_path, data
):
    """Of ranks that have names, and show where they are when they are asked."""
    overdue = tmp_path / "overdue"
    (tmp_path / "fault.py").write_text(ABORT.replace("FILE", repr(str(overdue))))
    given = {
        **data,
        "job.dump_folder": tmp_path / "run",
        "training.steps": 100000,
        "experimental.custom_import": tmp_path / "fault.py",
    }
    with quick.running(2, given) as process:
        wait_for_step(lambda: process.poll() is None, tmp_path / "run", 1)
        ranks = process.ranks()
        names = [Path(f"/proc/{pid}/comm").read_text() for pid in (process.pid, *ranks)]
        assert names[1:] == ["torchtrain\n"] * 2  # so that pkill finds the ranks by their name,
        assert names[0] != "torchtrain\n"  # and not the launcher, which the signal would end
        os.kill(ranks[0], signal.SIGUSR1)  # shows the stack and trains on
        stack = any(line.endswith(" in train\n") for line in process.stdout)
        assert stack, "the run ended without a stack"
        overdue.touch()
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGABRT, output
    assert NCCL_TIMEOUT in output, "what ranks write is passed on"
    *_, last = output.strip().splitlines()
    assert last == (
        "rank 1 was ended by NCCL's watchdog (SIGABRT): ALLREDUCE did not end within 100 s; "
        "the others were stopped"
    )


def read_signals(pid):
    """Return a process's state, T where it is stopped, and the mask of the signals that wait."""
    status = Path(f"/proc/{pid}/status").read_text()
    return re.search(r"State:\s*(\w)", status)[1], int(re.search(r"ShdPnd:\s*(\w+)", status)[1], 16)


def test_nohup_holds_and_a_second_ctrl_c_ends_ranks_that_do_not_answer(tmp_path, data):
    overrides = {**data, "job.dump_folder": tmp_path / "run", "training.steps": 100000}
    with quick.running(1, overrides, ignored=[signal.SIGHUP]) as process:
        wait_for_step(lambda: process.poll() is None, tmp_path / "run", 2)
        ranks = process.ranks()
        for pid in (process.pid, *ranks):
            os.kill(pid, signal.SIGHUP)
        last = metrics(tmp_path / "run")[-1]["step"]
        wait_for_step(lambda: process.poll() is None, tmp_path / "run", last + 10)
        os.kill(ranks[0], signal.SIGSTOP)
        while read_signals(ranks[0])[0] != "T":
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        # Of two that come before the first is handled, a process sees one.
        while not read_signals(ranks[0])[1] & 1 << signal.SIGINT - 1:
            assert process.poll() is None, "it waits for the rank, which cannot stop"
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        output, _ = process.communicate(timeout=15)  # torchrun waits for 30 s
    assert process.returncode == 128 + signal.SIGINT, output
    assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)


def node(rank, port):
    """What torchrun's variables say on this node of two."""
    return {
        "PET_NNODES": "2",
        "PET_NODE_RANK": str(rank),
        "PET_MASTER_ADDR": "127.0.0.1",
        "PET_MASTER_PORT": str(port),
    }


def test_one_node_whose_port_is_taken_says_so(tmp_path, data, free_port):
    overrides = {**data, "job.dump_folder": tmp_path / "run"}
    with socket.create_server(("", free_port)):
        printed = quick.launched(1, overrides, expect=2, MASTER_PORT=str(free_port))
    assert printed == (
        f"MASTER_PORT = {free_port}: address already in use on this node. "
        "Set another, the same on all nodes.\n"
    )


def test_two_nodes_train_as_one_does(tmp_path, data, free_port, forked):
    overrides = {**data, "job.dump_folder": tmp_path / "two"}
    with quick.running(1, overrides, **node(0, free_port)) as first:
        quick.launched(1, overrides, **node(1, free_port))
        output, _ = first.communicate(timeout=TIMEOUT_S)
    assert first.returncode == 0, output
    assert curve(tmp_path / "two") == forked[2][1]


def test_ctrl_c_ends_a_node_that_waits_in_one_line(tmp_path, data, free_port):
    given = options({**data, "job.dump_folder": tmp_path / "run"})
    launcher = forking.Ranks(1, be_launcher, environment(1, **node(0, free_port)), given)
    while not launcher.printed.endswith("\n"):
        assert launcher.alive(), launcher.printed
        time.sleep(0.05)
    os.kill(launcher.processes[0].pid, signal.SIGINT)
    assert launcher.finish(TIMEOUT_S) == [128 + signal.SIGINT], launcher.printed
    said, *rest = launcher.printed.splitlines()
    assert said.startswith(f"waiting for 1 node at 127.0.0.1:{free_port}"), said
    assert rest == ["stopped by SIGINT before the ranks started"]


def train_speaking(log_rank, arguments):
    """A rank whose LOG_RANK is this."""
    os.environ["LOG_RANK"] = log_rank
    return run_trainer(arguments)


def test_log_rank_chooses_who_speaks(tmp_path, data, forked):
    assert "[rank" not in forked[2][0], "one rank speaks unless more are asked for"
    overrides = {**data, "job.dump_folder": tmp_path / "run", "training.steps": 1}
    assert "[rank 1]" in on_ranks(2, train_speaking, "1", options(overrides))
    output = train(1, overrides)
    assert (tmp_path / "run" / "previous-1" / "metrics.jsonl").exists()
    assert "previous-1" in output


def test_non_finite_loss_stops_before_the_weights(tmp_path, data):
    overrides = {
        **data,
        "job.dump_folder": tmp_path / "run",
        "optimizer.lr": 1e30,
        "training.max_norm": 1e30,
    }
    run = forking.Ranks(2, run_trainer, options(overrides))
    assert run.finish(TIMEOUT_S) == [1, 1], run.printed
    assert "gradient norm" in run.printed
    assert "global samples" in run.printed
    assert run.printed.count("detect_anomaly") == 1
    assert "Traceback" not in run.printed
    assert run.store.get(ENDED) == b"1", "the launcher would start it again"


def test_a_stopped_rank_ends_the_run_within_the_training_timeout(stopped):
    output, _ = stopped.communicate()
    assert stopped.returncode == 1, output
    assert "rank 0 failed" in output
    *_, last = output.strip().splitlines()
    cause = (
        r"rank 1 did not answer in step (\d+) \(.*\) for 4 s; see (\S+); the others were stopped"
    )
    step, folder = re.fullmatch(cause, last).groups()
    assert Path(folder).name == f"step-{step}"
    assert [path.name for path in Path(folder).iterdir()] == ["rank-0.txt"]
