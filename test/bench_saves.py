"""Compare saving and verifying a checkpoint with the disk's own speed, in one run.

Not a test. `--folder` is on the disk in question:

    python test/bench_saves.py --ranks 4 --mib 256 --folder /scratch

Each round times, in turn: writing and syncing the same bytes as one file per rank, nothing else;
saving them as a checkpoint's tensors; and hashing the files again (from memory, as a resume right
after a save does). Rounds differ much on a shared disk: the median of many is what counts.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from helpers.forking import in_group

from torchtrain.checkpoint.digests import find_altered
from torchtrain.checkpoint.storage import write_tensors

TENSORS = 16


def write_plainly(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write and sync the bytes of the tensors, in pieces."""
    with open(path, "xb", buffering=0) as file:
        for tensor in tensors.values():
            content = memoryview(tensor.numpy()).cast("B")
            for begin in range(0, len(content), 2**22):
                file.write(content[begin : begin + 2**22])
        os.fsync(file.fileno())


def measure(folder: Path, mib: int, rounds: int) -> None:
    """Be a rank; rank 0 prints."""
    rank = dist.get_rank()
    numbers = mib * 2**20 // 4 // TENSORS
    tensors = {f"rank-{rank}/{number}": torch.randn(numbers) for number in range(TENSORS)}
    size_gb = 4 * numbers * TENSORS * dist.get_world_size() / 1e9
    seconds: dict[str, list[tuple[float, float]]] = {}

    def timed(what: str, action):
        dist.barrier()
        began, began_cpu = time.perf_counter(), time.process_time()
        result = action()
        cpu = time.process_time() - began_cpu
        dist.barrier()
        seconds.setdefault(what, []).append((time.perf_counter() - began, cpu))
        return result

    for number in range(rounds):
        plain, saved = folder / f"plain-{rank}-{number}", folder / f"saved-{number}"
        timed("write and sync", lambda plain=plain: write_plainly(plain, tensors))
        plain.unlink()
        if rank == 0:
            saved.mkdir()
        dist.barrier()
        save = lambda saved=saved: write_tensors(saved, tensors, dist.group.WORLD)  # noqa: E731
        written = timed("save", save)
        verify = lambda saved=saved, of=written: find_altered(saved, of, of, 2)  # noqa: E731
        assert timed("verify", verify) is None
        if rank == 0:
            shutil.rmtree(saved)
    if rank == 0:
        for what, taken in seconds.items():
            median = statistics.median(wall for wall, _ in taken)
            cpu = statistics.median(cpu for _, cpu in taken)
            print(
                f"{what:14s} {median:6.2f} s ({min(wall for wall, _ in taken):.2f} at best), "
                f"{size_gb / median:5.2f} GB/s; CPU {cpu:.2f} s per rank"
            )
        shares = [
            plain / saved
            for (plain, _), (saved, _) in zip(
                seconds["write and sync"], seconds["save"], strict=True
            )
        ]
        print(f"share of the disk's speed: {statistics.median(shares):.0%} (median of the rounds)")


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--mib", type=int, default=256, help="per rank")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=Path())
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        print(in_group(given.ranks, measure, Path(folder), given.mib, given.rounds), end="")


if __name__ == "__main__":
    main()
