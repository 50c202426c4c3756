"""Every operation of one save in turn: all ranks are killed before it, and the run goes on.

A save begins as a rank makes its temporary folder, and ends as the next one begins: what removes an
old checkpoint is part of it, and so is, of asynchronous ones, what happens beside the next step.
"""

import json
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torchtrain.tools.faults import counting
from torchtrain.tools.faults.bench import Bench, Lost, Options
from torchtrain.tools.faults.disk import Operation
from torchtrain.tools.faults.forked import kill_all_ranks, own_rank
from torchtrain.tools.faults.trial import Trial

TASK: Options = {"model.n_layers": 1, "checkpoint.interval": 1}
"""A save of few tensors, in each step."""
BEGIN = 3
"""The step after which the runs begin, one of validation: two checkpoints, a save removes one."""
IN_A_TRY = 6
"""Kills in a row; at most so many saves are left, and a kill can come after the rename."""


@dataclass(frozen=True)
class Kill:
    """Where a save is ended."""

    ranks: int
    """Of the run."""
    victim: int
    operation: int
    """Of the victim, from 1 on."""


def make(trial: Trial, mode: str) -> None:
    """Kill all ranks before some successive operations of a save, one in each start."""
    tries = list_tries(trial.bench, mode)
    kills = tries[trial.number % len(tries)]
    trial.task, trial.ranks = TASK, kills[0].ranks
    trial.bench.copy_half(trial.run, BEGIN, TASK, trial.ranks)
    for kill in kills:
        step = trial.find_newest() + 1
        inject = partial(die_in_save, trial.run, step, kill.victim, kill.operation)
        ranks = trial.end(inject, {"checkpoint.async_mode": mode})
        if ranks.statuses != [-9] * trial.ranks:
            raise Lost(f"{kill} was not reached in the save of step {step}: {ranks.output}")


def list_tries(bench: Bench, mode: str) -> list[list[Kill]]:
    """Return the kills of each try: all operations of a save on one rank and on two."""
    tries = []
    for ranks in (1, 2):
        counts = count_operations(bench, mode, ranks)
        kills = [
            Kill(ranks, victim, number)
            for victim, count in enumerate(counts)
            for number in range(1, count + 1)
        ]
        tries += [kills[first : first + IN_A_TRY] for first in range(0, len(kills), IN_A_TRY)]
    return tries


def count_operations(bench: Bench, mode: str, ranks: int) -> list[int]:
    """Return how many operations each rank makes in a save; counted once per campaign."""
    folder = bench.folder / f"recorded-save-{mode}-{ranks}"
    with bench.lock:
        if not folder.exists():
            folder.mkdir()
            bench.copy_half(folder / "run", BEGIN, TASK, ranks)
            options = {**TASK, "checkpoint.async_mode": mode}
            bench.train(folder / "run", partial(count_save, folder), options, ranks)
            shutil.rmtree(folder / "run")
        return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(ranks)]


def count_save(folder: Path) -> None:
    """Count the operations of this rank's first save, in a file of its own."""
    result = folder / f"{own_rank()}.json"
    save = OneSave(BEGIN + 1)

    def tell(operation: Operation) -> None:
        if save.includes(operation):
            save.count += 1
        elif save.is_over and not result.exists():
            result.write_text(json.dumps(save.count))

    counting.at_operations(folder / "run" / "checkpoint", lambda _, one: tell(one))


def die_in_save(run: Path, step: int, victim: int, number: int) -> None:
    """Have all ranks killed before this operation of the victim's save of that step."""
    save = OneSave(step)

    def tell(operation: Operation) -> None:
        if save.includes(operation):
            save.count += 1
            if save.count == number:
                kill_all_ranks()

    if own_rank() == victim:
        counting.at_operations(run / "checkpoint", lambda _, one: tell(one))


@dataclass
class OneSave:
    """Tells the operations of one rank's save from the others in the folder of checkpoints."""

    step: int
    count: int = 0
    is_over: bool = False
    _has_begun: bool = False

    def includes(self, operation: Operation) -> bool:
        """Return whether an operation, the next one of this rank, belongs to the save."""
        if operation.kind == "mkdir":
            self._has_begun |= self._makes(operation, self.step)
            self.is_over |= self._makes(operation, self.step + 1)
        return self._has_begun and not self.is_over

    def _makes(self, operation: Operation, step: int) -> bool:
        return Path(operation.path).name.startswith(f".tmp-step-{step}-")
