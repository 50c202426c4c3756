"""An optimizer of your own: Lion (Chen et al. 2023, arXiv:2302.06675).

    ./run_llama_train.sh --experimental.custom_import examples/own_optimizer.py \\
        --optimizer.name Lion --optimizer.lr 1e-4

It updates each element by itself, so it works on sharded parameters as it is, and its state is
saved and resharded like that of any optimizer: a tensor of the parameter's shape by its name.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from torchtrain.catalog.optimizers import register_optimizer
from torchtrain.config.schema import Optimizer as OptimizerConfig
from torchtrain.optimizers.build import split_by_decay


class Lion(torch.optim.Optimizer):
    """Moves every weight by the learning rate, in the direction of the momentum's sign."""

    def __init__(
        self, groups: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float]
    ) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update the weights: the paper's algorithm 2."""
        assert closure is None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self.update(weight, group)
        return None

    def update(self, weight: Tensor, group: dict[str, Any]) -> None:
        """Update one weight."""
        beta1, beta2 = group["betas"]
        state = self.state[weight]
        if not state:
            state["momentum"] = torch.zeros_like(weight)
        momentum = state["momentum"]
        direction = momentum.lerp(weight.grad, 1 - beta1).sign()
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        weight.add_(direction, alpha=-group["lr"])
        momentum.lerp_(weight.grad, 1 - beta2)


def build(weights: Mapping[str, nn.Parameter], config: OptimizerConfig) -> Lion:
    """Build Lion over this rank's weights; norms are not decayed."""
    groups = split_by_decay(weights, config.weight_decay)
    return Lion(groups, lr=config.lr, betas=(config.beta1, config.beta2))


register_optimizer("Lion", "own_optimizer:build")
