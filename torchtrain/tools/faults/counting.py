"""Instants of a rank that come again: its n-th call of a function, its n-th operation on files."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

from torchtrain.installation import PROGRAM
from torchtrain.tools.faults.disk import Operation, watch
from torchtrain.tools.faults.forked import own_rank

OURS = (str(Path(__file__).resolve().parents[2]), str(PROGRAM / "train.py"))
"""Where the trainer's functions are."""
NOT_OURS = str(Path(__file__).resolve().parent)


def at_calls(act: Callable[[int], None]) -> None:
    """Call `act` with the number of each call of a function of the trainer, from 1 on."""
    calls = 0

    def hear(frame: FrameType, event: str, _: Any) -> None:
        nonlocal calls
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(OURS) and not file.startswith(NOT_OURS):
            calls += 1
            act(calls)

    sys.setprofile(hear)


def at_operations(
    folder: Path, act: Callable[[int, Operation], None], *, writes: bool = True
) -> None:
    """Call `act` with each operation under `folder` and its number, from 1 on.

    Without `writes`, which are most of them, only the others count.
    """
    operations = 0

    def tell(operation: Operation) -> None:
        nonlocal operations
        if operation.kind == "write" and not writes:
            return
        operations += 1
        act(operations, operation)

    watch(folder, tell)


def count(folder: Path) -> None:
    """Count the calls and operations of this rank, in a file of its own."""
    counts = {"calls": 0, "operations": 0, "rarer": 0}
    results = folder / f"counted-{own_rank()}.json"

    def tell(number: int, operation: Operation) -> None:
        counts["operations"] = number
        counts["rarer"] += operation.kind != "write"

    at_operations(folder / "counted", tell)
    destroy = dist.destroy_process_group

    def write_and_destroy(group: dist.ProcessGroup | None = None) -> None:
        sys.setprofile(None)
        results.write_text(json.dumps(counts))
        destroy(group)

    dist.destroy_process_group = write_and_destroy
    at_calls(lambda number: counts.update(calls=number))


def read(folder: Path, ranks: int) -> tuple[list[int], list[int], list[int]]:
    """Return the calls, the operations, and those of them that were no writes, by rank."""
    counts = [json.loads((folder / f"counted-{rank}.json").read_text()) for rank in range(ranks)]
    calls, operations, rarer = (
        [of_rank[what] for of_rank in counts] for what in ("calls", "operations", "rarer")
    )
    return calls, operations, rarer
