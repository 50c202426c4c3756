"""What a run says of itself when it goes on from a checkpoint, and how long it then is."""

from types import SimpleNamespace

from torchtrain.catalog.parameters import count_parameters
from torchtrain.config.plans import plan_run, plan_schedule, plan_shape
from torchtrain.config.rules import Rate
from torchtrain.config_manager import JobConfig
from torchtrain.resuming import count_steps, find_schedule_changes


def test_changes_of_the_schedule_are_told_one_by_one():
    before = JobConfig().parse_args(["--training.steps=100", "--optimizer.lr=0.001"])
    now = JobConfig().parse_args(["--training.steps=200", "--optimizer.lr=0.002"])
    plan = SimpleNamespace(schedule=plan_schedule(now.lr_scheduler, 200), rate=Rate(0.002))
    trainer = SimpleNamespace(config=now, plan=plan)
    saved = SimpleNamespace(config=before.model_dump(mode="json"), steps=None, max_lr=None)
    changes = [
        "optimizer.lr was 0.001, is 0.002",
        "total_steps was 100, is 200",
        "warmup_steps was 10, is 20",
        "decay_steps was 90, is 180",
    ]
    assert find_schedule_changes(trainer, saved) == changes
    saved.config["training"]["steps"], saved.config["optimizer"]["lr"] = 10_000, "auto"
    saved.steps, saved.max_lr = 100, 0.001
    assert find_schedule_changes(trainer, saved) == changes
    now.optimizer.lr = "auto"
    changes[0] += ' by "auto"; to keep it, set optimizer.lr = 0.001'
    assert find_schedule_changes(trainer, saved) == changes


def test_the_steps_of_a_resumed_run_are_those_of_its_plan():
    """With the checkpoint's batch and vocabulary, whatever the world size is now."""
    options = ["--training.tokens=20x", "--training.local_batch_size=4", "--training.seq_len=64"]
    config = JobConfig().parse_args(options, world_size=2)
    first = plan_run(config, 2, tokenizer_size=1000)
    saved = SimpleNamespace(
        shape={"vocab_size": 1000}, data={"global_batch_size": first.batch.global_batch_size}
    )
    count = count_parameters("llama3", plan_shape(config.model))
    parameters = count.total + 2 * 1000 * 256
    assert first.steps == -(-20 * parameters // (8 * 64)) == count_steps(config, saved)
    resumed = plan_run(config, 4, tokenizer_size=1000, global_batch_size=8)
    assert (resumed.steps, resumed.schedule) == (first.steps, first.schedule)
    assert resumed.validation.last_step == first.steps
    assert plan_run(config, 4, tokenizer_size=1000).steps == -(-20 * parameters // (16 * 64))
