"""Options that another one leaves without effect: stated at the start, never an error."""

from typing import Any

from torchtrain.catalog.models import EXPERT_DETAILS, ModelShape
from torchtrain.catalog.optimizers import find_optimizer
from torchtrain.config.layout import PIPELINE_KEYS
from torchtrain.config.options import options
from torchtrain.config.plans import plan_shape
from torchtrain.config.schema import Config, Router
from torchtrain.config.sources import plan_sources
from torchtrain.config.toml import quoted

SET = object()  # stands for any value but "unset"

# What a run that saves nothing does without.
SAVING = (
    "checkpoint.enable_first_step_checkpoint",
    "checkpoint.last_save_model_only",
    "checkpoint.last_save_in_hf",
    "checkpoint.keep_every",
    "checkpoint.interval_minutes",
    "checkpoint.async_mode",
    "checkpoint.on_save_error",
)

# Options without effect while another one has a value: {(other option, value): options}.
IDLE_WHILE: dict[tuple[str, Any], tuple[str, ...]] = {
    ("data.mixture", SET): ("training.dataset", "training.dataset_path"),
    ("data.streaming", False): ("data.streams", "data.stall_timeout_seconds"),
    ("parallelism.tensor_parallel_degree", 1): (
        "parallelism.disable_sequence_parallel",
        "parallelism.disable_loss_parallel",
        "parallelism.enable_async_tensor_parallel",
    ),
    ("parallelism.disable_sequence_parallel", True): (
        "parallelism.enable_async_tensor_parallel",  # it overlaps sequence parallelism's exchanges
    ),
    ("parallelism.pipeline_parallel_degree", 1): PIPELINE_KEYS,
    ("parallelism.expert_parallel_degree", 1): (
        "parallelism.pipeline_parallel_expert_parallel_overlap",
    ),
    ("parallelism.module_fqns_per_model_part", SET): (
        "parallelism.pipeline_parallel_layers_per_stage",
        "parallelism.pipeline_parallel_first_stage_less_layers",
        "parallelism.pipeline_parallel_last_stage_less_layers",
    ),
    ("parallelism.context_parallel_degree", 1): (
        "parallelism.context_parallel_method",
        "parallelism.context_parallel_rotate_method",
        "parallelism.context_parallel_load_balancer",
    ),
    ("parallelism.context_parallel_method", "ulysses"): (
        "parallelism.context_parallel_rotate_method",
    ),
    ("checkpoint.enable", False): (
        "checkpoint.load_step",
        "checkpoint.initial_load_path",
        "checkpoint.initial_load_in_hf",
        "checkpoint.exclude_from_loading",
        "checkpoint.load_only",
        *SAVING,
        "checkpoint.export_dtype",
        "checkpoint.accept_changed_data",
        "checkpoint.accept_changed_model",
    ),
    ("checkpoint.initial_load_path", None): (
        "checkpoint.initial_load_model_only",
        "checkpoint.exclude_from_loading",
    ),
    ("checkpoint.initial_load_model_only", True): ("checkpoint.exclude_from_loading",),
    ("checkpoint.load_only", True): SAVING,
    ("checkpoint.keep_latest_k", 0): ("checkpoint.keep_every",),
    ("training.spike_deviations", None): ("training.spike_window",),
    ("validation.dataset", None): ("validation.dataset_path",),
    ("validation.dataset", SET): ("validation.held_out_share",),
    ("debug.deterministic", False): ("debug.deterministic_warn_only",),
}


def find_idle_options(config: Config) -> list[str]:
    """Return one sentence per option that was changed although another one leaves it no effect."""
    found: dict[str, str] = {}
    for (other, idle_value), keys in IDLE_WHILE.items():
        value = get_value(config, other)
        if value == idle_value or (idle_value is SET and value is not None):
            state = "is unset" if value is None else f"= {quoted(value)}"
            for key in keys:
                if get_value(config, key) != options()[key].default:
                    found.setdefault(key, f"has no effect while {other} {state}")
    datasets = {source.dataset for source in plan_sources(config.training, config.data)}
    if config.data.streaming and datasets == {"tokens"}:
        found["data.streaming"] = "has no effect: token files are read in place"
    if config.data.token_dtype and "tokens" not in {*datasets, config.validation.dataset}:
        text = 'has no effect: no data source is a token file (dataset "tokens")'
        found["data.token_dtype"] = text
    training = config.training
    may_skip = training.on_nonfinite == "skip" or training.spike_deviations is not None
    if not may_skip and training.max_skips != options()["training.max_skips"].default:
        found["training.max_skips"] = "has no effect: no step is skipped"
    found.update(_find_idle_families(config))
    own_code = find_optimizer(config.optimizer.name)
    if config.optimizer.state_dtype is not None and not own_code.startswith("torchtrain."):
        text = f"has an effect only if {own_code} reads it"
        found["optimizer.state_dtype"] = text
    if training.on_nonfinite == "skip" and config.debug.detect_anomaly:
        text = "skips no NaN: debug.detect_anomaly ends the run with a traceback in its backward"
        found["training.on_nonfinite"] = text
    checkpoint = config.checkpoint
    if "lr_scheduler" in checkpoint.exclude_from_loading:
        text = "lr_scheduler has no effect: the rate always follows from the config and the step"
        found.setdefault("checkpoint.exclude_from_loading", text)
    exports = checkpoint.last_save_model_only or checkpoint.last_save_in_hf
    if checkpoint.export_dtype is not None and not exports:
        text = "has no effect while neither last_save_model_only nor last_save_in_hf is set"
        found.setdefault("checkpoint.export_dtype", text)
    shape = plan_shape(config.model)
    found.update(_find_idle_balance(config, shape))
    found.update(_find_idle_widths(config, shape))
    return [f"{key} = {quoted(get_value(config, key))} {text}" for key, text in found.items()]


def _find_idle_families(config: Config) -> dict[str, str]:
    """Return why options that are all for one thing have no effect, by their names."""
    reasons = {}
    if config.optimizer.name != "Muon":
        reasons["optimizer.muon_"] = f"optimizer.name = {quoted(config.optimizer.name)}"
    if not config.model.converters:
        reasons["quantize."] = "model.converters = []"
    elif not config.quantize_linear_float8.enable_fsdp_float8_all_gather:
        reasons["quantize.linear.float8.precompute"] = (
            "quantize.linear.float8.enable_fsdp_float8_all_gather = false"
        )
    return {
        name: f"has no effect while {reason}"
        for beginning, reason in reasons.items()
        for name, option in options().items()
        if name.startswith(beginning) and get_value(config, name) != option.default
    }


def _find_idle_balance(config: Config, shape: ModelShape) -> dict[str, str]:
    """Return why options that spread tokens over experts have no effect, by their names."""
    found = {}
    if not shape.router_bias:
        found["router.bias_update_rate"] = "has no effect while the model's router_bias = false"
    if shape.n_sparse_layers == 0:
        names = [f"router.{key}" for key in Router.model_fields]
        for name in (*names, "debug.moe_force_load_balance"):
            found[name] = "has no effect: the model has no sparse layer"
    return {
        name: text
        for name, text in found.items()
        if get_value(config, name) != options()[name].default
    }


def _find_idle_widths(config: Config, shape: ModelShape) -> dict[str, str]:
    """Return what is said of given keys of [model] that this shape leaves without effect."""
    idle: dict[str, str] = {}
    if shape.n_experts == 0:
        idle = dict.fromkeys(EXPERT_DETAILS, "has no effect while model.n_experts = 0")
    elif shape.n_sparse_layers == shape.n_layers and shape.expert_hidden_dim:
        idle["ffn_hidden_dim"] = (
            "has no effect: all layers are sparse, and model.expert_hidden_dim is the width there"
        )
    given = config.model.model_dump(exclude_none=True)
    return {f"model.{key}": text for key, text in idle.items() if key in given}


def get_value(config: Config, name: str) -> Any:
    """Return the value of an option by its full name, `section.key`."""
    section, _, key = name.rpartition(".")
    return getattr(getattr(config, section.replace(".", "_")), key)
