"""The learning-rate schedule against its formula's written-out values; what holds for each one."""

import json
import math
import warnings
from dataclasses import asdict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchtrain.config.plans import Schedule, plan_schedule
from torchtrain.config.schema import LRScheduler
from torchtrain.config_manager import JobConfig
from torchtrain.lr_scheduling import (
    describe,
    differences,
    get_lr_scheduler,
    lr_factor,
    set_step,
)


def factors(steps, training_steps=None, **options):
    schedule = plan_schedule(LRScheduler(**options), training_steps or steps)
    return [lr_factor(step, schedule) for step in range(1, steps + 1)]


def job(steps, lr=8e-4, **options):
    config = JobConfig()
    config.training.steps, config.optimizer.lr = steps, lr
    config.lr_scheduler = LRScheduler(**options)
    return config


def scheduled(config):
    """An optimizer with two groups, as the real one has, and its scheduler."""
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))]} for _ in range(2)]
    optimizer = torch.optim.SGD(groups, lr=config.optimizer.lr)
    return optimizer, get_lr_scheduler(optimizer, config)


def rates_of_a_run(config, steps):
    """The rate each optimizer step used, in every group."""
    optimizer, scheduler = scheduled(config)
    rates = []
    for _ in range(steps):
        assert [group["lr"] for group in optimizer.param_groups] == scheduler.get_last_lr()
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


def test_ten_steps():
    expected = [4e-4, 8e-4, 7.1e-4, 6.2e-4, 5.3e-4, 4.4e-4, 3.5e-4, 2.6e-4, 1.7e-4, 8e-5]
    rates = rates_of_a_run(job(10), 10)
    assert rates == pytest.approx(expected, rel=1e-12)
    assert rates[1] == 8e-4
    assert rates[-1] == 8e-4 * 0.1


def test_past_the_end_the_rate_stays():
    rates = rates_of_a_run(job(10), 14)
    assert rates[10:] == [rates[9]] * 4


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {1: [1], 2: [0.5, 1], 3: [0.5, 1, 0.1], 4: [0.5, 1, 0.55, 0.1]}),
        ({"warmup_steps": 0}, {1: [0.1], 2: [0.55, 0.1], 3: [0.7, 0.4, 0.1]}),
        ({"warmup_steps": 8}, {4: [1 / 4, 2 / 4, 3 / 4, 1]}),
        ({"warmup_ratio": 0.0}, {4: [0.5, 1, 0.55, 0.1]}),
        ({"warmup_ratio": 1.0}, {5: [0.2, 0.4, 0.6, 0.8, 1]}),
        ({"decay_ratio": 0.0}, {5: [0.5, 1, 1, 1, 1]}),
        ({"decay_ratio": 0.4}, {5: [0.5, 1, 1, 0.55, 0.1]}),
        ({"decay_ratio": 1.0}, {5: [0.5, 1, 0.7, 0.4, 0.1]}),
        (
            {"warmup_steps": 1, "decay_type": "sqrt"},
            {5: [1, 0.55, 1 - 0.9 * 0.5**0.5, 1 - 0.9 * 0.75**0.5, 0.1]},
        ),
        (
            {"warmup_steps": 1, "decay_type": "cosine"},
            {4: [1, 0.1 + 0.9 * 0.75, 0.1 + 0.9 * 0.25, 0.1]},
        ),
        ({"warmup_steps": 1, "min_lr_factor": 0.0}, {3: [1, 0.5, 0]}),
        ({"warmup_steps": 1, "min_lr_factor": 1.0}, {3: [1, 1, 1]}),
    ],
    ids=str,
)
def test_factors_of_short_runs(options, expected):
    for steps, values in expected.items():
        assert factors(steps, **options) == pytest.approx(values, rel=1e-12)


def test_warm_up_is_a_tenth_of_the_run():
    schedule = plan_schedule(LRScheduler(), 1000)
    assert schedule == Schedule(1000, 100, 0, 900, "linear", 0.1)
    assert plan_schedule(LRScheduler(warmup_ratio=0.05, decay_ratio=0.2), 1000) == Schedule(
        1000, 50, 750, 200, "linear", 0.1
    )


def test_total_steps_spans_more_than_the_run():
    assert factors(10, training_steps=10, total_steps=20) == factors(20)[:10]


SHARES = st.floats(0, 1)


@given(
    steps=st.integers(1, 300),
    warmup_steps=st.none() | st.integers(0, 400),
    warmup_ratio=SHARES,
    decay_ratio=st.none() | SHARES,
    decay_type=st.sampled_from(["linear", "sqrt", "cosine"]),
    min_lr_factor=SHARES,
)
def test_every_schedule_rises_stays_falls(steps, **options):
    schedule = plan_schedule(LRScheduler(**options), steps)
    warmup, stable, decay = schedule.warmup_steps, schedule.stable_steps, schedule.decay_steps
    assert min(warmup, stable, decay) >= 0
    assert warmup + stable + decay == steps
    values = factors(steps, **options)
    rising, flat, falling = (
        values[:warmup],
        values[warmup : warmup + stable],
        values[warmup + stable :],
    )
    assert rising == [step / warmup for step in range(1, warmup + 1)]
    assert flat == [1.0] * stable
    assert sorted(falling, reverse=True) == falling
    assert all(options["min_lr_factor"] <= value <= 1 for value in falling)
    assert values[-1] == (options["min_lr_factor"] if decay else 1.0)
    assert lr_factor(steps + 1, schedule) == lr_factor(steps + 1000, schedule) == values[-1]
    assert all(math.isfinite(value) for value in values)


@pytest.mark.parametrize("resumed_at", [0, 1, 4, 9, 10, 12])
def test_resuming_gives_the_rates_of_the_run_that_was_not_stopped(resumed_at):
    config = job(10, decay_type="cosine")
    whole = rates_of_a_run(config, 14)
    optimizer, scheduler = scheduled(config)
    for group in optimizer.param_groups:
        group["lr"] = 123.0  # what a loaded optimizer state may bring along
    with warnings.catch_warnings():
        warnings.simplefilter(
            "error"
        )  # PyTorch warns of a scheduler out of step with its optimizer
        set_step(scheduler, resumed_at)
        rest = []
        for _ in range(resumed_at, 14):
            assert [group["lr"] for group in optimizer.param_groups] == scheduler.get_last_lr()
            rest.append(scheduler.get_last_lr()[0])
            optimizer.step()
            scheduler.step()
    assert rest == whole[resumed_at:]


def test_a_changed_schedule_takes_its_rate_from_the_new_config():
    _, scheduler = scheduled(job(20, lr=1e-3))
    set_step(scheduler, 10)
    assert scheduler.get_last_lr() == [1e-3 * lr_factor(11, plan_schedule(LRScheduler(), 20))] * 2


def test_differences_are_named_one_by_one():
    saved = json.loads(json.dumps(asdict(plan_schedule(LRScheduler(), 10))))
    assert differences(saved, plan_schedule(LRScheduler(), 10)) == []
    changed = differences(
        saved, plan_schedule(LRScheduler(decay_type="cosine", warmup_steps=3), 10)
    )
    assert changed == [
        "warmup_steps was 2, is 3",
        "decay_steps was 8, is 7",
        "decay_type was linear, is cosine",
    ]
    del saved["decay_type"]
    assert differences(saved, plan_schedule(LRScheduler(), 10)) == [
        "decay_type was None, is linear"
    ]


def test_the_start_line_states_the_schedule():
    line = describe(plan_schedule(LRScheduler(decay_ratio=0.5, decay_type="sqrt"), 100), 8e-4)
    assert "\n" not in line
    for part in (
        "max 0.0008",
        "min 8e-05",
        "10 steps of warm-up",
        "40 stable",
        "50 of sqrt decay",
        "step 100",
    ):
        assert part in line
