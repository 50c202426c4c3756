"""The names of a model's parameters. No torch here: the config check reads it."""

from torchtrain.catalog.models import TRANSFORMER, ModelShape, find_family


def list_parameters(family: str, shape: ModelShape) -> list[str] | None:
    """Return the full names of the whole model's parameters; None for a class of the user's.

    Raises:
        UserError: there is no such family.
    """
    if find_family(family).model != TRANSFORMER:
        return None
    names = ["tok_embeddings.weight"]
    for layer in range(shape.n_layers):
        of_block = [*_list_attention(shape), *_list_feed_forward(shape, layer)]
        norms = ["attention_norm.weight", "ffn_norm.weight"]
        names += [f"layers.{layer}.{name}" for name in (*of_block, *norms)]
    names.append("norm.weight")
    return names if shape.tied_embeddings else [*names, "output.weight"]


def _list_attention(shape: ModelShape) -> list[str]:
    modules = ["wq", "wk", "wv", "wo"]
    if shape.qk_norm:
        modules += ["q_norm", "k_norm"]
    return [f"attention.{module}.weight" for module in modules]


def _list_feed_forward(shape: ModelShape, layer: int) -> list[str]:
    weights = ("w1", "w2", "w3")
    if not shape.is_sparse(layer):
        return [f"feed_forward.{name}.weight" for name in weights]
    names = ["moe.router.gate.weight", *(f"moe.experts.{name}" for name in weights)]
    if shape.n_shared_experts:
        names += [f"moe.shared_experts.{name}.weight" for name in weights]
    return names
