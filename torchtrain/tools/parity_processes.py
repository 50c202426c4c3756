"""The ranks of `torchtrain.tools.parity`, as sets of processes that each run many layouts."""

import json
import os
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from signal import SIGKILL
from typing import Any

import torch

from torchtrain.installation import PROGRAM
from torchtrain.tools.launch import RENDEZVOUS_VARIABLES, SPIN_COUNT
from torchtrain.tools.parity_plan import Plan
from torchtrain.tools.parity_ranks import DONE


def run_cases(
    plan: Plan, ranks: int, cases: dict[str, dict[str, Any]], folder: Path
) -> Iterator[tuple[str, str]]:
    """Run the cases in turn on one set of ranks; if one ends the set, a new set runs the rest.

    Yields:
        The name of each case that is done, and what failed, "" if nothing.
    """
    waiting = dict(cases)
    while waiting:
        cases_file = folder / f"cases-{ranks}.json"
        orders = {"timeout_seconds": plan.timeout_seconds, "cases": list(waiting.values())}
        cases_file.write_text(json.dumps(orders))
        process = start(plan, ranks, cases_file)
        last_lines: deque[str] = deque(maxlen=20)
        try:
            assert process.stdout is not None
            for line in process.stdout:
                if not line.startswith(DONE):
                    last_lines.append(line)
                    continue
                name = line.removeprefix(DONE).strip()
                del waiting[name]
                yield name, ""
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, SIGKILL)
            process.wait()
        if waiting:
            name = next(iter(waiting))
            del waiting[name]
            yield name, first_fault(folder, name) or f"the ranks ended: {''.join(last_lines)}"


def start(plan: Plan, ranks: int, cases_file: Path) -> subprocess.Popen[str]:
    """Start torchrun and its ranks, in a process group of their own so that they end together."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    return subprocess.Popen(
        [sys.executable, *launcher, *plan.worker, str(cases_file)],
        env=environment(ranks, on_gpus=plan.on_gpus),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )


def environment(ranks: int, *, on_gpus: bool) -> dict[str, str]:
    """Return this process's environment without what a launcher around it left.

    Each rank gets a fair share of the cores.
    """
    launchers = {"RANK", "LOCAL_RANK", "WORLD_SIZE", *RENDEZVOUS_VARIABLES}
    variables = {
        "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // ranks)),
        "GOMP_SPINCOUNT": SPIN_COUNT,
    }
    for name, value in os.environ.items():
        if name not in launchers and not name.startswith(("PET_", "TORCHELASTIC_")):
            variables[name] = value
    if not on_gpus:
        variables["CUDA_VISIBLE_DEVICES"] = ""  # ROCm honors it too
    paths = [str(PROGRAM), os.environ.get("PYTHONPATH", "")]
    variables["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    return variables


def first_fault(folder: Path, name: str) -> str:
    """Return the fault of the rank that failed first; the others failed because of it."""
    files = sorted(folder.glob(f"{name}.fault-*"), key=lambda file: file.stat().st_mtime_ns)
    return files[0].read_text() if files else ""


def load_results(folder: Path, name: str) -> dict[str, Any]:
    """Put together what all ranks left of a case, and remove their files."""
    results: dict[str, Any] = {}
    for file in folder.glob(f"{name}.*"):
        of_one_rank = torch.load(file, weights_only=True)
        for key in ("initial", "gradients", "weights"):
            of_one_rank[key] |= results.get(key, {})
        results = of_one_rank
        file.unlink()
    return results
