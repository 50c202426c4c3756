"""The optimizer of the run, built from the weights by their names in the whole model."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from torchtrain.catalog.optimizers import find_optimizer
from torchtrain.config.schema import Optimizer as OptimizerConfig
from torchtrain.utils import load_attribute


def build_optimizer(weights: Mapping[str, nn.Parameter], config: OptimizerConfig) -> Optimizer:
    """Build the optimizer that `optimizer.name` stands for in the catalog.

    Args:
        weights: what this rank updates, each parameter once.
        config: the section [optimizer].

    Raises:
        UserError: the catalog has no such name, or its entry cannot be imported.
    """
    build = load_attribute(find_optimizer(config.name), f"optimizer.name = {config.name!r}")
    return build(weights, config)


def split_by_decay(
    weights: Mapping[str, nn.Parameter], weight_decay: float
) -> list[dict[str, Any]]:
    """Split the weights into a group with weight decay and one without.

    Weight decay is for matrices: norm weights, the only parameters of one dimension, scale what
    the next matrix reads, and decaying them would fight their value of 1.
    """
    matrices = [weight for weight in weights.values() if weight.ndim > 1]
    vectors = [weight for weight in weights.values() if weight.ndim <= 1]
    return [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
