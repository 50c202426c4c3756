"""The run's folder (`job.dump_folder`): who owns it, what an earlier run left in it, and what it says of itself."""

import fcntl
import json
import os
import socket
from typing import Any, TextIO

from torchtrain.config.plans import list_output_folders
from torchtrain.config.toml import to_toml
from torchtrain.config_manager import JobConfig
from torchtrain.errors import UserError
from torchtrain.logging_utils import logger
from torchtrain.utils import METRICS_FILE, expanded, write_durably

SUPERSEDED_FILE = "metrics.superseded.jsonl"
DESCRIPTION_FILES = ("config.toml", "run.json")


class RunFolder:
    """Held by its owner, rank 0, for as long as the run lives; only the owner calls the methods.

    Raises:
        UserError: the folder cannot be made or written, or another run holds it.
    """

    def __init__(self, config: JobConfig, owner: bool) -> None:
        self.config, self.owner = config, owner
        self.path = expanded(config.job.dump_folder)
        if owner:
            self._lock = self._claim()

    def _claim(self) -> TextIO:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = open(self.path / ".lock", "a+")  # noqa: SIM115 (held open: closing it gives the lock up)
        except OSError as fault:
            raise UserError(
                f"job.dump_folder = {str(self.path)!r} cannot be written: {fault.strerror}"
            ) from fault
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            raise UserError(
                f"job.dump_folder = {str(self.path)!r} is in use by {holder}. "
                "Wait for that run, end it, or give this one another folder."
            ) from None
        except OSError as fault:
            raise UserError(
                f"job.dump_folder = {str(self.path)!r} is on a file system without locks ({fault.strerror}), "
                "so two runs could write there at once. Mount it with locks, or choose another folder."
            ) from fault
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        return lock

    def begin_afresh(self) -> None:
        """Move what an earlier run left to `previous-<n>/`: nothing is overwritten, no curve doubles back."""
        names = {METRICS_FILE, SUPERSEDED_FILE, *DESCRIPTION_FILES, "wandb"}
        names |= {
            folder.parts[0]
            for folder in list_output_folders(self.config).values()
            if not folder.is_absolute()
        }
        earlier = sorted(name for name in names if (self.path / name).exists())
        if not earlier:
            return
        taken = [int(p.name[9:]) for p in self.path.glob("previous-*") if p.name[9:].isdigit()]
        target = self.path / f"previous-{max(taken, default=0) + 1}"
        target.mkdir()
        for name in earlier:
            os.rename(self.path / name, target / name)
        logger.info(f"outputs of an earlier run moved to {target}")

    def resume_at(self, step: int) -> None:
        """Move logged lines past `step` (and a torn last line) to the superseded file: those steps are taken again."""
        metrics = self.path / METRICS_FILE
        if not metrics.exists():
            return
        lines = metrics.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if _logged_step(line) <= step]
        moved = [line for line in lines if _logged_step(line) > step]
        if not moved:
            return
        with open(self.path / SUPERSEDED_FILE, "a", encoding="utf-8") as superseded:
            superseded.writelines(line if line.endswith("\n") else line + "\n" for line in moved)
            superseded.flush()
            os.fsync(superseded.fileno())
        write_durably(metrics, "".join(kept))
        logger.info(
            f"{len(moved)} logged lines past step {step} moved to {self.path / SUPERSEDED_FILE}"
        )

    def describe_run(self, derived: dict[str, Any]) -> None:
        """Write `config.toml` (what was given) and `run.json` (what was derived from it)."""
        write_durably(self.path / "config.toml", to_toml(self.config))
        write_durably(self.path / "run.json", json.dumps(derived, indent=2) + "\n")


def _logged_step(line: str) -> float:
    """The step of one line of metrics.jsonl; a line torn by a kill counts as past every step."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
