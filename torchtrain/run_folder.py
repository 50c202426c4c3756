"""The folder of a run (`job.dump_folder`): its lock, what an earlier run left, config and facts."""

import fcntl
import json
import os
import socket
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from torchtrain.errors import UserError
from torchtrain.hangs import HANG_FOLDER
from torchtrain.logging_utils import logger
from torchtrain.utils import (
    METRICS_FILE,
    SAMPLES_FILE,
    fsync_folder,
    make_folder,
    plural,
    remove_unfinished,
    write_durably,
    writing,
)

# What is logged, and where its lines go that a resumed run has superseded.
LOGS = {
    METRICS_FILE: "metrics.superseded.jsonl",
    SAMPLES_FILE: "samples.superseded.jsonl",
}
DESCRIPTION_FILES = ("config.toml", "run.json")
CUT = ".cut-"
"""Begins the name of what is kept of a log, while the rest is moved; see `_cut_log`."""
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
            self._clean_up()

    def _lock(self) -> TextIO:
        """Lock the folder; the lock is held until the file that is returned is closed."""
        with writing(f"job.dump_folder = {str(self.path)!r}"):
            make_folder(self.path)
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
        with suppress(OSError):  # on a full disk the lock holds too; only its holder has no name
            os.truncate(lock.fileno(), 0)
            os.write(lock.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
        return lock

    def _clean_up(self) -> None:
        """Take back what a run that was killed left half done, and remove its temporary files."""
        for name in DESCRIPTION_FILES:
            remove_unfinished(self.path / name)
        for name, superseded_name in LOGS.items():
            remove_unfinished(self.path / name)  # of earlier versions
            superseded = self.path / superseded_name
            for pending in self.path.glob(f"{CUT}{name}-*"):
                with writing(superseded):
                    with open(superseded, "ab") as file:
                        file.truncate(int(pending.name.rpartition("-")[2]))
                        os.fsync(file.fileno())
                    pending.unlink()

    def begin_afresh(self, outputs: Iterable[Path]) -> None:
        """Move what an earlier run left to `previous-<n>/`: nothing is overwritten.

        Args:
            outputs: the folders that a run writes to; the relative ones are in this folder.
        """
        names = {*LOGS.keys(), *LOGS.values(), *DESCRIPTION_FILES, "wandb", HANG_FOLDER}
        names |= {output.parts[0] for output in outputs if not output.is_absolute()}
        earlier = sorted(name for name in names if _holds_something(self.path / name))
        if not earlier:
            return
        target = self._next_previous()
        with writing(target):
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
                with writing(self.path / superseded):
                    self._cut_log(self.path / name, self.path / superseded, step)

    def _cut_log(self, log: Path, superseded: Path, step: int) -> None:
        """Move lines from the log to the superseded ones, all of them or none.

        First what is kept of the log is written to a file whose name has the size of `superseded`.
        Where that is found at a start, the lines were not all moved: `superseded` is cut to its
        size, and the log, which still has them, is cut anew.
        """
        kept = []
        moved = []
        for line in log.read_text("utf-8", "surrogateescape").splitlines(keepends=True):
            if _logged_step(line) <= step:
                kept.append(line)
            else:
                moved.append(line.rstrip("\n") + "\n")
        if not moved:
            return
        size = superseded.stat().st_size if superseded.exists() else 0
        pending = log.with_name(f"{CUT}{log.name}-{size}")
        _append_durably(pending, kept)
        _append_durably(superseded, moved)
        os.replace(pending, log)
        fsync_folder(self.path)
        logger.info(f"{plural(len(moved), 'logged line')} past step {step} moved to {superseded}")

    def describe_run(self, config_toml: str, facts: Mapping[str, Any]) -> None:
        """Write `config.toml`, what was given, and `run.json`, what was derived from it."""
        texts = (config_toml, json.dumps(facts, indent=2) + "\n")
        for name, text in zip(DESCRIPTION_FILES, texts, strict=True):
            with writing(self.path / name):
                write_durably(self.path / name, text)


def lacks_validation(run_folder: Path, step: int) -> bool:
    """Return whether a run was stopped after this step, and has left its validation out."""
    log = run_folder / METRICS_FILE
    lines = log.read_text("utf-8", "surrogateescape").splitlines() if log.exists() else []
    with suppress(ValueError, KeyError, IndexError, TypeError):
        last = json.loads(lines[-1])
        return bool(last["step"] == step and last["val_loss"] is None)
    return False


def _holds_something(path: Path) -> bool:
    """Return whether it is there, and no empty folder, as a start that was refused leaves it."""
    return any(path.iterdir()) if path.is_dir() else path.exists()


def _append_durably(path: Path, lines: list[str]) -> None:
    with open(path, "a", encoding="utf-8", errors="surrogateescape") as file:
        file.writelines(lines)
        file.flush()
        os.fsync(file.fileno())
    fsync_folder(path.parent)


def _logged_step(line: str) -> float:
    """Return the step of a logged line; a torn line counts as past every step."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
