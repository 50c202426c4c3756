"""Show that every layout trains the same model: one process in fp32 against each layout, on this machine.

    python -m torchtrain.tools.parity [--config FILE] [--layouts NAME,NAME|all] [--steps N] [--json FILE] [options]

The reference is one process in fp32 without recomputation, compilation or offload. A layout runs on its number of local
ranks (over gloo; on GPUs where enough for all layouts asked for are visible), from the same seed and over the same
global batches. Compared are the loss (the global one, and the largest of one sequence) and the gradient norm of every
step, each parameter's gradient at step 1 and each parameter at the end; the initial weights, and the copies of a
parameter on different ranks, must be equal to the bit.

A layout is a line of `torchtrain.tools.layouts`. What the FILE itself says of how its model is run (`plain` lists it)
counts for nothing; a trainer option given here goes over the FILE, for the reference too unless it is one of those. A
FILE runs as it is but for the number of steps; without one debug_model.toml does, shrunk by `SHRUNK` so that the whole
table takes minutes on two cores.

Exit status: 0 all layouts are the same; 1 one is off, failed or was refused; 2 something else the user can mend.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from signal import SIGKILL
from typing import Any

import torch
from torch import Tensor

from torchtrain.config.options import options
from torchtrain.config.reading import read_command_line
from torchtrain.config_manager import JobConfig
from torchtrain.errors import UserError
from torchtrain.installation import PROGRAM
from torchtrain.tools.launch import RENDEZVOUS_VARIABLES, SPIN_COUNT, visible_gpus
from torchtrain.tools.layouts import LAYOUTS, TASKS, Layout
from torchtrain.tools.parity_ranks import DONE
from torchtrain.utils import nearest, write_durably

REFERENCE = "reference-"  # goes before a task's name where a layout has its own

SHRUNK: dict[str, Any] = {
    "model.dim": 64,
    "model.n_layers": 4,
    "model.n_heads": 8,
    "model.n_kv_heads": 4,
    "model.ffn_hidden_dim": 128,
    "training.seq_len": 64,
    "training.global_batch_size": 8,
    "training.local_batch_size": 8,
    "comm.init_timeout_seconds": 120,
}

# ---- what counts as the same ----


@dataclass(frozen=True)
class Tolerance:
    """The largest relative differences that rounding explains."""

    loss: float
    norm: float
    gradient: float
    """Of each parameter, ‖a − b‖ / ‖b‖ at step 1."""
    weights: float
    """The same of the weights after the last step."""


# fp32 keeps 24 bits (6e-8); layouts differ in the order of sums alone: measured up to 1e-7 in the loss and 7e-7 in a
# gradient. bf16 keeps 8 bits (4e-3), to which it rounds each product of forward and backward: 4e-4 and 9e-3. Adam
# divides a gradient by its own size, so an element whose gradient is little but rounding moves by up to a learning rate
# either way; weights have a tolerance of their own: 8e-6 and 6e-3 after four steps.
TOLERANCES = {
    "float32": Tolerance(loss=1e-6, norm=1e-5, gradient=1e-5, weights=5e-5),
    "bfloat16": Tolerance(loss=1e-3, norm=1e-2, gradient=3e-2, weights=2e-2),
}


@dataclass(frozen=True)
class Row:
    """What the table says of one layout; differences are None where it did not run to its end."""

    layout: str
    ranks: int
    verdict: str
    """ "same", or what is off, or why it did not run."""
    loss: float | None = None
    norm: float | None = None
    gradient: float | None = None
    weights: float | None = None
    seconds: float | None = None
    worst_gradient: str = ""
    worst_weights: str = ""


def compare(
    layout: str, ranks: int, mine: dict[str, Any], reference: dict[str, Any], tolerance: Tolerance
) -> Row:
    """A layout's results against its reference's, both as `load_results` leaves them."""
    loss, norm = (max(map(relative, mine[key], reference[key])) for key in ("losses", "norms"))
    gradient, worst_gradient = worst(mine["gradients"], reference["gradients"])
    weights, worst_weights = worst(mine["weights"], reference["weights"])
    begins = {
        name: weight.to(mine["initial"][name].dtype)
        for name, weight in reference["initial"].items()
    }
    differs, differing = worst(mine["initial"], begins)
    faults = {
        "loss": loss > tolerance.loss,
        "gradient norm": norm > tolerance.norm,
        f"gradient of {worst_gradient}": gradient > tolerance.gradient,
        f"weights of {worst_weights}": weights > tolerance.weights,
        f"initial weights of {differing}": differs > 0,
        f"copies differ between ranks of {', '.join(mine['drifted'][:3])}": bool(mine["drifted"]),
    }
    off = "; ".join(text for text, is_so in faults.items() if is_so)
    verdict = f"OFF: {off}" if off else "same"
    return Row(
        layout,
        ranks,
        verdict,
        loss,
        norm,
        gradient,
        weights,
        mine["seconds"],
        worst_gradient,
        worst_weights,
    )


def relative(mine: Tensor | float, reference: Tensor | float) -> float:
    """‖mine − reference‖ / ‖reference‖; infinite where it is no number or the shapes differ."""
    a, b = (
        torch.as_tensor(mine, dtype=torch.float64),
        torch.as_tensor(reference, dtype=torch.float64),
    )
    if a.shape != b.shape:
        return math.inf
    difference, size = (a - b).norm().item(), b.norm().item()
    if difference == 0:
        return 0.0
    return difference / size if size > 0 and math.isfinite(difference) else math.inf


def worst(mine: dict[str, Tensor], reference: dict[str, Tensor]) -> tuple[float, str]:
    """The largest relative difference and whose it is; a parameter that one side alone has differs infinitely."""
    return max(
        (
            relative(mine[name], reference[name])
            if name in mine and name in reference
            else math.inf,
            name,
        )
        for name in mine.keys() | reference.keys()
    )


# ---- the ranks, as a set of processes that runs many layouts ----


@dataclass(frozen=True)
class Plan:
    """What is run, before any layout is put over it."""

    config_file: str
    values: dict[str, Any]
    """Options over the file, by full name."""
    timeout_seconds: int = 120
    on_gpus: bool = False
    worker: tuple[str, ...] = ("-m", "torchtrain.tools.parity_ranks")
    """What torchrun starts on each rank."""

    def command_line(self, task: str, layout: Layout | None = None) -> list[str]:
        """Trainer options of a layout; of the task's reference without one."""
        if layout is None:
            values = self.values | plain() | TASKS[task].overrides
        else:
            values = plain() | self.values | TASKS[task].overrides | layout.overrides
        return [
            "--job.config_file",
            self.config_file,
            *(f"--{name}={as_text(values[name])}" for name in values),
        ]


def plain() -> dict[str, Any]:
    """The options that say how a model is run and not what is trained, as the reference has them."""
    sections = ("parallelism", "activation_checkpoint", "compile", "checkpoint")
    values = {
        name: option.default for name, option in options().items() if name.split(".")[0] in sections
    }
    values |= {
        f"training.{key}": "float32"
        for key in ("dtype", "mixed_precision_param", "mixed_precision_reduce")
    }
    return values | {"training.enable_cpu_offload": False}


def as_text(value: Any) -> str:
    """A value as the command line takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "none"
    if isinstance(value, list):
        return ";".join(map(as_text, value)) if isinstance(value[0], list) else ",".join(value)
    return str(value)


def run_cases(
    plan: Plan, ranks: int, cases: dict[str, dict[str, Any]], folder: Path
) -> Iterator[tuple[str, str]]:
    """Run the cases in turn on one set of ranks; where one ends the set, a new set takes up the rest.

    Yields:
        The name of each case that is through, and what failed, "" if nothing.
    """
    waiting = dict(cases)
    while waiting:
        cases_file = folder / f"cases-{ranks}.json"
        cases_file.write_text(
            json.dumps({"timeout_seconds": plan.timeout_seconds, "cases": list(waiting.values())})
        )
        launcher = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
        ]
        process = subprocess.Popen(
            [*launcher, *plan.worker, str(cases_file)],
            env=environment(ranks, plan.on_gpus),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # so that launcher and ranks can be ended together, and nobody else
        )
        last_lines: deque[str] = deque(maxlen=20)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if line.startswith(DONE):
                    name = line.removeprefix(DONE).strip()
                    del waiting[name]
                    yield name, ""
                else:
                    last_lines.append(line)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, SIGKILL)
            process.wait()
        if waiting:
            name = next(iter(waiting))
            del waiting[name]
            yield name, first_fault(folder, name) or f"the ranks ended: {''.join(last_lines)}"


def first_fault(folder: Path, name: str) -> str:
    """Of the rank that failed first; the others failed for want of it."""
    files = sorted(folder.glob(f"{name}.fault-*"), key=lambda file: file.stat().st_mtime_ns)
    return files[0].read_text() if files else ""


def environment(ranks: int, on_gpus: bool) -> dict[str, str]:
    """This process's, without what a launcher around it left, and with a fair share of the cores for each rank."""
    launchers = {"RANK", "LOCAL_RANK", "WORLD_SIZE", *RENDEZVOUS_VARIABLES}
    kept = {
        k: v
        for k, v in os.environ.items()
        if k not in launchers and not k.startswith(("PET_", "TORCHELASTIC_"))
    }
    if not on_gpus:
        kept["CUDA_VISIBLE_DEVICES"] = ""  # ROCm honours it too
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    python_path = os.pathsep.join(filter(None, [str(PROGRAM), os.environ.get("PYTHONPATH")]))
    return {
        "OMP_NUM_THREADS": threads,
        "GOMP_SPINCOUNT": SPIN_COUNT,
        **kept,
        "PYTHONPATH": python_path,
    }


def load_results(folder: Path, name: str) -> dict[str, Any]:
    """What all ranks left of a case, put together; the files are removed."""
    results: dict[str, Any] = {}
    for file in folder.glob(f"{name}.*"):
        part = torch.load(file, weights_only=True)
        for key in ("initial", "gradients", "weights"):
            part[key] |= results.get(key, {})
        results = part
        file.unlink()
    return results


# ---- the table ----


def check_layouts(layouts: dict[str, Layout], plan: Plan) -> Iterator[Row]:
    """Run the references and the layouts, those of fewer ranks first, and yield a row each as soon as it is known.

    Raises:
        UserError: a reference cannot be run.
    """
    with tempfile.TemporaryDirectory(prefix="torchtrain-parity-") as temporary:
        folder = Path(temporary)
        cases: dict[int, dict[str, dict[str, Any]]] = {1: {}}

        def add(name: str, ranks: int, task: str, command_line: list[str]) -> None:
            case = {"name": name, "results": str(folder / name), "options": command_line}
            cases.setdefault(ranks, {})[name] = case | {"hide_labels": TASKS[task].hide_labels}

        for task in dict.fromkeys(layout.task for layout in layouts.values()):
            add(REFERENCE + task, 1, task, plan.command_line(task))
        tolerances = {}
        for name, layout in layouts.items():
            command_line = plan.command_line(layout.task, layout)
            try:
                training = JobConfig().parse_args(command_line, world_size=layout.ranks).training
            except UserError as fault:
                yield Row(name, layout.ranks, f"refused: {' '.join(str(fault).split())}")
                continue
            rounded = "bfloat16" in (training.dtype, training.mixed_precision_param)
            tolerances[name] = TOLERANCES["bfloat16" if rounded else "float32"]
            add(name, layout.ranks, layout.task, command_line)

        references: dict[str, dict[str, Any]] = {}
        for ranks, of_these_ranks in sorted(cases.items()):
            for name, failure in run_cases(plan, ranks, of_these_ranks, folder):
                if failure and name.startswith(REFERENCE):
                    raise UserError(f"the reference, one process in fp32, failed: {failure}")
                if failure:
                    yield Row(name, ranks, f"failed: {failure.splitlines()[0]}")
                elif name.startswith(REFERENCE):
                    references[name] = load_results(folder, name)
                else:
                    reference = references[REFERENCE + layouts[name].task]
                    yield compare(
                        name, ranks, load_results(folder, name), reference, tolerances[name]
                    )


def choose(names: str) -> dict[str, Layout]:
    """The layouts that `--layouts` names.

    Raises:
        UserError: there is none of that name.
    """
    if names == "all":
        return LAYOUTS
    for name in names.split(","):
        if name not in LAYOUTS:
            close = nearest(name, LAYOUTS)
            hint = f"did you mean {close}? " if close else ""
            raise UserError(
                f"--layouts: {name!r} is unknown; {hint}Allowed: all, or some of {', '.join(LAYOUTS)}"
            )
    return {name: LAYOUTS[name] for name in names.split(",")}


def make_plan(
    config_file: str | None, steps: int, trainer_options: list[str], layouts: dict[str, Layout]
) -> Plan:
    """Check what all layouts have in common.

    Raises:
        UserError: the reference's configuration has a fault.
    """
    read = read_command_line(trainer_options)
    given, faults = read.values, read.faults
    if faults:
        raise UserError("\n".join(fault.text for fault in faults))
    file = config_file or str(PROGRAM / "train_configs" / "debug_model.toml")
    values = ({} if config_file else SHRUNK) | {"training.steps": steps} | given
    config = JobConfig().parse_args(Plan(file, values).command_line("plain"), world_size=1)
    ranks = max(layout.ranks for layout in layouts.values())
    if config.training.global_batch_size == -1:  # would depend on the layout
        values["training.global_batch_size"] = config.training.local_batch_size * ranks
    return Plan(file, values, config.comm.init_timeout_seconds, on_gpus=visible_gpus() >= ranks)


COLUMNS = "{:<34}{:>6}{:>9}{:>9}{:>10}{:>9}{:>9}  {}"


def as_line(row: Row) -> str:
    """A row of the table."""
    numbers = [row.loss, row.norm, row.gradient, row.weights]
    shown = ["-" if number is None else f"{number:.1e}" for number in numbers]
    seconds = "-" if row.seconds is None else f"{row.seconds:.1f}"
    remark = f" (worst gradient: {row.worst_gradient})" if row.verdict == "same" else ""
    return COLUMNS.format(row.layout, row.ranks, *shown, seconds, row.verdict + remark)


def main(arguments: list[str]) -> int:
    """Print the table; the exit status as above."""
    parser = argparse.ArgumentParser(
        prog="python -m torchtrain.tools.parity",
        description=__doc__,
        epilog=f"Layouts: {', '.join(LAYOUTS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--config", "--job.config_file", metavar="FILE", help="what is trained")
    parser.add_argument("--layouts", default="all", help="names with commas; default all")
    parser.add_argument(
        "--steps", type=int, default=4, help="optimizer steps of each run; default 4"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the table there too")
    asked, trainer_options = parser.parse_known_args(arguments)
    rows = []
    try:
        if asked.json is not None and not asked.json.absolute().parent.is_dir():
            raise UserError(f"--json {asked.json}: its folder does not exist")
        layouts = choose(asked.layouts)
        plan = make_plan(asked.config, asked.steps, trainer_options, layouts)
        print(
            f"{plan.config_file} with {', '.join(f'{name} = {value}' for name, value in plan.values.items())}"
        )
        print(
            f"Relative differences from one process in fp32, on {'GPUs' if plan.on_gpus else 'the CPU'}:\n"
        )
        print(
            COLUMNS.format(
                "layout", "ranks", "loss", "norm", "gradient", "weights", "seconds", "verdict"
            )
        )
        for row in check_layouts(layouts, plan):
            rows.append(row)
            print(as_line(row), flush=True)
    except UserError as fault:
        print(fault, file=sys.stderr)
        return 2
    wrong = [row.layout for row in rows if row.verdict != "same"]
    print(
        f"\n{len(rows) - len(wrong)} of {len(rows)} layouts are the same"
        + "".join(f"; not {name}" for name in wrong)
    )
    if asked.json is not None:
        table = [{k: None if v == math.inf else v for k, v in asdict(row).items()} for row in rows]
        tolerances = {dtype: asdict(tolerance) for dtype, tolerance in TOLERANCES.items()}
        facts = {
            "config_file": plan.config_file,
            "values": plan.values,
            "tolerances": tolerances,
            "layouts": table,
        }
        write_durably(asked.json, json.dumps(facts, indent=2) + "\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
