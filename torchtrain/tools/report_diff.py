"""Where two runs differ, as text: `torchtrain.tools.report A B --diff`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torchtrain.tools.report_data import Run, differences, is_number
from torchtrain.utils import plural

MEASURED = (
    "memory_gib",
    "tokens_per_second",
    "mfu",
    "data_time_pct",
    "step_time_s",
    "slowest_rank",
    "slowest_rank_excess_pct",
)
"""Metrics that differ from one launch to the next of the same run."""


@dataclass(frozen=True)
class Difference:
    """One metric of two runs, over the steps at which both have a number."""

    key: str
    steps: int
    first: int | None
    """The first step at which the numbers are not the same to the bit; None: there is none."""
    largest: float
    """Relative to the larger number of the two."""
    at: int
    """The first step that has the largest difference."""


def compare(a: Run, b: Run) -> list[Difference]:
    """Return the differences of each metric that both runs have: what was trained comes first."""
    numbers_a, numbers_b = _numbers(a), _numbers(b)
    found = []
    for key in sorted(numbers_a, key=lambda key: key in MEASURED):
        x, y = numbers_a[key], numbers_b.get(key, {})
        relative = {step: _relative(x[step], y[step]) for step in x if step in y}
        if relative:
            at = max(relative, key=lambda step: relative[step])
            first = next((step for step in relative if x[step] != y[step]), None)
            found.append(Difference(key, len(relative), first, relative[at], at))
    return found


def _numbers(run: Run) -> dict[str, dict[int, float]]:
    """Return the run's numbers by metric and step."""
    numbers: dict[str, dict[int, float]] = {}
    for record in run.records:
        for key, value in record.items():
            if key != "step" and is_number(value):
                numbers.setdefault(key, {})[record["step"]] = value
    return numbers


def _relative(x: float, y: float) -> float:
    return abs(x - y) / max(abs(x), abs(y)) if x != y else 0.0


def describe(a: Run, b: Run) -> list[str]:
    """Return the lines that say where the runs differ."""
    lines = [f"a: {a.folder}", f"b: {b.folder}"]
    lines += [f"{name}: {left} | {right}" for name, (left, right) in differences([a, b])]
    steps_a, steps_b = ({record["step"] for record in run.records} for run in (a, b))
    common = steps_a & steps_b
    lines += ["", f"{plural(len(common), 'step')} in both{_span(common)}"]
    for name, own in (("a", steps_a - steps_b), ("b", steps_b - steps_a)):
        if own:
            lines.append(f"{plural(len(own), 'step')} in {name} alone{_span(own)}")
    found = compare(a, b)
    loss = next((difference for difference in found if difference.key == "loss"), None)
    if loss is not None and loss.first is not None:
        lines.append(f"the losses part at step {loss.first}")
    elif loss is not None:
        lines.append("the losses are the same to the bit")
    return [*lines, "", *_table(found)] if found else lines


def _span(steps: set[int]) -> str:
    return f": {min(steps)} to {max(steps)}" if steps else ""


def _table(found: Sequence[Difference]) -> list[str]:
    titles = ("metric", "steps", "first difference", "largest, relative", "at step")
    rows: list[tuple[Any, ...]] = [titles]
    for one in found:
        largest = f"{one.largest:.2e}" if one.largest else "0"
        at: tuple[Any, ...] = (
            ("none", largest, "") if one.first is None else (f"step {one.first}", largest, one.at)
        )
        rows.append((one.key, one.steps, *at))
    widths = [max(len(str(row[column])) for row in rows) for column in range(len(titles))]
    lines = []
    for row in rows:
        cells = [str(cell).rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = str(row[0]).ljust(widths[0])
        lines.append("  ".join(cells).rstrip())
    return lines
