"""A rank dies: all start again by themselves, unless a further attempt would end the same."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from helpers import quick
from helpers.forking import train
from helpers.launching import (
    ROOT,
    environment,
    launched,
    options,
    wait_for_step,
)
from helpers.runs import STEPS, saving
from helpers.sameness import curve
from torch.distributed import run as torchrun
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from torchtrain import attempts, ranks
from torchtrain.errors import PeerFault
from torchtrain.tools import launch, restarts

FAULT = """
import os
import signal
from torchtrain import attempts

real = attempts.begin_step


def begin_step(step):
    real(step)
    if step == 8 and os.environ["RANK"] == LAST and CONDITION:
        os.kill(os.getpid(), signal.SIGKILL)


attempts.begin_step = begin_step  # before train.py imports it
"""


def fault(folder, text):
    """Options that make every rank execute `text` while it reads the config."""
    file = folder / "fault.py"
    file.write_text(textwrap.dedent(text))
    return {"experimental.custom_import": file}


def tensors(folder, scratch):
    dcp_to_torch_save(folder / "checkpoint" / f"step-{STEPS}", scratch)
    return torch.load(scratch, weights_only=True)


def assert_same_run(folder, untouched, scratch):
    assert curve(folder) == curve(untouched)
    mine, theirs = tensors(folder, scratch / "a.pt"), tensors(untouched, scratch / "b.pt")
    assert mine.keys() == theirs.keys()
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name


def killed_once(folder, ranks):
    """Options that end the last rank once, in step 8."""
    first_attempt = FAULT.replace("CONDITION", "attempts.restarts_so_far() == 0")
    return fault(folder, first_attempt.replace("LAST", repr(str(ranks - 1))))


@pytest.fixture(scope="module")
def untouched(tmp_path_factory, data):
    """The folders of two runs that nothing happens to, by their number of ranks."""
    folders = {ranks: tmp_path_factory.mktemp("untouched") / str(ranks) for ranks in (1, 2)}
    for count, folder in folders.items():
        train(count, saving(data, folder))
    return folders


STANDBYS_AT_ONCE = """
import traceback
from pathlib import Path

if "RANK" in os.environ:
    files = [Path(frame.filename).name for frame in traceback.extract_stack()]
    with open(FILE, "a") as file:
        file.write(f"{'standby.py' in files}\\n")
else:
    from torchtrain.tools import restarts

    restarts.STANDBY_AFTER_S = 0.0
"""


@pytest.mark.slow
def test_a_killed_rank_is_started_again_and_nothing_is_lost(tmp_path, data, untouched):
    """By ranks that were there before it was killed."""
    folder, told = tmp_path / "run", tmp_path / "told"
    once = killed_once(tmp_path, ranks=2)
    with open(tmp_path / "fault.py", "a") as file:
        file.write(STANDBYS_AT_ONCE.replace("FILE", repr(str(told))))
    output = quick.launched(2, saving(data, folder, **once), MAX_RESTARTS="1")
    cause = "rank 1 was ended by SIGKILL in step 8"
    assert f"{cause}; all ranks are started again (restart 1 of 1)" in output
    assert "restart 1 of 1: goes on after step 5; 2 steps taken again" in output
    assert_same_run(folder, untouched[2], tmp_path)
    assert told.read_text() == "True\n" * 4


def be_torchrun(variables, arguments):
    """Be torchrun itself, in this environment."""
    os.environ.clear()
    os.environ.update(variables)
    torchrun.main(arguments)


@pytest.mark.slow
def test_torchrun_alone_does_it_too(tmp_path, data, untouched):
    folder = tmp_path / "run"
    given = options(saving(data, folder, **killed_once(tmp_path, ranks=1)))
    its_own = ["--standalone", "--nproc-per-node=1", "--max-restarts=1"]
    program = str(ROOT / "train.py")
    launch = quick.Launch(be_torchrun, environment(1), [*its_own, program, *given])
    output = launch.output()
    assert "restart 1 of 1: goes on after step 5; 2 steps taken again" in output
    assert_same_run(folder, untouched[1], tmp_path)


@pytest.mark.slow
def test_a_stop_after_a_restart_has_the_status_of_a_stop(tmp_path, data):
    """Not that of the rank which had died before."""
    folder = tmp_path / "run"
    endless = killed_once(tmp_path, ranks=1) | {"training.steps": 100000}
    with quick.running(1, saving(data, folder, **endless), MAX_RESTARTS="1") as process:
        wait_for_step(lambda: process.poll() is None, folder, 9)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "after the launch was asked to stop" not in output


@pytest.mark.parametrize(
    ("steps", "is_repeated"),
    [
        ([8, 8], False),
        ([8, 8, 8], True),
        ([8, 8, 9], False),
        ([3, 8, 8, 8], True),
        ([None, None, None], True),
        ([None, 8, 8], False),
    ],
)
def test_the_third_crash_at_one_step_ends_the_run(steps, is_repeated):
    assert restarts.Outcome(steps=steps).is_repeated == is_repeated


@pytest.mark.slow
def test_a_crash_before_the_first_step_counts_and_nobody_that_torchrun_ended_is_blamed(
    tmp_path, data
):
    """The other rank imports torch meanwhile, so that torchrun's SIGTERM ends it."""
    early = fault(
        tmp_path,
        """
        import os

        if os.environ.get("RANK") == "1":
            os._exit(7)
        """,
    )
    output = launched(2, saving(data, tmp_path / "run", **early), expect=7, MAX_RESTARTS="9")
    assert output.count("rank 1 failed with exit status 7 before the first step") == 3
    assert output.count("started again (restart") == 2
    assert "the same step 3 times in a row: not started again" in output
    assert "SIGTERM" not in output


@pytest.mark.slow
def test_what_a_restart_does_not_mend_is_not_started_again(tmp_path, data):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "fine"}\n{"text": 3}\n')
    user_error = {"training.dataset": "jsonl", "training.dataset_path": bad}
    given = saving(data, tmp_path / "run", **user_error)
    output = quick.launched(1, given, expect=2, MAX_RESTARTS="3")
    assert output.count("bad.jsonl:2") == 1
    assert "Traceback" not in output
    assert "started again" not in output


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("3", "MAX_RESTARTS = 3 needs checkpoint.enable"),
        ("often", "MAX_RESTARTS = 'often': must be a whole number, at least 0"),
        ("-1", "MAX_RESTARTS = '-1': must be a whole number, at least 0"),
    ],
)
@pytest.mark.parametrize("name", ["MAX_RESTARTS", "PET_MAX_RESTARTS"])
def test_impossible_restarts_are_one_line(capfd, data, name, given, text):
    variables = environment(1) | {name: given}
    with patch.dict(os.environ, variables, clear=True):
        assert launch.main(options({**data, "checkpoint.enable": False})) == 2
    error = capfd.readouterr().err
    assert error.startswith(text)
    assert error.count("\n") == 1


def failures(**codes):
    """What torchrun says of ranks that failed, by exit code."""
    return {int(name[1:]): SimpleNamespace(exitcode=code) for name, code in codes.items()}


@pytest.mark.parametrize(
    ("codes", "failed_first", "first", "status"),
    [
        ({"r0": 1, "r1": -9}, {0, 1}, 1, 137),  # rank 0 failed for want of rank 1
        ({"r0": -15, "r1": 1}, {1}, 1, 1),  # torchrun ended rank 0
        ({"r0": -15, "r1": 1}, set(), 1, 1),
        ({"r1": -15, "r0": -15}, {1}, 1, 143),  # somebody else ended rank 1
        ({"r0": 1, "r1": -9}, {0}, 0, 1),  # rank 1 did not hear torchrun's SIGTERM
        ({"r0": 2}, {0}, 0, 2),
    ],
)
def test_the_first_cause_is_named(codes, failed_first, first, status):
    found = restarts.find_first(failures(**codes), failed_first)
    assert (found.rank, found.status) == (first, status)


def test_a_rank_that_does_not_hear_sigterm_delays_a_restart_by_seconds():
    ready = "import signal, time; print(flush=True); time.sleep(600)"
    deaf = ready.replace("print", "signal.signal(signal.SIGTERM, signal.SIG_IGN); print")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True
        )
        for code in (deaf, ready)
    ]
    for process in processes:
        process.stdout.readline()
    restarts.end_ranks(processes, grace_s=1.0)
    assert [process.wait(timeout=20) for process in processes] == [-signal.SIGKILL, -signal.SIGTERM]
    for process in processes:
        process.stdout.close()


def sleeping(count):
    """Processes that end when they are asked to."""
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    return [subprocess.Popen(command, start_new_session=True) for _ in range(count)]


def test_ranks_that_are_asked_to_stop_have_the_time_they_need():
    """A save may take minutes; but once one has ended, the others have little left to do."""
    processes = sleeping(2)
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(restarts.wait_for_ranks, processes, grace_s=0.5)
        time.sleep(1)
        assert not waiting.done()
        processes[0].kill()
        waiting.result(timeout=20)
    assert processes[1].poll() is None
    restarts.send(signal.SIGKILL, processes)
    assert [process.wait(timeout=20) for process in processes] == [-signal.SIGKILL] * 2


def test_the_end_of_a_jobs_time_is_a_stop():
    assert restarts.Failure(0, 75).is_stop
    assert restarts.Failure(0, -15).is_stop
    assert not restarts.Failure(0, 1).is_stop


@pytest.mark.parametrize(
    ("codes", "status"),
    [
        ([143, 143], 143),
        ([0, 0], 143),
        ([1, 1], 1),
        ([143, 1], 143),
        ([-15, 1], 143),
        ([1, -15], 143),
        ([1, -9], 137),
        ([75, None], 143),
        ([], 143),
    ],
)
def test_a_launch_that_was_to_stop_and_could_not_save_has_failed(codes, status, capfd):
    """Where one rank ends as it was asked to, others can have failed for want of it."""
    outcome = restarts.Outcome(at_stop=dict(enumerate(codes)))
    assert outcome.find_status(signal.SIGTERM) == status
    said = "rank 1 was ended by SIGKILL after the launch was asked to stop\n"
    assert capfd.readouterr().err == said * (status == 137)


def test_failures_are_named_as_people_know_them(capfd):
    assert str(restarts.Failure(3, -11)) == "rank 3 was ended by SIGSEGV"
    assert str(restarts.Failure(3, -250)) == "rank 3 was ended by signal 250"
    assert str(restarts.Failure(3, 1)) == "rank 3 failed with exit status 1"
    assert restarts.Outcome(restarts.Failure(1, -signal.SIGKILL)).report() == 137
    assert capfd.readouterr().err == "rank 1 was ended by SIGKILL; the others were stopped\n"


def test_only_crashes_in_a_row_are_repeated():
    assert not restarts.Outcome(steps=[8, 8]).is_repeated
    assert restarts.Outcome(steps=[8, 8, 8]).is_repeated
    assert not restarts.Outcome(steps=[8, 8, 9, 8]).is_repeated
    assert restarts.Outcome(steps=[4, None, None, None]).is_repeated


HANG = "rank 1 did not answer in step 8 (forward and backward) for 30 s; see outputs/hang/step-8"


def test_a_rank_that_did_not_answer_is_the_cause_and_not_the_signal_that_ended_it(capfd):
    killed = restarts.Failure(1, -signal.SIGKILL)
    outcome = restarts.Outcome(killed, hang=HANG)
    assert outcome.report() == 137
    assert capfd.readouterr().err == f"{HANG}; the others were stopped\n"
    agent = SimpleNamespace(_outcome=outcome, _remaining_restarts=2, _meeting=None)
    word = restarts.Word(step=8, hang=HANG)
    for count in (1, 2):
        restarts.Agent._judge(agent, killed, word, restarts=4)
        agent._remaining_restarts -= 1
        what = f"all ranks are started again (restart {2 + count} of 4)"
        assert capfd.readouterr().err == f"{HANG}; {what}\n"
    assert outcome.report() == 137
    assert not capfd.readouterr().err


def test_the_launcher_hears_of_a_hang_from_its_own_attempt_alone(store, monkeypatch):
    group = SimpleNamespace(master_addr="localhost", master_port=store.port)
    monkeypatch.setenv("TORCHTRAIN_ATTEMPT", "2")
    assert restarts.Agent._ask_store(None, group) == restarts.Word()
    told = attempts.of_attempt(store)
    told.set(attempts.HANG, HANG)
    assert told.check([attempts.HANG])
    assert restarts.Agent._ask_store(None, group) == restarts.Word(hang=HANG)
    store.set(attempts.STEP, "2 8")
    store.set(attempts.ENDED, "1")
    assert store.check([attempts.ENDED])
    word = restarts.Word(step=8, ended_for_good=True, hang=HANG)
    assert restarts.Agent._ask_store(None, group) == word
    monkeypatch.setenv("TORCHTRAIN_ATTEMPT", "3")
    assert restarts.Agent._ask_store(None, group) == restarts.Word(ended_for_good=True)


@pytest.fixture
def store(monkeypatch):
    """torchrun's store, and this process as its only rank."""
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    variables = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(server.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": "test",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return server


def test_attempts_do_not_see_each_others_addresses(store, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    attempts.meet(timedelta(seconds=20))[0].set("address", "of the dead")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not attempts.meet(timedelta(seconds=20))[0].check(["address"])


@pytest.mark.parametrize(("status", "is_user_error"), [(2, True), (1, False), (143, False)])
def test_torchrun_tries_again_in_vain_what_ended_for_good(store, status, is_user_error):
    ranks.join_process_group(20)
    assert attempts.end_for_good(status) == status
    dist.destroy_process_group()
    with pytest.raises(PeerFault, match=f"ended for good, with exit status {status}") as caught:
        attempts.meet(timedelta(seconds=20))
    assert caught.value.is_user_error == is_user_error


@pytest.mark.parametrize(
    ("status", "is_for_good"), [(143, False), (130, True), (75, True), (2, True)]
)
def test_a_change_of_nodes_is_no_stop_of_a_user(store, status, is_for_good):
    ranks.join_process_group(20)
    told = attempts.of_attempt(store)
    told.set(attempts.CHANGE, "join")
    assert told.check([attempts.CHANGE])  # a set alone returns before the server has it
    assert attempts.end_for_good(status) == status
    dist.destroy_process_group()
    assert store.check([attempts.ENDED]) == is_for_good


def test_without_torchrun_there_is_nothing_to_tell(alone):
    attempts.begin_step(3)
    attempts.log_restart(3)
    assert attempts.end_for_good(1) == 1
