"""Which weights FSDP gathers in float8, a byte a number, and how many numbers that is.

What is left out and why is `parallelisms.float8`'s and `float8_gather`'s to say; torchao, which
computes in float8, need not be there.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from torchtrain.catalog.models import ModelShape
from torchtrain.config.schema import Config
from torchtrain.models.decoder import load_decoder
from torchtrain.parallelisms.float8 import find_left_out, is_tied


@dataclass(frozen=True)
class Share:
    """What of the output, or of a block, is gathered in float8: the mean of all of its kind."""

    numbers: float = 0.0
    """Parameters that FSDP ranks shard."""
    weights: float = 0.0
    """The weights that these are."""


@dataclass(frozen=True)
class InFloat8:
    """What of a model FSDP gathers in float8."""

    names: frozenset[str] = frozenset()
    """Of the weights, in the whole model."""
    dense: Share = Share()
    """Of a block without experts."""
    sparse: Share = Share()
    """Of a block with experts, which themselves stay in the compute precision."""
    output: Share = Share()


def find_in_float8(config: Config, shape: ModelShape, tensor_ranks: int) -> InFloat8:
    """Return what FSDP gathers in float8, of a model that so many ranks share by tensors."""
    section = config.quantize_linear_float8
    if not config.model.converters or not section.enable_fsdp_float8_all_gather:
        return InFloat8()
    return _find(config.model.name, shape, tuple(section.filter_fqns), tensor_ranks)


@cache
def _find(family: str, shape: ModelShape, filters: tuple[str, ...], tensor_ranks: int) -> InFloat8:
    with torch.device("meta"):
        model = load_decoder(family)(shape)
    left_out = find_left_out(model, filters, tensor_ranks)
    sizes = {
        name: module.weight.numel()
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name not in left_out and not is_tied(model, name)
    }
    blocks: dict[bool, list[Share]] = {False: [], True: []}
    for layer in range(shape.n_layers):
        within = [
            size / (1 if ".shared_experts." in name else tensor_ranks)
            for name, size in sizes.items()
            if name.startswith(f"layers.{layer}.")
        ]
        blocks[shape.is_sparse(layer)].append(Share(sum(within), len(within)))
    output = sizes.get("output", 0)
    return InFloat8(
        names=frozenset(f"{name}.weight" for name in sizes),
        dense=average(blocks[False]),
        sparse=average(blocks[True]),
        output=Share(output / tensor_ranks, 1) if output else Share(),
    )


def average(shares: Iterable[Share]) -> Share:
    """Return the mean of several blocks."""
    each = list(shares)
    count = max(1, len(each))
    return Share(
        numbers=sum(share.numbers for share in each) / count,
        weights=sum(share.weights for share in each) / count,
    )
