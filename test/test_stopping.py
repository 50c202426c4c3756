"""What asks a run to stop, and that it does so in time."""

import math
import os
import signal
import time
from functools import partial

import pytest
import torch.distributed as dist
from helpers import forking
from helpers.forking import Ranks, run_trainer
from helpers.launching import metrics, options, wait_for_step
from helpers.sameness import assert_same_state, curve

import train
from torchtrain import ranks, stopping
from torchtrain.config_manager import JobConfig
from torchtrain.early_interrupt import end_on_interrupt
from torchtrain.errors import TIME_IS_UP, Stopped, UserError
from torchtrain.stopping import StopRequest, find_deadline, log_deadline
from torchtrain.validation import ValidationSet


@pytest.fixture
def stop():
    """A StopRequest that listens; the signals' handlers are restored afterwards."""
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    request = StopRequest()
    request.listen()
    yield request
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_asks_to_stop(stop, number):
    assert stop.find_reason() == 0
    signal.raise_signal(number)
    assert stop.find_reason() == number


def test_a_hangup_that_nohup_has_ignored_stays_ignored():
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        request = StopRequest()
        request.listen()
        signal.raise_signal(signal.SIGHUP)
        assert request.find_reason() == 0
        signal.raise_signal(signal.SIGTERM)
        assert request.find_reason() == signal.SIGTERM
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_second_ctrl_c_ends_at_once(stop):
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_repeated_sigterm_changes_nothing(stop):
    """Slurm and torchrun each send one."""
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert stop.find_reason() == signal.SIGTERM


# The end of its time


class Clock:
    """Stands for time.monotonic."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        monkeypatch.setattr("time.monotonic", lambda: self.now)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_the_deadline_is_the_earlier_of_both(clock):
    assert find_deadline(None, {}) == math.inf
    assert find_deadline(2.5, {}) == 1150
    slurm = {"SLURM_JOB_END_TIME": "1790000100"}
    assert find_deadline(None, slurm, now=1790000000) == 1100
    assert find_deadline(2.5, slurm, now=1790000000) == 1100
    assert find_deadline(1.0, slurm, now=1790000000) == 1060
    started = {"TORCHTRAIN_STARTED": "1789999970"}  # an earlier attempt has had 30 s
    assert find_deadline(1.0, started, now=1790000000) == 1030
    assert find_deadline(None, slurm, saves=False, now=1790000000) == math.inf
    with pytest.raises(UserError, match="SLURM_JOB_END_TIME = 'soon' is not a time in seconds"):
        find_deadline(None, {"SLURM_JOB_END_TIME": "soon"})


def test_a_deadline_is_said_if_there_is_one(clock, monkeypatch):
    said = []
    monkeypatch.setattr(stopping.logger, "info", said.append)
    log_deadline(math.inf)
    assert not said
    log_deadline(1090)
    assert "1.5 minutes are left: the run stops before " in said[0]
    assert said[0].endswith("with status 75")


def test_a_run_stops_while_there_is_time_for_a_step_and_a_save(clock, stop):
    """Twice the longest turn of 10 s, twice a save of 5 s, and 30 s to spare: 60 s."""
    stop.deadline = 2000.0
    for seconds, save in ((100, 0.0), (10, 0.0), (4, 5.0), (3, 5.0)):  # the first one compiles
        stop.begin_turn(save)
        clock.now += seconds
    clock.now = 1939.9
    assert stop.find_reason() == 0
    clock.now = 1940.1
    assert stop.find_reason() == TIME_IS_UP
    stop.begin_turn(5.0, is_last=True)
    assert stop.find_reason() == 0, "the run is done after this step"
    stop.begin_turn(5.0)
    signal.raise_signal(signal.SIGTERM)
    assert stop.find_reason() == signal.SIGTERM, "a signal that has come says why"


def test_the_first_save_is_begun_in_time_too(clock, stop):
    """Its time is estimated before the first step."""
    stop.deadline = 1000 + 2 * 200 + 30.0 + 1
    stop.begin_turn(200.0)
    assert stop.find_reason() == 0
    clock.now += 2
    assert stop.find_reason() == TIME_IS_UP


def test_the_first_turn_counts_until_there_is_another(clock, stop):
    stop.deadline = 2000.0
    stop.begin_turn(0.0)
    clock.now += 600
    stop.begin_turn(0.0)
    assert stop.find_reason() == TIME_IS_UP, "1,600 + 2 x 600 + 30 s"


def run_until_stopped(config, device, deadline):
    """What the run says as it stops, and its status; nothing of it is left, as of a process."""
    try:
        train.run(config, device, deadline)
    except Stopped as stopped:
        return str(stopped), stopped.status


def test_a_run_that_is_out_of_time_saves_and_goes_on_when_queued_again(tmp_path, data):
    device = ranks.join_process_group(60)
    given = {**data, "job.dump_folder": tmp_path, "checkpoint.enable": True}
    config = JobConfig().parse_args(options(given))
    try:
        deadline = time.monotonic() + stopping.SPARE_S / 2
        said = run_until_stopped(config, device, deadline)
        assert said == ("stopped at the end of its time after step 1", 75)
        assert [path.name for path in (tmp_path / "checkpoint").iterdir()] == ["step-1"]
        train.run(JobConfig().parse_args(options(given)), device)
        assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4]
    finally:
        dist.destroy_process_group()


# A stop while no step is being taken

STEPS = 6
QUICKLY_S = 30
"""For ranks that are to leave at once; what they are in lasts for ten minutes."""
WAITING = """
import os, time
from pathlib import Path
from torchtrain.catalog.datasets import register_corpus

@register_corpus("waiting")
def waiting(gate):
    for number in range(1000):
        is_second = os.environ.get("RANK") == "1"
        while number == WAITS_AT and is_second and not Path(gate + ".open").exists():
            Path(gate + ".waited-for").touch()
            time.sleep(0.05)
        yield f"document {number} says {number * number} " * 5
"""


def saving(folder, given, **overrides):
    return {
        **given,
        "job.dump_folder": folder,
        "training.steps": STEPS,
        "checkpoint.enable": True,
        "checkpoint.interval": 100,
        "checkpoint.async_mode": "disabled",
        **overrides,
    }


def saved_steps(folder):
    return sorted(path.name for path in (folder / "checkpoint").glob("step-*"))


def assert_same_run(folder, whole, tmp_path):
    assert curve(folder) == curve(whole)
    assert_same_state(folder, whole, STEPS, tmp_path)


def streaming(tmp_path, waits_at):
    """Options of a run on two ranks whose second one waits at a document until its gate is open."""
    (tmp_path / "my_waiting.py").write_text(WAITING.replace("WAITS_AT", str(waits_at)))
    return {
        "experimental.custom_import": tmp_path / "my_waiting.py",
        "training.dataset": "waiting",
        "training.dataset_path": tmp_path / "gate",
        "data.cache_folder": tmp_path / "cache",
        "data.streaming": True,
    }


def wait_until_it_waits(tmp_path, run):
    deadline = time.monotonic() + 60
    while not (tmp_path / "gate.waited-for").exists():
        assert run.alive(), run.printed
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.slow
def test_a_stop_while_one_rank_waits_for_its_stream_saves_the_last_whole_step(tmp_path):
    """The signal comes to the rank that has its data; what was read ahead comes again."""
    given = streaming(tmp_path, waits_at=18)
    run, whole = tmp_path / "run", tmp_path / "whole"
    with forking.running(2, saving(run, given)) as stalled:
        wait_until_it_waits(tmp_path, stalled)
        wait_for_step(stalled.alive, run, 2)
        time.sleep(2)  # until no more steps come
        last = metrics(run)[-1]["step"]
        os.kill(stalled.processes[0].pid, signal.SIGTERM)
        assert stalled.finish(QUICKLY_S) == [143, 143], stalled.printed
    assert 1 < last < STEPS, "it has stalled in the midst of the run"
    assert f"stopped by SIGTERM after step {last}" in stalled.printed
    assert "Traceback" not in stalled.printed
    assert metrics(run)[-1]["step"] == last
    assert saved_steps(run) == [f"step-{last}"]
    (tmp_path / "gate.open").touch()
    forking.train(2, saving(run, given))
    forking.train(2, saving(whole, given))
    assert_same_run(run, whole, tmp_path)


def stop_in_a_step(arguments):
    """Be a rank of a run whose second rank gets SIGTERM in its third step."""
    forward_backward = train.forward_backward

    def interrupted(trainer, microbatches):
        if trainer.step == 2 and dist.get_rank() == 1:
            signal.raise_signal(signal.SIGTERM)
        return forward_backward(trainer, microbatches)

    train.forward_backward = interrupted
    return run_trainer(arguments)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_after_the_step_that_it_came_in(tmp_path, data):
    given = options(saving(tmp_path, data))
    printed = forking.on_ranks(2, stop_in_a_step, given, expect=143, timeout_s=60)
    assert printed.count("stopped by SIGTERM after step 3") == 1, printed
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3]
    assert saved_steps(tmp_path) == ["step-3"]


def stop_in_validation(stopped_at, arguments):
    """Be a rank of a run whose second rank gets SIGTERM as it reads that batch of validation."""
    read = ValidationSet.read
    batches = 0

    def interrupted(self, numbers):
        nonlocal batches
        batches += 1
        if batches == stopped_at and dist.get_rank() == 1:
            signal.raise_signal(signal.SIGTERM)
        return read(self, numbers)

    ValidationSet.read = interrupted
    status = run_trainer(arguments)
    print(f"rank {os.environ['RANK']} has read {batches} batches")
    return status


VALIDATED = ("step", "val_loss", "val_bits_per_byte")


def validations(folder):
    return [{key: line.get(key, "none") for key in VALIDATED} for line in metrics(folder)]


@pytest.fixture(scope="module")
def validating(data):
    """Options of a run that validates twice, on 16 batches."""
    return {
        **data,
        "validation.enable": True,
        "validation.freq": 3,
        "validation.steps": 4,
        "validation.local_batch_size": 1,
        "metrics.log_freq": 2,  # the line of step 3 is for its validation
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory, validating):
    """Such a run, uninterrupted."""
    folder = tmp_path_factory.mktemp("validated") / "whole"
    forking.train(2, saving(folder, validating))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("step", "stopped_at"), [(3, 6), (STEPS, 16 + 6)])
def test_a_stop_in_a_validation_is_heard_between_its_batches_by_all_ranks(
    tmp_path, validating, whole, step, stopped_at
):
    """It is saved without, and the next start makes up for it, after the last step too."""
    run = tmp_path / "run"
    given = options(saving(run, validating))
    stop = partial(stop_in_validation, stopped_at)
    printed = forking.on_ranks(2, stop, given, expect=143, timeout_s=60)
    assert f"stopped by SIGTERM after step {step}" in printed
    assert all(f"rank {rank} has read {stopped_at} batches" in printed for rank in (0, 1)), printed
    assert validations(run)[-1] == {"step": step, "val_loss": None, "val_bits_per_byte": None}
    assert saved_steps(run) == [f"step-{step}"]
    forking.train(2, saving(run, validating))
    assert_same_run(run, whole, tmp_path)
    assert validations(run) == validations(whole)
    assert "nothing to do" in forking.train(2, saving(run, validating))


def compile_for_ever(arguments):
    """Be a rank whose first forward lasts, as when it compiles."""

    def last(*given):
        print(f"rank {dist.get_rank()} compiles", flush=True)
        time.sleep(600)

    train.forward_backward = last
    return run_watched(arguments)


def run_watched(arguments):
    """Be a rank as train.py makes it, where something ends one that has nothing to save."""
    end_on_interrupt(before="the first step")
    return run_trainer(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_first_step_ends_at_once(tmp_path, data, number):
    run = Ranks(2, compile_for_ever, options(saving(tmp_path / "run", data)))
    try:
        while run.printed.count("compiles") < 2:
            assert run.alive(), run.printed
            time.sleep(0.05)
        for process in run.processes:
            os.kill(process.pid, number)
        by_handler = number == signal.SIGINT
        assert run.finish(QUICKLY_S) == [128 + number if by_handler else -number] * 2
    finally:
        run.kill()
    assert ("stopped by SIGINT before the first step" in run.printed) == by_handler
    assert saved_steps(tmp_path / "run") == []


@pytest.mark.slow
def test_the_end_of_its_time_while_the_corpus_is_read_ends_all_ranks_at_once(tmp_path):
    given = {**streaming(tmp_path, waits_at=5), "data.streaming": False, "job.max_minutes": 0.12}
    arguments = options(saving(tmp_path / "run", given))
    (tmp_path / "gate.open").touch()
    text = (tmp_path / "my_waiting.py").read_text()
    (tmp_path / "my_waiting.py").write_text(text.replace("yield", "time.sleep(1); yield"))
    printed = forking.on_ranks(2, run_watched, arguments, expect=75, timeout_s=QUICKLY_S)
    assert printed.endswith("stopped at the end of its time before the first step\n"), printed
    assert "Traceback" not in printed
    assert saved_steps(tmp_path / "run") == []


def test_a_signal_is_noted_only_once_there_is_something_to_save(stop):
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    StopRequest()
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
