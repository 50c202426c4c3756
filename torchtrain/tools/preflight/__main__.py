"""Say, before a run costs anything, how much memory each of its ranks will take.

    python -m torchtrain.tools.preflight --job.config_file FILE [options] --world-size N
        [--device NAME] [--json]

The config's faults come first. The status is 0, 2 with a report of faults, or 3: the run does not
fit.
"""

import argparse
import dataclasses
import json
import sys

from torchtrain.config_manager import parse_or_exit
from torchtrain.errors import UserError
from torchtrain.metrics import GIB
from torchtrain.tools.preflight.devices import DEVICES, Device, find_device
from torchtrain.tools.preflight.memory import estimate_memory
from torchtrain.tools.preflight.verdict import ALLOCATOR_SHARE, Verdict
from torchtrain.tools.preflight.walk import RankMemory

DOES_NOT_FIT = 3


def main(arguments: list[str]) -> int:
    """Check the config, predict, print; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="torchtrain preflight",
        usage="%(prog)s --world-size N [--device NAME] [--json] [--SECTION.KEY VALUE ...]",
        description="Predict the memory of a run, given by train.py's options, without running it.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--world-size", type=int, required=True, metavar="N", help="ranks of the run")
    add("--device", metavar="NAME", help=f"one of {', '.join(DEVICES)}")
    add("--json", action="store_true", help="print JSON, in bytes")
    given, rest = parser.parse_known_args(arguments)
    if given.world_size < 1:
        parser.error(f"--world-size {given.world_size}: must be at least 1")
    config = parse_or_exit([word for word in rest if word != "--"], given.world_size)
    try:
        device = None if given.device is None else find_device(given.device)
        on_cpu = device is not None and device.name == "cpu"
        ranks = estimate_memory(config, given.world_size, "cpu" if on_cpu else "cuda")
    except UserError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    worst = max(ranks, key=lambda rank: rank.total)
    verdict = judge(worst, device)
    if given.json:
        print(json.dumps(as_json(ranks, verdict), indent=2))
    else:
        print("\n".join(describe(ranks, worst, device, verdict)))
    return DOES_NOT_FIT if verdict is not None and verdict.word == "does not fit" else 0


def judge(worst: RankMemory, device: Device | None) -> Verdict | None:
    """Return the verdict; None: no device is given, or its memory is the machine's own."""
    if device is None or device.memory_gib is None:
        return None
    return Verdict.of(worst, device.memory_gib)


def as_json(ranks: list[RankMemory], verdict: Verdict | None) -> dict[str, object]:
    """Return all figures, in bytes."""
    return {
        "ranks": [{**dataclasses.asdict(rank), "total": rank.total} for rank in ranks],
        "verdict": None if verdict is None else verdict.word,
    }


def describe(
    ranks: list[RankMemory], worst: RankMemory, device: Device | None, verdict: Verdict | None
) -> list[str]:
    """Return the report: the parts of the worst rank, the others' totals, the verdict."""
    which = f" of pipeline rank {worst.pipeline_rank}" if len(ranks) > 1 else ""
    lines = [f"memory at the worst moment{which}: {worst.moment}"]
    for name, size in worst.parts.items():
        if size:
            lines.append(f"{size / GIB:10.2f} GiB  {name.replace('_', ' ')}")
    lines.append(f"{worst.total / GIB:10.2f} GiB  tensors")
    beyond = worst.total * ALLOCATOR_SHARE
    lines.append(f"{beyond / GIB:10.2f} GiB  reserved beyond them, {ALLOCATOR_SHARE:.0%} assumed")
    if len(ranks) > 1:
        totals = ", ".join(f"{rank.total / GIB:.1f}" for rank in ranks)
        lines.append(f"tensors of each pipeline rank, in GiB: {totals}")
    if device is not None and verdict is not None:
        share = verdict.reserved / verdict.memory
        lines.append(
            f"{verdict.word}: {share:.0%} of the {device.memory_gib:g} GiB of {device.product}"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
