"""One logger for every room: plain lines, colored on a terminal, from the ranks the user asked for.

Errors go to stderr, everything else to stdout. A long preparation draws its progress on stderr,
where that is a terminal; the next line clears it.
"""

import logging
import os
import shutil
import sys
from typing import TextIO

logger = logging.getLogger("torchtrain")

CLEAR_LINE = "\r\x1b[K"

LINE_WIDTH = 100
"""Columns that a line may take where the output is not a terminal."""


class Color:
    """How a terminal is told to draw what follows."""

    BOLD = "\x1b[1m"
    DIM = "\x1b[2m"
    RED = "\x1b[31m"
    GREEN = "\x1b[32m"
    YELLOW = "\x1b[33m"
    BLUE = "\x1b[34m"
    RESET = "\x1b[0m"


def draw_progress(text: str) -> None:
    """Show `text` in place of the previous progress; nothing where stderr is not a terminal."""
    if sys.stderr.isatty():
        columns = shutil.get_terminal_size().columns
        print(CLEAR_LINE + text[: columns - 1], end="", file=sys.stderr, flush=True)


def clear_progress() -> None:
    """Remove the progress that is shown, if any."""
    draw_progress("")


def line_width() -> int:
    """Return how many columns of text a log line can take without wrapping."""
    columns = LINE_WIDTH
    if sys.stdout.isatty():
        columns = shutil.get_terminal_size((LINE_WIDTH, 24)).columns
    prefixes = [handler.prefix for handler in logger.handlers if isinstance(handler, _Handler)]
    return columns - max(map(len, prefixes), default=0)


def use_color(stream: TextIO, *, disabled: bool = False) -> bool:
    """Return whether `stream` is a terminal that wants color; https://no-color.org is honored."""
    return not disabled and stream.isatty() and "NO_COLOR" not in os.environ


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]  # generic from Python 3.11 on
    """Writes `[rank r] text`; warnings and errors say what they are."""

    def __init__(self, stream: TextIO, prefix: str, *, color: bool) -> None:
        super().__init__(stream)
        self.prefix = prefix
        self.color = color

    def emit(self, record: logging.LogRecord) -> None:
        clear_progress()
        super().emit(record)

    def format(self, record: logging.LogRecord) -> str:
        text = self.prefix + record.getMessage()
        if record.levelno < logging.WARNING:
            return text
        label = record.levelname.lower()
        if self.color:
            color = Color.RED if record.levelno >= logging.ERROR else Color.YELLOW
            label = f"{color}{label}{Color.RESET}"
        return f"{label}: {text}"


def init_logging(rank: int = 0, world_size: int = 1, *, disable_color: bool = False) -> None:
    """Print this rank's lines if LOG_RANK (ranks, comma-separated; default 0) names it.

    Of any other rank, print errors alone. The rank is left out where only rank 0 prints.
    """
    shown = _shown_ranks(world_size)
    prefix = "" if shown == {0} else f"[rank {rank}] "
    ordinary = _Handler(sys.stdout, prefix, color=use_color(sys.stdout, disabled=disable_color))
    ordinary.addFilter(lambda record: record.levelno < logging.ERROR)
    errors = _Handler(sys.stderr, prefix, color=use_color(sys.stderr, disabled=disable_color))
    errors.setLevel(logging.ERROR)
    logger.handlers[:] = [ordinary, errors]
    logger.setLevel(logging.INFO if rank in shown else logging.ERROR)
    logger.propagate = False


def _shown_ranks(world_size: int) -> set[int]:
    named = os.environ.get("LOG_RANK", "0").split(",")
    ranks = {int(number) for number in named if number.strip().isdigit()}
    return {rank for rank in ranks if rank < world_size} or {0}
