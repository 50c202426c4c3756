"""What the optimizer keeps for each weight, and what its step takes beside that: it takes a step on
fake weights."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import nn

from torchtrain.config.schema import Optimizer
from torchtrain.optimizers.build import build_optimizer
from torchtrain.tools.preflight.live_bytes import LiveBytes, list_tensors
from torchtrain.tools.preflight.specimen import fake_tensors

SIZE = 64
"""Rows and columns of the fake weights."""


@dataclass(frozen=True)
class OptimizerBytes:
    """Bytes as multiples of those of the weights."""

    matrices: float
    """What is kept for the matrices of the blocks."""
    others: float
    """What is kept for all other weights."""
    temporary: float
    """What a step takes for a while, for each weight there is."""


@cache
def trace_optimizer(section: str) -> OptimizerBytes:
    """Return what an optimizer takes, by its section as JSON."""
    few, kept = _step(section, blocks=2)
    many, _ = _step(section, blocks=4)
    weight = SIZE * SIZE * torch.float32.itemsize
    return OptimizerBytes(
        matrices=kept["layers.0.w"] / weight,
        others=kept["output.weight"] / weight,
        temporary=(many - few) / (2 * weight),
    )


def _step(section: str, blocks: int) -> tuple[int, dict[str, int]]:
    """Return the temporary bytes of a step, and by name what is kept for a weight."""
    with fake_tensors(1):
        names = [*(f"layers.{block}.w" for block in range(blocks)), "output.weight"]
        weights = {name: nn.Parameter(torch.empty(SIZE, SIZE)) for name in names}
        for weight in weights.values():
            weight.grad = torch.empty_like(weight)
        config = Optimizer.model_validate_json(section).model_copy(update={"groups": []})
        optimizer = build_optimizer(weights, config)
        optimizer.step()
        live = LiveBytes()
        with live:
            optimizer.step()
        states = {name: optimizer.state[weight] for name, weight in weights.items()}
    kept = {
        name: sum(each.nbytes for each in list_tensors(dict(state)) if each.dim() > 0)
        for name, state in states.items()
    }
    return live.peak, kept
