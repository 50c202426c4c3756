"""What has become of a sweep: a table of its runs, the best marked, and a page of their curves."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from torchtrain.errors import UserError
from torchtrain.tools import report
from torchtrain.tools.report_data import Run
from torchtrain.tools.sweep.kept import find_changes
from torchtrain.tools.sweep.plan import Sweep, SweepRun
from torchtrain.tools.sweep.running import is_held, read_ending, read_run
from torchtrain.utils import METRICS_FILE

TITLES = ("run", "state", "step", "loss", "val. loss", "tokens/s", "folder")
UNKNOWN = "–"


@dataclass(frozen=True)
class Row:
    """What the table says of a run."""

    name: str
    state: str
    """done, not finite, failed, begun, under way, or not begun."""
    step: str
    loss: float | None
    """The last that was logged."""
    val_loss: float | None
    tokens_per_second: float | None
    """The median."""
    folder: str
    changed: Sequence[str] = ()
    """The options in which it differs from what the file asks for now."""

    def cells(self, mark: str) -> list[str]:
        """Return the columns as text."""
        losses = [f"{x:.4f}" if x is not None else UNKNOWN for x in (self.loss, self.val_loss)]
        speed = f"{self.tokens_per_second:,.0f}" if self.tokens_per_second else UNKNOWN
        return [f"{mark} {self.name}", self.state, self.step, *losses, speed, self.folder]


def make_rows(sweep: Sweep) -> list[Row]:
    """Return a row for each run of the sweep."""
    changes = find_changes(sweep)
    return [_make_row(sweep, run, changes.get(run.name, ())) for run in sweep.runs]


def _make_row(sweep: Sweep, run: SweepRun, changed: Sequence[str]) -> Row:
    found = read_run(sweep, run)
    ending = read_ending(sweep, run)
    state = "not begun" if found is None else "begun"
    if ending is not None:
        state = ending.state
    elif is_held(sweep, run):
        state = "under way"
    if found is None:
        folder = str(sweep.path(run))
        return Row(run.name, state, UNKNOWN, None, None, None, folder, changed)
    speeds = found.series("tokens_per_second")[1]
    step = f"{found.records[-1]['step']:,}"
    if isinstance(found.facts.get("steps"), int):
        step += f" of {found.facts['steps']:,}"
    return Row(
        name=run.name,
        state=state,
        step=step,
        loss=_last(found, "loss"),
        val_loss=_last(found, "val_loss"),
        tokens_per_second=median(speeds) if speeds else None,
        folder=str(sweep.path(run)),
        changed=changed,
    )


def _last(run: Run, key: str) -> float | None:
    return next(iter(run.series(key)[1][-1:]), None)


def find_best(rows: Sequence[Row]) -> tuple[Row | None, str]:
    """Return the best of the runs that are done, and by what: the validation, if all have one.

    What was run with other options than the file asks for now does not count.
    """
    valid = [row for row in rows if not row.changed]
    done = [row for row in valid if row.state == "done" and row.loss is not None]
    by_validation = {row.name: row.val_loss for row in done if row.val_loss is not None}
    if done and len(by_validation) == len(done):
        return min(done, key=lambda row: by_validation[row.name]), "lowest validation loss"
    by_loss = {row.name: row.loss for row in done if row.loss is not None}
    return min(done, key=lambda row: by_loss[row.name], default=None), "lowest last loss"


def format_table(rows: Sequence[Row]) -> str:
    """Return the table as text; names and folders to the left, numbers to the right."""
    best, reason = find_best(rows)
    marks = ["*" if row is best else "!" if row.changed else " " for row in rows]
    lines = [list(TITLES)] + [row.cells(mark) for row, mark in zip(rows, marks, strict=True)]
    lines[0][0] = f"  {TITLES[0]}"
    widths = [max(len(line[column]) for line in lines) for column in range(len(TITLES))]
    is_text = (True, True, False, False, False, False, True)
    text = []
    for line in lines:
        columns = zip(line, widths, is_text, strict=True)
        cells = [cell.ljust(width) if left else cell.rjust(width) for cell, width, left in columns]
        text.append("  ".join(cells).rstrip())
    if best is not None:
        text.append(f"* {reason} of the runs that are done")
    for row in rows:
        if row.changed:
            text.append(f"! not as the file asks for now: {row.name}: {'; '.join(row.changed)}")
    return "\n".join(text)


def show(sweep: Sweep) -> None:
    """Print the table, and write the page of curves where that can be done."""
    rows = make_rows(sweep)
    print(f"\n{format_table(rows)}\n", flush=True)
    folders = [sweep.path(run) for run in sweep.runs if read_run(sweep, run) is not None]
    if not folders:
        print(f"no page of curves: no run has a {METRICS_FILE} yet")
        return
    try:
        report.draw(folders, sweep.folder / "report.html")
    except UserError as fault:
        print(f"no page of curves: {fault}")
