"""What ends a run early, signals and faults, and the exit status and the message of each."""

import signal

import pytest

import train
from torchtrain.config_manager import JobConfig
from torchtrain.errors import NonFinite, PeerFault, SharedUserError, Stopped, UserError


@pytest.fixture
def stop():
    """A StopRequest; the signals' handlers are restored afterwards."""
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    yield train.StopRequest()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_asks_to_stop(stop, number):
    assert stop.signal_number == 0
    signal.raise_signal(number)
    assert stop.signal_number == number


def test_a_second_ctrl_c_ends_at_once(stop):
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_a_repeated_sigterm_changes_nothing(stop):
    """Slurm and torchrun each send one."""
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGTERM)
    assert stop.signal_number == signal.SIGTERM


def peer_fault(*, is_user_error):
    fault = PeerFault("rank 1 failed")
    fault.is_user_error = is_user_error
    return fault


# What a run raises: (exit status, whether rank 0 says it, whether rank 1 does).
ENDS = {
    "nothing": (None, 0, False, False),
    "a user error of this rank": (UserError("the cause"), 2, True, True),
    "a user error of all ranks": (SharedUserError("the cause"), 2, True, False),
    "a loss that is not finite": (NonFinite("the cause"), 1, True, False),
    "a peer's user error": (peer_fault(is_user_error=True), 2, False, False),
    "a peer's crash": (peer_fault(is_user_error=False), 1, False, False),
    "SIGTERM": (Stopped(signal.SIGTERM, 3), 128 + 15, False, False),
    "a second Ctrl-C": (KeyboardInterrupt(), 128 + 2, False, False),
    "a crash": (RuntimeError("the cause"), 1, True, True),
}


@pytest.fixture
def logger(monkeypatch):
    """The logger as it was, after whatever a test makes of it."""
    level = train.logger.level
    monkeypatch.setattr(train.logger, "handlers", [])
    monkeypatch.setattr(train.logger, "propagate", train.logger.propagate)
    yield
    train.logger.setLevel(level)


@pytest.mark.usefixtures("logger")
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("end", ENDS)
def test_exit_status_and_who_says_why(end, rank, monkeypatch, capfd):
    raised, status, *says = ENDS[end]

    def run(config, device):
        if raised is not None:
            raise raised

    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(train, "run", run)
    monkeypatch.setattr(train, "join_process_group", lambda timeout_seconds: None)
    monkeypatch.setattr(train, "end_with_launcher", lambda: None)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)
    assert train.main(JobConfig()) == status
    printed = "".join(capfd.readouterr())
    assert ("the cause" in printed) == says[rank]
    assert ("Traceback" in printed) == (end == "a crash")
