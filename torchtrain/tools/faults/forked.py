"""Ranks as forks of one process that has imported torch and train.py, so that a start is cheap."""

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist

Inject = Callable[[], None]
"""What a rank does to itself before it calls `train.main`; a module's function, or a partial."""

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["train"])


@dataclass(frozen=True)
class Place:
    """Where a rank stands: what torchrun would tell it, and where it prints."""

    rank: int
    world_size: int
    port: int
    printed: Path
    leader: int
    """Process id of rank 0, whose process group the others join; 0 for rank 0 itself."""


class ForkedRanks:
    """The ranks of one run, in a process group of their own.

    Args:
        world_size: how many.
        options: of the trainer.
        printed: the file that their output is added to.
        inject: what makes a fault in each rank.
    """

    def __init__(
        self, world_size: int, options: list[str], printed: Path, inject: Inject | None = None
    ) -> None:
        self.printed = printed
        self._begins_at = printed.stat().st_size if printed.exists() else 0
        self._store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        self._processes: list[multiprocessing.process.BaseProcess] = []
        for rank in range(world_size):
            leader = self._processes[0].pid or 0 if rank else 0
            place = Place(rank, world_size, self._store.port, printed, leader)
            process = _FORKS.Process(target=_be_rank, args=(place, options, inject), daemon=True)
            process.start()
            self._processes.append(process)

    @property
    def pids(self) -> list[int]:
        """Process ids, in rank order."""
        return [process.pid or 0 for process in self._processes]

    @property
    def statuses(self) -> list[int | None]:
        """The exit status of each rank, -n if signal n ended it, None while it runs."""
        return [process.exitcode for process in self._processes]

    @property
    def output(self) -> str:
        """What these ranks have printed."""
        with open(self.printed, "rb") as file:
            file.seek(self._begins_at)
            return file.read().decode(errors="replace")

    def wait(self, timeout_s: float, *, until_one_has_ended: bool = False) -> bool:
        """Return whether all ranks, or one, ended by themselves in this time."""
        deadline = time.monotonic() + timeout_s
        while running := [process for process in self._processes if process.exitcode is None]:
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            wait([process.sentinel for process in running], left)
            if until_one_has_ended and any(status is not None for status in self.statuses):
                return True
        return True

    def kill(self) -> None:
        """Send SIGKILL to all that still run, at once; return when they are gone."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pids[0], signal.SIGKILL)
        for process in self._processes:
            process.kill()  # one that had not joined the group yet
        for process in self._processes:
            process.join()


def kill_all_ranks() -> None:
    """End all ranks of this run at once, as a power cut does; called in one of them."""
    os.killpg(0, signal.SIGKILL)


def replace(module: ModuleType, name: str, substitute: Callable[..., Any]) -> None:
    """Have a module call `substitute(real, ...)` where it calls its function `name`."""
    setattr(module, name, partial(substitute, getattr(module, name)))


def own_rank() -> int:
    """Return the rank of this process."""
    return int(os.environ["RANK"])


def _be_rank(place: Place, options: list[str], inject: Inject | None) -> None:
    """Be a rank's process, as torchrun starts train.py, but print to a file."""
    _join_group_of(place.leader)
    with open(place.printed, "ab", buffering=0) as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    os.environ.update(
        RANK=str(place.rank),
        LOCAL_RANK=str(place.rank),
        WORLD_SIZE=str(place.world_size),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(place.port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RUN_ID="faults",
        TORCHELASTIC_RESTART_COUNT="0",
    )
    torch.set_num_threads(1)
    status = 1
    try:
        status = _train(options, inject)
    except BaseException:
        print(f"rank {place.rank} failed:\n{traceback.format_exc()}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # as train.py ends


def _train(options: list[str], inject: Inject | None) -> int:
    import train
    from torchtrain.config_manager import JobConfig

    if inject is not None:
        inject()
    return train.main(JobConfig().parse_args(options))


def _join_group_of(leader: int) -> None:
    """Join the process group of rank 0, or found it: all ranks can then be killed at once."""
    if not leader:
        os.setpgid(0, 0)
        return
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        with suppress(ProcessLookupError, PermissionError):
            os.setpgid(0, leader)
            return
        time.sleep(0.001)
