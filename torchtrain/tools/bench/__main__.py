"""Measure how fast this machine trains, beside how fast it multiplies matrices.

    python -m torchtrain.tools.bench [--sizes debug,36M] [--rounds 3] [--compile] [--json]
    python -m torchtrain.tools.bench --against REV [...]
    python -m torchtrain.tools.bench --scale [8,64,512,4096]

Each figure is the median over rounds of a run of the trainer as a user starts it. Before each run
matrix products of the model's sizes are timed alone, in the same environment; the fastest of them
is the peak that a step's model FLOP/s are a share of.

`--against REV` takes turns with the trainer of another commit, and prints the ratio of the speeds
of each round. `--scale` sets up a rank of runs of many ranks, whose communication is left out, and
says what grows. Options of the trainer may follow `--`.

The machine should have nothing else to do.
"""

import argparse
import json
import signal
import statistics
import sys
from dataclasses import asdict
from pathlib import Path

from torchtrain.errors import ConfigError, UserError
from torchtrain.tools.bench.machine import choose_dtype, describe_machine, find_device
from torchtrain.tools.bench.runs import Figures, Setting, measure_run, time_products
from torchtrain.tools.bench.scale import as_scale_table, measure_scale
from torchtrain.tools.bench.sizes import Size, choose_sizes
from torchtrain.tools.bench.trees import other_commit
from torchtrain.tools.bench.work import find_work
from torchtrain.utils import plural

SCALE = "8,64,512,4096"


def make_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="torchtrain bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), help="default: the accelerator, where there is one")
    add("--sizes", help="default: all that are meant for the device")
    add("--rounds", type=int, default=3, help="runs of each size (default: %(default)s)")
    add("--ranks", type=int, default=1, help="processes on this machine (default: %(default)s)")
    add("--dtype", choices=("bfloat16", "float32"), help="default: the fastest in hardware")
    add("--compile", action="store_true", help="with torch.compile")
    add("--against", metavar="REV", help="take turns with this commit")
    add("--scale", nargs="?", const=SCALE, metavar="RANKS", help=f"default: {SCALE}")
    add("--json", action="store_true", help="print JSON")
    add("options", nargs="*", metavar="-- options", help="of the trainer")
    return parser


def measure_size(
    size: Size, setting: Setting, rounds: int, other: Path | None
) -> dict[str, object]:
    """Return the medians of a size's runs, and of the ratios to another checkout's, if any."""
    work = find_work(size, setting)
    own: list[Figures] = []
    products: dict[str, list[float]] = {}
    ratios: list[float] = []
    for _ in range(rounds):
        for name, speed in time_products(work.shape, size, setting).items():
            products.setdefault(name, []).append(speed)
        own.append(measure_run(size, setting))
        if other is not None:
            theirs = measure_run(size, setting, other)
            ratios.append(own[-1].tokens_per_second / theirs.tokens_per_second)
    figures: dict[str, object] = {
        name: statistics.median(asdict(each)[name] for each in own) for name in asdict(own[0])
    }
    flops = work.flops_per_token * statistics.median(each.tokens_per_second for each in own)
    speeds = {name: statistics.median(each) for name, each in products.items()}
    figures["model_flops"] = flops
    figures["share_of_peak"] = flops / (max(speeds.values()) * setting.ranks)
    figures["products_flops"] = speeds
    if ratios:
        figures["ratios"] = ratios
    return figures


def as_row(name: str, figures: dict[str, object]) -> str:
    """Return a size's line of the table."""
    numbers = {key: value for key, value in figures.items() if isinstance(value, float)}
    ratios = figures.get("ratios")
    compared = ""
    if isinstance(ratios, list):
        middle = statistics.median(ratios)
        compared = f"  {middle:.3f} ({min(ratios):.3f} to {max(ratios):.3f})"
    return (
        f"{name:10}{numbers['tokens_per_second']:>10,.0f}"
        f"{numbers['model_flops'] / 1e12:>10.3f}{numbers['share_of_peak']:>8.1%}"
        f"{1e3 * numbers['step_time_s']:>12,.1f}{numbers['first_step_s']:>12.1f}"
        f"{numbers['memory_gib']:>9.2f}{numbers['data_time_pct']:>8.1f}"
        f"{numbers['save_stall_s']:>9.2f}{compared}"
    )


HEADER = (
    f"{'':10}{'tokens/s':>10}{'TFLOP/s':>10}{'of peak':>8}{'step, ms':>12}{'1st step, s':>12}"
    f"{'mem, GiB':>9}{'data, %':>8}{'save, s':>9}"
)


def report_sizes(given: argparse.Namespace, setting: Setting, other: Path | None) -> None:
    """Measure the sizes and print each as it is done."""
    machine = describe_machine(setting.device)
    measured: dict[str, dict[str, object]] = {}
    if not given.json:
        how = "compiled" if setting.compiled else "eager"
        print(f"{machine}; {plural(setting.ranks, 'rank')}, {setting.dtype}, {how}")
        print(HEADER + (f"  tokens/s ÷ {given.against}" if other else ""), flush=True)
    for name, size in choose_sizes(given.sizes, setting.device).items():
        measured[name] = measure_size(size, setting, given.rounds, other)
        if not given.json:
            print(as_row(name, measured[name]), flush=True)
    if given.json:
        print(json.dumps({"machine": machine, **asdict(setting), "sizes": measured}, indent=2))


def run(given: argparse.Namespace) -> None:
    """Do what the command line asks for.

    Raises:
        UserError: it cannot be done, or a run did not end well.
    """
    if given.rounds < 1 or given.ranks < 1:
        raise UserError("--rounds and --ranks must be at least 1")
    if given.scale is not None:
        figures = measure_scale(given.scale)
        print(json.dumps(figures, indent=2) if given.json else as_scale_table(figures))
        return
    device = find_device(given.device)
    setting = Setting(
        device=device,
        ranks=given.ranks,
        dtype=given.dtype or choose_dtype(device),
        compiled=given.compile,
        options=tuple(given.options),
    )
    if given.against is None:
        report_sizes(given, setting, None)
        return
    with other_commit(given.against) as tree:
        report_sizes(given, setting, tree)


def main(arguments: list[str]) -> int:
    """Print the table. Returns the exit status: 0; 2 for a user error; 130 for Ctrl-C."""
    given = make_parser().parse_args(arguments)
    try:
        run(given)
    except (UserError, ConfigError) as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    # Both end the run that is under way, and remove what is temporary.
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    sys.exit(main(sys.argv[1:]))
