"""What a run says of itself when it goes on from a checkpoint."""

from types import SimpleNamespace

from torchtrain.config.plans import plan_schedule
from torchtrain.config_manager import JobConfig
from torchtrain.resuming import find_schedule_changes


def test_changes_of_the_schedule_are_told_one_by_one():
    before = JobConfig().parse_args(["--training.steps=100", "--optimizer.lr=0.001"])
    now = JobConfig().parse_args(["--training.steps=200", "--optimizer.lr=0.002"])
    trainer = SimpleNamespace(
        config=now, plan=SimpleNamespace(schedule=plan_schedule(now.lr_scheduler, 200))
    )
    saved = SimpleNamespace(config=before.model_dump(mode="json"))
    assert find_schedule_changes(trainer, saved) == [
        "optimizer.lr was 0.001, is 0.002",
        "total_steps was 100, is 200",
        "warmup_steps was 10, is 20",
        "decay_steps was 90, is 180",
    ]
