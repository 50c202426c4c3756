"""Power cuts: a run is played again up to an operation, and goes on from what would be left."""

import logging
import os
import pickle
import re
import shutil
from functools import partial
from pathlib import Path

from torchtrain.tools.faults import counting
from torchtrain.tools.faults.bench import Bench, Lost
from torchtrain.tools.faults.disk import Operation
from torchtrain.tools.faults.replay import Disk
from torchtrain.tools.faults.trial import Trial

SAID = "said"
"""The kind of what stands between the operations for a checkpoint that was reported as saved."""


def cut_power(trial: Trial, mode: str) -> None:
    """Cut the power before any operation of a run, or of one that goes on from a checkpoint."""
    is_resumed = trial.rng.random() < 0.3
    root, start = record(trial.bench, mode, is_resumed=is_resumed)
    operations = read(root)
    last = trial.rng.randrange(1, len(operations))
    disk = Disk(root, start)
    promised = 0
    for operation in operations[:last]:
        if operation.kind == SAID:
            promised = int(operation.target)
        else:
            disk.do(operation)
    disk.cut_power(trial.folder, trial.rng)
    trial.faults += 1
    if trial.find_newest() < promised:
        raise Lost(f"step {promised} was reported as saved before operation {last}, and is lost")


def record(bench: Bench, mode: str, *, is_resumed: bool) -> tuple[Path, Path | None]:
    """Make a run that records what it does on the disk, once per campaign.

    Returns:
        The folder in which it is, and the one that has what was there at its start.
    """
    name = f"recorded-{mode}{'-resumed' * is_resumed}"
    root, start = bench.folder / name, bench.folder / f"{name}-start" if is_resumed else None
    with bench.lock:
        if root.exists():
            return root, start
        root.mkdir()
        if start is not None:
            start_from_older(bench, start)
            shutil.copytree(start, root, dirs_exist_ok=True)
        options = {"checkpoint.async_mode": mode}
        bench.train(root / "run", partial(record_operations, root), options)
        bench.compare(root / "run")
    return root, start


def start_from_older(bench: Bench, folder: Path) -> None:
    """Lay down a run that ended after step 6 and has to go on from step 4."""
    bench.copy_half(folder / "run", 6)
    shutil.rmtree(folder / "run" / "checkpoint" / "step-6")


def record_operations(root: Path) -> None:
    """Add each operation of this rank to the record that all ranks share, before it is done."""
    record = os.open(f"{root}.operations", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)

    def tell(_: int, operation: Operation) -> None:
        os.write(record, pickle.dumps(operation))  # at once: ranks and threads take turns

    def hear(line: logging.LogRecord) -> bool:
        if saved := re.match(r"saved .*step-(\d+) ", line.getMessage()):
            tell(0, Operation(SAID, "", target=saved[1]))
        return True

    counting.at_operations(root, tell)
    logging.getLogger("torchtrain").addFilter(hear)


def read(root: Path) -> list[Operation]:
    """Return the operations of the run that recorded."""
    operations = []
    with open(f"{root}.operations", "rb") as file:
        while file.peek(1):
            operations.append(pickle.load(file))
    return operations
