"""The historic face of the config, which `torchtrain.config` reads and checks.

    config = JobConfig().parse_args()          # default < TOML < command line

As a command it is `torchtrain.tools.check_config`.
"""

import os
import runpy
import sys

from torchtrain.installation import exit_without_dependencies

if __name__ == "__main__":
    exit_without_dependencies()

from pydantic import PrivateAttr

from torchtrain.config.reading import Source, read_config
from torchtrain.config.schema import Config
from torchtrain.errors import ConfigError, UserError
from torchtrain.launch_variables import check_place


class JobConfig(Config):
    """All sections. `JobConfig()` holds the defaults; `parse_args` fills it."""

    _notes: list[str] = PrivateAttr(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """What `parse_args` found without effect, to be stated at the start of the run."""
        return self._notes

    def parse_args(
        self,
        args_list: list[str] | None = None,
        world_size: int | None = None,
        beneath: Source | None = None,
        above: Source | None = None,
    ) -> "JobConfig":
        """Fill the sections in place, as `read_config` reads them, and return the config."""
        config, self._notes = read_config(args_list, world_size, beneath, above)
        for field in Config.model_fields:
            setattr(self, field, getattr(config, field))
        return self


def parse_or_exit(args_list: list[str] | None = None, world_size: int | None = None) -> JobConfig:
    """Return the parsed config; print a faulty one's report on stderr and exit with status 2.

    Without a world size this process is one of the ranks: its launcher's variables are checked too.
    """
    try:
        config = JobConfig().parse_args(args_list, world_size)
        if world_size is None:
            check_place(os.environ)
        return config
    except ConfigError as fault:
        print(fault, file=sys.stderr)
    except UserError as fault:
        print(f"error: {fault}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    runpy.run_module("torchtrain.tools.check_config", run_name="__main__", alter_sys=True)
