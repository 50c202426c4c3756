"""Expert parallelism: ranks share the experts of a sparse layer, and rows travel to their experts.

Each rank routes its own tokens. An all-to-all brings every row to the rank that has its expert, a
second one brings the results back; in the backward the same two run the other way. The dense part
of the model is laid out as without experts (Lepikhin et al. 2020, arXiv:2006.16668).

Every rank takes part in every exchange, also with no row to send or to receive.

Letters: N rows that this rank sends (a row for each of its tokens and chosen experts), M rows that
it receives, D model width, E experts, R ranks that share them.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from torchtrain.models.decoder import Decoder
from torchtrain.models.moe import Dispatch, Permute, SparseFeedForward
from torchtrain.parallelisms.mesh import Mesh

collectives = torch.ops._c10d_functional


class Exchange:
    """The all-to-all between the ranks that share the experts."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group.group_name
        self.ranks = group.size()
        self.between: Callable[[], None] = do_nothing
        """Called when an all-to-all is under way, before it is waited for."""

    def run(self, rows: Tensor, received: list[int], sent: list[int]) -> Tensor:
        """Send `sent[r]` rows to each rank r and return those received, in the order of ranks."""
        under_way = collectives.all_to_all_single(rows.contiguous(), received, sent, self.group)
        self.between()
        return collectives.wait_tensor(under_way)


def do_nothing() -> None:
    """Go on to wait for the exchange."""


class ExchangeRows(torch.autograd.Function):
    """`Exchange.run`, whose backward sends the gradients the way back."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, received: list[int], sent: list[int], exchange: Exchange
    ) -> Tensor:
        """Take rows [N, D] to the rows [M, D] of all ranks for this one."""
        ctx.sizes = received, sent
        ctx.exchange = exchange
        return exchange.run(rows, received, sent)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        """Return the gradient [N, D] of the rows that were sent."""
        received, sent = ctx.sizes
        return ctx.exchange.run(gradient, sent, received), None, None, None


class ExchangedDispatch(Dispatch):
    """Brings rows to the ranks that have their experts, and back."""

    def __init__(self, exchange: Exchange) -> None:
        super().__init__()
        self.exchange = exchange

    def forward(self, experts: nn.Module, rows: Tensor, counts: Tensor) -> Tensor:
        """Take rows [N, D], sorted by expert, and the number of each expert's [E] to [N, D]."""
        ranks = self.exchange.ranks
        here = len(counts) // ranks  # experts of a rank
        equal = [here] * ranks
        # From each rank in turn, the number of rows for each expert of this one, [R · E/R].
        counts_here = self.exchange.run(counts, equal, equal)
        # The sizes of an exchange must be known to the host: one wait for the device.
        sizes = torch.stack([counts, counts_here]).unflatten(1, (ranks, here)).sum(dim=2)
        sent, received = sizes.tolist()
        rows = ExchangeRows.apply(rows, received, sent, self.exchange)  # [M, D], by rank
        experts_of_rows = torch.arange(here, device=rows.device).repeat(ranks)
        order = experts_of_rows.repeat_interleave(counts_here, output_size=len(rows)).argsort(
            stable=True
        )
        inverse = order.argsort()
        rows = Permute.apply(rows, order, inverse, 1)
        rows = experts(rows, counts_here.unflatten(0, (ranks, here)).sum(dim=0))
        rows = Permute.apply(rows, inverse, order, 1)
        result: Tensor = ExchangeRows.apply(rows, sent, received, self.exchange)
        return result


def apply_expert_parallel(model: Decoder, mesh: Mesh) -> None:
    """Give each rank a share of every sparse layer's experts, where ranks share them, in place.

    Args:
        model: on the meta device, before FSDP.
        mesh: the ranks that share experts divide their number, as the config check has seen to.
    """
    for sparse in find_sparse(model):
        sparse.router.sum_over_shards = partial(sum_over, groups=mesh.sequence_groups)
        sparse.router.sequence_shards = mesh.degrees.ranks_per_stage
    if mesh.experts is None:
        return
    exchange = Exchange(mesh.experts.get_group())
    for sparse in find_sparse(model):
        for name, weight in list(sparse.experts.named_parameters()):
            shared = distribute_tensor(weight, mesh.experts, [Shard(0)])
            sparse.experts.register_parameter(name, nn.Parameter(shared))
        sparse.experts.own = take_own
        sparse.dispatch = ExchangedDispatch(exchange)


def take_own(weight: Tensor) -> Tensor:
    """Return the weight of the experts that this rank has."""
    assert isinstance(weight, DTensor)
    return weight.to_local()


def sum_over(counts: Tensor, groups: list[dist.ProcessGroup]) -> Tensor:
    """Return the sum of the counts over the ranks of all groups; they need no gradient."""
    total = counts.clone()
    for group in groups:
        dist.all_reduce(total, group=group)
    return total


def find_sparse(model: nn.Module) -> list[SparseFeedForward]:
    """Return the sparse feed-forwards of the model."""
    return [module for module in model.modules() if isinstance(module, SparseFeedForward)]
