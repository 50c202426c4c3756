"""The edges of the loop: what ends a run early, with which status and message; and memory."""

import signal
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from helpers.launching import options
from torch.distributed.tensor import DTensor

import train
from torchtrain import ranks
from torchtrain.checkpoint import Checkpointer
from torchtrain.config_manager import JobConfig
from torchtrain.errors import (
    TIME_IS_UP,
    NonFinite,
    PeerFault,
    ReplicasDiffer,
    SharedUserError,
    Stopped,
    UserError,
)
from torchtrain.metrics import MetricsLogger
from torchtrain.set_up import set_up


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
    "replicas that differ": (ReplicasDiffer("the cause"), 1, True, False),
    "a peer's user error": (peer_fault(is_user_error=True), 2, False, False),
    "a peer's crash": (peer_fault(is_user_error=False), 1, False, False),
    "SIGTERM": (Stopped(signal.SIGTERM, 3), 128 + 15, False, False),
    "the end of its time": (Stopped(TIME_IS_UP, 3), 75, False, False),
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

    def run(config, device, deadline):
        if raised is not None:
            raise raised

    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(train, "run", run)
    monkeypatch.setattr(train, "join_process_group", lambda timeout_seconds: None)
    monkeypatch.setattr("torch.distributed.destroy_process_group", lambda: None)
    assert train.main(JobConfig()) == status
    printed = "".join(capfd.readouterr())
    assert ("the cause" in printed) == says[rank]
    assert ("Traceback" in printed) == (end == "a crash")


@pytest.fixture(scope="module")
def trainer(data):
    """A run that validates, set up on one rank of this process."""
    device = ranks.join_process_group(60)
    given = {**data, "validation.enable": True, "validation.steps": 1}
    yield set_up(JobConfig().parse_args(options(given), world_size=1), device)
    dist.destroy_process_group()


def test_a_batch_without_a_valid_label_is_refused(trainer):
    batches = [
        replace(batch, labels=torch.full_like(batch.labels, -100))
        for batch in trainer.loader.step_batches(1)
    ]
    said = r"step 1: no valid label in the global batch, global samples 0 to 7"
    with pytest.raises(SharedUserError, match=said):
        train.forward_backward(trainer, batches)
    assert all(weight.grad is None for weight in trainer.weights.values())


def test_a_validation_leaves_the_weights_sharded(trainer):
    """Else every rank would hold the whole model until its next backward."""
    train.validate(trainer, train.StopRequest())
    for name, parameter in trainer.parts[0].named_parameters():
        assert isinstance(parameter, DTensor), name


@pytest.mark.usefixtures("trainer")  # for its process group
def test_what_is_logged_is_synced_before_a_checkpoint_is_written(data, tmp_path, monkeypatch):
    """After a power cut no complete checkpoint lacks the lines of its steps."""
    events = []

    def recorded(kind, name):
        action = getattr(kind, name)

        def act(*arguments, **options):
            events.append(name)
            return action(*arguments, **options)

        monkeypatch.setattr(kind, name, act)

    recorded(MetricsLogger, "log")
    recorded(MetricsLogger, "sync")
    recorded(Checkpointer, "save")
    saving = {"checkpoint.enable": True, "checkpoint.interval": 2, "training.steps": 3}
    given = options({**data, **saving, "job.dump_folder": tmp_path / "run"})
    train.run(JobConfig().parse_args(given, world_size=1), torch.device("cpu"))
    assert events == ["log", "log", "sync", "save", "log", "sync", "save"]
