"""Ring attention (Liu et al. 2023, arXiv:2310.01889): each rank's queries over all ranks' keys.

Queries stay; keys and values of all ranks come by, either one rank at a time ("alltoall") or all
at once ("allgather"). A softmax over all keys follows exactly from softmaxes over parts of them
and their log-sum-exps (Milakov and Gimelshein 2018, arXiv:1805.02867).

PyTorch's own `context_parallel()` does not run on CPU: it has no sharding rule for the CPU's
flash-attention op. Here the same code serves both kinds of device: only the kernel of one partial
attention differs.

Letters: B batch, H query heads, K key/value heads, C head width, S sequence, R ranks of the ring,
L = S/R, Lq and Lk the queries and keys of one partial attention.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from torchtrain.config.schema import Parallelism
from torchtrain.models.attention import repeat_heads

aten = torch.ops.aten
# These ops, unlike torch.distributed's functions, can be traced by torch.compile and have the same
# names in all supported versions. Inputs must be contiguous; results must be waited for before use.
collectives = torch.ops._c10d_functional


class Ring(NamedTuple):
    """This rank's place among those that share a sequence, and how they share it."""

    group: str
    """Name of the process group; a name, since modules that hold it are copied and compiled."""
    rank: int
    size: int
    headtail: bool
    """Whether rank r has the chunks r and 2R-1-r of 2R, rather than the r-th of R."""
    gathers: bool
    """Whether all keys and values come at once, instead of one rank's at a time."""

    @classmethod
    def of(cls, cp_mesh: DeviceMesh, parallelism: Parallelism) -> "Ring":
        """Build this rank's on a mesh of one dimension, sharing as the config says."""
        return cls(
            group=cp_mesh.get_group().group_name,
            rank=cp_mesh.get_local_rank(),
            size=cp_mesh.size(),
            headtail=parallelism.context_parallel_load_balancer == "headtail",
            gathers=parallelism.context_parallel_rotate_method == "allgather",
        )


class RingAttention(nn.Module):
    """This rank's queries over the keys and values of all ranks."""

    def __init__(self, ring: Ring) -> None:
        super().__init__()
        self.ring = ring

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: None = None) -> Tensor:
        """Take q [B, H, L, C] and k, v [B, K, L, C] to [B, H, L, C].

        The config check refuses document masking here.
        """
        return AttendAroundRing.apply(q, torch.stack((k, v)), self.ring)


class AttendAroundRing(torch.autograd.Function):
    """The ring's forward and backward.

    The backward of a part, given the result and log-sum-exp of the whole, is that part's share of
    the whole's backward (Dao 2023, arXiv:2307.08691, algorithm 2). Parts are added up in fp32.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, ring: Ring) -> Tensor:  # type: ignore[override]
        """Take q [B, H, L, C] and kv [2, B, K, L, C] to [B, H, L, C] in q's type."""
        result = torch.zeros_like(q, dtype=torch.float32, memory_format=torch.contiguous_format)
        lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
        dropout_state: list[Tensor] = []
        for source, held in visit(kv, ring):
            seen = find_visible(ring, source, q.shape[2])
            if seen is None:
                continue
            k, v = held[:, :, :, seen.columns].unbind(0)
            part = attend(q[:, :, seen.rows], k, v, causal=seen.causal)
            dropout_state = part.dropout_state
            whole_lse = torch.logaddexp(lse[:, :, seen.rows], part.lse)
            kept = (lse[:, :, seen.rows] - whole_lse).exp().unsqueeze(-1)
            added = (part.lse - whole_lse).exp().unsqueeze(-1)
            result[:, :, seen.rows] = kept * result[:, :, seen.rows] + added * part.result.float()
            lse[:, :, seen.rows] = whole_lse
        result = result.to(q.dtype)
        ctx.save_for_backward(q, kv, result, lse, *dropout_state)
        ctx.ring = ring
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        """Take grad [B, H, L, C] to the gradients of q [B, H, L, C] and kv [2, B, K, L, C].

        Those of a rank's keys and values come from the queries of all ranks. Where all were
        gathered, all gradients are reduced and scattered; in rotation they travel along, and one
        step more brings them home.
        """
        q, kv, result, lse, *dropout_state = ctx.saved_tensors
        ring: Ring = ctx.ring
        grad_q = torch.zeros_like(q, dtype=torch.float32)
        gathered_ranks = ring.size if ring.gathers else 0
        grad_all = torch.zeros(
            (gathered_ranks, *kv.shape), dtype=torch.float32, device=kv.device
        )  # [R, 2, B, K, L, C]
        traveling = None
        for source, held in visit(kv, ring):
            if ring.gathers:
                grad_kv = grad_all[source]
            else:
                grad_kv = torch.zeros_like(kv, dtype=torch.float32)
            seen = find_visible(ring, source, q.shape[2])
            if seen is not None:
                rows, columns = seen.rows, seen.columns
                k, v = held[:, :, :, columns].unbind(0)
                whole = Attended(result[:, :, rows], lse[:, :, rows], dropout_state)
                part_q, part_k, part_v = attend_backward(
                    grad[:, :, rows], q[:, :, rows], k, v, whole, causal=seen.causal
                )
                grad_q[:, :, rows] += part_q
                grad_kv[:, :, :, columns] = torch.stack((part_k, part_v))
            if not ring.gathers:
                if traveling is not None:
                    grad_kv = collectives.wait_tensor(traveling) + grad_kv
                traveling = pass_on(grad_kv, ring)
        if ring.gathers:
            traveling = collectives.reduce_scatter_tensor(
                grad_all.flatten(0, 1), "sum", ring.size, ring.group
            )
        return grad_q.to(q.dtype), collectives.wait_tensor(traveling).to(kv.dtype), None


class Seen(NamedTuple):
    """What this rank's queries see of one rank's keys."""

    rows: slice
    """The queries that see any."""
    columns: slice
    """The keys that they see."""
    causal: bool
    """Whether each sees only those up to its own position, rather than all."""


def find_visible(ring: Ring, source: int, length: int) -> Seen | None:
    """Return what this rank's queries see of the keys of rank `source`; None for nothing.

    Both have `length` positions. They grow within a shard in either order, so the own shard is
    seen through a plain causal mask. Under "headtail", the head of a lower rank lies before both
    own chunks and its tail after both; both chunks of a higher rank lie between the own head and
    the own tail.
    """
    everything = slice(0, length)
    first_half = slice(0, length // 2)
    second_half = slice(length // 2, length)
    if source == ring.rank:
        return Seen(rows=everything, columns=everything, causal=True)
    if source < ring.rank:
        columns = first_half if ring.headtail else everything
        return Seen(rows=everything, columns=columns, causal=False)
    if ring.headtail:
        return Seen(rows=second_half, columns=everything, causal=False)
    return None


def visit(kv: Tensor, ring: Ring) -> Iterator[tuple[int, Tensor]]:
    """Yield each rank with its keys and values [2, B, K, L, C]: own first, rank - 1, rank - 2, …

    While one is used the next is on its way.
    """
    if ring.gathers:
        coming = collectives.all_gather_into_tensor(kv.contiguous(), ring.size, ring.group)
        yield ring.rank, kv
        by_rank = collectives.wait_tensor(coming).unflatten(0, (ring.size, 2))
        for step in range(1, ring.size):
            source = (ring.rank - step) % ring.size
            yield source, by_rank[source]
        return
    for step in range(ring.size - 1):
        coming = pass_on(kv, ring)
        yield (ring.rank - step) % ring.size, kv
        kv = collectives.wait_tensor(coming)
    yield (ring.rank + 1) % ring.size, kv


def pass_on(x: Tensor, ring: Ring) -> Tensor:
    """Begin to send x to the next rank of the ring, and to receive that of the one before."""
    sent = [0] * ring.size
    received = [0] * ring.size
    sent[(ring.rank + 1) % ring.size] = x.shape[0]
    received[(ring.rank - 1) % ring.size] = x.shape[0]
    return exchange(x, sent, received, ring.group)


def exchange(x: Tensor, sent: list[int], received: list[int], group: str) -> Tensor:
    """Begin an all-to-all along the first dimension: so many slices to and from each rank."""
    return collectives.all_to_all_single(x.contiguous(), received, sent, group)


class Attended(NamedTuple):
    """The result of an attention, and what its backward needs."""

    result: Tensor
    """[B, H, Lq, C], in q's type."""
    lse: Tensor
    """The log-sum-exps [B, H, Lq], fp32."""
    dropout_state: list[Tensor]
    """On CUDA two tensors, the random state of a dropout (which is 0); else nothing."""


def attend(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Attended:
    """Compute one partial attention.

    Args:
        q: [B, H, Lq, C].
        k: [B, K, Lk, C].
        v: [B, K, Lk, C].
        causal: whether query i sees keys 0 .. i, Lq = Lk, rather than all.
    """
    if q.device.type == "cpu":
        k, v = repeat_heads(q, k, v)
        result, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=causal)
        return Attended(result, lse, [])
    if q.dtype == torch.float32:  # the flash kernel has half precisions only
        k, v = repeat_heads(q, k, v)
        result, lse, *state = aten._scaled_dot_product_efficient_attention(
            q, k, v, None, compute_log_sumexp=True, is_causal=causal
        )
        lse = lse[:, :, : q.shape[2]]  # it comes padded to a multiple of 32
        return Attended(result, lse, state)
    result, lse, _, _, _, _, *state, _ = aten._scaled_dot_product_flash_attention(
        q, k, v, is_causal=causal
    )
    return Attended(result, lse, state)


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, whole: Attended, *, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return this part's share of the gradients of q, k and v.

    `grad` is that of the result of the `whole` attention; shapes are as in `attend`.
    """
    result, lse, state = whole
    kv_heads = k.shape[1]
    if q.device.type == "cpu":
        k, v = repeat_heads(q, k, v)
        grad_q, grad_k, grad_v = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, result, lse, 0.0, causal
        )
    elif q.dtype == torch.float32:
        k, v = repeat_heads(q, k, v)
        padded = F.pad(lse, (0, -q.shape[2] % 32), value=torch.inf)
        wanted = [True, True, True, False]  # the gradients of q, k, v, not of a bias
        grad_q, grad_k, grad_v, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, None, result, padded, *state, 0.0, wanted, causal
        )
    else:
        lengths = (None, None, q.shape[2], k.shape[2])
        grad_q, grad_k, grad_v = aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, result, lse.contiguous(), *lengths, 0.0, causal, *state
        )
    return grad_q, sum_heads(grad_k, kv_heads), sum_heads(grad_v, kv_heads)


def sum_heads(x: Tensor, heads: int) -> Tensor:
    """Undo `repeat_heads` in the backward: [B, H, L, C] to [B, K, L, C], in fp32."""
    return x.unflatten(1, (heads, -1)).sum(dim=2, dtype=torch.float32)
