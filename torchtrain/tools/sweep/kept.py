"""What the folder of a sweep holds of an earlier start, against what its file asks for now."""

from collections.abc import Iterator

import tomli

from torchtrain.catalog.identity import RESULTS, ROUNDING
from torchtrain.config.options import options
from torchtrain.config.schema import Config
from torchtrain.config.toml import quoted, to_toml
from torchtrain.errors import UserError
from torchtrain.tools.sweep.naming import Values
from torchtrain.tools.sweep.plan import Sweep, SweepRun, flat
from torchtrain.utils import user_errors

OF_A_RUN = (
    "training.dataset",
    "training.dataset_path",
    "training.global_batch_size",
    "training.seq_len",
    "training.dtype",
    "training.steps",
    "training.tokens",
    "data.text_key",
    "data.mixture",
    "data.packing",
    "data.token_dtype",
    "data.streaming",
    "data.streams",
    "validation.enable",
    "validation.held_out_share",
    "debug.seed",
    "optimizer.lr",
    "optimizer.state_dtype",
    "lr_scheduler.warmup_steps",
    "lr_scheduler.warmup_ratio",
    "lr_scheduler.total_steps",
    "lr_scheduler.decay_ratio",
    "lr_scheduler.decay_type",
    "lr_scheduler.min_lr_factor",
)
"""Beside those of the model, what a checkpoint is compared in when a run resumes."""
WHERE_IT_BEGINS = (
    "checkpoint.load_step",
    "checkpoint.initial_load_path",
    "checkpoint.initial_load_model_only",
    "checkpoint.initial_load_in_hf",
    "checkpoint.exclude_from_loading",
)
LENGTH = ("training.steps", "training.tokens")


def list_compared() -> list[str]:
    """Return the options that a run's numbers depend on, if only in their last bits."""
    named = {*OF_A_RUN, *WHERE_IT_BEGINS, *RESULTS, *ROUNDING}
    return [name for name in options() if name in named or name.startswith("model.")]


def find_changes(sweep: Sweep) -> dict[str, list[str]]:
    """Return by name which runs that have begun were asked for otherwise, and in which options.

    Their results would stand in one table with those of other options. Options that change no
    result, such as how often something is saved or logged, may change.

    Raises:
        UserError: what a run has left cannot be read.
    """
    defaults = flat(tomli.loads(to_toml(Config())))
    compared = list_compared()
    found = {run.name: list(_compare(sweep, run, defaults, compared)) for run in sweep.runs}
    return {name: differing for name, differing in found.items() if differing}


def _compare(sweep: Sweep, run: SweepRun, defaults: Values, compared: list[str]) -> Iterator[str]:
    """Yield the options in which a run differs; one that its file does not have had its default."""
    file = sweep.path(run, ".toml")
    if not file.exists() or not sweep.path(run).exists():
        return
    with user_errors(f"{file} cannot be read", OSError, ValueError):
        before = defaults | flat(tomli.loads(file.read_text("utf-8")))
    now = defaults | flat(tomli.loads(to_toml(run.config)))
    for key in compared:
        if before.get(key) != now.get(key):
            yield f"{key} was {quoted(before.get(key))}, is {quoted(now.get(key))}"


def check_unchanged(sweep: Sweep) -> None:
    """Check that what has run so far is what the sweep's file and its config file ask for now.

    Raises:
        UserError: names each run and option that differs.
    """
    changes = find_changes(sweep)
    if not changes:
        return
    lines = "\n  ".join(f"{name}: {'; '.join(texts)}" for name, texts in changes.items())
    is_longer = any(text.startswith(LENGTH) for texts in changes.values() for text in texts)
    why = (
        "A run of another length is another run, also from its first step on: the learning rate "
        "is planned for all of it. "
    )
    raise UserError(
        f"{sweep.file}, or its config file, has changed since runs in {sweep.folder} began:\n"
        f"  {lines}\n{why if is_longer else ''}Give the sweep another folder, or move away what "
        "these runs have left: all that begins with their names. --table shows them as they are"
    )


def find_others(sweep: Sweep) -> list[str]:
    """Return the names of runs in the folder that the sweep no longer has."""
    names = {run.name for run in sweep.runs}
    stems = sorted(file.stem for file in sweep.folder.glob("*.toml"))
    return [name for name in stems if name not in names and (sweep.folder / name).is_dir()]
