"""Linear layers that multiply in float8, by torchao: forward, and both products of the backward.

Before a product its operands are cast to 8 bits by scales that bring the largest number of each
scaled part, a whole tensor or a row, to the largest that float8 holds (Micikevicius et al. 2022,
arXiv:2209.05433). Results have the compute precision; those of scales by rows, unless emulated, are
rounded to bf16, which is all that their kernel gives. Weights, gradients, optimizer states and
names of parameters stay as they are, so a checkpoint fits a run without float8, too.

What is scaled together is what one product has: the tokens of a microbatch that a rank computes.
A weight's scales are those of the whole weight on any layout.
"""

import re
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from torchtrain.config.layout import FLOAT8_MULTIPLE
from torchtrain.config.schema import Float8Linear
from torchtrain.kernel_checks import import_float8
from torchtrain.models.decoder import Decoder
from torchtrain.parallelisms.tensor_parallel import find_roles

LAYER = r"\.\d+\."
"""A layer's number in a name."""


def apply_float8(model: Decoder, section: Float8Linear, tensor_ranks: int) -> None:
    """Let the linear layers compute in float8, in place, but for what `find_left_out` names.

    Args:
        model: on the meta device, before all that wraps or shards its modules.
        section: of the config.
        tensor_ranks: of tensor parallelism, which share each weight.
    """
    torchao = import_float8()
    left_out = find_left_out(model, section.filter_fqns, tensor_ranks)
    recipe = torchao.Float8LinearConfig.from_recipe_name(section.recipe_name or "tensorwise")
    torchao.convert_to_float8_training(
        model,
        config=replace(recipe, emulate=section.emulate),
        module_filter_fn=lambda module, name: type(module) is nn.Linear and name not in left_out,
    )
    if model.keeps("output") and "output" not in left_out:
        # The product, and not a view of it, which FSDP warns of.
        model.output.register_forward_hook(
            lambda module, inputs, logits: torch.ops.aten._unsafe_view(logits, logits.shape)
        )


def find_compiler_options(section: Float8Linear | None) -> dict[str, bool]:
    """Return what the compiler Inductor has to know of a model that computes in float8."""
    if section is None or section.recipe_name != "rowwise":
        return {}
    # Else compiled programs, which leave out roundings to bf16, recompute other numbers in the
    # backward: NaN after tens of steps (https://github.com/pytorch/pytorch/issues/150859).
    return {"emulate_precision_casts": True}


def describe_float8(model: Decoder, section: Float8Linear, tensor_ranks: int) -> str:
    """Return what computes in float8 and what does not, in words.

    Args:
        model: the whole.
        section: of the config.
        tensor_ranks: of tensor parallelism.
    """
    linear = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    left_out = find_left_out(model, section.filter_fqns, tensor_ranks)
    reasons = [f"{re.sub(LAYER, '.*.', name)} ({why})" for name, why in left_out.items()]
    if model.shape.n_sparse_layers:
        reasons.append("experts and routers")
    kept = f"; not {', '.join(dict.fromkeys(reasons))}" if reasons else ""
    emulated = ", emulated" if section.emulate else ""
    gathered = ", gathered in float8" if section.enable_fsdp_float8_all_gather else ""
    if gathered and "output" not in left_out and is_tied(model, "output"):
        gathered += " but for output (tied)"
    count = len(linear) - len(left_out)
    return f"{section.recipe_name or 'tensorwise'}{emulated}: {count} linear layers{gathered}{kept}"


def is_tied(model: Decoder, name: str) -> bool:
    """Return whether the layer's weight is the embedding's as well, which reads whole numbers."""
    return name == "output" and model.shape.tied_embeddings


def find_left_out(model: Decoder, filters: Iterable[str], tensor_ranks: int) -> dict[str, str]:
    """Return why linear layers keep the compute precision, by their names."""
    roles = find_roles(model)
    left_out = {}
    for name, module in model.named_modules():
        if type(module) is not nn.Linear:  # a router's is its own
            continue
        rows, columns = module.weight.shape
        role = roles.get(name)
        row_ranks = tensor_ranks if role in ("columns", "logits") else 1
        column_ranks = tensor_ranks if role == "rows" else 1
        if any(text in name for text in filters):
            left_out[name] = "filter_fqns"
        elif rows % (FLOAT8_MULTIPLE * row_ranks) or columns % (FLOAT8_MULTIPLE * column_ranks):
            shared = f" over {tensor_ranks} ranks" if row_ranks * column_ranks > 1 else ""
            left_out[name] = f"{rows} x {columns}{shared}: no multiples of {FLOAT8_MULTIPLE}"
    return left_out
