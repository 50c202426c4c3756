"""What the commands that use a trained model have in common: options, faults, exit statuses."""

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable

from torchtrain.errors import ConfigError, PeerFault, SharedUserError, UserError
from torchtrain.launch_variables import check_place
from torchtrain.logging_utils import init_logging, logger


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model, and how it is loaded."""
    add = parser.add_argument
    add("--checkpoint", required=True, help="a run, a checkpoint, or a Hugging Face folder")
    add("--tokenizer", help="its file or folder (the run's)")
    add("--dtype", choices=("float32", "bfloat16"), help="bfloat16; on a CPU float32")
    add("--json", action="store_true", help="print JSON")


def report_faults(action: Callable[[], None]) -> int:
    """Do it, and turn faults into messages and an exit status: 2, 130 for Ctrl-C, 1 for a crash.

    The text alone goes to stdout: warnings are for stderr.
    """
    try:
        check_place(os.environ)
    except UserError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    rank = int(os.environ.get("RANK", "0"))
    init_logging(rank, int(os.environ.get("WORLD_SIZE", "1")))
    logger.handlers = [logging.StreamHandler(sys.stderr)]
    logger.setLevel(logging.WARNING if rank == 0 else logging.ERROR)
    try:
        action()
    except (UserError, ConfigError) as fault:
        if rank == 0 or not isinstance(fault, SharedUserError):
            print(f"error: {fault}", file=sys.stderr)
        return 2
    except PeerFault as fault:
        return 2 if fault.is_user_error else 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # a reader that has seen enough, as `head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception:
        print(f"rank {rank} failed:\n{traceback.format_exc()}", file=sys.stderr)
        return 1
    return 0


def end(status: int) -> None:
    """End the process, as train.py does: a group's threads can hang while Python is torn down."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
