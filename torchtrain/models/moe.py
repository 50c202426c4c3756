"""A sparse feed-forward: of many experts, each token is computed by the few that a router chooses.

No token is dropped and no expert has a capacity. Tokens are sorted by expert and multiplied group
by group. A technique that shares the experts over ranks replaces `SparseFeedForward.dispatch`.

Letters: B batch, S sequence, T tokens (B · S), D model width, E experts, k experts per token,
N rows (T · k, a row for each token and expert), F feed-forward width of one expert.

Sources: Mixtral (arXiv:2401.04088), Qwen3 (arXiv:2505.09388), DeepSeek-V3 (arXiv:2412.19437,
section 2.1.2); the z-loss: ST-MoE (arXiv:2202.08906).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtrain.catalog.models import ModelShape

STATISTICS = ("entropy", "balance_loss", "z_loss")
"""What a router adds up beside the tokens of each expert, in this order."""


class Routing(NamedTuple):
    """What a router decides."""

    experts: Tensor
    """Those of each token, [B, S, k]."""
    weights: Tensor
    """Theirs, fp32, [B, S, k]."""
    counts: Tensor
    """Rows of each expert, [E], int64."""


class Gate(nn.Linear):
    """The router's projection, multiplied in fp32 whatever the compute precision."""

    def forward(self, x: Tensor) -> Tensor:
        """Take x [T, D] to logits [T, E], fp32."""
        return F.linear(x.float(), self.weight.float())


class Router(nn.Module):
    """Chooses each token's experts: those of the k highest scores.

    The choice is a pure function of the block's input, the weights and the bias, which changes
    between optimizer steps alone: a recomputation in the backward decides the same.
    """

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        self.shape = shape
        self.gate = Gate(shape.dim, shape.n_experts, bias=False)
        self.balance_weight = 0.0
        """Weight of a sequence's balance loss in the loss of the global batch."""
        self.z_weight = 0.0
        """The same of a token's z-loss."""
        self.sequence_shards = 1
        """Ranks that share a sequence here; `sum_over_shards` adds up what each of them has."""
        self.sum_over_shards: Callable[[Tensor], Tensor] = lambda counts: counts
        self.totals: Tensor | None = None
        """[E + 3], fp64: tokens of each expert and STATISTICS, added up until they are zeroed."""
        self.forces_balance = False
        """Choose the experts in turn, whatever the scores (for benchmarks)."""

    def forward(self, x: Tensor, bias: Tensor | None) -> Routing:
        """Route x [B, S, D]; `bias` [E] takes part in the choice, not in the weights."""
        shape = self.shape
        logits = self.gate(x.flatten(0, 1)).unflatten(0, x.shape[:2])
        scores = logits.softmax(dim=-1) if shape.router_scores == "softmax" else logits.sigmoid()
        experts = self._choose(scores if bias is None else scores + bias)
        weights = scores.gather(-1, experts)
        if shape.router_renormalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        weights = weights * shape.router_scale
        counts = experts.new_zeros(shape.n_experts)
        counts.scatter_add_(0, experts.flatten(), experts.new_ones(experts.numel()))
        if self.totals is not None:
            losses, observed = self._observe(logits, scores, counts)
            weights = AddLosses.apply(weights, losses, observed, self.totals)
        return Routing(experts, weights, counts)

    def _choose(self, scores: Tensor) -> Tensor:
        """Return the experts with the k highest of the scores [B, S, E]: [B, S, k]."""
        k = self.shape.experts_per_token
        if self.forces_balance:
            rows = torch.arange(scores[..., :k].numel(), device=scores.device)
            return (rows % self.shape.n_experts).view(*scores.shape[:-1], k)
        return scores.topk(k, dim=-1).indices

    def _observe(self, logits: Tensor, scores: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the losses, 0-dim, and what is to be added to `totals`."""
        shares = scores / scores.sum(dim=-1, keepdim=True)  # [B, S, E]
        entropy = -(shares * shares.clamp(min=1e-30).log()).sum()
        z_loss = logits.logsumexp(dim=-1).square().sum()
        balance_loss = z_loss.new_zeros(())
        if self.balance_weight > 0:  # it takes another choice, and a sum over the shards
            balance_loss = self._sequence_balance(scores, shares)
        statistics = torch.stack([entropy, balance_loss, z_loss]).detach()
        losses = self.balance_weight * balance_loss + self.z_weight * z_loss
        return losses, torch.cat([counts.double(), statistics.double()])

    def _sequence_balance(self, scores: Tensor, shares: Tensor) -> Tensor:
        """Return the sum of the sequences' balance losses (DeepSeek-V3, equations 17 to 20).

        Of a sequence that ranks share, each has a part: the loss is linear in `shares`, and the
        loads that multiply them are counted over the whole sequence first.
        """
        k = self.shape.experts_per_token
        n_experts = self.shape.n_experts
        chosen = torch.zeros_like(scores).scatter(-1, self._choose(scores), 1.0)
        loads = self.sum_over_shards(chosen.sum(dim=1))  # [B, E]
        tokens = scores.shape[1] * self.sequence_shards
        return (n_experts / (k * tokens) * loads * shares.sum(dim=1) / tokens).sum()


class AddLosses(torch.autograd.Function):
    """Passes weights on; its backward adds the gradient of losses and counts what was routed.

    Backward, since that runs exactly once for each microbatch trained on: a forward also runs in
    validation, and again where it is recomputed.
    """

    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, losses: Tensor, observed: Tensor, totals: Tensor
    ) -> Tensor:
        """Return the weights as they are."""
        ctx.save_for_backward(observed, losses)
        ctx.totals = totals
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        """Return the weights' gradient and that of the losses, which is 1."""
        observed, losses = ctx.saved_tensors
        ctx.totals.add_(observed)
        return gradient, torch.ones_like(losses), None, None


class Permute(torch.autograd.Function):
    """Rows in another order, each of them `copies` times: `rows[order // copies]`.

    Its backward adds up the copies in their order, so that it gives the same bits each time.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, inverse: Tensor, copies: int) -> Tensor:
        """Take rows [N / copies, D] to [N, D]; `inverse` undoes the permutation `order` [N]."""
        ctx.save_for_backward(inverse)
        ctx.copies = copies
        return rows[order // copies]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        """Return the gradient of the rows."""
        (inverse,) = ctx.saved_tensors
        return gradient[inverse].unflatten(0, (-1, ctx.copies)).sum(dim=1), None, None, None


class ZeroIdleGradients(torch.autograd.Function):
    """Weights as they are; their gradient is 0 for an expert without a row.

    `F.grouped_mm` leaves it unwritten on Blackwell: https://github.com/pytorch/pytorch/issues/172439
    """

    @staticmethod
    def forward(ctx: Any, weights: Tensor, counts: Tensor) -> Tensor:
        """Take weights [E, ...] and the rows of each expert [E]."""
        ctx.save_for_backward(counts)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Return the gradient of the weights."""
        (counts,) = ctx.saved_tensors
        return gradient.masked_fill((counts == 0).view(-1, 1, 1), 0.0), None


class Experts(nn.Module):
    """SwiGLU feed-forwards side by side, their weights stacked: [E, F, D], and w2 [E, D, F]."""

    def __init__(self, shape: ModelShape) -> None:
        super().__init__()
        into = (shape.n_experts, shape.width_per_expert, shape.dim)
        out_of = (shape.n_experts, shape.dim, shape.width_per_expert)
        self.w1 = nn.Parameter(torch.empty(into))
        self.w2 = nn.Parameter(torch.empty(out_of))
        self.w3 = nn.Parameter(torch.empty(into))
        self.own: Callable[[Tensor], Tensor] = lambda weight: weight
        """From a weight to that of the experts which this rank has."""

    def forward(self, rows: Tensor, counts: Tensor) -> Tensor:
        """Take rows [N, D], the first counts[0] of them for the first expert, to [N, D].

        Under expert parallelism the experts are those that this rank has.
        """
        w1, w2, w3 = self.own(self.w1), self.own(self.w2), self.own(self.w3)
        gate = self.multiply(rows, w1, counts)
        up = self.multiply(rows, w3, counts)
        return self.multiply(F.silu(gate) * up, w2, counts)

    def multiply(self, rows: Tensor, weights: Tensor, counts: Tensor) -> Tensor:
        """Multiply each expert's rows by the transpose of its matrix.

        One kernel for all in bf16; in fp32 a loop over the experts is 2.5 times as fast on a CPU,
        and a GPU has no kernel.
        """
        # Groups may have any size: PyTorch's kernel for Hopper and Blackwell asks for a multiple of
        # 16 bytes only along a dimension with stride 1, the weights' gradient included (its check:
        # aten/src/ATen/native/cuda/GroupMMCommon.cuh). Those are the widths.
        kernel_reads = all(width * rows.element_size() % 16 == 0 for width in weights.shape[1:])
        if rows.dtype == torch.bfloat16 and kernel_reads:
            ends = counts.cumsum(dim=0, dtype=torch.int32)
            weights = ZeroIdleGradients.apply(weights, counts)
            return F.grouped_mm(rows, weights.transpose(1, 2), offs=ends)
        groups = rows.split(counts.tolist())
        products = [
            F.linear(group, weight) for group, weight in zip(groups, weights.unbind(), strict=True)
        ]
        return torch.cat(products)


class Dispatch(nn.Module):
    """Brings rows to their experts and back: here they are all at hand."""

    def forward(self, experts: nn.Module, rows: Tensor, counts: Tensor) -> Tensor:
        """Take rows [N, D], sorted by expert, and the number of each expert's [E] to [N, D]."""
        return experts(rows, counts)


class SparseFeedForward(nn.Module):
    """The weighted sum of what each token's experts make of it, and of the shared experts'."""

    expert_bias: Tensor | None
    """[E], fp32: part of the choice, where the shape asks for it."""

    def __init__(self, shape: ModelShape, shared_experts: nn.Module | None) -> None:
        super().__init__()
        self.shape = shape
        self.router = Router(shape)
        self.experts = Experts(shape)
        self.dispatch: nn.Module = Dispatch()
        self.shared_experts = shared_experts
        bias = torch.zeros(shape.n_experts) if shape.router_bias else None
        self.register_buffer("expert_bias", bias)

    @property
    def idle_parameters(self) -> int:
        """Parameters of the experts that do not compute a token."""
        n_experts = self.shape.n_experts
        whole = sum(weight.numel() for weight in self.experts.parameters())
        return whole // n_experts * (n_experts - self.shape.experts_per_token)

    def forward(self, x: Tensor) -> Tensor:
        """Take x [B, S, D] to [B, S, D]."""
        routing = self.router(x, self.expert_bias)
        tokens = x.flatten(0, 1)  # [T, D]
        k = self.shape.experts_per_token
        order = routing.experts.flatten().argsort(stable=True)  # [N]
        inverse = order.argsort()
        rows = Permute.apply(tokens, order, inverse, k)  # [N, D], sorted by expert
        rows = Permute.apply(self.dispatch(self.experts, rows, routing.counts), inverse, order, 1)
        weights = routing.weights.flatten(0, 1).unsqueeze(-1)  # [T, k, 1]
        mixed = (rows.unflatten(0, (-1, k)) * weights).sum(dim=1).to(x.dtype).view_as(x)
        if self.shared_experts is None:
            return mixed
        return mixed + self.shared_experts(tokens).view_as(x)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "SparseFeedForward":  # noqa: FBT001, FBT002
        """Keep the bias in fp32: its small steps would be lost in bf16."""
        super()._apply(fn, recurse)
        if self.expert_bias is not None:
            self.expert_bias = self.expert_bias.float()
        return self
