"""The optimizer of the run, built from the weights by their names in the whole model."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from torchtrain.catalog.optimizers import find_optimizer
from torchtrain.config.parameter_groups import find_group
from torchtrain.config.schema import Optimizer as OptimizerConfig
from torchtrain.config.schema import ParameterGroup
from torchtrain.errors import SharedUserError
from torchtrain.step_metrics import MetricSource, StepMetrics
from torchtrain.utils import load_attribute

RATE_NAME = "rate_name"
"""The key, in a parameter group whose learning rate is not the main one, of that rate's name."""


def build_optimizer(weights: Mapping[str, nn.Parameter], config: OptimizerConfig) -> Optimizer:
    """Build the optimizer that `optimizer.name` stands for in the catalog.

    Args:
        weights: what this rank updates, each parameter once.
        config: the section [optimizer].

    Returns:
        The optimizer. Its first parameter group has the main learning rate, and may be empty.

    Raises:
        UserError: the catalog has no such name, its entry cannot be imported, or the optimizer
            lacks what `optimizer.groups` sets.
    """
    build = load_attribute(find_optimizer(config.name), f"optimizer.name = {config.name!r}")
    optimizer: Optimizer = build(weights, config)
    names = {weight: name for name, weight in weights.items()}
    groups = optimizer.param_groups
    optimizer.param_groups = []
    for group in groups:
        first, *others = [
            {**part, "params": parameters}
            for part in split_by_name(group, names, config.groups)
            for parameters in split_by_mesh(part["params"])
        ]
        group.update(first)  # an optimizer inside this one may hold the same group
        optimizer.param_groups += [group, *others]
    return optimizer


class LearningRates(MetricSource):
    """Logs the learning rates beside the main one, where there are any."""

    def __init__(self, optimizer: Optimizer, config: OptimizerConfig) -> None:
        self.optimizer = optimizer
        rates = {group.pattern: group.lr for group in config.groups}
        if config.name == "Muon":
            rates["adamw"] = config.muon_adamw_lr
        self.names = [name for name, rate in rates.items() if rate not in (None, config.lr)]

    def add_metrics(self, metrics: StepMetrics) -> None:
        """Add each rate by its name; a rank without weights that have it adds none."""
        for name in self.names:
            groups = self.optimizer.param_groups
            rates = [group["lr"] for group in groups if group.get(RATE_NAME) == name]
            rate = torch.tensor(max(rates, default=0.0), dtype=torch.float64)
            metrics.add(f"optimizer/lr/{name}", rate, reduce="max")


def split_by_name(
    group: Mapping[str, Any],
    names: Mapping[nn.Parameter, str],
    settings: list[ParameterGroup],
) -> list[dict[str, Any]]:
    """Split a parameter group of the optimizer by what its parameters' names set.

    Returns:
        First the group with what no pattern matches, possibly empty; then a group per pattern.

    Raises:
        SharedUserError: a group of the optimizer lacks a setting. All ranks raise it, also those
            without a parameter that the pattern matches.
    """
    for setting in settings:
        for key in setting.changes.keys() - group.keys():
            raise SharedUserError(
                f"optimizer.groups sets {key}, but the optimizer's parameter groups have no {key}"
            )
    parameters: dict[int | None, list[nn.Parameter]] = defaultdict(list)
    for weight in group["params"]:
        parameters[find_group(names[weight], settings)].append(weight)
    split = [{**group, "params": parameters[None]}]
    for number, setting in enumerate(settings):
        if parameters[number]:
            changed: dict[str, Any] = dict(setting.changes)
            if setting.lr is not None:
                changed[RATE_NAME] = setting.pattern
            split.append({**group, **changed, "params": parameters[number]})
    return split


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
