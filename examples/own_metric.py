"""A metric of your own: the largest element of the gradient, from an optimizer that watches it.

    ./run_llama_train.sh --experimental.custom_import examples/own_metric.py \\
        --optimizer.name WatchedAdamW

It appears in metrics.jsonl, in TensorBoard and on the screen. A module of the model has metrics of
its own in the same way: by inheriting from MetricSource.
"""

from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from torchtrain.catalog.optimizers import register_optimizer
from torchtrain.config.schema import Optimizer as OptimizerConfig
from torchtrain.optimizers.build import split_by_decay
from torchtrain.step_metrics import MetricSource, StepMetrics


class WatchedAdamW(torch.optim.AdamW, MetricSource):
    """AdamW with a metric."""

    def add_metrics(self, metrics: StepMetrics) -> None:
        """Add the largest element of this rank's shards of the gradient."""
        largest = torch.zeros(())
        for group in self.param_groups:
            for weight in group["params"]:
                gradient = weight.grad
                shard = gradient.to_local() if isinstance(gradient, DTensor) else gradient
                if shard.numel() > 0:
                    largest = torch.maximum(largest.to(shard.device), shard.abs().max())
        metrics.add("gradient/largest", largest, reduce="max")


def build(weights: Mapping[str, nn.Parameter], config: OptimizerConfig) -> WatchedAdamW:
    """Build it over this rank's weights; norms are not decayed."""
    groups = split_by_decay(weights, config.weight_decay)
    return WatchedAdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps)


register_optimizer("WatchedAdamW", "own_metric:build")
