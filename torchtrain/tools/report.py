"""Show runs as one HTML page, or say where two of them differ.

    python -m torchtrain.tools.report RUN [RUN ...] [--html FILE]
    python -m torchtrain.tools.report A B --diff

RUN is a run's folder (job.dump_folder), of a run that has ended or is going on. The page loads
nothing from anywhere; its pictures lie beside it as PNG too. Exit status: 0, or 2 for a user error.
"""

import argparse
import sys
from pathlib import Path

from torchtrain.errors import UserError
from torchtrain.tools import report_diff
from torchtrain.tools.report_data import read_runs
from torchtrain.utils import expand_user, plural, user_errors


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 2 for a user error, else 0."""
    parser = make_parser()
    given = parser.parse_args(arguments)
    if given.diff and (len(given.runs) != 2 or given.html):
        parser.error("--diff takes two runs, and no --html")
    try:
        if given.diff:
            print("\n".join(report_diff.describe(*read_runs(given.runs))))
        else:
            draw(given.runs, given.html or given.runs[0] / "report.html")
    except UserError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = argparse.ArgumentParser(
        prog="torchtrain report",
        description="Show runs as one HTML page, or say where two of them differ.",
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", type=expand_user, metavar="RUN", help="a run's folder")
    parser.add_argument(
        "--html",
        type=expand_user,
        metavar="FILE",
        help="the page (default: report.html in the first run's folder); pictures go beside it",
    )
    parser.add_argument(
        "--diff", action="store_true", help="print where two runs differ instead, as text"
    )
    return parser


def draw(folders: list[Path], html: Path) -> None:
    """Write the page of the runs in these folders, and say where it is.

    Raises:
        UserError: a run cannot be read, matplotlib is missing, the page cannot be written.
    """
    from torchtrain.tools.report_charts import draw_all
    from torchtrain.tools.report_page import write_report

    runs = read_runs(folders)
    pictures = list(draw_all(runs))
    with user_errors(f"{html} cannot be written; --html names another place", OSError):
        images = write_report(runs, pictures, html)
    print(
        f"{html}: {plural(len(pictures), 'chart')} of {plural(len(runs), 'run')}; PNGs in {images}"
    )


if __name__ == "__main__":
    sys.exit(main())
