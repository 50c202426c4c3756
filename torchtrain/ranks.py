"""How the ranks of a run come up, agree, and fail together."""

import ctypes
import hashlib
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import timedelta
from typing import Any, NoReturn, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from torchtrain import attempts
from torchtrain.devices import choose_device, describe_unused_gpus, usable_accelerator
from torchtrain.errors import PeerFault, SharedUserError, UserError
from torchtrain.launch_variables import meets_in_store
from torchtrain.logging_utils import logger
from torchtrain.open_files import allow_open_files

T = TypeVar("T")

collectives = torch.ops._c10d_functional  # which have one name in all supported versions

FLIGHT_RECORDER_SIZE = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
"""How many collectives NCCL's flight recorder keeps: the variable and its older name."""

PATIENT = "patient"
"""What the name of a patient group begins with in PyTorch's registry of groups."""


def join_process_group(timeout_seconds: int) -> torch.device:
    """Join the process group, of one rank without a launcher, and take this rank's device.

    The group carries CPU tensors over gloo and, with an accelerator, device tensors over that
    device's own backend.

    Raises:
        UserError: this rank has no device, or may not have as many open files as it needs.
            Or MASTER_PORT is taken.
        SharedUserError: the ranks have devices of different types.
        PeerFault: another rank has no device; this node's first rank raises the same of open files;
            the ranks did not meet; or an earlier attempt of this launch has ended for good.
    """
    accelerator = usable_accelerator()
    backend = "gloo"
    if accelerator is not None:
        backend = f"cpu:gloo,{accelerator}:{dist.get_default_backend_for_device(accelerator)}"
    timeout = timedelta(seconds=timeout_seconds)
    if not any(name in os.environ for name in FLIGHT_RECORDER_SIZE):
        os.environ[FLIGHT_RECORDER_SIZE[0]] = "2000"
    _allow_connections()
    if meets_in_store(os.environ):
        store, rank, world_size = attempts.meet(timeout)
    else:
        store, rank, world_size = dist.HashStore(), 0, 1
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world_size)
    device = together(lambda: choose_device(accelerator))
    require_one_type(device)
    if accelerator is not None:
        torch.accelerator.set_device_index(device.index)
    elif attempts.ATTEMPT not in os.environ and (unused := describe_unused_gpus()):
        logger.warning(unused)  # our launcher has said it
    return device


def require_one_type(device: torch.device) -> None:
    """Refuse to go on where a node has fallen back to its CPUs, and others have GPUs.

    The one would wait in a collective over gloo, and the others over NCCL.

    Raises:
        SharedUserError: names the types, with their ranks.
    """
    by_rank = gathered((device.type, describe_unused_gpus() if device.type == "cpu" else None))
    if len({kind for kind, _ in by_rank}) == 1:
        return
    named = name_values(kind + (f" ({unused})" if unused else "") for kind, unused in by_rank)
    raise SharedUserError(f"the ranks need devices of one type, and have {named}")


def _allow_connections() -> None:
    """Let this rank have open files enough for its connections to the others."""
    try:
        warning = allow_open_files(int(os.environ.get("WORLD_SIZE", "1")))
    except UserError as fault:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            raise
        peer_fault = PeerFault(str(fault))
        peer_fault.is_user_error = True
        raise peer_fault from None
    if warning and attempts.ATTEMPT not in os.environ:
        logger.warning(warning)  # our launcher has said it


def name_process() -> None:
    """Name this process "torchtrain" (Linux), as `ps`, `top` and `pkill` see it."""
    if sys.platform != "linux":
        return
    set_name = 15  # PR_SET_NAME, prctl(2); at most 15 bytes
    ctypes.CDLL(None).prctl(set_name, b"torchtrain")


def set_timeout(seconds: int) -> None:
    """Make it an error, from now on, for a collective to take longer; not in patient groups.

    A stopped or lost rank then ends the run instead of hanging it. All ranks call it. It reaches
    every process group that this rank is in, whoever made it: one that is made later, as those of a
    mesh, has PyTorch's timeout until the next call.
    """
    dist.barrier()
    for group in dist.distributed_c10d._world.pg_map:
        if not group.group_desc.startswith(PATIENT):
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def patient_group(thread: str = "main") -> dist.ProcessGroup:
    """Return the group of a thread for messages that may wait long, as for a slow disk.

    The messages are off the accelerator; the timeout is hours where that of training is minutes.
    A group of many ranks is dear (open_files.py), so each thread has one: the first call makes it,
    on every rank. Two threads must not share one: in another order their messages would mix.
    """
    name = f"{PATIENT}: {thread}"
    for group in dist.distributed_c10d._world.pg_map:
        if group.group_desc == name:
            return group
    return dist.new_group(backend="gloo", timeout=timedelta(hours=6), group_desc=name)


def together(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run `action` on every rank; if it fails on any, all ranks fail.

    Without this, one rank would raise while the others wait for it in their next collective.
    Without a fault it costs a collective of one number, off the accelerator.

    Args:
        action: what to do on each rank.
        group: holds all ranks; its timeout bounds how long the quickest rank waits for the slowest.

    Raises:
        BaseException: the fault of the lowest rank that failed, on that rank.
        PeerFault: the same, on the others.
    """
    result: T | None = None
    fault: BaseException | None = None
    try:
        result = action()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as raised:  # DCP's CheckpointException is not an Exception
        fault = raised
    failed = torch.tensor(int(fault is not None))
    dist.all_reduce(failed, group=group)
    if failed.item():
        _raise_lowest(fault, group)
    return cast(T, result)


def _raise_lowest(fault: BaseException | None, group: dist.ProcessGroup | None) -> NoReturn:
    """Raise this rank's fault if no lower rank has failed, else that rank's PeerFault."""
    peer_fault = None
    if fault is not None:
        peer_fault = PeerFault(f"rank {dist.get_rank()} failed: {fault}")
        peer_fault.is_user_error = isinstance(fault, UserError)
    by_rank = gathered(peer_fault, group)
    lowest = next(rank for rank, theirs in enumerate(by_rank) if theirs is not None)
    if fault is not None and lowest == dist.get_rank():
        raise fault
    raise by_rank[lowest] or AssertionError("no rank failed")


def gathered(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Return every rank's `value`, in rank order."""
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def gather_rows(row: Tensor) -> Tensor:
    """Return every rank's `row` [N], in rank order, as [R, N] on the same device.

    They come in one tensor: one for each rank would cost each of them more with every rank.
    """
    ranks = dist.get_world_size()
    group = dist.distributed_c10d._get_default_group().group_name
    rows: Tensor = collectives.wait_tensor(collectives.all_gather_into_tensor(row, ranks, group))
    return rows.view(ranks, len(row))


def on_rank_zero(action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Run `action` on rank 0 alone and return its (small) result on all; if it fails, all fail.

    On a shared file system ranks can disagree about what exists, so one of them decides.
    """
    result = together(lambda: action() if dist.get_rank() == 0 else None, group)
    shared: list[Any] = [result]
    dist.broadcast_object_list(shared, group=group)  # which leaves the sender's list as it is
    return shared[0]


def first_on_each_node(action: Callable[[], T], group: dist.ProcessGroup) -> T:
    """Run `action` on the first rank of each node, then on the others, which find its work done."""
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    early = together(lambda: action() if is_first else None, group)
    late = together(lambda: None if is_first else action(), group)
    return cast(T, early if is_first else late)


def require_equal(value: str, what: str) -> None:
    """Refuse to train where ranks differ in something that must be the same.

    Raises:
        SharedUserError: names the first rank that differs from rank 0.
    """
    first, *others = gathered(value)
    for rank, theirs in enumerate(others, start=1):
        if theirs != first:
            raise SharedUserError(
                f"{what} differs between ranks: {first} on rank 0, {theirs} on rank {rank}"
            )


def require_equal_config(
    config: Mapping[str, Mapping[str, Any]], may_differ: Collection[str]
) -> None:
    """Refuse to train where ranks were given different configs.

    Args:
        config: the merged values of this rank, by section and key.
        may_differ: what is not compared, each as `section.key`.

    Raises:
        SharedUserError: names each key that differs, with its values and the ranks that have them.
    """
    compared = {}
    for section, values in config.items():
        for key, value in values.items():
            if f"{section}.{key}" not in may_differ:
                compared[f"{section}.{key}"] = repr(value)
    digest = hashlib.sha256(repr(sorted(compared.items())).encode()).hexdigest()
    if len(set(gathered(digest))) == 1:
        return
    by_rank = gathered(compared)
    lines = ["the ranks were given different configs; all nodes of a run need the same"]
    for key in sorted(set().union(*by_rank)):
        given = [theirs.get(key, "not there") for theirs in by_rank]
        if len(set(given)) > 1:
            lines.append(f"  {key} = {name_values(given)}")
    raise SharedUserError("\n".join(lines))


def name_values(values: Iterable[str]) -> str:
    """Return "a on rank 0, b on ranks 1 to 7" of values in rank order."""
    ranks_by_value: dict[str, list[int]] = defaultdict(list)
    for rank, value in enumerate(values):
        ranks_by_value[value].append(rank)
    return ", ".join(f"{value} on {name_ranks(ranks)}" for value, ranks in ranks_by_value.items())


def name_ranks(ranks: list[int]) -> str:
    """Return "rank 3", "ranks 0 to 7" or "ranks 0, 2, 5"."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    if len(ranks) > 2 and ranks == list(range(ranks[0], ranks[-1] + 1)):
        return f"ranks {ranks[0]} to {ranks[-1]}"
    return f"ranks {', '.join(map(str, ranks))}"
