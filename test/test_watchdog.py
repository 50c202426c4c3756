"""Ranks that are stopped or stuck: their stacks are written, and the one not there is named."""

import textwrap
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers.forking import Ranks, run_trainer
from helpers.launching import metrics, options

import train
from torchtrain import set_up, watchdog
from torchtrain.attempts import HANG
from torchtrain.config.schema import Comm
from torchtrain.config_manager import JobConfig
from torchtrain.hangs import Position
from torchtrain.text_samples import TextSampler
from torchtrain.validation import Validator
from torchtrain.watchdog import SUSPICION, Watchdog

TIMEOUT_S = 3

STUCK = """
import os
import time
from pathlib import Path

import train

real = train.forward_backward
other = Path(__file__).with_name("rank-0.pid")
if os.environ["RANK"] == "0":
    other.write_text(str(os.getpid()))


def forward_backward(trainer, microbatches):
    if trainer.step == 2 and os.environ["RANK"] == "1":
        while Path("/proc", other.read_text()).exists():
            time.sleep(0.05)
    return real(trainer, microbatches)


train.forward_backward = forward_backward
"""

IN_A_SAVE = """
import os
import signal
import time

from torchtrain.checkpoint import saving

real = saving.write_tensors


def write_tensors(*arguments):
    if os.environ["RANK"] == "1":
        FAULT
    return real(*arguments)


saving.write_tensors = write_tensors
"""


def start(folder, data, fault, timeout_s=TIMEOUT_S, **overrides):
    """Two ranks, each of which executes `fault` while it reads the config."""
    folder.mkdir(exist_ok=True)
    file = folder / "fault.py"
    file.write_text(textwrap.dedent(fault))
    given = {
        **data,
        "job.dump_folder": folder / "run",
        "experimental.custom_import": file,
        "comm.train_timeout_seconds": timeout_s,
        **overrides,
    }
    return Ranks(2, run_trainer, options(given))


@pytest.mark.slow
def test_a_rank_that_is_stuck_is_named_and_its_stack_shows_where(tmp_path, data):
    ranks = start(tmp_path, data, STUCK, timeout_s=5)  # it answers in an eighth of that
    assert ranks.finish(60) == [1, 1]
    folder = tmp_path / "run" / "hang" / "step-3"
    cause = "error: rank 1 had not arrived, in step 3 (forward and backward); others waited for "
    assert ranks.printed.count(cause) == 1, ranks.printed
    assert f"see {folder}" in ranks.printed
    assert sorted(path.name for path in folder.iterdir()) == ["rank-0.txt", "rank-1.txt"]
    stuck, waiting = ((folder / f"rank-{rank}.txt").read_text() for rank in (1, 0))
    assert "fault.py" in stuck
    main_thread = waiting.partition("main thread:")[2].partition("\n\n")[0]  # its outermost first
    *_, innermost = [line for line in main_thread.split("\n") if "in forward_backward" in line]
    assert "fault.py" not in innermost
    assert "in all_reduce" in waiting


@pytest.mark.slow
def test_a_rank_that_is_stopped_in_a_save_ends_the_run_and_a_slow_disk_does_not(tmp_path, data):
    save = {"checkpoint.enable": True, "checkpoint.interval": 2, "training.steps": 2}
    stop = IN_A_SAVE.replace("FAULT", "os.kill(os.getpid(), signal.SIGSTOP)")
    wait = IN_A_SAVE.replace("FAULT", f"time.sleep({1.5 * TIMEOUT_S})")
    stopped = start(tmp_path / "stopped", data, stop, **save)
    slow = start(tmp_path / "slow", data, wait, **save)
    try:
        stopped.processes[0].join(60)
        assert stopped.statuses == [1, None], stopped.printed
        assert slow.finish(60) == [0, 0], slow.printed
    finally:
        stopped.kill()
        slow.kill()
    cause = f"error: rank 1 did not answer in step 2 (saving) for {TIMEOUT_S} s; see "
    assert stopped.printed.count(cause) == 1, stopped.printed
    folder = tmp_path / "stopped" / "run" / "hang" / "step-2"
    assert [path.name for path in folder.iterdir()] == ["rank-0.txt"]
    assert "in save_progress" in (folder / "rank-0.txt").read_text()
    assert not (tmp_path / "slow" / "run" / "hang").exists()
    assert len(metrics(tmp_path / "slow" / "run")) == 2


LATER = {
    "training.steps": 4,
    "validation.enable": True,
    "validation.freq": 2,
    "text_samples.freq": 2,
    "text_samples.prompts": "one word",
    "text_samples.max_new_tokens": 1,
}


def slow_for_once(place):
    """What makes rank 1 take longer than the timeout of training, the first time."""
    return f"""
import os
import time

from {place.__module__} import {place.__name__} as place

real = place.run
runs = []


def run(*arguments):
    runs.append(arguments)
    if os.environ["RANK"] == "1" and len(runs) == 1:
        time.sleep({1.5 * TIMEOUT_S})
    return real(*arguments)


place.run = run
"""


@pytest.mark.slow
def test_what_is_compiled_after_the_first_step_has_the_time_for_it(tmp_path, data):
    runs = {
        tmp_path / place.__name__: start(
            tmp_path / place.__name__, data, slow_for_once(place), **LATER
        )
        for place in (Validator, TextSampler)
    }
    try:
        for folder, ranks in runs.items():
            assert ranks.finish(60) == [0, 0], ranks.printed
            assert not (folder / "run" / "hang").exists()
    finally:
        for ranks in runs.values():
            ranks.kill()


def test_only_the_first_validation_and_texts_have_the_time_of_the_first_step(
    tmp_path, data, alone, monkeypatch
):
    events = []
    for where in (set_up, watchdog):
        monkeypatch.setattr(where, "set_timeout", events.append)
    for place in (Validator, TextSampler):
        real = place.run

        def run(*arguments, place=place, real=real):
            events.append(place.__name__)
            return real(*arguments)

        monkeypatch.setattr(place, "run", run)
    timeouts = {"comm.init_timeout_seconds": 70, "comm.train_timeout_seconds": 7}
    given = {**data, **LATER, **timeouts, "job.dump_folder": tmp_path / "run"}
    train.run(JobConfig().parse_args(options(given), world_size=1), torch.device("cpu"))
    assert events == [
        *(70, 7),
        *(70, "Validator", 7),
        *(70, "TextSampler", 7),
        *("Validator", "TextSampler"),
    ]
    given |= {"validation.freq": 1, "training.steps": 2, "job.dump_folder": tmp_path / "early"}
    events.clear()
    train.run(JobConfig().parse_args(options(given), world_size=1), torch.device("cpu"))
    assert events == [70, "Validator", 7, "Validator", 70, "TextSampler", 7]


@pytest.fixture
def watch(tmp_path, alone, monkeypatch):
    """Rank 0's watchdog of two ranks, at the place that a test says, and its look at the store."""
    mesh = SimpleNamespace(all_groups=list, group=lambda _: None)
    comm = Comm(init_timeout_seconds=4, train_timeout_seconds=1)
    dog = Watchdog(comm, tmp_path, mesh, loop=lambda: None)
    dog.world_size, dog.timeout_s = 2, 1.0
    store = dist.HashStore()

    def look(place, passed_s, step=3, entered=7):
        position = Position(step=step, place=place, entered={"0": entered})
        monkeypatch.setattr(dog, "_find_position", lambda: position)
        dog._look(store, passed_s)
        return store.get(HANG).decode() if store.check([HANG]) else ""

    def broken(folder):
        raise RuntimeError("the device hangs")

    monkeypatch.setattr(watchdog, "write_collectives", broken)
    monkeypatch.setattr(watchdog.os, "_exit", lambda status: ended.append(status))
    ended = []
    return SimpleNamespace(look=look, store=store, ended=ended, folder=tmp_path / "hang", dog=dog)


def test_a_rank_that_enters_no_collective_suspects_a_hang_before_the_timeout(watch):
    assert not watch.look("validation", 0.25)
    for number in range(10):  # it moves
        assert not watch.look("validation", 0.6, entered=8 + number)
    assert not watch.look("validation", 0.5, entered=17)
    assert "rank 1 did not answer in step 3 (validation) for 1 s" in watch.look(
        "validation", 0.25, entered=17
    )
    assert (watch.folder / "step-3" / "rank-0.txt").exists()
    assert not watch.ended, "its collective raises"


def test_what_was_no_hang_is_taken_back_and_the_next_one_has_more_time(watch):
    watch.look("validation", 0.25)
    assert watch.look("validation", 0.75)
    assert watch.look("validation", 0.1), "it has not moved yet"
    assert watch.look("finishing", 0.0), "it has not entered a collective"
    assert not watch.look("validation", 0.05, entered=8)
    assert not watch.store.check([SUSPICION])
    assert not watch.look("validation", 0.9, entered=8)
    assert watch.look("validation", 0.06, entered=8)


def test_a_disk_may_be_waited_for_as_long_as_the_next_rank_gives_signs_of_life(watch):
    for beat in range(20):
        watch.store.set("beat/1", str(beat))
        assert not watch.look("saving", 0.25)
    for _ in range(3):
        assert not watch.look("saving", 0.25)
    assert not watch.ended
    assert "rank 1 did not answer in step 3 (saving) for 1 s" in watch.look("saving", 0.25)
    assert watch.ended == [1]


def test_a_rank_that_has_ended_needs_to_give_no_sign_of_life(watch):
    watch.store.set("beat/1", "ended")
    for _ in range(20):
        assert not watch.look("finishing", 0.25)
    assert not watch.ended


def test_a_rank_answers_once_to_what_another_suspects(watch):
    watch.store.set("beat/1", "ended")
    watch.look("reading data", 0.25)
    watch.store.set(SUSPICION, "2-of-rank-1")
    watch.look("reading data", 0.25)
    told = watch.store.get("2-of-rank-1/0")
    assert Position.model_validate_json(told) == Position(
        step=3, place="reading data", entered={"0": 7}
    )
    assert (watch.folder / "step-2" / "rank-0.txt").exists()
    watch.store.delete_key("2-of-rank-1/0")
    watch.look("reading data", 0.25)
    assert not watch.store.check(["2-of-rank-1/0"])


def test_time_in_which_all_were_stopped_does_not_count(watch, monkeypatch):
    """The rank, stopped by Ctrl-Z and continued, finds the clock an hour further."""
    passed = []
    monkeypatch.setattr(watchdog, "connect_to_store", lambda _: watch.store)
    monkeypatch.setattr(watch.dog, "_look", lambda _, passed_s: passed.append(passed_s))
    clock = iter([0.0, 3600.0, 3600.0, 3600.1, 3600.1])
    monkeypatch.setattr(watchdog.time, "monotonic", lambda: next(clock))
    waits = iter([False, False, True])
    watch.dog._ended = SimpleNamespace(wait=lambda _: next(waits))
    watch.dog._watch()
    assert passed == [0.25, pytest.approx(0.1)]
    assert watch.store.get("beat/0") == b"ended"
