"""Running the runs of a sweep, one after the other, each through the launcher."""

import ctypes
import fcntl
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Literal

import torchtrain
from torchtrain.config.toml import to_toml
from torchtrain.errors import TRY_AGAIN, UserError
from torchtrain.tools.report_data import Run, read_runs
from torchtrain.tools.sweep.plan import Sweep, SweepRun
from torchtrain.utils import make_folder, user_errors, write_durably, writing

ELSEWHERE = 3
"""The exit status of a sweep that has nothing to do but to wait for others."""
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2)
"""What is passed on to the run that is under way, and ends the sweep once that has ended."""
ERROR = re.compile(r"error: (?:\[rank \d+\] )?(.*)")
"""A line of the log with which an error begins."""
NUMBERS = re.compile(r"step \d+: loss (\S+), gradient norm (\S+), on ")
"""How an error begins that is about the numbers of a step (`bad_numbers`)."""
TRIES = 10
BETWEEN_TRIES_S = 0.05
"""A look at whether a run is held takes less; another sweep that runs it takes longer."""
SHOWN_LINES = 12
"""How much of the log of a run that failed is shown."""


@dataclass(frozen=True)
class Ending:
    """How a run has ended for good; in a file beside its folder."""

    state: Literal["done", "not finite", "failed"]
    status: int
    """The launcher's exit status."""
    seconds: float

    @property
    def is_final(self) -> bool:
        """Whether running it again would give the same."""
        return self.state != "failed"


def read_ending(sweep: Sweep, run: SweepRun) -> Ending | None:
    """Return how a run has ended; None: it has not begun, or is to go on.

    Raises:
        UserError: the file cannot be read.
    """
    file = sweep.path(run, ".ended.json")
    if not file.exists():
        return None
    with user_errors(f"{file} cannot be read; remove it to run this again", OSError, ValueError):
        known = json.loads(file.read_text("utf-8"))
        if not isinstance(known, dict) or known.keys() != Ending.__annotations__.keys():
            raise ValueError("it is not what a sweep writes")
        return Ending(**known)


def read_run(sweep: Sweep, run: SweepRun) -> Run | None:
    """Return what a run has logged; None before its first step."""
    try:
        return read_runs([sweep.path(run)])[0]
    except UserError:
        return None


@contextmanager
def holding(sweep: Sweep, run: SweepRun) -> Iterator[bool]:
    """Hold a run, so that no other sweep starts it meanwhile; yield whether it could be had."""
    with writing(sweep.folder):
        make_folder(sweep.folder)
        descriptor = os.open(_lock_file(sweep, run), os.O_RDWR | os.O_CREAT, 0o644)
    try:
        yield _try_to_hold(descriptor)
    finally:
        os.close(descriptor)


def _try_to_hold(descriptor: int) -> bool:
    for _ in range(TRIES):
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(BETWEEN_TRIES_S)
    return False


def is_held(sweep: Sweep, run: SweepRun) -> bool:
    """Return whether a sweep is running this; nothing is made, and no other look is in the way."""
    try:
        descriptor = os.open(_lock_file(sweep, run), os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _lock_file(sweep: Sweep, run: SweepRun) -> Path:
    return sweep.folder / f".{run.name}.lock"


class Runner:
    """Runs one run at a time, and passes on the signals that come meanwhile."""

    def __init__(self, sweep: Sweep) -> None:
        self.sweep = sweep
        self.stopped_by = 0
        """The signal that has asked for the end of the sweep, or 0."""
        self._process: subprocess.Popen[bytes] | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear signals, but for SIGHUP where this process ignores it, as under `nohup`."""
        heard = set(SIGNALS)
        if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            heard.remove(signal.SIGHUP)
        before = {number: signal.signal(number, self._stop) for number in heard}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopped_by = self.stopped_by or number
        if self._process is not None:
            self._process.send_signal(number)

    def run(self, run: SweepRun, say: Callable[[str], None]) -> int:
        """Run it, or go on with it, to its end; return the launcher's exit status.

        What the run prints goes to a file beside its folder.

        Raises:
            UserError: the sweep's folder cannot be written.
        """
        config_file, log = self.sweep.path(run, ".toml"), self.sweep.path(run, ".log")
        with writing(self.sweep.folder):
            self.sweep.path(run, ".ended.json").unlink(missing_ok=True)
            write_durably(config_file, to_toml(run.config))
            started, begin = time.monotonic(), log.stat().st_size if log.exists() else 0
            with open(log, "ab") as output:
                status = self._launch(config_file, output.fileno())
        if self.stopped_by and status != 0:
            return status
        lines = _read_from(log, begin)
        ending = self._judge(run, status, lines, time.monotonic() - started)
        if ending is not None:
            text = json.dumps(asdict(ending)) + "\n"
            with writing(self.sweep.folder):
                write_durably(self.sweep.path(run, ".ended.json"), text)
        self._tell(ending, status, lines, say)
        return status

    def _launch(self, config_file: Path, output: int) -> int:
        """Start the launcher, wait for it, and return its exit status."""
        package = str(Path(torchtrain.__file__).parents[1])
        paths = [package, os.environ.get("PYTHONPATH", "")]
        command = [sys.executable, "-m", "torchtrain.tools.launch", "--job.config_file"]
        self._process = subprocess.Popen(
            [*command, str(config_file)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)},
            start_new_session=True,  # Ctrl-C comes to the sweep alone, which passes it on once
            preexec_fn=_end_with_parent(),
        )
        if self.stopped_by:  # just before it was there
            self._process.send_signal(self.stopped_by)
        status = self._process.wait()
        self._process = None
        return status if status >= 0 else 128 - status

    def _judge(self, run: SweepRun, status: int, lines: list[str], seconds: float) -> Ending | None:
        """Return how a run has ended; None where it is to go on another time."""
        if status == TRY_AGAIN:
            return None
        if status == 0:
            has_logged = read_run(self.sweep, run) is not None
            return Ending("done" if has_logged else "failed", status, seconds)
        return Ending("not finite" if find_bad_numbers(lines) else "failed", status, seconds)

    @staticmethod
    def _tell(
        ending: Ending | None, status: int, lines: list[str], say: Callable[[str], None]
    ) -> None:
        """Say how a run has ended, and of one that failed what it said last."""
        if ending is None:
            say(f"  has come to the end of its time (status {status}), and can go on")
            return
        shown = []
        if ending.state == "not finite":
            shown = [str(find_bad_numbers(lines))]
        if ending.state == "failed":
            shown = lines[-SHOWN_LINES:]
            if status == 0:
                shown.append("  its status is 0, but it has not logged a single step")
        say("\n".join([f"  {ending.state} after {ending.seconds:,.0f} s", *shown]))


def find_bad_numbers(lines: list[str]) -> str | None:
    """Return a launch's last error if it says that a loss or a gradient is not finite, else None.

    A step that was skipped is a warning; one that ends the run since its loss is far above the
    last ones has finite numbers.
    """
    errors = [(line, found[1]) for line in lines if (found := ERROR.match(line))]
    if not errors:
        return None
    line, text = errors[-1]
    numbers = NUMBERS.match(text)
    if numbers is None or all(math.isfinite(float(number)) for number in numbers.groups()):
        return None
    return line


def _end_with_parent() -> Callable[[], object] | None:
    """Return what a new process calls to be ended by the kernel (Linux) when its parent dies.

    The launcher then stops its ranks, as by a scheduler's SIGTERM.
    """
    if sys.platform != "linux":
        return None
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
    return partial(ctypes.CDLL(None).prctl, set_parent_death_signal, int(signal.SIGTERM))


def _read_from(log: Path, begin: int) -> list[str]:
    with open(log, "rb") as file:
        file.seek(begin)
        return file.read().decode("utf-8", "replace").splitlines()
