"""One logger for every room: plain lines, coloured on a terminal, printed by the ranks the user asked for."""

import logging
import os
import sys

logger = logging.getLogger("torchtrain")

BOLD, DIM, RED, GREEN, YELLOW, BLUE, RESET = (f"\x1b[{code}m" for code in (1, 2, 31, 32, 33, 34, 0))


class _Formatter(logging.Formatter):
    """`[rank r] text`, the rank left out when only one rank prints; warnings and errors say what they are."""

    def __init__(self, prefix: str, colour: bool) -> None:
        super().__init__()
        self.prefix, self.colour = prefix, colour

    def format(self, record: logging.LogRecord) -> str:
        text = self.prefix + record.getMessage()
        if record.levelno < logging.WARNING:
            return text
        label = record.levelname.lower()
        if self.colour:
            label = (RED if record.levelno >= logging.ERROR else YELLOW) + label + RESET
        return f"{label}: {text}"


def use_colour(disabled: bool = False) -> bool:
    """Whether stdout is a terminal that wants colour (https://no-color.org is honoured)."""
    return not disabled and sys.stdout.isatty() and "NO_COLOR" not in os.environ


def init_logging(rank: int = 0, world_size: int = 1, disable_colour: bool = False) -> None:
    """Print this rank's log lines if LOG_RANK (a comma-separated list, default 0) names it; else errors alone."""
    shown = {
        int(r)
        for r in os.environ.get("LOG_RANK", "0").split(",")
        if r.strip().isdigit() and int(r) < world_size
    }
    shown = shown or {0}
    handler = logging.StreamHandler(sys.stdout)
    prefix = f"[rank {rank}] " if len(shown) > 1 or shown != {0} else ""
    handler.setFormatter(_Formatter(prefix, use_colour(disable_colour)))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if rank in shown else logging.ERROR)
    logger.propagate = False
