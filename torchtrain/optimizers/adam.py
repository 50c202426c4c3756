"""Adam (Kingma & Ba 2014, arXiv:1412.6980) and AdamW, over plain or sharded parameters."""

from collections.abc import Mapping

import torch
from torch import nn

from torchtrain.config.schema import Optimizer as OptimizerConfig
from torchtrain.optimizers.build import split_by_decay


def build_adam(weights: Mapping[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.Adam:
    """Build Adam, whose weight decay is added to the gradient."""
    return torch.optim.Adam(
        split_by_decay(weights, config.weight_decay),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=config.implementation == "fused",
        foreach=config.implementation == "foreach",
    )


def build_adamw(weights: Mapping[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """Build AdamW, whose weight decay is decoupled (Loshchilov & Hutter 2017, arXiv:1711.05101)."""
    return torch.optim.AdamW(
        split_by_decay(weights, config.weight_decay),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=config.implementation == "fused",
        foreach=config.implementation == "foreach",
    )
