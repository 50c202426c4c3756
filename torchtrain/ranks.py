"""How the ranks of a run come up, agree, and fail together."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from torchtrain.errors import PeerFault, SharedUserError, UserError

T = TypeVar("T")


def _told(fault: BaseException | None) -> PeerFault | None:
    """What of this rank's fault travels to the others, where one was raised."""
    if fault is None:
        return None
    told = PeerFault(f"rank {dist.get_rank()} failed: {fault}")
    told.is_user_error = isinstance(fault, UserError)
    return told


def usable_accelerator() -> str | None:
    """The type of the accelerator that this machine has and training can use: one with a communication backend of its
    own, such as NCCL. (Apple's GPUs have none, and no fp64.) None: train on the CPU."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is None:
        return None
    backend = dist.Backend.default_device_backend_map.get(accelerator.type, "gloo")
    return None if backend == "gloo" else accelerator.type


def join_process_group(timeout_seconds: int) -> torch.device:
    """Take this rank's device and join the process group, of one rank where no launcher has set one up.

    The group carries CPU tensors over gloo and, with an accelerator, device tensors over that device's own backend.
    """
    accelerator = usable_accelerator()
    device = torch.device("cpu")
    backend = "gloo"
    if accelerator is not None:
        device = torch.device(accelerator, int(os.environ.get("LOCAL_RANK", "0")))
        torch.accelerator.set_device_index(device.index)
        backend = f"cpu:gloo,{device.type}:{dist.get_default_backend_for_device(device)}"
    alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    timeout = timedelta(seconds=timeout_seconds)
    dist.init_process_group(
        backend, timeout=timeout, **({} if "WORLD_SIZE" in os.environ else alone)
    )
    return device


def end_with_launcher() -> None:
    """On Linux, have the kernel end this rank when torchrun dies: a SIGKILLed launcher would leave it training on."""
    if sys.platform != "linux" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def set_timeout(seconds: int, groups: list[dist.ProcessGroup]) -> None:
    """From here on a collective that takes longer is an error: a stopped or lost rank ends the run, not a hang."""
    dist.barrier()
    for group in [dist.group.WORLD, *groups]:
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def patient_group() -> dist.ProcessGroup:
    """A group for messages that may have to wait long for a slow disk or for one rank's work, off the accelerator.

    Every rank must call it. Its timeout is hours where that of training is minutes.
    """
    return dist.new_group(backend="gloo", timeout=timedelta(hours=6))


def together(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run `action` on every rank; if it fails on any, all ranks fail, the lowest failing one with the cause.

    Without this, one rank would raise while the others wait for it in their next collective. `group` holds all ranks;
    its timeout bounds how long the quickest rank waits for the slowest. Without a fault it costs a collective of one
    number, off the accelerator.
    """
    result, fault = _attempt(action)
    failed = torch.tensor(int(fault is not None))
    dist.all_reduce(failed, group=group)
    if failed.item():
        for rank, theirs in enumerate(gathered(_told(fault), group)):
            if theirs is not None:
                raise fault if fault is not None and rank == dist.get_rank() else theirs
    return result  # type: ignore[return-value]


def gathered(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Every rank's `value`, in the order of the ranks."""
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def on_rank_zero(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run `action` on rank 0 alone and hand its (small) result to all; if it fails, all ranks fail.

    On a shared file system ranks can disagree about what exists, so one of them decides.
    """
    shared: list = [together(lambda: action() if dist.get_rank() == 0 else None, group)]
    dist.broadcast_object_list(shared, group=group)  # which leaves the sender's list as it is
    return shared[0]


def _attempt(action: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    try:
        return action(), None
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as fault:  # not only Exception: DCP's CheckpointException is none
        return None, fault


def require_equal(value: str, what: str) -> None:
    """Refuse to train where ranks differ in something that must be one.

    Raises:
        SharedUserError: names the first rank that differs from rank 0.
    """
    first, *others = gathered(value)
    for rank, theirs in enumerate(others, start=1):
        if theirs != first:
            raise SharedUserError(
                f"{what} differs between ranks: {first} on rank 0, {theirs} on rank {rank}"
            )
