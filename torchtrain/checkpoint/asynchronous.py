"""Saving beside training: the state is copied at once, and a thread of each rank writes the copy.

The threads have a process group of their own, since two threads that use one group in different
orders mix up its messages.
"""

import socket
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint._state_dict_stager import StateDictStager

from torchtrain.errors import CheckpointError, SharedUserError
from torchtrain.host_memory import find_available_bytes
from torchtrain.logging_utils import logger
from torchtrain.ranks import gathered, patient_group
from torchtrain.shards import local

MIB = 2**20


class BackgroundWriter:
    """Writes one copy at a time. All ranks call its methods together.

    Args:
        pinned: copy to pinned memory, which is faster from an accelerator.

    Raises:
        UserError: there is no accelerator to pin memory for.
    """

    def __init__(self, *, pinned: bool) -> None:
        if pinned and not torch.accelerator.is_available():
            raise SharedUserError(
                'checkpoint.async_mode = "async_with_pinned_mem": PyTorch finds no accelerator '
                'here, and memory is pinned for one; set "async"'
            )
        self.group = patient_group("checkpoint")
        self._threads = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._running: Future[None] | None = None
        self._has_copied = False
        self._pinned = pinned
        # It keeps the memory of one copy for the next. (DefaultStager around it can be used once
        # alone in torch 2.11.)
        self._stager = StateDictStager(pin_memory=pinned, share_memory=False)

    def has_room(self, tensors: Mapping[str, Tensor], group: dist.ProcessGroup) -> bool:
        """Return whether the copies of all ranks fit in their hosts' memory, and say so.

        Asked before the first copy, whose memory is kept: by then the run has taken steps, and
        holds what it needs for them.

        Args:
            tensors: what this rank is to copy.
            group: of all ranks, not that of the threads.
        """
        if self._has_copied:
            return True
        size = sum(local(tensor).nbytes for tensor in tensors.values())
        by_rank = gathered((socket.gethostname(), size, find_available_bytes()), group)
        needed: Counter[str] = Counter()
        left: dict[str, float] = {}
        for host, of_rank, available in by_rank:
            needed[host] += of_rank
            left[host] = min(available, left.get(host, available))
        host = min(needed, key=lambda name: left[name] - needed[name])
        copies = f"copies of the state take {needed[host] / MIB:,.1f} MiB of host memory"
        if needed[host] > left[host]:
            logger.warning(
                f"training stands still while this is saved, in spite of checkpoint.async_mode: "
                f"{copies}, and {host} has {left[host] / MIB:,.1f} MiB left"
            )
            return False
        logger.info(f"saves beside training: {copies} on {host}")
        return True

    def copy(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a copy of the tensors on the host. When this returns, they may change.

        Raises:
            CheckpointError: the host has no memory for it after all, or the copy failed.
        """
        assert self._running is None, "the save before was not finished"
        try:
            copied = self._stager.stage(dict(tensors), non_blocking=self._pinned)
            if self._pinned:
                torch.accelerator.synchronize()
        except (MemoryError, RuntimeError) as fault:  # PyTorch has a RuntimeError for either
            cause = str(fault) or "no memory"
            raise CheckpointError(f"the state could not be copied to the host: {cause}") from fault
        assert isinstance(copied, dict)
        return copied

    def start(self, write: Callable[[dict[str, Tensor]], None], copied: dict[str, Tensor]) -> None:
        """Give the copy to `write` in the thread of this rank, once every rank has made its own.

        The threads wait for each other.
        """
        self._has_copied = True
        self._running = self._threads.submit(write, copied)

    @property
    def is_idle(self) -> bool:
        """Whether nothing was started since the last `finish`: the same on all ranks."""
        return self._running is None

    def has_ended(self, group: dist.ProcessGroup) -> bool:
        """Return whether all ranks have written, or one has failed; one collective of two numbers.

        Args:
            group: of all ranks, not that of the threads.
        """
        if self._running is None:
            return False
        is_done = self._running.done()
        failed = is_done and self._running.exception() is not None
        state = torch.tensor([int(failed), int(not is_done)])
        dist.all_reduce(state, op=dist.ReduceOp.MAX, group=group)
        any_failed, any_running = state.tolist()
        return bool(any_failed or not any_running)

    def finish(self) -> None:
        """Wait until it is written.

        Raises:
            BaseException: what the thread of this rank raised; all ranks' threads fail together.
        """
        if self._running is not None:
            running, self._running = self._running, None
            running.result()
