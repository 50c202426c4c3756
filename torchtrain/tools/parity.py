"""Show that every layout trains the same model: one process in fp32 against each layout.

    python -m torchtrain.tools.parity [--config FILE] [--layouts NAME,NAME|all] [--steps N]
                                      [--json FILE] [trainer options]

The reference is one process in fp32 without recomputation, compilation or offload. A layout runs on
its number of local ranks (over gloo; on GPUs if enough are visible for all layouts asked for), from
the same seed and over the same global batches. Compared are the loss (the global one, and the
largest of one sequence) and the gradient norm of every step, each parameter's gradient at step 1
and each parameter at the end; the initial weights, and the copies of a parameter on different
ranks, must be equal to the bit.

A layout is a line of `torchtrain.tools.layouts`. The FILE's own layout options (`parity_plan.plain`
lists them) are ignored. Trainer options given here override the FILE, also in the reference unless
they are layout options. A FILE runs as it is but for the number of steps; without one
debug_model.toml runs, shrunk so that the whole table takes minutes on two cores.

A reference that fails costs the layouts that are compared with it, and no others.

Exit status: 0 all layouts agree; 1 one differs, failed, was refused or has nothing to be compared
with; 2 a user error.
"""

import argparse
import json
import math
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torchtrain.config_manager import JobConfig
from torchtrain.errors import UserError
from torchtrain.tools.layouts import LAYOUTS, TASKS, Layout
from torchtrain.tools.parity_compare import TOLERANCES, Row, Tolerance, compare
from torchtrain.tools.parity_plan import Plan, choose, make_plan
from torchtrain.tools.parity_processes import load_results, run_cases
from torchtrain.utils import expand_user, write_durably

REFERENCE = "reference-"  # before a task's name where a layout has its own

COLUMNS = "{:<34}{:>6}{:>9}{:>9}{:>10}{:>9}{:>9}  {}"


def check_layouts(layouts: dict[str, Layout], plan: Plan) -> Iterator[Row]:
    """Yield the row of each layout as soon as it is known, of fewer ranks first."""
    tolerances = {}
    refused = {}
    for name, layout in layouts.items():
        try:
            tolerances[name] = check_layout(layout, plan)
        except UserError as fault:
            refused[name] = " ".join(str(fault).split())
    for name, reason in refused.items():
        yield Row(name, layouts[name].ranks, f"refused: {reason}")

    accepted = {name: layout for name, layout in layouts.items() if name not in refused}
    with tempfile.TemporaryDirectory(prefix="torchtrain-parity-") as folder:
        yield from run_layouts(accepted, tolerances, plan, Path(folder))


def run_layouts(
    layouts: dict[str, Layout], tolerances: dict[str, Tolerance], plan: Plan, folder: Path
) -> Iterator[Row]:
    """Run the references and the layouts, and yield each row, at last those without a reference."""
    references: dict[str, dict[str, Any]] = {}
    lost: dict[str, str] = {}  # references that failed, and why
    for ranks, cases in sorted(list_cases(layouts, plan, folder).items()):
        of_use = {name: case for name, case in cases.items() if case["reference"] not in lost}
        for name, failure in run_cases(plan, ranks, of_use, folder):
            reference = cases[name]["reference"]
            if name == reference and failure:
                lost[name] = first_line(failure)
            elif name == reference:
                references[name] = load_results(folder, name)
            elif reference in lost:
                continue  # it has run beside its reference, and has nothing to be compared with
            elif failure:
                yield Row(name, ranks, f"failed: {first_line(failure)}")
            else:
                results = load_results(folder, name)
                yield compare(name, ranks, results, references[reference], tolerances[name])
    for name, layout in layouts.items():
        reason = lost.get(REFERENCE + layout.task)
        if reason is not None:
            yield Row(name, layout.ranks, f"failed: its reference, one process in fp32: {reason}")


def check_layout(layout: Layout, plan: Plan) -> Tolerance:
    """Check a layout's configuration, and return the differences that its precision explains.

    Raises:
        UserError: the configuration has a fault.
    """
    command_line = plan.command_line(layout.task, layout)
    config = JobConfig().parse_args(command_line, world_size=layout.ranks)
    precisions = [config.training.dtype, config.training.mixed_precision_param]
    if config.optimizer.name == "Muon":
        precisions.append(config.optimizer.muon_ns_dtype)
    return TOLERANCES["bfloat16" if "bfloat16" in precisions else "float32"]


def list_cases(
    layouts: dict[str, Layout], plan: Plan, folder: Path
) -> dict[int, dict[str, dict[str, Any]]]:
    """Return the orders for `parity_ranks`, by number of ranks and name, references first."""
    cases: dict[int, dict[str, dict[str, Any]]] = defaultdict(dict)

    def add(name: str, ranks: int, task: str, layout: Layout | None) -> None:
        cases[ranks][name] = {
            "name": name,
            "reference": REFERENCE + task,
            "results": str(folder / name),
            "options": plan.command_line(task, layout),
            "hide_labels": TASKS[task].hide_labels,
        }

    for layout in layouts.values():
        add(REFERENCE + layout.task, 1, layout.task, None)
    for name, layout in layouts.items():
        add(name, layout.ranks, layout.task, layout)
    return cases


def first_line(text: str) -> str:
    """Return the first line of a text."""
    return text.partition("\n")[0]


def as_line(row: Row) -> str:
    """Return a row of the table as text."""
    numbers = [row.loss, row.norm, row.gradient, row.weights]
    shown = ["-" if number is None else f"{number:.1e}" for number in numbers]
    seconds = "-" if row.seconds is None else f"{row.seconds:.1f}"
    remark = f" (worst gradient: {row.worst_gradient})" if row.verdict == "same" else ""
    return COLUMNS.format(row.layout, row.ranks, *shown, seconds, row.verdict + remark)


def write_json(file: Path, plan: Plan, rows: list[Row]) -> None:
    """Write the table, the options and the tolerances."""
    table = []
    for row in rows:
        facts = asdict(row)
        table.append({key: None if value == math.inf else value for key, value in facts.items()})
    report = {
        "config_file": plan.config_file,
        "values": plan.values,
        "tolerances": {dtype: asdict(tolerance) for dtype, tolerance in TOLERANCES.items()},
        "layouts": table,
    }
    write_durably(file, json.dumps(report, indent=2) + "\n")


def make_parser() -> argparse.ArgumentParser:
    """Build the command line, of which trainer options are left over."""
    parser = argparse.ArgumentParser(
        prog="torchtrain parity",
        description=__doc__,
        epilog=f"Layouts: {', '.join(LAYOUTS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", "--job.config_file", metavar="FILE", help="the config to train")
    parser.add_argument("--layouts", default="all", help="comma-separated names (default: all)")
    parser.add_argument(
        "--steps", type=int, default=4, help="optimizer steps of each run (default: 4)"
    )
    parser.add_argument(
        "--json", type=expand_user, metavar="FILE", help="also write the table to this file"
    )
    return parser


def print_table(layouts: dict[str, Layout], plan: Plan) -> list[Row]:
    """Run the layouts, print each row as it comes, and return them."""
    values = ", ".join(f"{name} = {value}" for name, value in plan.values.items())
    device = "GPUs" if plan.on_gpus else "the CPU"
    print(f"{plan.config_file} with {values}")
    print(f"Relative differences from one process in fp32, on {device}:\n")
    header = ("layout", "ranks", "loss", "norm", "gradient", "weights", "seconds", "verdict")
    print(COLUMNS.format(*header))
    rows = []
    for row in check_layouts(layouts, plan):
        rows.append(row)
        print(as_line(row), flush=True)
    return rows


def main(arguments: list[str]) -> int:
    """Print the table. Returns the exit status described above."""
    asked, trainer_options = make_parser().parse_known_args(arguments)
    try:
        if asked.json is not None and not asked.json.absolute().parent.is_dir():
            raise UserError(f"--json {asked.json}: its folder does not exist")
        layouts = choose(asked.layouts)
        plan = make_plan(asked.config, asked.steps, trainer_options, layouts)
        rows = print_table(layouts, plan)
    except UserError as fault:
        print(fault, file=sys.stderr)
        return 2
    wrong = [row.layout for row in rows if row.verdict != "same"]
    summary = f"{len(rows) - len(wrong)} of {len(rows)} layouts agree"
    print("\n" + "; ".join([summary, *(f"not {name}" for name in wrong)]))
    if asked.json is not None:
        write_json(asked.json, plan, rows)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
