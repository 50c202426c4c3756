"""Train a small model under faults, and show that nothing is lost.

    python -m torchtrain.tools.faults [--seed S] [--kills N] [--jobs J] [--only NAME [--try K]]
    python -m torchtrain.tools.faults --every-operation [--jobs J]

A try injects a fault, or several in a row, into a run of 10 steps on two ranks; then the run is
restarted without faults, and must end as the untouched run does: weights, optimizer states,
position in the data and every logged number, to the bit, with nothing unfinished left in its
folder. Where a fault ends the run with a message, that must come in time, and the checkpoint before
must load. A try that does not end so is lost: its folder is kept, and the line that makes that try
again is printed.

Ctrl-C ends the campaign with the table so far. Linux only.

Exit status: 0 nothing is lost; 1 something is; 2 a user error.
"""

import argparse
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

from torchtrain.errors import UserError
from torchtrain.tools.faults import campaign
from torchtrain.tools.faults.bench import Bench, Lost
from torchtrain.tools.faults.campaign import FAULTS, Tally
from torchtrain.utils import expand_user, nearest


def make_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="torchtrain faults",
        description=__doc__,
        epilog=f"Faults: {', '.join(FAULTS)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--seed", type=int, default=0, help="of all that is drawn (default: 0)")
    add("--kills", type=int, default=100, help="about how many faults are made (default: 100)")
    add("--jobs", type=int, default=1, help="tries at a time (default: 1)")
    add("--only", metavar="NAME", help="of this fault alone")
    add("--try", type=int, metavar="K", dest="number", help="this try of it alone")
    add(
        "--every-operation",
        action="store_true",
        help="kill at each operation of one save instead, on one rank and two, in both ways",
    )
    add("--folder", type=expand_user, help="where the runs are (default: a temporary folder)")
    return parser


def check(asked: argparse.Namespace) -> None:
    """Check the command line.

    Raises:
        UserError: an option is out of range, or this is not Linux.
    """
    if sys.platform != "linux":
        raise UserError("faults are made by means of Linux: /proc, and signals of the kernel")
    if asked.kills < 1 or asked.jobs < 1:
        raise UserError("--kills and --jobs must be at least 1")
    if asked.only is not None and asked.only not in FAULTS:
        close = nearest(asked.only, FAULTS)
        hint = f"; did you mean {close}?" if close else ""
        raise UserError(f"--only {asked.only!r} is none of {', '.join(FAULTS)}{hint}")
    if asked.number is not None and asked.only is None:
        raise UserError("--try needs --only: each fault has tries of its own")
    if asked.every_operation and asked.only is not None:
        raise UserError("--every-operation and --only exclude each other")


def choose_tries(asked: argparse.Namespace, bench: Bench) -> list[tuple[str, int]]:
    """Return the tries that the command line asks for."""
    if asked.every_operation:
        return campaign.plan_every_operation(bench)
    if asked.number is not None:
        return [(asked.only, asked.number)]
    return campaign.plan([asked.only] if asked.only else FAULTS, asked.kills, asked.seed)


def make(asked: argparse.Namespace, bench: Bench) -> tuple[dict[str, Tally], int]:
    """Make the tries, say at once which are lost.

    Returns:
        The lines of the table, and how many tries were to be made.
    """
    tallies: dict[str, Tally] = {}
    tries: list[tuple[str, int]] = []
    seed = asked.seed
    try:
        bench.prepare()
        tries = choose_tries(asked, bench)
        for ended in campaign.run(bench, tries, seed, asked.jobs):
            campaign.count(tallies, ended)
            trial = ended.trial
            if not ended.lost:
                trial.remove()
                continue
            print(
                f"LOST {trial.name}, try {trial.number}: {ended.lost}\n  kept in {trial.folder}; "
                f"again: --only {trial.name} --seed {seed} --try {trial.number}",
                flush=True,
            )
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
    return tallies, len(tries)


def main(arguments: list[str]) -> int:
    """Print the table. Returns the exit status described above."""
    asked = make_parser().parse_args(arguments)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # and nohup this, which would ignore some faults
    started = time.monotonic()
    try:
        check(asked)
        folder = asked.folder or Path(tempfile.mkdtemp(prefix="torchtrain-faults-"))
        tallies, planned = make(asked, Bench(folder))
    except UserError as fault:
        print(fault, file=sys.stderr)
        return 2
    except Lost as fault:
        print(f"the untouched run itself is not as it must be: {fault}", file=sys.stderr)
        return 1
    print(campaign.as_table(tallies))
    lost = any(tally.lost for tally in tallies.values())
    if asked.folder is None and not lost:
        shutil.rmtree(folder, ignore_errors=True)
    made = sum(tally.tries for tally in tallies.values())
    minutes = (time.monotonic() - started) / 60
    print(f"\nseed {asked.seed}: {made} of {planned} tries in {minutes:.1f} minutes")
    return int(lost)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
