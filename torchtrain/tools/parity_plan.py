"""What `torchtrain.tools.parity` runs: the layouts asked for, and the options of each run."""

from dataclasses import dataclass
from typing import Any

from torchtrain.config.options import options
from torchtrain.config.reading import read_command_line
from torchtrain.config.toml import toml_value
from torchtrain.config_manager import JobConfig
from torchtrain.errors import UserError
from torchtrain.installation import PROGRAM
from torchtrain.tools.launch import visible_gpus
from torchtrain.tools.layouts import LAYOUTS, TASKS, Layout
from torchtrain.utils import nearest

SHRUNK: dict[str, Any] = {
    "model.dim": 64,
    "model.n_layers": 4,
    "model.n_heads": 8,
    "model.n_kv_heads": 4,
    "model.ffn_hidden_dim": 128,
    "training.seq_len": 64,
    "training.global_batch_size": 8,
    "training.local_batch_size": 8,
    "comm.init_timeout_seconds": 120,
}
"""What makes debug_model.toml small enough for the whole table to take minutes on two cores."""


@dataclass(frozen=True)
class Plan:
    """What is run, before any layout is put over it."""

    config_file: str
    values: dict[str, Any]
    """Options over the file, by full name."""
    is_shrunk: bool = False
    """Whether the model is debug_model.toml's, made small."""
    timeout_seconds: int = 120
    on_gpus: bool = False
    worker: tuple[str, ...] = ("-m", "torchtrain.tools.parity_ranks")
    """What torchrun starts on each rank."""

    def command_line(self, task: str, layout: Layout | None = None) -> list[str]:
        """Return the trainer options of a layout; of the task's reference without one."""
        overrides = TASKS[task].overrides
        given_values = (TASKS[task].shrunk if self.is_shrunk else {}) | self.values
        if layout is None:
            values = given_values | plain() | overrides
        else:
            values = plain() | given_values | overrides | layout.overrides
        given = [f"--{name}={as_text(value)}" for name, value in values.items()]
        return ["--job.config_file", self.config_file, *given]


def plain() -> dict[str, Any]:
    """Return the layout options (how a model is run, not what is trained) of the reference."""
    sections = ("parallelism", "activation_checkpoint", "compile", "checkpoint")
    values = {
        name: option.default for name, option in options().items() if name.split(".")[0] in sections
    }
    for key in ("dtype", "mixed_precision_param", "mixed_precision_reduce"):
        values[f"training.{key}"] = "float32"
    values["training.enable_cpu_offload"] = False
    return values


def as_text(value: Any) -> str:
    """Return a value as the command line takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "none"
    if isinstance(value, dict):
        return toml_value(value)
    if isinstance(value, list):
        separator = ";" if value and isinstance(value[0], list) else ","
        return separator.join(map(as_text, value))
    return str(value)


def choose(names: str) -> dict[str, Layout]:
    """Return the layouts that `--layouts` names.

    Raises:
        UserError: a name is unknown.
    """
    if names == "all":
        return LAYOUTS
    for name in names.split(","):
        if name not in LAYOUTS:
            close = nearest(name, LAYOUTS)
            hint = f"did you mean {close}? " if close else ""
            allowed = ", ".join(LAYOUTS)
            raise UserError(
                f"--layouts: {name!r} is unknown; {hint}Allowed: all, or some of {allowed}"
            )
    return {name: LAYOUTS[name] for name in names.split(",")}


def make_plan(
    config_file: str | None, steps: int, trainer_options: list[str], layouts: dict[str, Layout]
) -> Plan:
    """Check what all layouts have in common.

    Raises:
        UserError: the reference's configuration has a fault.
    """
    given = read_command_line(trainer_options)
    if given.faults:
        raise UserError("\n".join(fault.text for fault in given.faults))
    file = config_file or str(PROGRAM / "train_configs" / "debug_model.toml")
    values = ({} if config_file else SHRUNK) | {"training.steps": steps} | given.values
    config = JobConfig().parse_args(Plan(file, values).command_line("plain"), world_size=1)
    ranks = max(layout.ranks for layout in layouts.values())
    if config.training.global_batch_size == -1:  # would depend on the layout
        values["training.global_batch_size"] = config.training.local_batch_size * ranks
    return Plan(
        config_file=file,
        values=values,
        is_shrunk=config_file is None,
        timeout_seconds=config.comm.init_timeout_seconds,
        on_gpus=visible_gpus() >= ranks,
    )
