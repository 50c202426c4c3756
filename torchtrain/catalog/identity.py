"""Which model a checkpoint holds, and what of the config may change when a run resumes.

The data is compared by the loader, the tensors where they are loaded, the learning-rate schedule
line by line. A test holds that every key is compared, stated, or changes no result.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from torchtrain.catalog.models import EXPERT_DETAILS, FAMILIES, ModelShape, legacy_shape
from torchtrain.errors import SharedUserError
from torchtrain.logging_utils import logger

RESULTS = (
    "optimizer.name",
    "optimizer.beta1",
    "optimizer.beta2",
    "optimizer.eps",
    "optimizer.weight_decay",
    "optimizer.groups",
    "optimizer.muon_momentum",
    "optimizer.muon_nesterov",
    "optimizer.muon_ns_steps",
    "optimizer.muon_ns_dtype",
    "optimizer.muon_adamw_lr",
    "model.converters",
    "quantize.linear.float8.recipe_name",
    "quantize.linear.float8.filter_fqns",
    "router.bias_update_rate",
    "router.balance_loss_weight",
    "router.z_loss_weight",
    "training.max_norm",
    "training.on_nonfinite",
    "training.spike_deviations",
    "training.spike_window",
    "training.document_masking",
    "training.mixed_precision_param",
    "training.mixed_precision_reduce",
    "data.on_bad_row",
    "validation.dataset",
    "validation.dataset_path",
    "validation.seq_len",
    "validation.freq",
    "validation.steps",
    "debug.moe_force_load_balance",
    "experimental.custom_import",
)
"""Keys that are free to change on resume and change what is computed: a change is stated."""

ROUNDING = (
    "optimizer.implementation",
    "training.local_batch_size",
    "training.enable_cpu_offload",
    "parallelism.data_parallel_replicate_degree",
    "parallelism.data_parallel_shard_degree",
    "parallelism.tensor_parallel_degree",
    "parallelism.disable_sequence_parallel",
    "parallelism.disable_loss_parallel",
    "parallelism.enable_async_tensor_parallel",
    "parallelism.pipeline_parallel_degree",
    "parallelism.pipeline_parallel_schedule",
    "parallelism.pipeline_parallel_microbatch_size",
    "parallelism.expert_parallel_degree",
    "parallelism.context_parallel_degree",
    "parallelism.context_parallel_method",
    "parallelism.context_parallel_rotate_method",
    "parallelism.context_parallel_load_balancer",
    "compile.enable",
    "compile.components",
    "compile.backend",
    "quantize.linear.float8.emulate",
    "debug.deterministic",
)
"""Keys that change the order of operations, so the last bits of results: stated as that."""

# They matter only where the rotary frequencies are scaled.
SCALING_DETAILS = ("rope_low_freq_factor", "rope_high_freq_factor", "rope_original_seq_len")

Sections = Mapping[str, Mapping[str, Any]]
"""A config by section and key."""

MAY_DIFFER_PER_NODE = (
    "job.config_file",
    "data.cache_folder",
    # Each node may have a copy of its own: what is in it is compared by fingerprint.
    "training.dataset_path",
    "validation.dataset_path",
    "model.tokenizer_path",
    "model.hf_assets_path",
)
"""Options whose values may differ between the nodes of a run."""


@dataclass(frozen=True, kw_only=True)
class ModelIdentity:
    """Which function of the tokens a model's weights are the parameters of."""

    family: str
    """`model.name`."""
    shape: Mapping[str, Any]
    """The fields of its `ModelShape`; a vocabulary of 0 is the tokenizer's."""


@dataclass(frozen=True)
class Difference:
    """A value that differs from the checkpoint's."""

    key: str
    """The full name of the key."""
    saved: Any
    current: Any

    def __str__(self) -> str:
        return f"{self.key}: {show(self.saved)} in the checkpoint, {show(self.current)} now"


def show(value: Any) -> str:
    """Return a value as the config file has it."""
    return "unset" if value is None else json.dumps(value)


def find_saved_model(config: Sections, shape: Mapping[str, Any] | None) -> ModelIdentity:
    """Return which model a checkpoint holds, by its config and its shape.

    Old checkpoints have no shape. It is what their config and the flavors of their time give.

    Raises:
        SharedUserError: the config does not say it.
    """
    section = config.get("model", {})
    if "name" not in section or "flavor" not in section:
        raise SharedUserError("the checkpoint's config does not say which model it holds")
    if shape is None:
        shape = asdict(legacy_shape(section["name"], section["flavor"], section))
    return ModelIdentity(family=section["name"], shape=shape)


def compare_models(saved: ModelIdentity, current: ModelIdentity) -> list[Difference]:
    """Return what makes the checkpoint's model another function than this one.

    A field that was added after the checkpoint was saved had its default there. A vocabulary of 0
    differs from none: the tokenizer and the rows of the embedding are compared by themselves.
    """
    found = []
    if _find_class(saved.family) != _find_class(current.family):
        found.append(Difference("model.name", saved.family, current.family))
    defaults = {
        field.name: field.default for field in fields(ModelShape) if field.default is not MISSING
    }
    before = {**defaults, **saved.shape}
    now = current.shape
    ignored = _find_idle_fields(_read_shape(before), _read_shape(now))
    for key in {**now, **before}:
        if key not in ignored and before.get(key) != now.get(key):
            found.append(Difference(f"model.{key}", before.get(key), now.get(key)))
    return found


def _read_shape(values: Mapping[str, Any]) -> ModelShape:
    """Return the shape without the fields that it no longer knows."""
    return ModelShape(**{field.name: values[field.name] for field in fields(ModelShape)})


def _find_idle_fields(before: ModelShape, now: ModelShape) -> set[str]:
    """Return the fields in which the shapes may differ and still compute the same function.

    Where a width of 0 stands for another one, what counts is that.
    """
    idle: set[str] = set()
    if before.rope_scaling_factor == now.rope_scaling_factor == 1:
        idle.update(SCALING_DETAILS)
    if before.vocab_size == 0 or now.vocab_size == 0:
        idle.add("vocab_size")
    if before.width_per_head == now.width_per_head:
        idle.add("head_width")
    if before.n_experts == now.n_experts == 0:
        idle.update(EXPERT_DETAILS)
    elif before.width_per_expert == now.width_per_expert:
        idle.add("expert_hidden_dim")
        if before.n_sparse_layers == before.n_layers and now.n_sparse_layers == now.n_layers:
            idle.add("ffn_hidden_dim")
    if before.sparse_layers == now.sparse_layers:
        idle.update(("n_dense_layers", "sparse_every"))
    return idle


def _find_class(family: str) -> str:
    """Return what computes a family's models; its name where it is not registered."""
    return FAMILIES[family].model if family in FAMILIES else family


def require_same_model(
    path: Path, saved: ModelIdentity, current: ModelIdentity, *, accept_changes: bool
) -> None:
    """Check that the checkpoint's model is this run's, or say what differs where that is accepted.

    Args:
        path: of the checkpoint.
        saved: the model that it holds.
        current: this run's.
        accept_changes: `checkpoint.accept_changed_model`.

    Raises:
        SharedUserError: names every key that differs, with both values.
    """
    differences = compare_models(saved, current)
    if not differences:
        return
    lines = "\n".join(f"  {difference}" for difference in differences)
    text = f"{path} holds another model than this run's:\n{lines}"
    if accept_changes:
        logger.warning(
            f"{text}\ncheckpoint.accept_changed_model allows it: the weights are loaded into a "
            "model that computes something else from them"
        )
        return
    settings = ", ".join(f"{each.key} = {show(each.saved)}" for each in differences)
    raise SharedUserError(
        f"{text}\nFor the checkpoint's model set {settings}. To load its weights into this one "
        "anyway, set checkpoint.accept_changed_model = true"
    )


def describe_state_dtype(path: Path, saved: Sections, current: Sections) -> str:
    """Say that the optimizer's states have another precision than saved, and the way out.

    Args:
        path: of the checkpoint.
        saved: its config.
        current: the config now.

    Returns:
        Empty where the precision is the same, or the weights' differs too.
    """
    if saved["training"].get("dtype", "float32") != current["training"]["dtype"]:
        return ""
    before, now = (
        config["optimizer"].get("state_dtype") or current["training"]["dtype"]
        for config in (saved, current)
    )
    if before == now:
        return ""
    return (
        f"optimizer.state_dtype was {before}, is {now}; set it to {show(before)}, or, in another "
        "job.dump_folder, take the weights alone by checkpoint.initial_load_path = "
        f"{show(str(path))}"
    )


def describe_changes(saved: Sections, current: Sections, defaults: Sections) -> tuple[str, bool]:
    """Say which keys that are free to change differ from the checkpoint's.

    Args:
        saved: the checkpoint's config; a key that it does not have had its default.
        current: the config now.
        defaults: of every key.

    Returns:
        One line, empty where nothing differs; and whether more than the last bits can change.
    """
    results = _list_changes(RESULTS, saved, current, defaults)
    rounding = _list_changes(ROUNDING, saved, current, defaults)
    parts = list(results)
    if rounding:
        parts.append(f"in rounding alone: {', '.join(rounding)}")
    return "; ".join(parts), bool(results)


def _list_changes(
    names: Iterable[str], saved: Sections, current: Sections, defaults: Sections
) -> list[str]:
    changes = []
    for name in names:
        section, _, key = name.rpartition(".")
        before = saved.get(section, {}).get(key, defaults[section][key])
        now = current[section][key]
        if before != now:
            changes.append(f"{name} was {show(before)}, is {show(now)}")
    return changes
