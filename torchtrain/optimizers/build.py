"""Adam and AdamW over plain or sharded parameters."""

from collections.abc import Iterable

import torch
from torch import nn

from torchtrain.config_manager import Optimizer as OptimizerConfig


def build_optimizer(
    parameters: Iterable[nn.Parameter], config: OptimizerConfig
) -> torch.optim.Optimizer:
    """The optimizer of [optimizer] over these parameters, each of which comes once.

    Weight decay is for matrices: norm weights, the only parameters of one dimension, scale what the next matrix reads,
    and decaying them would fight their value of 1. AdamW's decay is decoupled (Loshchilov & Hutter, arXiv:1711.05101),
    Adam's is added to the gradient.
    """
    parameters = list(parameters)
    groups = [
        {
            "params": [matrix for matrix in parameters if matrix.ndim > 1],
            "weight_decay": config.weight_decay,
        },
        {"params": [vector for vector in parameters if vector.ndim <= 1], "weight_decay": 0.0},
    ]
    algorithm = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam}[config.name]
    implementation = {name: config.implementation == name for name in ("fused", "foreach")}
    return algorithm(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, **implementation
    )
