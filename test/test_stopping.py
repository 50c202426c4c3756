"""What asks a run to stop, and that it does so in time."""

import math
import signal
import time

import pytest
import torch.distributed as dist
from helpers.launching import metrics, options

import train
from torchtrain import ranks, stopping
from torchtrain.config_manager import JobConfig
from torchtrain.errors import TIME_IS_UP, Stopped, UserError
from torchtrain.stopping import StopRequest, find_deadline, log_deadline


@pytest.fixture
def stop():
    """A StopRequest; the signals' handlers are restored afterwards."""
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield StopRequest()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_asks_to_stop(stop, number):
    assert stop.reason == 0
    signal.raise_signal(number)
    assert stop.reason == number


def test_a_second_ctrl_c_ends_at_once(stop):
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_repeated_sigterm_changes_nothing(stop):
    """Slurm and torchrun each send one."""
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert stop.reason == signal.SIGTERM


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
    assert stop.reason == 0
    clock.now = 1940.1
    assert stop.reason == TIME_IS_UP
    stop.begin_turn(5.0, is_last=True)
    assert stop.reason == 0, "the run is done after this step"
    stop.begin_turn(5.0)
    signal.raise_signal(signal.SIGTERM)
    assert stop.reason == signal.SIGTERM, "a signal that has come says why"


def test_the_first_turn_counts_until_there_is_another(clock, stop):
    stop.deadline = 2000.0
    stop.begin_turn(0.0)
    clock.now += 600
    stop.begin_turn(0.0)
    assert stop.reason == TIME_IS_UP, "1,600 + 2 x 600 + 30 s"


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
