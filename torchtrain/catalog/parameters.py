"""A model's parameters: names, shapes, how many. No torch here: the config check reads it."""

import math
from dataclasses import dataclass

from torchtrain.catalog.models import TRANSFORMER, ModelShape, find_family

Shapes = dict[str, tuple[int, ...]]
"""Shapes of parameters by their names."""


@dataclass(frozen=True)
class ParameterCount:
    """How many parameters a model has; tied weights count once."""

    total: int
    active: int
    """Those that take part in the computation of one token: of the routed experts, its own."""
    inner: int
    """Those beside embedding and output projection, of all experts."""


def list_parameters(family: str, shape: ModelShape) -> list[str] | None:
    """Return the full names of the whole model's parameters; None for a class of the user's.

    Raises:
        UserError: there is no such family.
    """
    if find_family(family).model != TRANSFORMER:
        return None
    return list(list_shapes(shape))


def count_parameters(family: str, shape: ModelShape) -> ParameterCount | None:
    """Return how many parameters the whole model has; None for a class of the user's.

    Raises:
        UserError: there is no such family.
    """
    if find_family(family).model != TRANSFORMER:
        return None
    sizes = {name: math.prod(dimensions) for name, dimensions in list_shapes(shape).items()}
    total = sum(sizes.values())
    experts = sum(size for name, size in sizes.items() if ".moe.experts." in name)
    used = 0
    if shape.n_experts > 0:
        used = experts // shape.n_experts * shape.experts_per_token
    ends = sizes["tok_embeddings.weight"] + sizes.get("output.weight", 0)
    return ParameterCount(total=total, active=total - experts + used, inner=total - ends)


def list_shapes(shape: ModelShape) -> Shapes:
    """Return the shapes of the parameters of `models.llama.Transformer` by their full names."""
    ends = (shape.vocab_size, shape.dim)
    shapes: Shapes = {"tok_embeddings.weight": ends}
    for layer in range(shape.n_layers):
        of_block = {
            **_list_attention(shape),
            **_list_feed_forward(shape, layer),
            "attention_norm.weight": (shape.dim,),
            "ffn_norm.weight": (shape.dim,),
        }
        shapes |= {f"layers.{layer}.{name}": each for name, each in of_block.items()}
    shapes["norm.weight"] = (shape.dim,)
    if not shape.tied_embeddings:
        shapes["output.weight"] = ends
    return shapes


def _list_attention(shape: ModelShape) -> Shapes:
    q_width = shape.n_heads * shape.width_per_head
    kv_width = shape.n_kv_heads * shape.width_per_head
    modules: Shapes = {
        "wq": (q_width, shape.dim),
        "wk": (kv_width, shape.dim),
        "wv": (kv_width, shape.dim),
        "wo": (shape.dim, q_width),
    }
    if shape.qk_norm:
        modules |= {"q_norm": (shape.width_per_head,), "k_norm": (shape.width_per_head,)}
    return {f"attention.{module}.weight": each for module, each in modules.items()}


def _list_feed_forward(shape: ModelShape, layer: int) -> Shapes:
    if not shape.is_sparse(layer):
        weights = _list_swiglu(shape.dim, shape.ffn_hidden_dim)
        return {f"feed_forward.{name}.weight": each for name, each in weights.items()}
    shapes: Shapes = {"moe.router.gate.weight": (shape.n_experts, shape.dim)}
    for name, each in _list_swiglu(shape.dim, shape.width_per_expert).items():
        shapes[f"moe.experts.{name}"] = (shape.n_experts, *each)
    if shape.n_shared_experts:
        width = shape.n_shared_experts * shape.width_per_expert
        for name, each in _list_swiglu(shape.dim, width).items():
            shapes[f"moe.shared_experts.{name}.weight"] = each
    return shapes


def _list_swiglu(dim: int, width: int) -> Shapes:
    return {"w1": (width, dim), "w2": (dim, width), "w3": (width, dim)}
