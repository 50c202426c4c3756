"""Train a small model under faults, and show that nothing is lost.

    python -m torchtrain.tools.faults [--seed S] [--kills N] [--jobs J] [--only NAME [--try K]]

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
from torchtrain.utils import nearest


def make_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m torchtrain.tools.faults",
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
    add("--folder", type=Path, help="where the runs are (default: a temporary folder)")
    return parser


def choose_tries(asked: argparse.Namespace) -> list[tuple[str, int]]:
    """Return the tries that the command line asks for.

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
    if asked.number is not None:
        return [(asked.only, asked.number)]
    return campaign.plan([asked.only] if asked.only else FAULTS, asked.kills, asked.seed)


def make(tries: list[tuple[str, int]], bench: Bench, seed: int, jobs: int) -> dict[str, Tally]:
    """Make the tries, say at once which are lost, and return the lines of the table."""
    tallies: dict[str, Tally] = {}
    try:
        bench.prepare()
        for ended in campaign.run(bench, tries, seed, jobs):
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
    return tallies


def main(arguments: list[str]) -> int:
    """Print the table. Returns the exit status described above."""
    asked = make_parser().parse_args(arguments)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    started = time.monotonic()
    try:
        tries = choose_tries(asked)
        folder = asked.folder or Path(tempfile.mkdtemp(prefix="torchtrain-faults-"))
        tallies = make(tries, Bench(folder), asked.seed, asked.jobs)
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
    print(f"\nseed {asked.seed}: {made} of {len(tries)} tries in {minutes:.1f} minutes")
    return int(lost)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
