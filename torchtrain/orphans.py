"""A rank ends with its launcher, from its first instant on, and what a rank starts ends with it.

Imports no torch: importing it takes seconds, in which the launcher can be killed too.
"""

import ctypes
import os
import signal
import sys

LAUNCHER_PID = "TORCHTRAIN_LAUNCHER_PID"
"""The environment variable by which the launcher tells its ranks who their parent is."""
STARTED_BY = "TORCHTRAIN_STARTED_BY"
"""That by which a rank tells a tool that it runs."""


def end_with_launcher() -> None:
    """Have the kernel (Linux) end this rank when torchrun dies; end it here if that is dead.

    A launcher that was ended by SIGKILL would leave it training on. The kernel goes by the thread
    that started the rank: torchrun's main thread, which lives as long as the process.
    """
    is_launched = "TORCHELASTIC_RUN_ID" in os.environ or LAUNCHER_PID in os.environ
    if sys.platform != "linux" or not is_launched:
        return
    _ask_to_end_with_parent()
    if _is_orphan():  # asked last: a launcher that dies later is the kernel's business
        os.kill(os.getpid(), signal.SIGKILL)


def end_with_rank() -> None:
    """Have the kernel (Linux) end this tool when the rank that runs it dies, if one does."""
    if sys.platform != "linux" or STARTED_BY not in os.environ:
        return
    _ask_to_end_with_parent()
    if os.getppid() != int(os.environ[STARTED_BY]):
        os.kill(os.getpid(), signal.SIGKILL)


def _ask_to_end_with_parent() -> None:
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _is_orphan() -> bool:
    """Check whether the launcher died before its death could be asked for."""
    parent = os.getppid()
    if LAUNCHER_PID in os.environ:
        return parent != int(os.environ[LAUNCHER_PID])
    # A plain torchrun does not say who it is. Orphans go to process 1, unless an ancestor (systemd
    # for a user's session) takes them: such a one is not recognized, and ends when it finds no
    # store to join. In a container torchrun can be process 1 itself; it runs the same Python then.
    if parent != 1:
        return False
    try:
        return not os.path.samefile("/proc/1/exe", "/proc/self/exe")
    except OSError:  # process 1 is another user's
        return True
