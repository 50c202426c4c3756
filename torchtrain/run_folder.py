"""The folder of a run (`job.dump_folder`): its lock, what an earlier run left, config and facts."""

import fcntl
import json
import os
import socket
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TextIO

from torchtrain.errors import UserError
from torchtrain.logging_utils import logger
from torchtrain.utils import METRICS_FILE, SAMPLES_FILE, plural, user_errors, write_durably

# What is logged, and where its lines go that a resumed run has superseded.
LOGS = {
    METRICS_FILE: "metrics.superseded.jsonl",
    SAMPLES_FILE: "samples.superseded.jsonl",
}
DESCRIPTION_FILES = ("config.toml", "run.json")
PREVIOUS = "previous-"


class RunFolder:
    """The folder of a run, locked by its owner, rank 0, for as long as the run lives.

    Only the owner calls the methods.

    Raises:
        UserError: the folder cannot be created or written, or another run holds it.
    """

    def __init__(self, path: Path, *, owner: bool) -> None:
        self.path = path
        self.owner = owner
        if owner:
            self._lock_file = self._lock()

    def _lock(self) -> TextIO:
        """Lock the folder; the lock is held until the file that is returned is closed."""
        with user_errors(f"job.dump_folder = {str(self.path)!r} cannot be written", OSError):
            self.path.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
        lock = os.fdopen(descriptor, "r+")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = lock.read().strip() or "another process"
            raise UserError(
                f"job.dump_folder = {str(self.path)!r} is in use by {holder}. "
                "Wait for that run, end it, or give this one another folder."
            ) from None
        except OSError as fault:
            raise UserError(
                f"job.dump_folder = {str(self.path)!r} is on a file system without locks "
                f"({fault.strerror}), so two runs could write there at once. Mount it with locks, "
                "or choose another folder."
            ) from fault
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        return lock

    def begin_afresh(self, outputs: Iterable[Path]) -> None:
        """Move what an earlier run left to `previous-<n>/`: nothing is overwritten.

        Args:
            outputs: the folders that a run writes to; the relative ones are in this folder.
        """
        names = {*LOGS.keys(), *LOGS.values(), *DESCRIPTION_FILES, "wandb"}
        names |= {output.parts[0] for output in outputs if not output.is_absolute()}
        earlier = sorted(name for name in names if (self.path / name).exists())
        if not earlier:
            return
        target = self._next_previous()
        target.mkdir()
        for name in earlier:
            os.rename(self.path / name, target / name)
        logger.info(f"outputs of an earlier run moved to {target}")

    def _next_previous(self) -> Path:
        """Return the first `previous-<n>` that comes after all that are there."""
        numbers = [path.name.removeprefix(PREVIOUS) for path in self.path.glob(f"{PREVIOUS}*")]
        newest = max((int(number) for number in numbers if number.isdigit()), default=0)
        return self.path / f"{PREVIOUS}{newest + 1}"

    def resume_at(self, step: int) -> None:
        """Move logged lines past `step`, and a torn last one, aside: those steps come again."""
        for name, superseded in LOGS.items():
            if (self.path / name).exists():
                self._cut_log(self.path / name, self.path / superseded, step)

    def _cut_log(self, log: Path, superseded: Path, step: int) -> None:
        kept = []
        moved = []
        for line in log.read_text(encoding="utf-8").splitlines(keepends=True):
            if _logged_step(line) <= step:
                kept.append(line)
            else:
                moved.append(line.rstrip("\n") + "\n")
        if not moved:
            return
        with open(superseded, "a", encoding="utf-8") as file:
            file.writelines(moved)
            file.flush()
            os.fsync(file.fileno())
        write_durably(log, "".join(kept))
        logger.info(f"{plural(len(moved), 'logged line')} past step {step} moved to {superseded}")

    def describe_run(self, config_toml: str, facts: Mapping[str, Any]) -> None:
        """Write `config.toml`, what was given, and `run.json`, what was derived from it."""
        write_durably(self.path / "config.toml", config_toml)
        write_durably(self.path / "run.json", json.dumps(facts, indent=2) + "\n")


def _logged_step(line: str) -> float:
    """Return the step of a logged line; a torn line counts as past every step."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
