"""What keeps the experts evenly loaded, over all ranks: losses, biases, and metrics that tell.

A router adds up, in its backward, what it has routed on this rank (models/moe.py). Once per step
those totals are summed over all ranks, each token counted once: every rank then knows the whole
job's, of every layer, and what follows from them is the same on every layout.

The bias: Wang et al. 2024 (arXiv:2408.15664), which DeepSeek-V3 uses (arXiv:2412.19437).

Letters: E experts, L sparse layers of the whole model.
"""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from torchtrain.config.plans import RunPlan
from torchtrain.config.schema import Router
from torchtrain.models.decoder import Decoder
from torchtrain.models.moe import STATISTICS, SparseFeedForward
from torchtrain.parallelisms.expert_parallel import find_sparse
from torchtrain.step_metrics import MetricSource, StepMetrics


class ExpertBalance(MetricSource):
    """The load of every expert, and what is done about it.

    All ranks call its methods together, also those of a pipeline that have no sparse layer.
    """

    def __init__(
        self,
        parts: Mapping[int, Decoder],
        plan: RunPlan,
        section: Router,
        seq_len: int,
        device: torch.device,
        *,
        forces_balance: bool,
    ) -> None:
        """Give the routers their weights in the loss, and a place for their totals.

        Args:
            parts: this rank's part of the model, materialized.
            plan: of the run; its model has sparse layers.
            section: the config's.
            seq_len: tokens per sequence of the global batch.
            device: of the computation.
            forces_balance: choose the experts in turn, whatever the scores.
        """
        shape = plan.shape
        sequences = plan.batch.global_batch_size
        self.section = section
        self.tokens = sequences * seq_len
        self.balance_weight = section.balance_loss_weight / sequences
        self.z_weight = section.z_loss_weight / self.tokens
        self.layers = shape.sparse_layers
        size = (len(self.layers), shape.n_experts + len(STATISTICS))
        self.totals = torch.zeros(size, dtype=torch.float64, device=device)
        """[L, E + 3]: what this rank has routed in the step so far; 0 in other ranks' layers."""
        self.sums = torch.zeros_like(self.totals)
        """The whole job's of the last step."""
        self.names_layers = False
        self.own: dict[int, SparseFeedForward] = {}
        """This rank's sparse layers, by their row."""
        for part in parts.values():
            for layer, block in part.layers.items():
                for module in find_sparse(block):
                    self.own[self.layers.index(int(layer))] = module
        for row, module in self.own.items():
            module.router.balance_weight = self.balance_weight
            module.router.z_weight = self.z_weight
            module.router.forces_balance = forces_balance
            module.router.totals = self.totals[row]

    def collect(self, step: int) -> None:
        """Sum what all routers have counted in this step, and let them begin anew."""
        self.sums.copy_(self.totals)
        dist.all_reduce(self.sums)
        self.totals.zero_()
        every = self.section.log_layers_freq
        self.names_layers = every > 0 and step % every == 0

    @property
    def loads(self) -> Tensor:
        """Tokens of each expert in the last step, [L, E]: exact, as whole numbers in fp64 are."""
        return self.sums[:, : -len(STATISTICS)]

    def add_metrics(self, metrics: StepMetrics) -> None:
        """Add what the last step's totals say, which is the same on all ranks."""
        loads = self.loads
        entropy, balance_loss, z_loss = self.sums[:, -len(STATISTICS) :].unbind(dim=1)
        of_layers = {
            "load_max": loads.amax(dim=1) / loads.mean(dim=1),
            "idle_experts": (loads == 0).double().mean(dim=1),
            "entropy": entropy / self.tokens,
        }
        metrics.add("router/load_max", of_layers["load_max"].max(), reduce="max")
        metrics.add("router/idle_experts", of_layers["idle_experts"].mean(), reduce="max")
        metrics.add("router/entropy", of_layers["entropy"].mean(), reduce="max")
        metrics.add("router/balance_loss", self.balance_weight * balance_loss.sum(), reduce="max")
        metrics.add("router/z_loss", self.z_weight * z_loss.sum(), reduce="max")
        if self.names_layers:
            for name, values in of_layers.items():
                for layer, value in zip(self.layers, values, strict=True):
                    metrics.add(f"router/layer_{layer}/{name}", value, reduce="max")

    def update_biases(self) -> None:
        """Raise the bias of each expert with less than the mean load, and lower the others'."""
        loads = self.loads
        wanting = (loads.mean(dim=1, keepdim=True) - loads).sign().float()  # [L, E]
        for row, module in self.own.items():
            if module.expert_bias is not None:
                module.expert_bias.add_(wanting[row], alpha=self.section.bias_update_rate)
