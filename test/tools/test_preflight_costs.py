"""What a run costs: checkpoints as large as those that are saved, days, hours and money."""

import pytest
import torch
from helpers.launching import options
from helpers.published import configure

from torchtrain.catalog.parameters import list_parameters
from torchtrain.checkpoint import Checkpointer
from torchtrain.checkpoint.state import make_states
from torchtrain.config.plans import plan_run
from torchtrain.config.schema import Checkpoint
from torchtrain.config_manager import JobConfig
from torchtrain.resuming import progress_of
from torchtrain.set_up import set_up
from torchtrain.tools.preflight.costs import (
    cost_checkpoint,
    cost_run,
    count_kept,
    measure_checkpoint,
)
from torchtrain.tools.preflight.devices import find_device
from torchtrain.tools.preflight.step_time import StepTime
from torchtrain.tools.preflight.time_report import describe_cost, describe_step

H100 = find_device("h100")
STEP = StepTime(
    terms={"matrix products": 7.0, "attention": 2.99, "optimizer and clipping": 0.01},
    seconds=10.0,
    fastest_s=8.0,
    slowest_s=12.5,
    tokens=1024 * 8192,
    flops_per_token=5e10,
    peak_flops=8e17,
)


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"model.tied_embeddings": True, "training.dtype": "bfloat16"},
        {"optimizer.name": "Muon", "model.n_experts": 4, "model.router_bias": True},
    ],
    ids=["AdamW", "tied-bf16", "Muon-experts"],
)
@pytest.mark.usefixtures("alone")
def test_a_checkpoint_is_as_large_as_one_that_was_saved(overrides, data, tmp_path):
    given = {"job.dump_folder": tmp_path, "checkpoint.enable": True, **data, **overrides}
    config = JobConfig().parse_args(options(given), world_size=1)
    trainer = set_up(config, torch.device("cpu"))
    make_states(trainer.optimizer)
    trainer.step = 1
    checkpointer = Checkpointer(config.checkpoint, tmp_path)
    checkpointer.save(trainer.model_state, trainer.optimizer, progress_of(trainer))
    checkpointer.finish()
    predicted = sum(measure_checkpoint(config, trainer.plan.shape))
    files = list((tmp_path / "checkpoint" / "step-1").glob("*.distcp"))
    saved = sum(file.stat().st_size for file in files)
    # Beside the tensors a file holds a header for each of them, and random states.
    tensors = 4 * len(list_parameters(config.model.name, trainer.plan.shape))
    assert files
    assert predicted <= saved <= predicted + 2048 * tensors


def test_a_large_model_s_checkpoint():
    config = configure("llama3_405b", 512, {"checkpoint.keep_latest_k": 3})
    plan = plan_run(config, 512)
    cost = cost_checkpoint(config, plan, H100, 512, disk_gb_per_s=100.0)
    numbers = 405_853_388_800
    assert cost.parameters == 4 * numbers
    # Two states of each number, and a count of steps for each of the 1,137 parameters.
    assert cost.states == 8 * numbers + 4 * 1137
    assert cost.write_s == cost.size / 1e11
    assert cost.stall_s == cost.size / 512 / H100.host_bandwidth
    assert cost.saves == 2400
    assert cost.disk == 4 * cost.size


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ({"keep_latest_k": 2}, 3),
        ({"keep_latest_k": 20}, 10),
        ({"keep_latest_k": 0}, None),
        ({"keep_latest_k": 2, "keep_every": 300}, 6),
        ({"keep_latest_k": 2, "keep_every": 150}, 6),
    ],
    ids=str,
)
def test_how_many_checkpoints_are_kept(section, expected):
    assert count_kept(Checkpoint(interval=100, **section), steps=1000) == expected


def test_days_hours_and_money():
    config = configure("llama3_8b", 8, {"training.steps": 86_400, "checkpoint.enable": False})
    cost = cost_run(config, plan_run(config, 8), H100, STEP, price=2.5)
    assert cost.days == [8.0, 10.0, 12.5]
    assert cost.device_hours == [8 * 24 * days for days in cost.days]
    assert cost.costs == [2.5 * hours for hours in cost.device_hours]
    assert cost.tokens == 86_400 * 1024 * 8192
    assert cost.checkpoint is None
    assert describe_cost(cost) == [
        "run        86,400 steps, 725 billion tokens: 10 (8 to 12.5) days",
        "devices    8: 1,920 (1,536 to 2,400) device-hours",
        "cost       4,800 (3,840 to 6,000), at 2.5 per device-hour",
    ]


def test_saves_that_training_waits_for_are_part_of_the_run():
    options = {"training.steps": 1000, "checkpoint.interval": 100}
    waiting = {"checkpoint.async_mode": "disabled"} | options
    configs = [configure("llama3_8b", 8, each) for each in (options, waiting)]
    beside, instead = (cost_run(each, plan_run(each, 8), H100, STEP) for each in configs)
    assert instead.checkpoint.stall_s == instead.checkpoint.write_s
    assert instead.seconds[1] == 1000 * 10 + 10 * instead.checkpoint.write_s
    assert 1000 * 10 < beside.seconds[1] < instead.seconds[1]
    assert describe_cost(beside)[-1] == (
        "checkpoint 89.7 GiB (weights 29.9, optimizer 59.8), written in 48.2 s, training waits "
        "188 ms; 10 saves, disk for 10: 897 GiB"
    )


def test_a_step_in_words():
    assert describe_step(STEP) == [
        "step       10 s (8 s to 12.5 s), 8,388,608 tokens",
        "speed      838,861 tokens per second (671,089 to 1,048,576)",
        "MFU        5 % (4 to 7); 50 GFLOP a token",
        "       70.0 %       7 s  matrix products",
        "       29.9 %    2.99 s  attention",
        "        0.1 %     10 ms  all else: optimizer and clipping",
    ]


def test_a_run_of_so_many_tokens_at_a_rate_that_follows_from_them():
    config = configure("llama3_8b", 8, {"training.tokens": 8388608e3, "optimizer.lr": "auto"})
    cost = cost_run(config, plan_run(config, 8), H100, STEP)
    assert cost.steps == 1000
    assert cost.checkpoint.states > 2 * cost.checkpoint.parameters
