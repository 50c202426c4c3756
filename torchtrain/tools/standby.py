"""Ranks that import what they need before they are told which ranks they are.

The imports take seconds, most of a small run's start. At the first start they run beside the
launcher's own. Where ranks may be restarted, the next attempt's have run before they are needed.

    python torchtrain/tools/standby.py READ_END train.py [trainer options]

is one of them, which the launcher starts. It waits for the rank's environment at the end of a pipe
that it has inherited, and then is that rank. Without one it leaves.

Not by `-m`, which looks for torchtrain in the working directory first: that can be another one's.
"""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from typing import IO

from torchtrain.early_interrupt import end_on_interrupt
from torchtrain.imports import begin_imports
from torchtrain.orphans import end_with_launcher
from torchtrain.tools.rank_errors import RankErrors

IMPORTS = (
    "pydantic",
    "torch",
    "torch._dynamo",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "torch.nn.attention.flex_attention",
)
"""What takes long of what a rank imports, and nothing of torchtrain's: what
`experimental.custom_import` names comes before that."""

END_S = 5.0
"""How long a process may take to end once it is killed."""


@dataclass
class Standby:
    """A process that waits."""

    process: subprocess.Popen[bytes]
    pipe: IO[str]
    """What its environment is written to."""


class Standbys:
    """The processes that wait on this node, at most one for each of its ranks.

    Args:
        command: of a rank: Python, its options, train.py and the trainer's options.
        count: number of ranks on this node.
    """

    def __init__(self, command: list[str], count: int) -> None:
        self.command = command
        self.count = count
        self.waiting: dict[int, Standby] = {}
        """By local rank."""
        self.are_of_use = True
        """Whether they can become ranks, and the host lets them start."""
        self.errors = RankErrors()
        """What those that wait, and the ranks, write to stderr."""

    def start(self, first_rank: int | None = None, at_most: int | None = None) -> None:
        """Start those that are not there. Where the host refuses, ranks are new processes.

        Args:
            first_rank: this node's, where the ranks start for the first time: a rank may be
                interrupted before its imports are done, and rank 0 alone then says so.
            at_most: so many of those that wait, the first; None: one for each rank.
        """
        script = next(place for place, word in enumerate(self.command) if word.endswith(".py"))
        python, rank_command = self.command[:script], self.command[script:]
        wanted = self.count if at_most is None else at_most
        for local_rank in range(wanted if self.are_of_use else 0):
            if local_rank in self.waiting:
                continue
            environment = dict(os.environ)
            if first_rank is not None:
                environment["RANK"] = str(first_rank + local_rank)
            try:
                standby = self._start_one(python, rank_command, environment)
            except OSError:
                self.are_of_use = False
                return
            self.waiting[local_rank] = standby

    def _start_one(
        self, python: list[str], rank_command: list[str], environment: Mapping[str, str]
    ) -> Standby:
        read_end, write_end = os.pipe()
        pipe = os.fdopen(write_end, "w")
        try:
            process = subprocess.Popen(
                [*python, __file__, str(read_end), *rank_command],
                env=environment,
                stderr=self.errors.sink,
                pass_fds=[read_end],
                start_new_session=True,
            )
        except OSError:
            pipe.close()
            raise
        finally:
            os.close(read_end)
        return Standby(process, pipe)

    def take(
        self, command: list[str], environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes] | None:
        """Return a process that becomes this rank, or None if none is there.

        Where torchrun would start another command, as with PYTHON_EXEC, none ever is.
        """
        if command != self.command:
            self.give_up()
        standby = self.waiting.pop(int(environment["LOCAL_RANK"]), None)
        if standby is None:
            return None
        is_sent = False
        if standby.process.poll() is None:
            with suppress(BrokenPipeError), standby.pipe:
                json.dump(dict(environment), standby.pipe)
                standby.pipe.flush()
                is_sent = True
        if is_sent:
            return standby.process
        end(standby)
        return None

    def give_up(self) -> None:
        """End those that wait, and start no more: they cannot become ranks."""
        self.are_of_use = False
        while self.waiting:
            end(self.waiting.popitem()[1])

    def close(self) -> None:
        """End those that are left, and pass on their last words."""
        self.give_up()
        self.errors.drain()


def end(standby: Standby) -> None:
    """End a process that has nothing to lose."""
    with suppress(BrokenPipeError):  # it had begun to be written to
        standby.pipe.close()
    standby.process.kill()
    with suppress(subprocess.TimeoutExpired):  # as when it waits for a disk that is gone
        standby.process.wait(END_S)


def look_for_modules_as(script: str) -> None:
    """Look for modules where Python would if it ran this script, not beside this file.

    Its folder is the first on the search path, and torchtrain.tools puts ours before it.
    """
    here = os.path.dirname(__file__)
    if here in sys.path:  # not with PYTHONSAFEPATH, under which no script's is
        sys.path[: sys.path.index(here) + 1] = [os.path.dirname(os.path.realpath(script))]


def main(arguments: list[str]) -> int:
    """Import, wait, and be the rank; returns only where there is none to be."""
    end_with_launcher()
    end_on_interrupt(before="the first step")
    begin_imports()
    read_end, *rank_command = arguments
    look_for_modules_as(rank_command[0])
    with suppress(ImportError):  # train.py says what is missing
        for name in IMPORTS:
            import_module(name)
    with os.fdopen(int(read_end)) as pipe:
        environment = pipe.read()
    if not environment:
        return 0
    os.environ.clear()
    os.environ.update(json.loads(environment))
    sys.argv = rank_command
    runpy.run_path(rank_command[0], run_name="__main__")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
