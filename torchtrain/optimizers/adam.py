"""Adam (Kingma & Ba 2014, arXiv:1412.6980) and AdamW, over plain or sharded parameters."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from torchtrain.bf16_states import Bf16Adam, Bf16AdamW
from torchtrain.config.schema import Optimizer as OptimizerConfig
from torchtrain.optimizers.build import split_by_decay


def build_adam(weights: Mapping[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.Adam:
    """Build Adam, whose weight decay is added to the gradient."""
    groups = split_by_decay(weights, config.weight_decay)
    if config.state_dtype == "bfloat16":
        return Bf16Adam(weights, groups, **choose_settings(config))
    return torch.optim.Adam(groups, **choose_settings(config))


def build_adamw(weights: Mapping[str, nn.Parameter], config: OptimizerConfig) -> torch.optim.AdamW:
    """Build AdamW, whose weight decay is decoupled (Loshchilov & Hutter 2017, arXiv:1711.05101)."""
    groups = split_by_decay(weights, config.weight_decay)
    if config.state_dtype == "bfloat16":
        return Bf16AdamW(weights, groups, **choose_settings(config))
    return torch.optim.AdamW(groups, **choose_settings(config))


def choose_settings(config: OptimizerConfig) -> dict[str, Any]:
    """Return what both take from the section, under PyTorch's names."""
    return {
        "lr": config.lr,
        "betas": (config.beta1, config.beta2),
        "eps": config.eps,
        "fused": config.implementation == "fused",
        "foreach": config.implementation == "foreach",
    }
