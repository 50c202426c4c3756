"""Train a grid or a list of runs of one config file, and compare them.

    python -m torchtrain.tools.sweep SWEEP.toml                 every run, one after the other
    python -m torchtrain.tools.sweep SWEEP.toml --only RUN      one of them, by its name or number
    python -m torchtrain.tools.sweep SWEEP.toml --table         run nothing: show what there is
    NGPU=8 python -m torchtrain.tools.sweep SWEEP.toml --slurm  write a Slurm array's script

All runs are checked before one starts. Given again, it goes on where it was: what is done stays,
and what has failed is tried again. Environment: the launcher's, NGPU for example.
Exit status: 0 all runs have a result, be it that the loss is not finite; 1 some have failed; 2 a
user error; 3 what has no result yet is under way elsewhere; 75 some are to go on; 128 + n stopped
by signal n.
"""

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from torchtrain.errors import TRY_AGAIN, UserError
from torchtrain.tools.launch import (
    RENDEZVOUS_VARIABLES,
    count_processes,
    count_restarts,
    visible_gpus,
)
from torchtrain.tools.nodes import read_nodes
from torchtrain.tools.sweep.kept import check_unchanged, find_others
from torchtrain.tools.sweep.plan import Sweep, SweepRun, read_sweep
from torchtrain.tools.sweep.running import ELSEWHERE, Runner, holding, is_held, read_ending
from torchtrain.tools.sweep.slurm import write_script
from torchtrain.tools.sweep.table import show
from torchtrain.utils import expand_user, nearest, plural


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return the exit status described above."""
    given = make_parser().parse_args(arguments)
    try:
        processes = count_ranks(given)
        sweep = read_sweep(given.file, processes)
        check_launches(sweep)
        if given.table:
            show(sweep)
            held = {run.name for run in sweep.runs if is_held(sweep, run)}
            return find_status(sweep, sweep.runs, held)
        check_unchanged(sweep)
        if given.slurm:
            script = write_script(sweep, processes)
            print(f"{script}: {plural(len(sweep.runs), 'run')}. Submit it: sbatch {script}")
            print(f"Then show what has become of them: {again(sweep)} --table")
            return 0
        if given.only is not None:
            return run_all(sweep, [choose(sweep, given.only)])
        tell_others(sweep)
        status = run_all(sweep, sweep.runs)
        show(sweep)
        return status
    except UserError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="torchtrain sweep",
        description="Train a grid or a list of runs of one config file, and compare them.",
        allow_abbrev=False,
    )
    parser.add_argument("file", type=expand_user, metavar="SWEEP.toml", help="see docs/sweep.md")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--only", metavar="RUN", help="run one alone: its name, or number from 0")
    what.add_argument("--table", action="store_true", help="run nothing: show what there is")
    what.add_argument(
        "--slurm", action="store_true", help="run nothing: write the script of a Slurm array"
    )
    return parser


def count_ranks(given: argparse.Namespace) -> int:
    """Return how many ranks each run will have; 0 where none will run.

    Raises:
        UserError: NGPU is impossible here, or missing where another machine will be asked for it.
    """
    if given.table:
        return 0
    if not given.slurm:
        return count_processes(visible_gpus())
    if not os.environ.get("NGPU"):
        raise UserError("--slurm needs NGPU, the number of GPUs that each run is to have")
    return count_processes(0)


def check_launches(sweep: Sweep) -> None:
    """Check what the launcher asks of its environment, as it does before each run.

    Raises:
        UserError: there are several nodes, or restarts without checkpoints.
    """
    names = {f"PET_{name}": os.environ[name] for name in RENDEZVOUS_VARIABLES if name in os.environ}
    nodes = read_nodes({**names, **os.environ})
    if nodes.count > 1:
        raise UserError("a sweep's runs have one node each; NNODES asks for more")
    without = [run.name for run in sweep.runs if not run.config.checkpoint.enable]
    if count_restarts() and without:
        raise UserError(f"MAX_RESTARTS needs checkpoint.enable, which {without[0]} lacks")


def tell_others(sweep: Sweep) -> None:
    """Say which runs in the folder the sweep no longer has."""
    others = find_others(sweep)
    if others:
        print(f"not in {sweep.file} any more, and left as they are: {' '.join(others)}")


def choose(sweep: Sweep, name: str) -> SweepRun:
    """Return the run of this name or number.

    Raises:
        UserError: the sweep has none.
    """
    for number, run in enumerate(sweep.runs):
        if name in (run.name, str(number)):
            return run
    close = nearest(name, [run.name for run in sweep.runs])
    hint = f"; did you mean {close}?" if close else "."
    raise UserError(
        f"--only {name}: {sweep.file} has no such run{hint} Its {plural(len(sweep.runs), 'run')} "
        f"are numbered from 0, and named as {sweep.runs[0].name}"
    )


def run_all(sweep: Sweep, runs: list[SweepRun]) -> int:
    """Run what is not done yet, one after the other; return the exit status."""
    runner = Runner(sweep)
    elsewhere = set()
    with runner.listening():
        for number, run in enumerate(runs, 1):
            with holding(sweep, run) as is_free:
                ending = read_ending(sweep, run)
                place = f"[{number}/{len(runs)}] {run.name}"
                if ending is not None and ending.is_final:
                    say(f"{place}: is {ending.state} already")
                elif not is_free:
                    say(f"{place}: is under way elsewhere")
                    elsewhere.add(run.name)
                else:
                    say(f"{place}: its output goes to {sweep.path(run, '.log')}")
                    runner.run(run, say)
            if runner.stopped_by:
                say(f"stopped in {run.name}. To go on: {again(sweep)}")
                return 128 + runner.stopped_by
    return find_status(sweep, runs, elsewhere)


def find_status(sweep: Sweep, runs: Sequence[SweepRun], elsewhere: set[str]) -> int:
    """Return the exit status by how the runs have ended.

    Args:
        sweep: whose folder has their endings.
        runs: those that count.
        elsewhere: names of those that others are running, for which there is no need to try again.
    """
    endings = {run.name: read_ending(sweep, run) for run in runs}
    if any(ending is not None and not ending.is_final for ending in endings.values()):
        return 1
    without = {name for name, ending in endings.items() if ending is None}
    if not without:
        return 0
    return ELSEWHERE if without <= elsewhere else TRY_AGAIN


def again(sweep: Sweep) -> str:
    """Return the command that goes on with the sweep."""
    return f"python -m torchtrain.tools.sweep {sweep.file}"


def say(text: str) -> None:
    """Print at once, also into a file."""
    print(text, flush=True)


if __name__ == "__main__":
    sys.exit(main())
