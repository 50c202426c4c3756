"""Writing a model in Hugging Face's form: weights, their index and config.json.

A shape decides which architecture it is; what none of them computes is refused by name. One file's
tensors are held at a time, and one weight.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from torchtrain.catalog.models import ModelShape
from torchtrain.checkpoint.hf_folder import CONFIG, INDEX
from torchtrain.models.hf_config import (
    ARCHITECTURES,
    FIELDS,
    SCALING_FIELDS,
    find_architecture,
)
from torchtrain.models.hf_names import find_counterpart, order_as_halves


@dataclass(frozen=True, kw_only=True)
class Export:
    """What is written, beside the weights."""

    shape: ModelShape
    """Of the model, its vocabulary known."""
    seq_len: int
    """Tokens of the longest sequence that it was trained on."""
    special_ids: Mapping[str, int | None]
    """`bos_token_id`, None where there is none, and `eos_token_id`."""
    dtype: torch.dtype | None = None
    """Of the weights; None: as they are."""
    shard_bytes: int = 5 * 10**9
    """Largest size of one file, in bytes; a larger tensor has a file of its own."""


def write_hf_folder(
    folder: Path,
    sizes: Mapping[str, tuple[torch.Size, torch.dtype]],
    read: Callable[[str], Tensor],
    export: Export,
) -> list[str]:
    """Write a model's weights, their index, config.json and generation_config.json.

    Args:
        folder: there, with no such files.
        sizes: of each of our weights, by its name.
        read: returns a whole weight; each is asked for once, in the order of `sizes`.
        export: what else to write.

    Returns:
        The names of the files.

    Raises:
        UserError: Hugging Face has no such model.
    """
    dtypes = {export.dtype or dtype for _, dtype in sizes.values()}
    dtype_name = str(max(dtypes, key=lambda each: each.itemsize)).removeprefix("torch.")
    config = {**to_config(export.shape, export.seq_len, dtype_name), **export.special_ids}
    shards = _plan_shards(sizes, export)
    names = list(dict.fromkeys(shards.values()))
    waiting: dict[str, Tensor] = {}
    for ours in sizes:
        waiting.update(_convert(ours, read(ours), export))
        while waiting and _is_complete(shards, waiting):
            file = shards[next(iter(waiting))]
            part = {name: waiting.pop(name) for name, at in shards.items() if at == file}
            save_file(part, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(0o644)
    assert not waiting
    documents: dict[str, dict[str, Any]] = {
        CONFIG: config,
        "generation_config.json": {"_from_model_config": True, **export.special_ids},
    }
    if len(names) > 1:
        total = sum(_count_bytes(size, dtype, export) for size, dtype in sizes.values())
        documents[INDEX] = {"metadata": {"total_size": total}, "weight_map": shards}
    for name, content in documents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return [*names, *documents]


def _count_bytes(size: torch.Size, dtype: torch.dtype, export: Export) -> int:
    return size.numel() * (export.dtype or dtype).itemsize


def _plan_shards(
    sizes: Mapping[str, tuple[torch.Size, torch.dtype]], export: Export
) -> dict[str, str]:
    """Return the file of each tensor by Hugging Face's name, in the order of writing."""
    numbers: dict[str, int] = {}
    number, filled = 1, 0
    for ours, (size, dtype) in sizes.items():
        names = find_counterpart(ours, export.shape).names
        each = _count_bytes(size, dtype, export) // len(names)
        for name in names:
            if filled and filled + each > export.shard_bytes:
                number, filled = number + 1, 0
            filled += each
            numbers[name] = number
    if number == 1:
        return dict.fromkeys(numbers, "model.safetensors")
    return {name: f"model-{at:05d}-of-{number:05d}.safetensors" for name, at in numbers.items()}


def _is_complete(shards: Mapping[str, str], waiting: Mapping[str, Tensor]) -> bool:
    """Return whether all tensors of the file that is written next are there."""
    file = shards[next(iter(waiting))]
    return all(name in waiting for name, at in shards.items() if at == file)


def _convert(ours: str, weight: Tensor, export: Export) -> dict[str, Tensor]:
    """Return the tensors of one of our weights."""
    theirs = find_counterpart(ours, export.shape)
    if export.dtype is not None:
        weight = weight.to(export.dtype)
    if theirs.rotated_width:
        weight = order_as_halves(weight, theirs.rotated_width)
    tensors = weight.unbind() if theirs.is_stacked else (weight,)
    # A file's tensors may not share memory.
    return {
        name: tensor.clone() if theirs.is_stacked else tensor.contiguous()
        for name, tensor in zip(theirs.names, tensors, strict=True)
    }


def to_config(shape: ModelShape, seq_len: int, dtype: str) -> dict[str, Any]:
    """Return the config.json of a model, without the tokenizer's ids.

    Args:
        shape: of the model, its vocabulary known.
        seq_len: tokens of the longest sequence that it was trained on.
        dtype: name of the weights' type.

    Raises:
        UserError: as `find_architecture`.
    """
    name = find_architecture(shape)
    architecture = ARCHITECTURES[name]
    config: dict[str, Any] = {"architectures": [name], "model_type": architecture.model_type}
    for ours, theirs in (*FIELDS, *architecture.fields):
        config[theirs] = getattr(shape, ours)
    config["head_dim"] = shape.width_per_head
    if name == "MixtralForCausalLM":
        config["intermediate_size"] = shape.width_per_expert
    if name == "Qwen3MoeForCausalLM":
        config["moe_intermediate_size"] = shape.width_per_expert
        dense = [layer for layer in range(shape.n_layers) if not shape.is_sparse(layer)]
        config |= {"decoder_sparse_step": 1, "mlp_only_layers": dense}
    config["rope_theta"] = shape.rope_theta
    config["rope_scaling"] = None
    config["max_position_embeddings"] = seq_len
    if shape.rope_scaling_factor != 1:
        scaling = {theirs: getattr(shape, ours) for ours, theirs in SCALING_FIELDS}
        original = shape.rope_original_seq_len
        config["rope_scaling"] = {"rope_type": "llama3", **scaling}
        config["original_max_position_embeddings"] = original
        config["max_position_embeddings"] = max(seq_len, int(original * shape.rope_scaling_factor))
    config |= {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
    config |= {"attention_dropout": 0.0, "sliding_window": None, "use_cache": True}
    return config | {"initializer_range": 0.02, "torch_dtype": dtype}
