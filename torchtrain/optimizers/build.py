"""The optimizer of the run, built from the weights by their names in the whole model."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
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
    optimizer: Optimizer = build(weights, config)
    optimizer.param_groups = [
        {**group, "params": parameters}
        for group in optimizer.param_groups
        for parameters in split_by_mesh(group["params"])
    ]
    return optimizer


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


def split_by_mesh(weights: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Split the weights by the ranks that share them, into one list at least.

    Experts may have another mesh than the rest of the model, and an update of many weights at once,
    as foreach and fused do it, takes DTensors of one mesh alone.
    """
    groups: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for weight in weights:
        mesh = weight.device_mesh if isinstance(weight, DTensor) else None
        groups.setdefault(mesh, []).append(weight)
    return list(groups.values()) or [[]]
