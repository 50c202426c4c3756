"""What the launcher checks of its config and its environment, beside the imports of the ranks."""

import os
import sys
from contextlib import suppress

from torchtrain.config_manager import JobConfig, parse_or_exit
from torchtrain.errors import ConfigError, UserError
from torchtrain.open_files import allow_open_files
from torchtrain.tools.nodes import Nodes


def check_log_rank(world_size: int) -> None:
    """Check that LOG_RANK names ranks of this run.

    Raises:
        UserError: it does not.
    """
    given = os.environ.get("LOG_RANK", "0")
    for rank in given.split(","):
        if not rank.strip().isdigit() or int(rank) >= world_size:
            raise UserError(
                f"LOG_RANK = {given!r}: must be ranks from 0 to {world_size - 1}, "
                "separated by commas"
            )


def find_usable(trainer_args: list[str], nodes: Nodes, processes: int) -> list[int]:
    """Return the numbers of nodes that can share the config, ascending.

    The largest alone, where the number of nodes is fixed or none can: `check_config` says why.
    """
    usable = []
    for count in range(nodes.least, nodes.count + 1) if nodes.is_elastic else []:
        with suppress(ConfigError):
            JobConfig().parse_args(trainer_args, processes * count)
            usable.append(count)
    unusable = nodes.count + 1 - nodes.least - len(usable)
    if usable and unusable and nodes.rank == 0:
        numbers = ", ".join(map(str, usable))
        print(f"of {nodes.least} to {nodes.count} nodes, this config can be shared by {numbers}")
    return usable or [nodes.count]


def check_config(
    trainer_args: list[str], world_size: int, nodes: Nodes, restarts: int, *, on_nvidia: bool
) -> JobConfig:
    """Read the config. A refused one ends this process, after a word to the nodes that wait.

    Raises:
        UserError: restarts are wanted, but there will be no checkpoints to go on from; or nodes may
            come and go, which takes restarts and one global batch size; or too few files may be
            open for so many ranks; or the run surely does not fit into the memory of the GPUs.
    """
    try:
        config = parse_or_exit(trainer_args, world_size)
        elastic = f"NNODES = {nodes.least}:{nodes.count} needs "
        if nodes.is_elastic and config.training.global_batch_size == -1:
            raise UserError(
                f"{elastic}training.global_batch_size: -1 would depend on how many nodes are there"
            )
        if nodes.is_elastic and restarts == 0:
            raise UserError(f"{elastic}MAX_RESTARTS: each loss of a node takes one of them")
        if restarts and not config.checkpoint.enable:
            raise UserError(
                f"MAX_RESTARTS = {restarts} needs checkpoint.enable: without checkpoints every "
                "restart would begin at step 1 again"
            )
        # All ranks connect to the launcher of node 0; those of a restart inherit the limit.
        if warning := allow_open_files(world_size):
            print(f"warning: {warning}", file=sys.stderr)
        if on_nvidia:
            from torchtrain.tools.memory_check import check_memory

            check_memory(config, trainer_args, world_size)
        return config
    except (SystemExit, UserError):
        if nodes.meet_here:
            from torchtrain.tools.meeting import tell_refused

            tell_refused(nodes)
        raise
