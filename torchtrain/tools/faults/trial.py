"""One try: a run that has faults, is started again without, and is compared."""

import json
import os
import random
import re
import shutil
import signal
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from torchtrain.checkpoint.commit import Marker, inspect
from torchtrain.hangs import HANG_FOLDER
from torchtrain.run_folder import LOGS
from torchtrain.tools.faults.bench import NO_OPTIONS, STEPS, Bench, Lost, Options
from torchtrain.tools.faults.forked import ForkedRanks, Inject
from torchtrain.utils import METRICS_FILE

GRACE_S = 5.0
"""How long ranks have to end after another has failed, as under the launcher."""
CHECKPOINT = re.compile(r"step-\d+(\.(damaged|incomplete|superseded)(-\d+)?)?")
"""What may be in the folder of checkpoints in the end."""
IN_RUN_FOLDER = {
    ".lock",
    "config.toml",
    "run.json",
    "checkpoint",
    HANG_FOLDER,
    *LOGS,
    *LOGS.values(),
}
"""What may be in a run's folder in the end."""


@dataclass
class Trial:
    """A try, by the fault's name and a number; the same seed makes the same."""

    bench: Bench
    name: str
    number: int
    seed: int
    rng: random.Random = field(init=False)
    task: Options = field(default_factory=dict)
    """Options of all its starts, and of the untouched run that it is compared with."""
    ranks: int = 2
    """How many its run has."""
    faults: int = 0
    """How many faults were made, such as kills."""
    refusals: int = 0
    """How many of them ended a run with a message, after which the checkpoint before was loaded."""

    def __post_init__(self) -> None:
        self.rng = random.Random(f"{self.seed} {self.name} {self.number}")
        self.folder.mkdir(parents=True)

    @property
    def folder(self) -> Path:
        """What the try may write to."""
        return self.bench.folder / f"{self.name}-{self.number}"

    @property
    def run(self) -> Path:
        """The folder of its run."""
        return self.folder / "run"

    @property
    def steps_again(self) -> int:
        """Number of logged steps that were taken again."""
        superseded = [self.run / LOGS[METRICS_FILE], *self.run.glob(f"previous-*/{METRICS_FILE}")]
        return sum(len(file.read_text().splitlines()) for file in superseded if file.exists())

    def start(self, inject: Inject | None = None, options: Options = NO_OPTIONS) -> ForkedRanks:
        """Start its run in the background, with a fault or without."""
        return self.bench.start(self.run, inject, {**self.task, **options}, self.ranks)

    def end(self, inject: Inject, options: Options = NO_OPTIONS) -> ForkedRanks:
        """Run until the fault, or the end, has ended all ranks.

        Raises:
            Lost: they do not end, or went on from another checkpoint than the newest.
        """
        newest = self.find_newest()
        ranks = self.start(inject, options)
        try:
            if not ranks.wait(self.bench.patience_s, until_one_has_ended=True):
                raise Lost(f"no rank ended in time after the fault: {ranks.output}")
            end_others(ranks, self.bench.patience_s)
        finally:
            ranks.kill()
        if any(ranks.statuses):
            self.faults += 1
        require_resumed(ranks.output, newest)
        return ranks

    def find_newest(self) -> int:
        """Return the step of the newest complete checkpoint, 0 if there is none."""
        return max(self.list_complete(), default=0)

    def list_complete(self) -> list[int]:
        """Return the steps of the complete checkpoints, newest first."""
        steps = [
            int(path.name[5:])
            for path in (self.run / "checkpoint").glob("step-*")
            if path.name[5:].isdigit() and isinstance(inspect(path), Marker)
        ]
        return sorted(steps, reverse=True)

    def draw_mode(self) -> str:
        """Draw a value of `checkpoint.async_mode`."""
        return self.rng.choice(["disabled", "async"])

    def draw_up_to(self, count: int) -> int:
        """Draw an instant out of those of a whole run, from 1 on; early ones if much is done."""
        left = 1 - 0.6 * self.find_newest() / STEPS
        return self.rng.randint(1, max(1, round(left * count)))

    def finish(self) -> None:
        """Start the run again without a fault; check how it ends, and what it leaves.

        Raises:
            Lost: something is not as it must be.
        """
        newest = self.find_newest()
        output = self.bench.train(self.run, options=self.task, ranks=self.ranks)
        require_resumed(output, newest)
        self.bench.compare(self.run, self.bench.untouched(self.task, self.ranks))
        require_clean(self.run)

    def last_logged_step(self) -> int:
        """Return the step of the last whole line of the log, 0 if there is none."""
        file = self.run / METRICS_FILE
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        return int(json.loads(whole[-1])["step"]) if whole else 0

    def remove(self) -> None:
        """Remove all that it has written."""
        shutil.rmtree(self.folder)


def end_others(ranks: ForkedRanks, patience_s: float) -> None:
    """Do what the launcher does when a rank has failed: SIGTERM to the others, then SIGKILL."""
    if not any(ranks.statuses):
        ranks.wait(patience_s)
        return
    if ranks.wait(0.1):
        return
    for pid, status in zip(ranks.pids, ranks.statuses, strict=True):
        if status is None:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
    ranks.wait(GRACE_S)


def require_resumed(output: str, newest: int | Collection[int]) -> None:
    """Check that a start went on from the newest checkpoint, if it came so far.

    Raises:
        Lost: it went on from another, or began anew.
    """
    allowed = {newest} if isinstance(newest, int) else set(newest)
    found = None
    if loaded := re.search(r"\(step (\d+), model and optimizer\)", output):
        found = int(loaded[1])
    elif re.search(r"^nothing to do: ", output, re.MULTILINE):
        found = STEPS
    elif re.search(r"^step +1/", output, re.MULTILINE):
        found = 0
    if found is not None and found not in allowed:
        raise Lost(f"went on after step {found}, but the newest checkpoint is {newest}")


def require_clean(run: Path) -> None:
    """Check that nothing unfinished is left in the folder of a run.

    Raises:
        Lost: something is.
    """
    names = {path.name for path in run.iterdir() if not path.name.startswith("previous-")}
    names -= IN_RUN_FOLDER
    names |= {
        f"checkpoint/{path.name}"
        for path in (run / "checkpoint").iterdir()
        if not CHECKPOINT.fullmatch(path.name)
    }
    if names:
        raise Lost(f"left behind: {', '.join(sorted(names))}")
