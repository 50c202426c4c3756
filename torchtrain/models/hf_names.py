"""The weights of `models.llama` under the names, and in the order of rows, of Hugging Face.

Differences beside names: Hugging Face's rotation turns the two halves of a head, ours neighboring
pairs (rotary.py), so the rows of wq, wk and of a head's norm stand in another order; and it has a
tensor per expert where ours are stacked. Both directions follow from one table.

Source: the state dictionaries of LlamaForCausalLM, Qwen3ForCausalLM, MixtralForCausalLM and
Qwen3MoeForCausalLM (https://github.com/huggingface/transformers).

Letters: C head width, E experts.
"""

from dataclasses import dataclass

from torch import Tensor

from torchtrain.catalog.models import ModelShape

# Ours and theirs; the first "*" is the layer's number, a second one the expert's.
NAMES = (
    ("tok_embeddings.weight", "model.embed_tokens.weight"),
    ("layers.*.attention.wq.weight", "model.layers.*.self_attn.q_proj.weight"),
    ("layers.*.attention.wk.weight", "model.layers.*.self_attn.k_proj.weight"),
    ("layers.*.attention.wv.weight", "model.layers.*.self_attn.v_proj.weight"),
    ("layers.*.attention.wo.weight", "model.layers.*.self_attn.o_proj.weight"),
    ("layers.*.attention.q_norm.weight", "model.layers.*.self_attn.q_norm.weight"),
    ("layers.*.attention.k_norm.weight", "model.layers.*.self_attn.k_norm.weight"),
    ("layers.*.feed_forward.w1.weight", "model.layers.*.mlp.gate_proj.weight"),
    ("layers.*.feed_forward.w2.weight", "model.layers.*.mlp.down_proj.weight"),
    ("layers.*.feed_forward.w3.weight", "model.layers.*.mlp.up_proj.weight"),
    ("layers.*.attention_norm.weight", "model.layers.*.input_layernorm.weight"),
    ("layers.*.ffn_norm.weight", "model.layers.*.post_attention_layernorm.weight"),
    ("norm.weight", "model.norm.weight"),
    ("output.weight", "lm_head.weight"),
)
MIXTRAL_EXPERTS = (
    ("layers.*.moe.router.gate.weight", "model.layers.*.block_sparse_moe.gate.weight"),
    ("layers.*.moe.experts.w1", "model.layers.*.block_sparse_moe.experts.*.w1.weight"),
    ("layers.*.moe.experts.w2", "model.layers.*.block_sparse_moe.experts.*.w2.weight"),
    ("layers.*.moe.experts.w3", "model.layers.*.block_sparse_moe.experts.*.w3.weight"),
)
QWEN3_EXPERTS = (
    ("layers.*.moe.router.gate.weight", "model.layers.*.mlp.gate.weight"),
    ("layers.*.moe.experts.w1", "model.layers.*.mlp.experts.*.gate_proj.weight"),
    ("layers.*.moe.experts.w2", "model.layers.*.mlp.experts.*.down_proj.weight"),
    ("layers.*.moe.experts.w3", "model.layers.*.mlp.experts.*.up_proj.weight"),
)
ROTATED = ("attention.wq.weight", "attention.wk.weight", "q_norm.weight", "k_norm.weight")
"""Ends of the names of the weights whose rows the rotation pairs."""


@dataclass(frozen=True)
class Counterpart:
    """What holds one of our weights in a Hugging Face model."""

    names: list[str]
    """The tensor; of stacked weights one per expert."""
    is_stacked: bool
    rotated_width: int
    """Head width C where rows are in the other order, else 0."""


def find_counterpart(name: str, shape: ModelShape) -> Counterpart:
    """Return the counterpart of our weight of this full name in a model of this shape."""
    parts = name.split(".")
    layer = parts[1] if parts[0] == "layers" else ""
    pattern = name.replace(f"layers.{layer}.", "layers.*.", 1) if layer else name
    experts = QWEN3_EXPERTS if shape.qk_norm else MIXTRAL_EXPERTS
    theirs = dict((*NAMES, *experts))[pattern].replace("*", layer, 1)
    is_stacked = "*" in theirs
    numbers = range(shape.n_experts) if is_stacked else range(1)
    return Counterpart(
        names=[theirs.replace("*", str(number)) for number in numbers],
        is_stacked=is_stacked,
        rotated_width=shape.width_per_head if name.endswith(ROTATED) else 0,
    )


def order_as_halves(weight: Tensor, width: int) -> Tensor:
    """Reorder the rows of heads of this width, [heads · C, ...], from neighboring pairs to halves.

    Rows 0, 2, 4, … of a head come before its rows 1, 3, 5, …
    """
    return weight.unflatten(0, (-1, width // 2, 2)).transpose(1, 2).flatten(0, 2)


def order_as_pairs(weight: Tensor, width: int) -> Tensor:
    """Undo `order_as_halves`."""
    return weight.unflatten(0, (-1, 2, width // 2)).transpose(1, 2).flatten(0, 2)
