"""The learning rate over the run: linear warm-up, a stable stretch if asked for, decay.

Pure functions of the step. W steps warm up, the last D of T decay to the share m of the maximum.
Step k = 1 .. T takes the maximum times

    f(k) = k / W                     for k ≤ W
           1                         for W < k ≤ T − D
           m + (1 − m) · g(p)        beyond, with p = (k − T + D) / D

where g falls from 1 to 0: 1 − p (linear), 1 − √p (sqrt; Hägele et al. 2024, arXiv:2405.18392) or
½ (1 + cos πp) (cosine; Loshchilov & Hutter 2016, arXiv:1608.03983). Past T the rate stays what it
was at T. Decaying to a tenth of the maximum, exactly at the last step, follows Hoffmann et al. 2022
(arXiv:2203.15556).
"""

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from torchtrain.config.plans import Schedule, plan_schedule
from torchtrain.config.schema import Config

CURVES: dict[str, Callable[[float], float]] = {
    "linear": lambda p: 1 - p,
    "sqrt": lambda p: 1 - math.sqrt(p),
    "cosine": lambda p: (1 + math.cos(math.pi * p)) / 2,
}
"""g(p) by `lr_scheduler.decay_type`."""


def lr_factor(step: int, schedule: Schedule) -> float:
    """Return the share f(k) of the maximum that optimizer step k = `step` takes, counted from 1."""
    step = min(step, schedule.total_steps)
    if step <= schedule.warmup_steps:
        return step / schedule.warmup_steps
    decayed = step - schedule.warmup_steps - schedule.stable_steps
    if decayed <= 0:
        return 1.0
    falling = CURVES[schedule.decay_type](decayed / schedule.decay_steps)
    return schedule.min_lr_factor + (1 - schedule.min_lr_factor) * falling


def get_lr_scheduler(
    optimizer: Optimizer, job_config: Config, training_steps: int | None = None
) -> LambdaLR:
    """Build the scheduler, with the rate of step 1 set; step it right after each optimizer step.

    Args:
        optimizer: has the largest rates.
        job_config: the config.
        training_steps: steps of the run; by default `training.steps`.
    """
    steps = training_steps or job_config.training.steps
    schedule = plan_schedule(job_config.lr_scheduler, steps)
    # PyTorch's epoch e is the number of optimizer steps taken: it asks for the rate of step e + 1.
    return LambdaLR(optimizer, lambda epoch: lr_factor(epoch + 1, schedule))


def set_step(scheduler: LambdaLR, step: int) -> None:
    """Put the scheduler and the optimizer's rate where `step` optimizer steps would leave them.

    The rate comes from the config and the step alone, to the bit what stepping there gives; a rate
    that loading the optimizer's state brought along is overwritten.
    """
    rates = [
        base * factor(step)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    scheduler.load_state_dict(scheduler.state_dict() | {"last_epoch": step, "_last_lr": rates})
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def describe(schedule: Schedule, max_lr: float) -> str:
    """Describe the schedule in one line: maximum, minimum, warm-up, stable and decay steps."""
    last = max_lr * lr_factor(schedule.total_steps, schedule)
    return (
        f"max {max_lr:g}, min {last:g} at step {schedule.total_steps}: "
        f"{schedule.warmup_steps} steps of warm-up, {schedule.stable_steps} stable, "
        f"{schedule.decay_steps} of {schedule.decay_type} decay"
    )


def differences(saved: dict[str, Any], current: Schedule) -> list[str]:
    """Return one text per number that differs from a checkpoint's schedule, saved by `asdict`."""
    changed = []
    for name, now in asdict(current).items():
        before = saved.get(name)
        if before != now:
            changed.append(f"{name} was {before}, is {now}")
    return changed
