"""The learning rate over the run: linear warm-up, a stable stretch if asked for, decay. Pure functions of the step.

W steps warm up, the last D of T decay to the share m of the maximum. Step k = 1 .. T takes the maximum times

    f(k) = k / W                     for k ≤ W
           1                         for W < k ≤ T − D
           m + (1 − m) · g(p)        beyond, with p = (k − T + D) / D

where g falls from 1 to 0: 1 − p (linear), 1 − √p (sqrt; Hägele et al. 2024, arXiv:2405.18392) or
½ (1 + cos πp) (cosine; Loshchilov & Hutter 2016, arXiv:1608.03983). Past T the rate stays what it was at T.
Decaying to a tenth of the maximum, exactly at the last step, follows Hoffmann et al. 2022 (arXiv:2203.15556).
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from torchtrain.config_manager import JobConfig
from torchtrain.config_manager import LRScheduler as LRSchedulerConfig


@dataclass(frozen=True)
class Schedule:
    """A schedule with every number settled; T = warmup_steps + stable_steps + decay_steps."""

    total_steps: int
    """T, at least 1."""
    warmup_steps: int
    """W, 0 for none."""
    stable_steps: int
    decay_steps: int
    """D, 0 for none."""
    decay_type: Literal["linear", "sqrt", "cosine"]
    min_lr_factor: float
    """m."""


def build_schedule(config: LRSchedulerConfig, training_steps: int) -> Schedule:
    """Settle W and D: what does not fit into the run is cut, first the decay, then the warm-up."""
    total = config.total_steps or training_steps
    wanted_warmup = (
        max(2, int(config.warmup_ratio * total))
        if config.warmup_steps is None
        else config.warmup_steps
    )
    warmup = min(wanted_warmup, total)
    wanted_decay = total if config.decay_ratio is None else round(config.decay_ratio * total)
    decay = min(wanted_decay, total - warmup)
    return Schedule(
        total, warmup, total - warmup - decay, decay, config.decay_type, config.min_lr_factor
    )


def lr_factor(step: int, schedule: Schedule) -> float:
    """The share f(k) of the maximum that optimizer step k = `step` takes; steps count from 1."""
    step = min(step, schedule.total_steps)
    if step <= schedule.warmup_steps:
        return step / schedule.warmup_steps
    decayed = step - schedule.warmup_steps - schedule.stable_steps
    if decayed <= 0:
        return 1.0
    p = decayed / schedule.decay_steps
    falling = {"linear": 1 - p, "sqrt": 1 - math.sqrt(p), "cosine": (1 + math.cos(math.pi * p)) / 2}
    return schedule.min_lr_factor + (1 - schedule.min_lr_factor) * falling[schedule.decay_type]


def get_lr_scheduler(optimizer: Optimizer, job_config: JobConfig) -> LambdaLR:
    """The scheduler, with the rate of step 1 set; call its `step()` right after each optimizer step."""
    schedule = build_schedule(job_config.lr_scheduler, job_config.training.steps)
    # PyTorch's epoch e is the number of optimizer steps taken, so the rate it asks for is that of step e + 1.
    return LambdaLR(optimizer, lambda epoch: lr_factor(epoch + 1, schedule))


def set_step(scheduler: LambdaLR, step: int) -> None:
    """Put the scheduler, and the optimizer's rate, where `step` optimizer steps would have left them.

    The rate comes from the config and the step alone, to the bit what stepping there gives; a rate that loading the
    optimizer's state brought along is overwritten.
    """
    rates = [
        base * factor(step)
        for base, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    scheduler.load_state_dict(scheduler.state_dict() | {"last_epoch": step, "_last_lr": rates})
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def describe(schedule: Schedule, max_lr: float) -> str:
    """One line for the start of the run: maximum, minimum, warm-up, stable and decay steps."""
    last = max_lr * lr_factor(schedule.total_steps, schedule)
    return (
        f"max {max_lr:g}, min {last:g} at step {schedule.total_steps}: {schedule.warmup_steps} steps of warm-up, "
        f"{schedule.stable_steps} stable, {schedule.decay_steps} of {schedule.decay_type} decay"
    )


def differences(saved: dict[str, Any], current: Schedule) -> list[str]:
    """What changed since a checkpoint that holds the schedule as `dataclasses.asdict` gives it, a text a number."""
    numbers = ((name, saved.get(name), value) for name, value in asdict(current).items())
    return [f"{name} was {before}, is {now}" for name, before, now in numbers if before != now]
