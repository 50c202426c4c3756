"""Options that another one leaves without effect: stated at the start, never an error."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torchtrain.config.options import options
from torchtrain.config.schema import Config
from torchtrain.config.sources import plan_sources
from torchtrain.config.toml import quoted

# Options that only matter once another one leaves its default: {enabling option: its options}.
DETAILS = {
    "parallelism.tensor_parallel_degree": (
        "parallelism.disable_sequence_parallel",
        "parallelism.disable_loss_parallel",
        "parallelism.enable_async_tensor_parallel",
    ),
    "parallelism.context_parallel_degree": (
        "parallelism.context_parallel_method",
        "parallelism.context_parallel_rotate_method",
        "parallelism.context_parallel_load_balancer",
    ),
    "parallelism.pipeline_parallel_degree": (
        "parallelism.pipeline_parallel_schedule",
        "parallelism.pipeline_parallel_microbatch_size",
        "parallelism.pipeline_parallel_layers_per_stage",
        "parallelism.pipeline_parallel_first_stage_less_layers",
        "parallelism.pipeline_parallel_last_stage_less_layers",
        "parallelism.module_fqns_per_model_part",
    ),
    "data.streaming": ("data.streams", "data.stall_timeout_seconds"),
    "checkpoint.enable": (
        "checkpoint.load_step",
        "checkpoint.initial_load_path",
        "checkpoint.load_only",
        "checkpoint.enable_first_step_checkpoint",
        "checkpoint.accept_changed_data",
    ),
    "checkpoint.initial_load_path": ("checkpoint.initial_load_model_only",),
    "debug.deterministic": ("debug.deterministic_warn_only",),
}


@dataclass(frozen=True)
class Rule:
    """Options that have no effect while something applies."""

    applies: bool
    keys: tuple[str, ...]
    reason: str
    """Ends the sentence "... has no effect"."""


def find_idle_options(config: Config) -> list[str]:
    """Return one sentence per option that was changed although another one leaves it no effect."""
    found = {}
    for rule in [*_details(config), *_data_rules(config), *_layout_rules(config)]:
        for key in rule.keys:
            value = get_value(config, key)
            if rule.applies and value != options()[key].default and key not in found:
                found[key] = f"{key} = {quoted(value)} has no effect{rule.reason}"
    return list(found.values())


def get_value(config: Config, name: str) -> Any:
    """Return the value of an option by its full name, `section.key`."""
    section, _, key = name.partition(".")
    return getattr(getattr(config, section), key)


def _details(config: Config) -> Iterator[Rule]:
    for enabling, keys in DETAILS.items():
        value = get_value(config, enabling)
        reason = f" while {enabling} = {quoted(value)}"
        if value is None:
            reason = f" without {enabling}"
        yield Rule(applies=value == options()[enabling].default, keys=keys, reason=reason)


def _data_rules(config: Config) -> list[Rule]:
    data, validation = config.data, config.validation
    datasets = {source.dataset for source in plan_sources(config.training, data)}
    reads_token_files = "tokens" in datasets or validation.dataset == "tokens"
    return [
        Rule(
            applies=data.mixture is not None,
            keys=("training.dataset", "training.dataset_path"),
            reason=": data.mixture names the sources",
        ),
        Rule(
            applies=not reads_token_files,
            keys=("data.token_dtype",),
            reason=': no source is a token file (dataset "tokens")',
        ),
        Rule(
            applies=datasets == {"tokens"},
            keys=("data.streaming",),
            reason=": token files are read in place",
        ),
        Rule(
            applies=validation.enable and validation.dataset is None,
            keys=("validation.dataset_path",),
            reason=" without validation.dataset",
        ),
        Rule(
            applies=validation.enable and validation.dataset is not None,
            keys=("validation.held_out_share",),
            reason=f": {quoted(validation.dataset)} is validated on (validation.dataset)",
        ),
    ]


def _layout_rules(config: Config) -> list[Rule]:
    parallelism = config.parallelism
    return [
        Rule(
            applies=parallelism.context_parallel_method == "ulysses",
            keys=("parallelism.context_parallel_rotate_method",),
            reason=' with parallelism.context_parallel_method = "ulysses"',
        ),
        Rule(
            applies=parallelism.disable_sequence_parallel,
            keys=("parallelism.enable_async_tensor_parallel",),
            reason=" with parallelism.disable_sequence_parallel = true: it overlaps the "
            "communication of sequence parallelism",
        ),
        Rule(
            applies=parallelism.module_fqns_per_model_part is not None,
            keys=(
                "parallelism.pipeline_parallel_layers_per_stage",
                "parallelism.pipeline_parallel_first_stage_less_layers",
                "parallelism.pipeline_parallel_last_stage_less_layers",
            ),
            reason=" with parallelism.module_fqns_per_model_part, which lists each stage's layers",
        ),
        Rule(
            applies=config.checkpoint.load_only,
            keys=("checkpoint.enable_first_step_checkpoint",),
            reason=": checkpoint.load_only = true saves nothing",
        ),
    ]
