"""Predicted time and cost, in words."""

from collections.abc import Sequence

from torchtrain.metrics import GIB
from torchtrain.tools.preflight.costs import CheckpointCost, RunCost
from torchtrain.tools.preflight.step_time import StepTime
from torchtrain.utils import plural

LABEL = 11
"""Width of a line's label."""
LEAST_SHARE = 0.005
"""Terms below this share of a step are summed up in one line."""


def describe_step(step: StepTime) -> list[str]:
    """Return a step's time, speed and MFU with their ranges, and the terms, the largest first."""
    times = (step.seconds, step.fastest_s, step.slowest_s)
    typical, fastest, slowest = (describe_seconds(seconds) for seconds in times)
    speed, most, least = (f"{step.tokens_per_second(seconds):,.0f}" for seconds in times)
    mfu, best, worst = (f"{100 * step.mfu(seconds):.0f}" for seconds in times)
    operations = f"{step.flops_per_token / 1e9:,.4g}"
    lines = [
        _label("step", f"{typical} ({fastest} to {slowest}), {step.tokens:,} tokens"),
        _label("speed", f"{speed} tokens per second ({least} to {most})"),
        _label("MFU", f"{mfu} % ({worst} to {best}); {operations} GFLOP a token"),
    ]
    ordered = sorted(step.terms.items(), key=lambda item: -item[1])
    small = [name for name, seconds in ordered if seconds < LEAST_SHARE * step.seconds]
    for name, seconds in ordered:
        if name not in small:
            lines.append(_term(seconds, step.seconds, name))
    if small:
        rest = sum(step.terms[name] for name in small)
        lines.append(_term(rest, step.seconds, f"all else: {', '.join(small)}"))
    return lines


def _term(seconds: float, whole: float, name: str) -> str:
    return f"{100 * seconds / whole:{LABEL}.1f} %  {describe_seconds(seconds):>8}  {name}"


def describe_cost(cost: RunCost) -> list[str]:
    """Return what the run takes: time, devices, money, checkpoints."""
    days = _range([f"{each:,.3g}" for each in cost.days])
    hours = _range([f"{each:,.0f}" for each in cost.device_hours])
    tokens = f"{cost.tokens / 1e9:,.3g}"
    lines = [
        _label("run", f"{cost.steps:,} steps, {tokens} billion tokens: {days} days"),
        _label("devices", f"{cost.devices:,}: {hours} device-hours"),
    ]
    if cost.costs is not None:
        price = _range([f"{each:,.0f}" for each in cost.costs])
        lines.append(_label("cost", f"{price}, at {cost.price:g} per device-hour"))
    if cost.checkpoint is not None:
        lines.append(_label("checkpoint", _describe_checkpoint(cost.checkpoint)))
    return lines


def _describe_checkpoint(cost: CheckpointCost) -> str:
    kept = cost.saves if cost.most_at_once is None else cost.most_at_once
    return (
        f"{cost.size / GIB:,.1f} GiB (weights {cost.parameters / GIB:,.1f}, optimizer "
        f"{cost.states / GIB:,.1f}), written in {describe_seconds(cost.write_s)}, training waits "
        f"{describe_seconds(cost.stall_s)}; {plural(cost.saves, 'save')}, disk for {kept}: "
        f"{cost.disk / GIB:,.0f} GiB"
    )


def _range(shown: Sequence[str]) -> str:
    """Return the typical figure with the range, of the fastest, the typical and the slowest."""
    fastest, typical, slowest = shown
    return f"{typical} ({fastest} to {slowest})"


def describe_seconds(seconds: float) -> str:
    """Return a time in a unit that suits it."""
    if seconds < 1:
        return f"{1e3 * seconds:.3g} ms"
    if seconds < 600:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:,.0f} min"


def _label(label: str, text: str) -> str:
    return f"{label:<{LABEL}}{text}"
