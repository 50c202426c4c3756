"""Expert parallelism: each rank has a share of a sparse layer's experts, and rows travel to them.

The ranks that share the experts have tokens of their own. Each sorts its rows by expert, which is
by rank too; all-to-alls bring them to the experts' ranks and the results back (Lepikhin et al.
2020, arXiv:2006.16668, without its capacity: as many rows travel as were routed).

How many rows come is known only once the ranks have exchanged their counts, and the host must know
it to make room for them: one small copy from the device for each dispatch cannot be avoided.

A rank takes part in every exchange, also where it has no row to send or to receive, so that all
ranks issue the same sequence of collectives.

Letters: D model width, E experts, R ranks that share them, N rows of this rank's tokens, M rows
that come to its experts.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from torchtrain.models.decoder import Decoder
from torchtrain.models.moe import Permute, SparseFeedForward
from torchtrain.parallelisms.ring_attention import collectives, exchange


def apply_expert_parallel(model: Decoder, mesh: DeviceMesh) -> None:
    """Give each rank of the mesh, of one dimension, its share of all experts, in place.

    Weights are split by whole experts: the R-th part of E, which R divides (the config check has
    seen to that). On the meta device, nothing is communicated.
    """
    rows = RowExchange(mesh)
    for module in find_sparse(model):
        for name, weight in list(module.experts.named_parameters()):
            shard = nn.Parameter(distribute_tensor(weight, mesh, [Shard(0)], src_data_rank=None))
            module.experts.register_parameter(name, shard)
        module.experts.own_share = local
        module.dispatch = ExpertDispatch(rows)


def find_sparse(model: nn.Module) -> list[SparseFeedForward]:
    """Return the sparse feed-forwards of a model or of a part of it."""
    return [module for module in model.modules() if isinstance(module, SparseFeedForward)]


def local(weight: Tensor) -> Tensor:
    """Return the experts that this rank has."""
    assert isinstance(weight, DTensor)
    return weight.to_local()


class RowExchange:
    """The all-to-all of rows between the ranks that share the experts; all layers use one.

    An exchange is issued, then `while_underway` runs, then it is waited for: what is to be done
    in that time, by another thread too, is set there.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.group = mesh.get_group().group_name
        self.ranks = mesh.size()
        self.while_underway: Callable[[], None] = _do_nothing

    def __call__(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send the first sent[0] rows to rank 0, and so on; return those from rank 0, and so on."""
        coming = exchange(rows, sent, received, self.group)
        self.while_underway()
        return collectives.wait_tensor(coming)


def _do_nothing() -> None:
    pass


class ExchangeRows(torch.autograd.Function):
    """An exchange whose gradients go the same way back.

    Its collective is an operation of its own to the dispatcher, so that recomputation of chosen
    operations can save what came.
    """

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], move: RowExchange
    ) -> Tensor:
        """Take rows [N, D] to [M, D]."""
        ctx.sent, ctx.received, ctx.move = sent, received, move
        return move(rows, sent, received)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        """Take the gradient [M, D] to [N, D]."""
        return ctx.move(gradient, ctx.received, ctx.sent), None, None, None


class ExpertDispatch(nn.Module):
    """Brings rows to the ranks that have their experts, and the results back."""

    def __init__(self, move: RowExchange) -> None:
        super().__init__()
        self.move = move

    def forward(self, experts: nn.Module, rows: Tensor, counts: Tensor) -> Tensor:
        """Take rows [N, D], sorted by expert, and the number of each expert's [E] to [N, D]."""
        ranks = self.move.ranks
        share = len(counts) // ranks
        coming = self.move(counts, [share] * ranks, [share] * ranks).view(ranks, share)
        sizes = torch.stack([counts.view(ranks, share).sum(dim=1), coming.sum(dim=1)])
        sent, received = sizes.tolist()
        came = ExchangeRows.apply(rows, sent, received, self.move)  # [M, D], by rank, then expert
        expert_of = torch.arange(share, device=rows.device).repeat(ranks)
        expert_of = expert_of.repeat_interleave(coming.flatten(), output_size=sum(received))
        order = expert_of.argsort(stable=True)
        inverse = order.argsort()
        results = experts(Permute.apply(came, order, inverse, 1), coming.sum(dim=0))
        results = Permute.apply(results, inverse, order, 1)
        return ExchangeRows.apply(results, received, sent, self.move)
