"""The command `torchtrain`: the launcher, and every tool by its name.

    torchtrain [trainer options]        train, as run_llama_train.sh does
    torchtrain COMMAND [its options]    run a tool, as python -m torchtrain.tools.… does
    torchtrain --help                   list the commands

Without an installed `torchtrain` on the PATH it is `python -m torchtrain.tools`.
"""

import os
import runpy
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from torchtrain.utils import nearest


@dataclass(frozen=True)
class Command:
    """What a name on the command line runs."""

    module: str
    """Its full name; it is run as a program."""
    summary: str


COMMANDS: Mapping[str, Command] = {
    "train": Command(
        "torchtrain.tools.launch",
        "train on every visible GPU, or 2 CPU processes; --help lists the options of a run",
    ),
    "check-config": Command(
        "torchtrain.tools.check_config", "check a config for any number of ranks, print its plan"
    ),
    "preflight": Command(
        "torchtrain.tools.preflight", "predict what memory a run takes, and whether it fits"
    ),
    "prepare": Command(
        "torchtrain.tools.prepare", "tokenize a corpus ahead of the run, into its cache"
    ),
    "train-tokenizer": Command(
        "torchtrain.tools.train_tokenizer", "train a tokenizer on documents of your own"
    ),
    "sweep": Command("torchtrain.tools.sweep", "train a grid or a list of runs, and compare them"),
    "report": Command("torchtrain.tools.report", "show runs as one page of curves, or compare two"),
    "generate": Command("torchtrain.tools.generate", "let a trained model write"),
    "evaluate": Command("torchtrain.tools.evaluate", "measure a trained model on a dataset"),
    "convert": Command("torchtrain.tools.convert", "take a model to Hugging Face's form, or back"),
    "parity": Command("torchtrain.tools.parity", "check that every layout trains the same model"),
    "bench": Command("torchtrain.tools.bench", "measure how fast this machine trains"),
    "bench-data": Command("torchtrain.tools.bench_data", "measure how fast corpora are read"),
    "faults": Command("torchtrain.tools.faults", "train under faults; show that nothing is lost"),
}
"""By name, in the order in which a model comes to be."""

USAGE = """\
usage: torchtrain [--SECTION.KEY VALUE ...]
       torchtrain COMMAND [its options, --help among them]"""


def main() -> int:
    """Run what the command line names, and return the exit status where that is not a program."""
    hide_name()
    arguments = sys.argv[1:]
    if arguments in (["-h"], ["--help"]):
        print(f"{USAGE}\n\n{list_commands()}")
        return 0
    if not arguments or arguments[0].startswith("-"):
        return run("train", arguments)
    name, *rest = arguments
    if name in COMMANDS:
        return run(name, rest)
    close = nearest(name, COMMANDS)
    hint = f"; did you mean {close}?" if close else ""
    print(f"error: torchtrain has no command {name!r}{hint}\n\n{list_commands()}", file=sys.stderr)
    return 2


def run(name: str, arguments: list[str]) -> int:
    """Run a command in this process, as `python -m` does. It ends the process with its status."""
    sys.argv[1:] = arguments
    runpy.run_module(COMMANDS[name].module, run_name="__main__", alter_sys=True)
    return 0


def hide_name() -> None:
    """Give this process the name that it has under `python -m`.

    Ranks are named `torchtrain`, and so is, by its file, an installed script of that name:
    `pkill -USR1 torchtrain`, which asks ranks where they stand, would end their launcher.
    """
    with suppress(OSError):  # not Linux
        Path("/proc/self/comm").write_text(os.path.basename(sys.executable))


def list_commands() -> str:
    """Return the commands, a line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(["The commands are, train where none is named:", *lines])


if __name__ == "__main__":
    sys.exit(main())
