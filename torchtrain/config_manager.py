"""The historic face of the config, which `torchtrain.config` reads and checks.

    config = JobConfig().parse_args()          # default < TOML < command line

As a command it checks a config without running it; the status is 0, or 2 with a report:

    python -m torchtrain.config_manager [--world-size N] -- --job.config_file FILE ...
"""

import argparse
import sys

from torchtrain.installation import exit_without_dependencies

if __name__ == "__main__":
    exit_without_dependencies()

from pydantic import PrivateAttr

from torchtrain.config.plans import plan_run
from torchtrain.config.reading import read_config
from torchtrain.config.schema import SECTIONS, Config
from torchtrain.config.summary import summarize
from torchtrain.errors import ConfigError


class JobConfig(Config):
    """All sections. `JobConfig()` holds the defaults; `parse_args` fills it."""

    _notes: list[str] = PrivateAttr(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """What `parse_args` found without effect, to be stated at the start of the run."""
        return self._notes

    def parse_args(
        self, args_list: list[str] | None = None, world_size: int | None = None
    ) -> "JobConfig":
        """Fill the sections in place, as `read_config` reads them, and return the config."""
        config, self._notes = read_config(args_list, world_size)
        for section in SECTIONS:
            setattr(self, section, getattr(config, section))
        return self


def parse_or_exit(args_list: list[str] | None = None, world_size: int | None = None) -> JobConfig:
    """Return the parsed config; print a faulty one's report on stderr and exit with status 2."""
    try:
        return JobConfig().parse_args(args_list, world_size)
    except ConfigError as fault:
        print(fault, file=sys.stderr)
        raise SystemExit(2) from None


def main(arguments: list[str]) -> None:
    """Check the config of a run of so many ranks, and print what follows from it."""
    parser = argparse.ArgumentParser(
        prog="python -m torchtrain.config_manager",
        usage="%(prog)s [--world-size N] -- [--SECTION.KEY VALUE ...]",
        description="Check a config, given by train.py's options, without running it.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--world-size", type=int, default=1, metavar="N", help="ranks of the run (default: 1)"
    )
    given, rest = parser.parse_known_args(arguments)
    if given.world_size < 1:
        parser.error(f"--world-size {given.world_size}: must be at least 1")
    trainer_options = [argument for argument in rest if argument != "--"]
    config = parse_or_exit(trainer_options, given.world_size)
    lines = summarize(config, plan_run(config, given.world_size))
    lines += [f"note       {note}" for note in config.notes]
    print("\n".join(["The configuration is good.", *lines]))


if __name__ == "__main__":
    main(sys.argv[1:])
