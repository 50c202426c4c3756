"""Ranks without their start: forks of one process that has imported everything, the trainer too.

A launcher and its ranks are for `quick`, or where the start itself is tested for `launching`. That
forked ranks train as launched ones do, to the bit, is shown by test_launch.
"""

import faulthandler
import gc
import importlib
import logging
import multiprocessing
import os
import stat
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, util
from multiprocessing.connection import wait
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from helpers.launching import TIMEOUT_S, options

import train as trainer
from torchtrain.config_manager import JobConfig
from torchtrain.ranks import join_process_group
from torchtrain.tools import launch

GRACE_S = 30  # for the others, after a rank has failed: they may wait for it in a collective

FORKS = multiprocessing.get_context("forkserver")
# What ranks import when they need it, and tests.
IMPORTED = (
    "train",
    "helpers.warmed",
    "torchtrain.models.llama",
    "torchtrain.optimizers.adam",
    "numpy.ma",
    "hypothesis",
    "pytest",
)
FORKS.set_forkserver_preload(list(IMPORTED))


def fork_server():
    """Make the process of which ranks are forks a fork of this one, which has to import that too.

    Multiprocessing would start another Python for it. No test has been imported yet, so that ranks
    have what they would have there.
    """
    for name in IMPORTED:
        importlib.import_module(name)
    start_python = util.spawnv_passfds

    def fork(python, arguments, kept):
        code = arguments[-1]
        if "forkserver" not in code:
            return start_python(python, arguments, kept)
        pid = os.fork()
        if pid == 0:
            run_as_python(code, kept)
        return pid

    with patch.object(util, "spawnv_passfds", fork):
        forkserver.ensure_running()


def run_as_python(code, kept):
    """Be `python -c CODE` in this fork, which writes nothing to pytest's files."""
    faulthandler.disable()
    logging.root.handlers.clear()
    captured, sys.stdout = sys.stderr, open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    for reference in logging._handlerList:  # torch's have been made while pytest captured that
        handler = reference()
        if vars(handler).get("stream") is captured:
            handler.setStream(sys.stderr)
    close_pipes_but({0, 1, 2, *kept})
    try:
        exec(code, {"__name__": "__main__"})
    except SystemExit:
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def close_pipes_but(kept):
    """Close the pipes and sockets that a new process would not have: somebody waits for their end.

    Other files stay: a stream that has one may be written to.
    """
    for name in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the list's own is closed
            kind = os.fstat(int(name)).st_mode
            if int(name) not in kept and (stat.S_ISFIFO(kind) or stat.S_ISSOCK(kind)):
                os.close(int(name))


def enter(rank, world_size, port, printed, action, arguments):
    """Be a rank's process, as torchrun starts train.py, but print to a file."""
    gc.freeze()  # all that is imported stays: a collection that walks it takes a fifth of a second
    with open(printed, "ab", buffering=0) as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size))
    os.environ.pop("LOG_RANK", None)
    os.environ.update(
        MASTER_ADDR="localhost", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True"
    )
    os.environ.update(TORCHELASTIC_RUN_ID="test", TORCHELASTIC_RESTART_COUNT="0")
    torch.set_num_threads(1)
    try:
        status = action(*arguments)
    except BaseException:
        print(f"rank {rank}:\n{traceback.format_exc()}", file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status or 0)  # as train.py ends


class Ranks:
    """Ranks in the background that each run `action(*arguments)`."""

    def __init__(self, world_size, action, *arguments):
        self.file = tempfile.NamedTemporaryFile()  # noqa: SIM115
        self.store = dist.TCPStore(
            "localhost", 0, is_master=True, wait_for_workers=False
        )  # the others connect to it
        given = (world_size, self.store.port, self.file.name, action, arguments)
        self.processes = [
            FORKS.Process(target=enter, args=(rank, *given), daemon=True)
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    @property
    def printed(self):
        return Path(self.file.name).read_text(errors="replace")

    @property
    def statuses(self):
        """The exit status of each rank, None while it runs."""
        return [process.exitcode for process in self.processes]

    def alive(self):
        """Return whether no rank has ended."""
        return all(status is None for status in self.statuses)

    def finish(self, timeout_s):
        """Wait until all have ended and return their exit statuses.

        Once one has failed, the others have GRACE_S; those left when the time is up are killed.
        """
        deadline = time.monotonic() + timeout_s
        failed = False
        try:
            # One look per turn: a rank may end between two, and a wait for nobody lasts to the end.
            while running := [process for process in self.processes if process.exitcode is None]:
                left = deadline - time.monotonic()
                if left <= 0:
                    break
                wait([process.sentinel for process in running], left)
                if any(self.statuses) and not failed:
                    failed = True
                    deadline = min(deadline, time.monotonic() + GRACE_S)
        finally:
            self.kill()
        return self.statuses

    def kill(self):
        """Send SIGKILL to all that still run; return when they are gone."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


@contextmanager
def running(world_size, overrides):
    """Run a training run in the background; whatever is left of it at the end is killed."""
    ranks = Ranks(world_size, run_trainer, options(overrides))
    try:
        yield ranks
    finally:
        ranks.kill()


def on_ranks(world_size, action, *arguments, expect=0, timeout_s=TIMEOUT_S):
    """Run `action(*arguments)`, a module's function, on each rank and return what was printed."""
    ranks = Ranks(world_size, action, *arguments)
    statuses = ranks.finish(timeout_s)
    assert statuses == [expect] * world_size, (
        f"exit statuses {statuses}, expected {expect}:\n{ranks.printed}"
    )
    return ranks.printed


def in_group(world_size, action, *arguments, **limits):
    """Do what `on_ranks` does, in a process group of all these ranks."""
    return on_ranks(world_size, act_in_group, action, arguments, **limits)


def act_in_group(action, arguments):
    """Be a rank of `in_group`."""
    join_process_group(60)
    action(*arguments)
    dist.barrier()
    dist.destroy_process_group()


def run_trainer(arguments):
    """Run train.py with these options and return its exit status."""
    return trainer.main(JobConfig().parse_args(arguments))


def train(world_size, overrides, expect=0):
    """Run a training run to its end and return what was printed."""
    return on_ranks(world_size, run_trainer, options(overrides), expect=expect)


def be_launcher(variables, arguments):
    """Be the launcher, in this environment."""
    os.environ.clear()
    os.environ.update(variables)
    return launch.main(arguments)


def train_in_turn(world_size, runs):
    """Run training runs one after the other on one set of ranks, which is started once."""
    in_group(world_size, run_in_turn, [options(overrides) for overrides in runs])


def run_in_turn(runs):
    """Be a rank of `train_in_turn`."""
    for arguments in runs:
        trainer.run(JobConfig().parse_args(arguments), torch.device("cpu"))
        gc.collect()  # modules and hooks refer to each other in cycles
