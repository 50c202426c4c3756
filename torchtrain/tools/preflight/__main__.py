"""Say, before a run costs anything, what it will take: memory, time, money; or a better layout.

    python -m torchtrain.tools.preflight --job.config_file FILE [options] --world-size N
        [--device NAME] [--price P] [--disk-gb-per-s G] [--suggest [--write FILE]] [--json]

The config's faults come first. The status is 0, 2 with a report of faults, or 3: the run does not
fit.
"""

import argparse
import dataclasses
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from torchtrain.config.plans import RunPlan
from torchtrain.config.schema import Config
from torchtrain.config_manager import parse_or_exit
from torchtrain.errors import UserError
from torchtrain.metrics import GIB
from torchtrain.tools.preflight.costs import RunCost, cost_run
from torchtrain.tools.preflight.devices import DEVICES, Device, find_device
from torchtrain.tools.preflight.memory import estimate_memory, make_plan
from torchtrain.tools.preflight.step_time import StepTime, predict_step
from torchtrain.tools.preflight.suggest import Search, Suggestion, write_config
from torchtrain.tools.preflight.suggest import describe as describe_found
from torchtrain.tools.preflight.time_report import describe_cost, describe_step
from torchtrain.tools.preflight.verdict import ALLOCATOR_SHARE, FITS_BELOW, Verdict
from torchtrain.tools.preflight.walk import RankMemory

DOES_NOT_FIT = 3


def main(arguments: list[str]) -> int:
    """Check the config, predict, print; return the exit status."""
    parser = build_parser()
    given, rest = parser.parse_known_args(arguments)
    if given.world_size < 1:
        parser.error(f"--world-size {given.world_size}: must be at least 1")
    for name in ("price", "disk_gb_per_s"):
        value = getattr(given, name)
        if value is not None and not 0 < value < float("inf"):
            parser.error(f"--{name.replace('_', '-')} {value}: must be a positive number")
    if given.write is not None and not given.suggest:
        parser.error("--write needs --suggest")
    for name in ("price", "disk_gb_per_s", "suggest"):
        if getattr(given, name) and given.device is None:
            parser.error(f"--{name.replace('_', '-')} needs --device")
    config = parse_or_exit([word for word in rest if word != "--"], given.world_size)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch's, of what is traced: the run has its own
            return answer(config, given)
    except UserError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2


def answer(config: Config, given: argparse.Namespace) -> int:
    """Predict or suggest; return the exit status."""
    device = None if given.device is None else find_device(given.device)
    if given.suggest:
        assert device is not None
        return suggest(config, given.world_size, device, given.write, as_json=given.json)
    return predict(config, device, given)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of what is preflight's own; the trainer's options are left over."""
    parser = argparse.ArgumentParser(
        prog="torchtrain preflight",
        usage="%(prog)s --world-size N [--device NAME] [--price P] [--disk-gb-per-s G]"
        " [--suggest [--write FILE]] [--json] [--SECTION.KEY VALUE ...]",
        description="Predict a run, given by train.py's options, without running it.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--world-size", type=int, required=True, metavar="N", help="ranks of the run")
    names = ", ".join(DEVICES)
    add("--device", metavar="NAME", help=f"predict time, and whether it fits; one of {names}")
    add("--price", type=float, metavar="P", help="of one device for an hour")
    add(
        "--disk-gb-per-s",
        type=float,
        metavar="G",
        help="what all ranks together write of a checkpoint",
    )
    add("--suggest", action="store_true", help="search for the fastest layouts that fit")
    add("--write", type=Path, metavar="FILE", help="write the config of the best suggestion")
    add("--json", action="store_true", help="print JSON, in bytes and seconds")
    return parser


def predict(config: Config, device: Device | None, given: argparse.Namespace) -> int:
    """Print what the run takes as it is configured; return the exit status."""
    plan = make_plan(config, given.world_size)
    ranks = estimate_memory(config, given.world_size, device_type_of(device))
    worst = max(ranks, key=lambda rank: rank.allocated)
    verdict = judge(worst, device)
    step, cost = None, None
    if device is not None:
        step = predict_step(config, plan, device)
        rates = {"price": given.price, "disk_gb_per_s": given.disk_gb_per_s}
        cost = cost_run(config, plan, device, step, **rates)
    if given.json:
        print(json.dumps(as_json(ranks, verdict, step, cost), indent=2))
    else:
        print("\n".join(describe(plan, ranks, step, cost)))
        if device is not None and verdict is not None:
            print(describe_verdict(verdict, device))
    return DOES_NOT_FIT if verdict is not None and verdict.word == "does not fit" else 0


def suggest(
    config: Config, world_size: int, device: Device, path: Path | None, *, as_json: bool
) -> int:
    """Print the best layouts, and write the config of the first where a path is given."""
    if device.memory_gib is None:
        raise UserError(f"--suggest --device {device.name}: its memory is not known")
    device_type = device_type_of(device)

    def measure(each: Config) -> int:
        ranks = estimate_memory(each, world_size, device_type)
        return round(max(rank.allocated for rank in ranks) * (1 + ALLOCATOR_SHARE))

    limit = FITS_BELOW * device.memory_gib * GIB
    found = Search(config, world_size, device, measure, limit).find_best()
    if as_json:
        print(json.dumps([suggestion_as_json(each) for each in found], indent=2))
    else:
        step = predict_step(found[0].config, found[0].plan, device)
        print("\n".join(describe_found(found, step)))
    if path is not None:
        write_config(found[0].config, path)
        if not as_json:
            print(f"the first is written to {path}")
    return 0


def device_type_of(device: Device | None) -> str:
    """Return PyTorch's word for the device."""
    return "cpu" if device is not None and device.name == "cpu" else "cuda"


def judge(worst: RankMemory, device: Device | None) -> Verdict | None:
    """Return the verdict; None: no device is given, or its memory is the machine's own."""
    if device is None or device.memory_gib is None:
        return None
    return Verdict.of(worst, device.memory_gib)


def as_json(
    ranks: list[RankMemory], verdict: Verdict | None, step: StepTime | None, cost: RunCost | None
) -> dict[str, object]:
    """Return all figures, in bytes and seconds."""
    return {
        "ranks": [{**dataclasses.asdict(rank), "total": rank.total} for rank in ranks],
        "verdict": None if verdict is None else verdict.word,
        "step": None if step is None else dataclasses.asdict(step),
        "run": None if cost is None else dataclasses.asdict(cost),
    }


def suggestion_as_json(each: Suggestion) -> dict[str, object]:
    """Return a layout's options and what it takes."""
    return {
        "options": dict(each.options),
        "step_s": each.seconds,
        "terms_s": dict(each.terms),
        "memory": each.memory,
    }


def describe(
    plan: RunPlan, ranks: list[RankMemory], step: StepTime | None, cost: RunCost | None
) -> Iterator[str]:
    """Yield the report: the parts of the worst rank, the others' totals, the time, the cost."""
    worst = max(ranks, key=lambda rank: rank.allocated)
    yield f"layout     {plan.describe_layout()}"
    which = f" of pipeline rank {worst.pipeline_rank}" if len(ranks) > 1 else ""
    yield f"memory at the worst moment{which}: {worst.moment}"
    for name, size in worst.parts.items():
        if size:
            yield f"{size / GIB:10.2f} GiB  {name.replace('_', ' ')}"
    yield f"{worst.total / GIB:10.2f} GiB  tensors"
    if worst.cached:
        yield f"{worst.cached / GIB:10.2f} GiB  free blocks that the allocator keeps"
    beyond = worst.allocated * ALLOCATOR_SHARE
    yield f"{beyond / GIB:10.2f} GiB  reserved beyond them, {ALLOCATOR_SHARE:.0%} assumed"
    if len(ranks) > 1:
        totals = ", ".join(f"{rank.total / GIB:.1f}" for rank in ranks)
        yield f"tensors of each pipeline rank, in GiB: {totals}"
    if step is not None:
        yield from describe_step(step)
    if cost is not None:
        yield from describe_cost(cost)


def describe_verdict(verdict: Verdict, device: Device) -> str:
    """Return whether the run fits, in words."""
    share = verdict.reserved / verdict.memory
    return f"{verdict.word}: {share:.0%} of the {device.memory_gib:g} GiB of {device.product}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
