"""Launches without the imports: the launcher is a fork, see `forking`, and its ranks are its forks.

All else is as in `launching`: a rank is a child of the launcher in a session of its own, which runs
the same script with the same environment and imports what is torchtrain's itself. That such a
command starts Python, and what it starts trains, is shown by test_launch and test_restarts.
"""

import logging
import os
import runpy
import signal
import subprocess
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from helpers.forking import FORKS, be_launcher, close_pipes_but
from helpers.launching import TIMEOUT_S, environment, kill_group, options
from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

IMPORTED = {name.partition(".")[0] for name in sys.modules}
"""The packages that a launcher has, and leaves to its ranks: none of a user's."""


class ForkedPython(subprocess.Popen):
    """`python -u SCRIPT …` as a fork of this process; no other command."""

    def __init__(
        self, args, env, stdout=None, stderr=None, pass_fds=(), *, start_new_session=False
    ):
        python, option, script, *_ = args
        assert (python, option, script[-3:]) == (sys.executable, "-u", ".py"), args
        assert stdout is None
        assert start_new_session
        self.args = args
        self.stdin = self.stdout = self.stderr = self.returncode = None
        self._child_created, self._waitpid_lock = True, threading.Lock()
        self.pid = os.fork()
        if self.pid == 0:
            if stderr is not None:
                os.dup2(stderr if isinstance(stderr, int) else stderr.fileno(), 2)
            end_as(lambda: run_script(args[2:], env, pass_fds))


def run_script(command, env, inherited):
    """Run a script as Python runs it in a new process, but for what is imported already."""
    os.setsid()
    close_pipes_but({0, 1, 2, *inherited})
    os.environ.clear()
    os.environ.update(env)
    logging.disable(logging.NOTSET)
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for name in list(sys.modules):
        if name.partition(".")[0] not in IMPORTED - {"torchtrain", "train"}:
            del sys.modules[name]
    sys.argv = list(command)
    sys.path.insert(0, os.path.dirname(command[0]))
    runpy.run_path(command[0], run_name="__main__")


def end_as(action):
    """End this process with the exit status that Python would have after this."""
    try:
        status = action()
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)


def launch_forks(output, ignored, action, arguments):
    """Be a launcher, which does `action(*arguments)`; the ranks that it starts are forks of it."""
    os.setsid()
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    output.close()
    subprocess.Popen = subprocess_handler.Popen = ForkedPython
    end_as(lambda: action(*arguments))


class Launch:
    """A launcher in the background: of `subprocess.Popen` what tests need.

    Args:
        action: what it does, a module's function, and its arguments.
        ignored: signals that whoever starts it has it ignore, as `nohup` does.
    """

    def __init__(self, action, *arguments, ignored=()):
        output, written = FORKS.Pipe(duplex=False)
        given = written, ignored, action, arguments
        self.process = FORKS.Process(target=launch_forks, args=given, daemon=True)
        self.process.start()
        written.close()
        self.stdout = os.fdopen(os.dup(output.fileno()), errors="replace")
        output.close()
        self.pid = self.process.pid

    @property
    def returncode(self):
        """The exit status, None while it runs."""
        return self.process.exitcode

    def poll(self):
        """Return the exit status, None while it runs."""
        return self.process.exitcode

    def wait(self, timeout=TIMEOUT_S):
        """Return the exit status; what has not ended when the time is up is killed."""
        self.process.join(timeout)
        if self.poll() is None:
            kill_group(self)
            raise TimeoutError(f"the launcher has not ended within {timeout} s")
        return self.returncode

    def communicate(self, timeout=TIMEOUT_S):
        """Wait, and return what was printed meanwhile, and nothing."""
        with ThreadPoolExecutor(1) as thread:
            reading = thread.submit(self.stdout.read)
            self.wait(timeout)
            return reading.result(), None

    def output(self, expect=0):
        """Wait for this exit status, and return what was printed."""
        output, _ = self.communicate()
        assert self.returncode == expect, (
            f"exit status {self.returncode}, expected {expect}:\n{output}"
        )
        return output

    def send_signal(self, number):
        """Send it to the launcher alone."""
        os.kill(self.pid, number)

    def kill(self):
        """Send SIGKILL to the launcher; its ranks end with it."""
        self.process.kill()

    def ranks(self):
        """Return the process ids of the ranks there are."""
        return [*map(int, Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split())]


@contextmanager
def running(ranks, overrides, ignored=(), **extra):
    """Start a run as a context: whatever is left of it is killed at the end."""
    given = environment(ranks, **extra), options(overrides)
    launch = Launch(be_launcher, *given, ignored=ignored)
    try:
        yield launch
    finally:
        launch.kill()
        launch.process.join()
        launch.stdout.close()


def launched(ranks, overrides, expect=0, **extra):
    """Run to the end and return what was printed."""
    with running(ranks, overrides, **extra) as launch:
        return launch.output(expect)
