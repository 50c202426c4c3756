"""The edges of the loop: what ends a run early, with which status and message; and memory."""

import signal
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers.forking import on_ranks
from helpers.launching import options
from helpers.trained import validate
from helpers.waits import wait_once_a_step, waits_of_steps
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

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
from torchtrain.shards import local


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


@pytest.mark.usefixtures("trainer")  # for its process group
@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_a_batch_without_a_valid_label_ends_the_run_before_the_update(
    data, tmp_path, monkeypatch, on_nonfinite
):
    given = {**data, "training.on_nonfinite": on_nonfinite, "job.dump_folder": tmp_path}
    config = JobConfig().parse_args(options(given), world_size=1)
    trainer = set_up(config, torch.device("cpu"))
    weights = {name: local(weight.detach()).clone() for name, weight in trainer.weights.items()}
    read = trainer.loader.step_batches

    def without_labels(step):
        return [replace(each, labels=torch.full_like(each.labels, -100)) for each in read(step)]

    monkeypatch.setattr(trainer.loader, "step_batches", without_labels)
    monkeypatch.setattr(train, "set_up", lambda *_: trainer)
    said = r"step 1: no valid label in the global batch, global samples 0 to 7"
    with pytest.raises(SharedUserError, match=said):
        train.run(config, torch.device("cpu"))
    for name, weight in trainer.weights.items():
        assert torch.equal(local(weight), weights[name]), name
        assert (local(weight.grad) == 0).all(), name


@pytest.mark.usefixtures("trainer")  # for its process group
@pytest.mark.parametrize("log_freq", [1, 10])
def test_a_step_waits_for_the_device_once(data, tmp_path, log_freq):
    """When it reads what the ranks have measured, before the update: a step without a line too."""
    given = {**data, "training.steps": 3, "job.dump_folder": tmp_path}
    given |= {"training.local_batch_size": 4, "metrics.log_freq": log_freq}
    config = JobConfig().parse_args(options(given), world_size=1)
    waits = waits_of_steps(config, torch.device("cpu"))
    assert waits == [["step_metrics._gather"]] * 2


@pytest.mark.slow
def test_a_step_waits_once_on_every_layout(data, tmp_path):
    runs = {}
    for name, given in {
        "masks": {"training.document_masking": True},
        "tp": {"parallelism.tensor_parallel_degree": 2},
        "cp": {"parallelism.context_parallel_degree": 2},
        "pp": {"parallelism.pipeline_parallel_degree": 2},
    }.items():
        folder = {"training.steps": 3, "job.dump_folder": tmp_path / name}
        runs[name] = options({**data, **given, **folder})
    on_ranks(2, wait_once_a_step, runs, 1)


class Divisions(TorchDispatchMode):
    """Counts the divisions by the number 1."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        is_division = function.overloadpacket in (torch.ops.aten.div, torch.ops.aten.div_)
        self.count += is_division and isinstance(args[1], float) and args[1] == 1.0
        return function(*args, **(kwargs or {}))


def test_one_rank_divides_no_gradient(trainer):
    """FSDP would divide every one by 1 there, into a copy."""
    with Divisions() as seen:
        train.forward_backward(trainer, trainer.loader.step_batches(1))
    trainer.optimizer.zero_grad()
    assert seen.count == 0


def test_a_validation_leaves_the_weights_sharded(trainer):
    """Else every rank would hold the whole model until its next backward."""
    validate(trainer)
    for name, parameter in trainer.parts[0].named_parameters():
        assert isinstance(parameter, DTensor), name


@pytest.fixture
def recorded(monkeypatch):
    """What is called of the functions that `watch(where, name)` has named, in turn."""
    events = []

    def watch(where, name):
        action = getattr(where, name)

        def act(*arguments, **options):
            events.append(name)
            return action(*arguments, **options)

        monkeypatch.setattr(where, name, act)

    return SimpleNamespace(events=events, watch=watch)


@pytest.mark.usefixtures("trainer")  # for its process group
def test_what_is_logged_is_synced_before_a_checkpoint_is_written(data, tmp_path, recorded):
    """After a power cut no complete checkpoint lacks the lines of its steps."""
    recorded.watch(MetricsLogger, "log")
    recorded.watch(MetricsLogger, "sync")
    recorded.watch(Checkpointer, "save")
    saving = {"checkpoint.enable": True, "checkpoint.interval": 2, "training.steps": 3}
    given = options({**data, **saving, "job.dump_folder": tmp_path / "run"})
    train.run(JobConfig().parse_args(given, world_size=1), torch.device("cpu"))
    assert recorded.events == ["log", "log", "sync", "save", "log", "sync", "save"]


@pytest.mark.usefixtures("trainer")  # for its process group
def test_the_peak_of_memory_is_that_of_training(data, tmp_path, recorded):
    """Not of what comes before, where a weight is drawn or read whole."""
    for name in ("set_up", "resume", "reset_peak_memory", "forward_backward"):
        recorded.watch(train, name)
    given = {**data, "checkpoint.enable": True, "job.dump_folder": tmp_path / "run"}
    for steps in (1, 2):
        arguments = options({**given, "training.steps": steps})
        train.run(JobConfig().parse_args(arguments, world_size=1), torch.device("cpu"))
    trained = ["reset_peak_memory", "forward_backward"]
    assert recorded.events == ["set_up", *trained, "set_up", "resume", *trained]
