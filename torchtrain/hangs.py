"""A hang, as it is written down: where each rank stands, and which of them had not arrived."""

import faulthandler
import os
import socket
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import CodeType

import torch.distributed as dist
from pydantic import BaseModel, ConfigDict

from torchtrain.ranks import name_ranks

HANG_FOLDER = "hang"
"""In the run's folder: a folder for each step that hung."""

PLACES = {
    "read": "reading data",
    "__enter__": "scales of float8 weights",
    "forward_backward": "forward and backward",
    "clip_gradients": "gradient norm",
    "combine_ranks": "combining metrics",
    "judge": "judging the numbers",
    "optimizer_step": "optimizer",
    "run": "replica check",
    "validate": "validation",
    "make_up_validation": "validation",
    "show_texts": "text samples",
    "log": "logging",
    "poll": "saving",
    "save_progress": "saving",
    "end_step": "end of the step",
    "__exit__": "finishing",
}
"""What the loop is doing while it is in a function of this name."""

PATIENT_PLACES = ("reading data", "saving", "finishing")
"""Where a slow disk or source may be waited for, longer than for another rank."""


class Position(BaseModel):
    """Where a rank stands."""

    model_config = ConfigDict(frozen=True)

    step: int
    place: str
    """In the step."""
    entered: dict[str, int]
    """How many collectives it has entered so far, by the names of their groups."""

    @property
    def is_patient(self) -> bool:
        return self.place in PATIENT_PLACES

    def __str__(self) -> str:
        return f"step {self.step} ({self.place})"


def find_place(loop: CodeType, thread: int) -> str:
    """Return what `loop` is doing, by the function that it has called; `thread` runs it."""
    frame = sys._current_frames().get(thread)
    called = "itself"
    while frame is not None and frame.f_code is not loop:
        called, frame = frame.f_code.co_name, frame.f_back
    return PLACES.get(called, called)


def count_entered(groups: Sequence[dist.ProcessGroup]) -> dict[str, int]:
    """Return how many collectives this rank has entered, by the names of their groups.

    A group whose backend does not count them is left out.
    """
    entered: dict[str, int] = {}
    for group in groups:
        with suppress(RuntimeError):
            count = group._get_sequence_number_for_group()  # type: ignore[attr-defined]
            entered[group.group_name] = count
    return entered


def find_missing(positions: dict[int, Position], world_size: int) -> list[int]:
    """Return the ranks for which the others wait.

    They are those that did not answer; where all did, those that have entered fewer collectives of
    a group than another rank. Of these, one that is ahead in another group waits itself.

    Args:
        positions: by rank, of those that answered.
        world_size: how many ranks there are.
    """
    silent = [rank for rank in range(world_size) if rank not in positions]
    if silent:
        return silent
    behind: set[int] = set()
    ahead: set[int] = set()
    for name in {name for position in positions.values() for name in position.entered}:
        counts = {
            rank: position.entered[name]
            for rank, position in positions.items()
            if name in position.entered
        }
        most = max(counts.values())
        late = {rank for rank, count in counts.items() if count < most}
        behind |= late
        if late:
            ahead |= counts.keys() - late
    return sorted(behind - ahead or behind)


def describe_hang(
    positions: dict[int, Position], world_size: int, own: Position, waited_s: float, folder: Path
) -> str:
    """Return in one line who had not arrived.

    Args:
        positions: by rank, of those that answered.
        world_size: how many ranks there are.
        own: where the rank stands that has noticed it.
        waited_s: for how long it has.
        folder: where the stacks are.
    """
    missing = find_missing(positions, world_size)
    for_long = f"for {waited_s:.0f} s; see {folder}"
    if not missing:
        return f"no rank has made progress in {own} {for_long}"
    if missing[0] not in positions:
        return f"{name_ranks(missing)} did not answer in {own} {for_long}"
    theirs = positions[missing[0]]
    return f"{name_ranks(missing)} had not arrived, in {theirs}; others waited {for_long}"


def write_stacks(folder: Path, position: Position, waited_s: float) -> None:
    """Write where this rank stands, and each of its threads, to `rank-R.txt`.

    The main thread comes first: faulthandler stops after a hundred threads, and begins with the
    newest.
    """
    rank = dist.get_rank()
    main_thread = threading.main_thread().ident
    assert main_thread is not None
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f"rank-{rank}.txt", "w") as file:
        print(
            f"rank {rank} of {dist.get_world_size()}, process {os.getpid()} on "
            f"{socket.gethostname()}\n{position}, unmoved for {waited_s:.1f} s\n"
            f"collectives entered, by group: {position.entered}\n\nmain thread:",
            file=file,
        )
        traceback.print_stack(sys._current_frames()[main_thread], file=file)
        print(file=file, flush=True)
        faulthandler.dump_traceback(file)


def write_collectives(folder: Path) -> None:
    """With NCCL, write the last collectives of its flight recorder to `nccl-rank-R`.

    The form is that which PyTorch's own analyzer reads.
    """
    if "nccl" not in dist.get_backend_config():
        return
    try:
        from torch._C._distributed_c10d import _dump_nccl_trace  # type: ignore[attr-defined]
    except ImportError:  # it is not a public name
        return
    (folder / f"nccl-rank-{dist.get_rank()}").write_bytes(_dump_nccl_trace())
