"""What asks a run to stop after the step at hand: a signal, or the end of its time.

All ranks stop after the same step, since each learns the others' reasons with the step's metrics,
between the batches of a validation and the tokens of a text, and while all wait for a stream.
Before a process has finished its first step, which may compile for minutes, it has nothing to save:
there a signal ends it.
"""

import math
import signal
import time
from collections.abc import Mapping
from types import FrameType

from torchtrain.early_interrupt import end_watch
from torchtrain.errors import TIME_IS_UP, SharedUserError
from torchtrain.logging_utils import logger

SLURM_END = "SLURM_JOB_END_TIME"
"""Slurm's variable: when it ends the job, in seconds since 1970."""
STARTED = "TORCHTRAIN_STARTED"
"""The launcher's: when it started, in seconds since 1970, whatever attempt this is."""
SPARE_S = 30.0
"""Seconds kept in reserve, beyond what a step and a save take."""


def find_deadline(
    max_minutes: float | None,
    environment: Mapping[str, str],
    *,
    saves: bool = True,
    now: float | None = None,
) -> float:
    """Return when the run must have ended, by `time.monotonic`; infinity: at no time.

    Args:
        max_minutes: `job.max_minutes`, counted from the launch.
        environment: may have Slurm's end of the job. The earlier of the two counts.
        saves: whether the run saves checkpoints; one that does not gains nothing by stopping before
            Slurm stops it.
        now: seconds since 1970; None: the clock's.

    Raises:
        UserError: Slurm's variable is not a number.
    """
    now = time.time() if now is None else now
    left = math.inf
    if max_minutes is not None:
        left = 60 * max_minutes - (now - float(environment.get(STARTED, now)))
    given = environment.get(SLURM_END) if saves else None
    if given:
        try:
            left = min(left, float(given) - now)
        except ValueError:
            raise SharedUserError(f"{SLURM_END} = {given!r} is not a time in seconds") from None
    return time.monotonic() + left


def log_deadline(deadline: float) -> None:
    """Say what will happen at a deadline, if there is one."""
    if math.isfinite(deadline):
        left = deadline - time.monotonic()
        at = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(time.time() + left))
        when = f"{left / 60:,.1f} minutes are left: the run stops before {at}"
        logger.info(f"time       {when}, with status 75")


class StopRequest:
    """Turns SIGTERM, SIGHUP, SIGUSR2, the first SIGINT and a deadline into a request to stop.

    Signals from `listen` on. A repeated SIGTERM changes nothing: schedulers and torchrun each send
    one. A second Ctrl-C ends at once. SIGHUP stays ignored where it is, as `nohup` asks for.

    Args:
        deadline: when the run must have ended, by `time.monotonic`.
    """

    def __init__(self, deadline: float = math.inf) -> None:
        self.deadline = deadline
        self.signal_number = 0
        self._turn_began: float | None = None
        self._first_turn_s = 0.0  # it compiles, and warms up
        self._longest_turn_s = 0.0
        self._is_last_turn = False
        self._save_s = 0.0
        self._listens = False

    def listen(self) -> None:
        """From now on a signal asks to stop; before, it ends the process.

        It belongs right after a collective that no rank leaves before all have begun it, so that
        no rank waits for one that a signal has ended meanwhile.
        """
        if self._listens:
            return
        self._listens = True
        end_watch()  # first: a Ctrl-C that is noted must not end this rank too
        for number in (signal.SIGTERM, signal.SIGUSR2, signal.SIGINT):
            signal.signal(number, self._note)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._note)

    def begin_turn(self, save_seconds: float, *, is_last: bool = False) -> None:
        """Note that a turn of the loop begins, and how long a save takes.

        A turn is a step with its validation, its save and whatever comes between two steps.
        """
        now = time.monotonic()
        if self._turn_began is not None:
            turn_s = now - self._turn_began
            if self._first_turn_s:
                self._longest_turn_s = max(self._longest_turn_s, turn_s)
            else:
                self._first_turn_s = turn_s
        self._turn_began = now
        self._save_s = save_seconds
        self._is_last_turn = is_last

    def find_reason(self) -> int:
        """Return the signal that has asked to stop, or TIME_IS_UP, or 0."""
        turn_s = self._longest_turn_s or self._first_turn_s
        needed = 2 * (turn_s + self._save_s) + SPARE_S
        is_out_of_time = time.monotonic() + needed > self.deadline and not self._is_last_turn
        if not self.signal_number and is_out_of_time:
            return TIME_IS_UP
        return self.signal_number

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT == self.signal_number:
            raise KeyboardInterrupt
        self.signal_number = number
