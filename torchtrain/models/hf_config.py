"""The config.json of Hugging Face, and the shape of the model that it describes.

What no model here computes is refused by name. `torchtrain.tools.hf_export` goes the other way by
the same tables.

Source: the configuration classes of https://github.com/huggingface/transformers. Fields that only
other readers need (vLLM, llama.cpp: `rope_theta` and `original_max_position_embeddings` at the top
level) are written too.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, get_type_hints

from torchtrain.catalog.models import ModelShape
from torchtrain.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """A kind of model that Hugging Face has too."""

    model_type: str
    family: str
    """The family here that such a model is taken for, where its shape is no known flavor's."""
    qk_norm: bool
    fields: tuple[tuple[str, str], ...]
    """Fields of the shape and theirs, beside `FIELDS`."""


FIELDS = (
    ("dim", "hidden_size"),
    ("n_layers", "num_hidden_layers"),
    ("n_heads", "num_attention_heads"),
    ("n_kv_heads", "num_key_value_heads"),
    ("head_width", "head_dim"),
    ("ffn_hidden_dim", "intermediate_size"),
    ("vocab_size", "vocab_size"),
    ("norm_eps", "rms_norm_eps"),
    ("tied_embeddings", "tie_word_embeddings"),
)
MIXTRAL_FIELDS = (("n_experts", "num_local_experts"), ("experts_per_token", "num_experts_per_tok"))
QWEN3_MOE_FIELDS = (
    ("n_experts", "num_experts"),
    ("experts_per_token", "num_experts_per_tok"),
    ("expert_hidden_dim", "moe_intermediate_size"),
    ("router_renormalize", "norm_topk_prob"),
)
SCALING_FIELDS = (
    ("rope_scaling_factor", "factor"),
    ("rope_low_freq_factor", "low_freq_factor"),
    ("rope_high_freq_factor", "high_freq_factor"),
    ("rope_original_seq_len", "original_max_position_embeddings"),
)
ARCHITECTURES = {
    "LlamaForCausalLM": Architecture("llama", "llama3", qk_norm=False, fields=()),
    "MistralForCausalLM": Architecture("mistral", "llama3", qk_norm=False, fields=()),
    "Qwen3ForCausalLM": Architecture("qwen3", "qwen3", qk_norm=True, fields=()),
    "MixtralForCausalLM": Architecture("mixtral", "mixtral", qk_norm=False, fields=MIXTRAL_FIELDS),
    "Qwen3MoeForCausalLM": Architecture(
        "qwen3_moe", "qwen3", qk_norm=True, fields=QWEN3_MOE_FIELDS
    ),
}

REPRESENTED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "embedding_multiplier": (1, None),
    "residual_multiplier": (1, None),
    "logits_scaling": (1, None),
}
"""By a field of config.json that changes what the model computes: the values that ours can have."""

TYPES = get_type_hints(ModelShape)
NAMES_OF_TYPES = {int: "positive integer", float: "positive number", bool: "boolean"}

OPTIONAL = {
    "tie_word_embeddings": False,
    "head_dim": 0,
    "norm_topk_prob": False,
}
"""Fields that may be missing, and what that means."""


def find_architecture(shape: ModelShape) -> str:
    """Return the architecture that computes the same as a model of this shape.

    Raises:
        UserError: none does; names the keys of [model] that stand against it.
    """
    if shape.n_experts == 0:
        return "Qwen3ForCausalLM" if shape.qk_norm else "LlamaForCausalLM"
    wanted: dict[str, Any] = {
        "router_scores": "softmax",
        "router_scale": 1.0,
        "router_bias": False,
        "n_shared_experts": 0,
    }
    if not shape.qk_norm:
        wanted |= {"router_renormalize": True, "n_dense_layers": 0, "sparse_every": 1}
    against = [
        f"model.{key} = {getattr(shape, key)!r} (it must be {value!r})"
        for key, value in wanted.items()
        if getattr(shape, key) != value
    ]
    if against:
        raise UserError(
            f"Hugging Face's {'Qwen3Moe' if shape.qk_norm else 'Mixtral'} does not compute this "
            f"model: {', '.join(against)}"
        )
    return "Qwen3MoeForCausalLM" if shape.qk_norm else "MixtralForCausalLM"


def to_shape(config: Mapping[str, Any]) -> tuple[str, ModelShape]:
    """Return the family and the shape of the model that a config.json describes.

    Raises:
        UserError: it is not one of ours; names the field, what it is and what it may be.
    """
    name = _find_named(config)
    architecture = ARCHITECTURES[name]
    _check_represented(config)
    values: dict[str, Any] = {"qk_norm": architecture.qk_norm}
    for ours, theirs in (*FIELDS, *architecture.fields):
        values[ours] = _read_field(config, ours, theirs, _find_default(theirs, config))
    values |= _read_rope(config)
    if name == "Qwen3MoeForCausalLM":
        values |= _read_sparse_layers(config, values["n_layers"])
    return architecture.family, ModelShape(**values)


def _find_named(config: Mapping[str, Any]) -> str:
    """Return the architecture that config.json names."""
    named = config.get("architectures") or [None]
    for name in named if isinstance(named, list) else [named]:
        if name in ARCHITECTURES:
            return str(name)
    raise UserError(f"architectures = {named} is not among {', '.join(ARCHITECTURES)}")


def _check_represented(config: Mapping[str, Any]) -> None:
    """Check that no field asks for what a model here cannot compute."""
    for field, allowed in REPRESENTED.items():
        if field in config and config[field] not in allowed:
            raise UserError(
                f"{field} = {_show(config[field])}, but only {_show(allowed[0])} is known here"
            )
    window = config.get("sliding_window")
    if window is not None and config.get("use_sliding_window", True):
        raise UserError(f"sliding_window = {window}: attention within a window is not known here")
    others = sorted(set(config.get("layer_types") or ()) - {"full_attention"})
    if others:
        raise UserError(f"layer_types has {', '.join(others)}; only full_attention is known here")


def _find_default(theirs: str, config: Mapping[str, Any]) -> Any:
    """Return what a field means where it is missing; None: it must be there."""
    model_type = config.get("model_type")
    if theirs == "num_key_value_heads" and model_type == "llama":  # Llama 1 came without it
        return config.get("num_attention_heads")
    if theirs == "num_experts":
        return config.get("num_local_experts")  # the name that transformers 5 writes
    if theirs == "head_dim" and model_type == "qwen3":  # 128 there, where others divide
        return None
    return OPTIONAL.get(theirs)


def _read_field(config: Mapping[str, Any], ours: str, theirs: str, default: Any) -> Any:
    """Return a field, of the type that the shape has for it."""
    value = config.get(theirs)
    if value is None:
        value = default
    kind = TYPES[ours]
    if value is None:
        raise UserError(f"{theirs} is missing")
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is not bool and value < 0):
        raise UserError(f"{theirs} = {_show(value)} is not a {NAMES_OF_TYPES[kind]}")
    return value


def _read_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return base and scaling of the rotary frequencies, in the old fields or in the new one."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = config.get("rope_theta", rope.get("rope_theta"))
    if theta is None and config.get("model_type") == "llama":  # Llama 1 and 2 came without it
        theta = 10_000.0
    values = {"rope_theta": _read_field({"rope_theta": theta}, "rope_theta", "rope_theta", None)}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return values
    if kind != "llama3":
        raise UserError(f"rope type {_show(kind)} is not known here; default and llama3 are")
    return values | {
        ours: _read_field(rope, ours, theirs, config.get(theirs)) for ours, theirs in SCALING_FIELDS
    }


def _read_sparse_layers(config: Mapping[str, Any], n_layers: int) -> dict[str, int]:
    """Return which layers are sparse, as the shape says it."""
    step = config.get("decoder_sparse_step", 1)
    dense = config.get("mlp_only_layers") or []
    sparse = [layer for layer in range(n_layers) if layer not in dense and (layer + 1) % step == 0]
    for first in range(n_layers):
        for every in range(1, n_layers + 1):
            if sparse == list(range(first + every - 1, n_layers, every)):
                return {"n_dense_layers": first, "sparse_every": every}
    raise UserError(
        f"mlp_only_layers = {dense}, decoder_sparse_step = {step}: the sparse layers {sparse} are "
        "not every n-th after some dense ones"
    )


def _show(value: Any) -> str:
    return json.dumps(value)
