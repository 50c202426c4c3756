"""Running means kept in bf16, in half the memory, for any optimizer of PyTorch's.

An update widens the means of some weights to the weights' type, computes there, and rounds what it
keeps. bf16 holds 8 bits: rounded to the nearest, a mean that changes by less than 1/512 of itself
in a step stands still, as that of the squared gradient does with a beta2 of 0.999. So it is
rounded up or down by chance, in proportion to the distance, which is right on average (Gupta et
al. 2015, arXiv:1502.02551). Chance is a pure function of the parameter's full name, the element's
place in the whole parameter and the step: the same on any layout, on replicas and after a resume.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from torchtrain.shards import find_local_box, local

MOST_ELEMENTS = 1 << 24
"""Of the weights whose means are widened together, unless a single one has more."""

FACTORS = (-1640531527, 1540483477, -2048144789, -1028477379)
"""Odd numbers that scatter bits over 32: the golden ratio's, and those of Murmur hashes."""


class Bf16States(Optimizer):
    """Before an optimizer of PyTorch's among a class's bases: it keeps its means in bf16.

    Weights that are bf16 themselves have PyTorch's own rounding, to the nearest.
    """

    def __init__(
        self, weights: Mapping[str, nn.Parameter], groups: list[dict[str, Any]], **settings: Any
    ) -> None:
        """Take the weights by their names in the whole model, and what the optimizer takes."""
        super().__init__(groups, **settings)
        self.names = {weight: name for name, weight in weights.items()}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update the weights that have a gradient, some at a time."""
        groups = self.param_groups
        try:
            for group in groups:
                for weights in split_by_size(group["params"]):
                    self.param_groups = [{**group, "params": weights}]
                    self._step_wide(weights)
        finally:
            self.param_groups = groups

    def _step_wide(self, weights: Sequence[nn.Parameter]) -> None:
        """Let the optimizer update these weights alone, on means that are widened for it."""
        kept = {weight: dict(self.state[weight]) for weight in weights if weight in self.state}
        for weight, states in kept.items():
            for key in find_means(states):
                self.state[weight][key] = states[key].to(weight.dtype)
        super().step()
        for weight in weights:
            states = self.state.get(weight, {})
            if not states or weight.dtype == torch.bfloat16:
                continue
            bits = draw(weight, self.names[weight], states["step"])
            for number, key in enumerate(find_means(states)):
                before = kept[weight][key] if weight in kept else None
                # Each of Adam's two means has a half of the bits that are drawn.
                states[key] = round_mean(states[key], bits >> 16 * (number % 2), before)


class Bf16Adam(Bf16States, Adam):
    """Adam with its means in bf16."""


class Bf16AdamW(Bf16States, AdamW):
    """AdamW with its means in bf16."""


def find_means(states: Mapping[str, Tensor]) -> list[str]:
    """Return the keys of a weight's states that are not its number of steps."""
    return [key for key in states if key != "step"]


def split_by_size(weights: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Yield the weights in turn, together as many as have at most MOST_ELEMENTS on this rank."""
    together: list[nn.Parameter] = []
    elements = 0
    for weight in weights:
        size = local(weight.detach()).numel()
        if together and elements + size > MOST_ELEMENTS:
            yield together
            together, elements = [], 0
        together.append(weight)
        elements += size
    if together:
        yield together


def round_mean(wide: Tensor, bits: Tensor, kept: Tensor | None = None) -> Tensor:
    """Return a mean rounded by chance to bf16, in `kept` where that is given.

    Args:
        wide: the mean after this step, fp32, plain or sharded.
        bits: as `draw` returns them; the lower half of each decides.
        kept: bf16, of the mean's shape and layout.
    """
    if kept is None:
        kept = wide.to(torch.bfloat16)
    # bf16 drops the lower half of fp32's bits. A carry out of what is dropped goes up to the next
    # value, away from 0.
    half = (1 << 16) - 1
    rounded = (bits & half).add_(local(wide).view(torch.int32)).bitwise_and_(~half)
    local(kept).copy_(rounded.view(torch.float32))
    return kept


def draw(tensor: Tensor, name: str, step: Tensor) -> Tensor:
    """Return 32 random bits for each element of this rank's part of a tensor, int32.

    Args:
        tensor: plain or sharded.
        name: of the parameter.
        step: its number, 0-dim.
    """
    part = local(tensor)
    place = torch.zeros((), dtype=torch.int32, device=part.device)
    for size, (start, length) in zip(tensor.shape, find_local_box(tensor), strict=True):
        along = torch.arange(start, start + length, dtype=torch.int32, device=part.device)
        place = place.unsqueeze(-1) * size + along
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big", signed=True)
    first, second, *others = FACTORS
    # Sums and products of 32 bits, the rest of which is dropped.
    bits = place.mul_(first).bitwise_xor_(scatter(step.to(torch.int32) * second + seed, others))
    return scatter(bits, others)


def scatter(bits: Tensor, factors: Sequence[int]) -> Tensor:
    """Let each bit depend on all, in place: each number from another one."""
    for factor in (*factors, 1):
        upper = (bits >> 16).bitwise_and_((1 << 16) - 1)  # a shift fills up with the sign
        bits.bitwise_xor_(upper).mul_(factor)
    return bits
