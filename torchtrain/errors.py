"""What can end a run, and how: every exception of the project, with its exit status.

UserError              2    a user error: its message alone, no traceback
  SharedUserError      2    raised by every rank with one text, printed by rank 0 alone
  ConfigError          2    all faults of a configuration, one per line
  NotWritable          2    the cache folder cannot be written, and lacks what is needed
PeerFault              1, 2 another rank has failed and printed the cause; the status is that rank's
BadNumbers             1    no good step can follow: a further attempt would end the same
  NonFinite            1    loss or gradient is not a number, or too many steps were skipped
  ReplicasDiffer       1    ranks that must hold the same bits do not: silent corruption
CheckpointError        1    a checkpoint could not be written or read
Stopped          128 + n    signal n asked the run to stop, and it did after a whole step
Stopped              75    the same at the end of its time: the job is to be queued again
"""

import signal

TIME_IS_UP = 1000
"""A reason to stop, beside the numbers of signals and above them."""
TRY_AGAIN = 75
"""The exit status that says so: EX_TEMPFAIL of sysexits.h."""


class UserError(ValueError):
    """A user error: shown as its message alone, without a traceback, with exit status 2."""


class SharedUserError(UserError):
    """A user error that every rank raises with the same text, so rank 0 alone prints it."""


class ConfigError(UserError):
    """All faults of a configuration, one per line."""


class NotWritable(UserError):
    """The cache folder cannot be written: what is complete there can be used all the same."""


class PeerFault(RuntimeError):
    """Another rank has failed and prints the cause; this one only stops, with the same status."""

    is_user_error = False


class BadNumbers(RuntimeError):
    """The numbers are such that training cannot go on; every rank raises it with the same text."""


class NonFinite(BadNumbers):
    """The loss or the gradient is infinite or not a number, or too many steps were skipped."""


class ReplicasDiffer(BadNumbers):
    """What ranks have in common is no longer the same: silent corruption."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; names the ranks that failed and why."""


class Stopped(RuntimeError):
    """A signal, or the end of its time, asked the run to stop, and it did so after a whole step.

    Args:
        reason: the signal's number, or TIME_IS_UP.
        step: the last one taken.
    """

    def __init__(self, reason: int, step: int) -> None:
        if reason == TIME_IS_UP:
            cause, self.status = "at the end of its time", TRY_AGAIN
        else:
            cause, self.status = f"by {signal.Signals(reason).name}", 128 + reason
        super().__init__(f"stopped {cause} after step {step}")
