"""Launches as users make them: what befalls the launcher, or two of them."""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from torchtrain.tools.faults.bench import STEPS, Lost, last_checkpoint
from torchtrain.tools.faults.resharding import compare_to_rounding, compare_weights_to_rounding
from torchtrain.tools.faults.trial import Trial, require_clean

TAG = "TORCHTRAIN_FAULTS_TAG"
"""The environment variable by which the processes of a launch are found."""
LOST_S = 20.0
"""After so long the other nodes have gone on without one that was killed."""
GONE_S = 15.0
"""How long the ranks of a dead launcher have to end."""


class Launch:
    """What `run_llama_train.sh` starts, in the background."""

    def __init__(self, trial: Trial, name: str = "launch", **environment: str) -> None:
        trial.bench.launch_seconds()  # which tells how long one may take
        self.patience_s = trial.bench.patience_s
        self.tag = f"{TAG}={trial.folder}/{name}"
        self.printed = trial.folder / f"{name}.printed"
        command = [sys.executable, "-m", "torchtrain.tools.launch", *trial.bench.options(trial.run)]
        tag = {TAG: self.tag.partition("=")[2]}
        with open(self.printed, "wb") as file:
            self.process = subprocess.Popen(
                command,
                env={**os.environ, "NGPU": "2", "OMP_NUM_THREADS": "1", **tag, **environment},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def output(self) -> str:
        """What it has printed."""
        return self.printed.read_text(errors="replace")

    def pids(self, *variables: str) -> list[int]:
        """Return the processes of this launch, of those that have these environment variables."""
        wanted = {self.tag.encode(), *(variable.encode() for variable in variables)}
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit() and wanted <= {
                    *(entry / "environ").read_bytes().split(b"\0")
                }:
                    found.append(int(entry.name))
        return found

    def wait(self, seconds: float) -> int | None:
        """Return the exit status of the launcher, None if it does not end in this time."""
        with suppress(subprocess.TimeoutExpired):
            return self.process.wait(seconds)
        return None

    def require_gone(self) -> None:
        """Check that no process of it is left, or will be soon.

        Raises:
            Lost: one lives on.
        """
        deadline = time.monotonic() + GONE_S
        while left := self.pids():
            if time.monotonic() > deadline:
                raise Lost(f"{len(left)} processes outlive their launcher: {self.output}")
            time.sleep(0.1)

    def require_status(self, *allowed: int) -> int:
        """Check that it ends by itself, with one of these.

        Raises:
            Lost: it does not.
        """
        status = self.wait(self.patience_s)
        if status not in allowed:
            raise Lost(f"a launch ended with {status} instead of {allowed}: {self.output}")
        return status

    def kill(self) -> None:
        """Send SIGKILL to all its processes."""
        for pid in self.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()

    def __enter__(self) -> "Launch":
        return self

    def __exit__(self, *_: Any) -> None:
        self.kill()


def kill_launcher(trial: Trial) -> None:
    """Kill the launcher alone, at any time: its ranks end too, and it can be started at once."""
    with Launch(trial) as launch:
        wait_for_any_time(trial, launch)
        trial.faults += launch.wait(0) is None
        launch.process.kill()
        if trial.number % 2:
            with Launch(trial, "again") as again:
                again.require_status(0)
        launch.require_gone()


def kill_launch(trial: Trial) -> None:
    """Kill the launcher and all its ranks at any time, also while they import torch."""
    with Launch(trial) as launch:
        wait_for_any_time(trial, launch)
        trial.faults += launch.wait(0) is None


def restart(trial: Trial) -> None:
    """Kill a rank at any time under MAX_RESTARTS: the launch ends as if nothing had been."""
    with Launch(trial, MAX_RESTARTS="2") as launch:
        for _ in range(trial.rng.randint(1, 2)):
            wait_for_any_time(trial, launch)
            victims = launch.pids(f"RANK={trial.rng.randrange(2)}")
            for pid in victims:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            trial.faults += bool(victims)
        launch.require_status(0)
        launch.require_gone()
    require_done(trial)


def lose_node(trial: Trial) -> None:
    """Kill one of two nodes at any time, its launcher and its rank, and bring it back.

    It is back at once, or when the other has gone on without it.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with start_node(trial, "node-0", 0, port) as first:
        wait_for_any_time(trial, first)
        for number in range(trial.rng.randint(1, 2)):
            with start_node(trial, f"node-1-{number}", 1, port) as second:
                wait_for_any_time(trial, second)
                trial.faults += second.wait(0) is None
            first.wait(trial.rng.choice([0, LOST_S]))
        with start_node(trial, "node-1", 1, port):
            first.require_status(0)
        first.require_gone()
    require_done(trial)


def start_node(trial: Trial, name: str, rank: int, port: int) -> Launch:
    """Start one of two nodes, each of one rank, that may come and go."""
    return Launch(
        trial,
        name,
        NGPU="1",
        NNODES="1:2",
        NODE_RANK=str(rank),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RDZV_CONF="last_call_timeout=1",
        MAX_RESTARTS="9",
    )


def compare_nodes(trial: Trial) -> None:
    """Compare a run whose nodes have come and gone with the untouched one: equal to rounding."""
    untouched = trial.bench.folder / "untouched"
    compare_to_rounding(trial.run, untouched, was_stopped=True)
    compare_weights_to_rounding(last_checkpoint(trial.run), last_checkpoint(untouched))
    require_clean(trial.run)


def launch_twice(trial: Trial) -> None:
    """Launch twice in one folder: one run trains, and the other is refused or finds it done."""
    with Launch(trial) as first:
        wait_for_any_time(trial, first)
        trial.faults += first.wait(0) is None
        with Launch(trial, "second") as second:
            statuses = [launch.require_status(0, 2) for launch in (first, second)]
            outputs = [first.output, second.output]
    for status, output in zip(statuses, outputs, strict=True):
        if status == 2 and ("is in use by" not in output or "Traceback" in output):
            raise Lost(f"a second launch is refused without a message: {output}")
    if statuses == [2, 2]:
        raise Lost(f"both launches are refused: {outputs}")
    trial.refusals += 2 in statuses
    require_done(trial)


def stop_launcher(trial: Trial) -> None:
    """Ask the launcher to stop at any time, by chance twice: all end, and with that status."""
    number = trial.rng.choice([signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2])
    with Launch(trial) as launch:
        wait_for_any_time(trial, launch)
        trial.faults += launch.wait(0) is None
        for _ in range(trial.rng.randint(1, 2)):
            launch.process.send_signal(number)
            launch.wait(trial.rng.uniform(0, 1))
        launch.require_status(0, 128 + number, -number)
        launch.require_gone()


def require_done(trial: Trial) -> None:
    """Check that all steps were taken.

    Raises:
        Lost: they were not.
    """
    if trial.find_newest() != STEPS:
        raise Lost(f"a launch ended with status 0 after step {trial.find_newest()}")


def wait_for_any_time(trial: Trial, launch: Launch) -> None:
    """Wait for a time in which a launch can be anywhere: at its imports, in training, done."""
    launch.wait(trial.rng.uniform(0, trial.bench.launch_seconds()))
