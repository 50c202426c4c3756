"""Context parallelism: each rank holds a shard of every sequence; only attention looks beyond it.

Two methods. *Ring* (Liu et al. 2023, arXiv:2310.01889): queries stay, keys and values of all ranks come by, either one
rank at a time ("alltoall") or all at once ("allgather"); the partial results are merged by their log-sum-exps.
*Ulysses* (Jacobs et al. 2023, arXiv:2309.14509): an all-to-all gives each rank the whole sequence for a share of the
heads, and another gives the result back.

With contiguous shards the last rank has most of the causal work. "headtail" cuts the sequence into 2R chunks and gives
rank r the chunks r and 2R-1-r, so that each rank has the same (Llama 3, arXiv:2407.21783, section 3.3.2).

PyTorch's own `context_parallel()` does not run on CPU: it has no sharding rule for the CPU's flash-attention op. Here
the same code serves both kinds of device: only the kernel of one partial attention differs.

Letters: B batch, S sequence, H query heads, K key/value heads, C head width, R ranks of the context mesh, L = S/R.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from torchtrain.config_manager import Parallelism
from torchtrain.models.llama import BlockMask, CausalAttention, RotaryPositions, Transformer

aten = torch.ops.aten
# These ops, unlike torch.distributed's functions, can be traced by torch.compile and have the same names in all
# supported versions. Inputs must be contiguous; results must be waited for before use.
collectives = torch.ops._c10d_functional


class Ring(NamedTuple):
    """This rank's place among those that share a sequence, and how they share it."""

    group: str
    """Name of the process group; a name, since modules that hold it are copied and compiled."""
    rank: int
    size: int
    headtail: bool
    gathers: bool
    """All keys and values at once, instead of one rank's at a time."""

    @classmethod
    def of(cls, cp_mesh: DeviceMesh, parallelism: Parallelism) -> "Ring":
        """This rank's on a mesh of one dimension, sharing as the config says."""
        headtail = parallelism.context_parallel_load_balancer == "headtail"
        gathers = parallelism.context_parallel_rotate_method == "allgather"
        return cls(
            cp_mesh.get_group().group_name,
            cp_mesh.get_local_rank(),
            cp_mesh.size(),
            headtail,
            gathers,
        )


def apply_context_parallel(
    model: Transformer, cp_mesh: DeviceMesh, parallelism: Parallelism
) -> None:
    """Exchange, in place, every attention kernel and the positions for ones that know of the other shards.

    Args:
        model: has no parameter changed, and may hold part of the heads only (tensor parallelism).
        cp_mesh: one-dimensional. Every rank feeds the model its own `shard_sequence` of tokens.
        parallelism: says how. For "ulysses" the degree must divide the query heads and the key/value heads.
    """
    ring = Ring.of(cp_mesh, parallelism)
    ulysses = parallelism.context_parallel_method == "ulysses"
    for module in list(model.modules()):
        for attribute, child in list(module.named_children()):
            if isinstance(
                child, CausalAttention
            ):  # inside Attention, or inside the wrapper that widens bf16
                kernel = UlyssesAttention(child, ring) if ulysses else RingAttention(ring)
                setattr(module, attribute, kernel)
    model.rope = ShardPositions(model.rope, ring)


def shard_sequence(x: Tensor, ring: Ring) -> Tensor:
    """This rank's part of a sequence, tokens and labels alike: [B, S] to [B, S/R].

    R divides S; 2R does under "headtail" (the config check sees to it).
    """
    pieces = 2 * ring.size if ring.headtail else ring.size
    assert x.shape[1] % pieces == 0, f"{x.shape[1]} positions do not make {pieces} equal chunks"
    chunks = x.chunk(pieces, dim=1)
    mine = chunks[ring.rank]
    return torch.cat((mine, chunks[-1 - ring.rank]), dim=1) if ring.headtail else mine.contiguous()


class ShardPositions(RotaryPositions):
    """The rotations of the positions that this rank's shard has in the whole sequence."""

    def __init__(self, whole: RotaryPositions, ring: Ring) -> None:
        super().__init__(whole.shape)
        self.ring = ring

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """tokens [B, L] of the shard, to rotations [L, 1, C/2], complex64; with `documents` [B, S] [B, L, 1, C/2]."""
        positions = torch.arange(tokens.shape[1] * self.ring.size, device=tokens.device).unsqueeze(
            0
        )
        if documents is not None:
            positions = positions - documents
        return self.at(shard_sequence(positions, self.ring).squeeze(0))


class UlyssesAttention(nn.Module):
    """Shards of the sequence become shards of the heads for the kernel, and its result a shard of the sequence."""

    def __init__(self, kernel: nn.Module, ring: Ring) -> None:
        super().__init__()
        self.kernel = kernel
        self.ring = ring

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask | None = None
    ) -> Tensor:
        """q [B, H, L, C]; k, v [B, K, L, C]; to [B, H, L, C]; a `document_mask` is of whole sequences."""
        mixed = self.kernel(*(self._whole_sequence(x) for x in (q, k, v)), mask)  # [B, H/R, S, C]
        if self.ring.headtail:
            mixed = reorder(mixed, self._chunk_order())
        parts = mixed.unflatten(2, (self.ring.size, -1)).movedim(
            2, 0
        )  # [R, B, H/R, L, C], one for each rank
        return ExchangeParts.apply(parts, self.ring.group).movedim(0, 1).flatten(1, 2)

    def _whole_sequence(self, x: Tensor) -> Tensor:
        """[B, heads, L, C] to [B, heads/R, S, C], the positions in their own order."""
        parts = x.unflatten(1, (self.ring.size, -1)).movedim(
            1, 0
        )  # [R, B, heads/R, L, C], one for each rank
        whole = ExchangeParts.apply(parts, self.ring.group).movedim(0, 2).flatten(2, 3)
        if not self.ring.headtail:
            return whole
        order = self._chunk_order()
        return reorder(whole, [order.index(chunk) for chunk in range(len(order))])

    def _chunk_order(self) -> list[int]:
        """The 2R chunks as the ranks hold them: 0, 2R-1, 1, 2R-2, …"""
        size = self.ring.size
        return [chunk for rank in range(size) for chunk in (rank, 2 * size - 1 - rank)]


def reorder(x: Tensor, order: list[int]) -> Tensor:
    """[B, heads, S, C] cut into equal chunks along S, which are put together again in this order."""
    chunks = x.chunk(len(order), dim=2)
    return torch.cat([chunks[chunk] for chunk in order], dim=2)


class ExchangeParts(torch.autograd.Function):
    """An all-to-all of equal parts: x [R, ...], part r for rank r, to [R, ...], part r from rank r. Its own inverse."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:  # type: ignore[override]
        ctx.group = group
        return collectives.wait_tensor(exchange(x, [1] * x.shape[0], [1] * x.shape[0], group))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return collectives.wait_tensor(
            exchange(grad, [1] * grad.shape[0], [1] * grad.shape[0], ctx.group)
        ), None


class RingAttention(nn.Module):
    """This rank's queries over the keys and values of all ranks."""

    def __init__(self, ring: Ring) -> None:
        super().__init__()
        self.ring = ring

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: None = None) -> Tensor:
        """q [B, H, L, C]; k, v [B, K, L, C]; to [B, H, L, C]. The config check refuses document masking here."""
        return AttendAroundRing.apply(q, torch.stack((k, v)), self.ring)


class AttendAroundRing(torch.autograd.Function):
    """The ring's forward and backward.

    A softmax over all keys follows exactly from softmaxes over parts of them and their log-sum-exps (Milakov and
    Gimelshein 2018, arXiv:1805.02867). The backward of a part, given the result and log-sum-exp of the whole, is that
    part's share of the whole's backward (Dao 2023, arXiv:2307.08691, algorithm 2). Parts are added up in fp32.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, kv: Tensor, ring: Ring) -> Tensor:  # type: ignore[override]
        """q [B, H, L, C], kv [2, B, K, L, C], to [B, H, L, C] in q's type."""
        result = torch.zeros_like(q, dtype=torch.float32, memory_format=torch.contiguous_format)
        lse = torch.full(q.shape[:3], -torch.inf, dtype=torch.float32, device=q.device)
        dropout_state: list[Tensor] = []
        for source, held in visit(kv, ring):
            seen = visible(ring, source, q.shape[2])
            if seen is None:
                continue
            k, v = held[:, :, :, seen.columns].unbind(0)
            part, part_lse, *dropout_state = attend(q[:, :, seen.rows], k, v, seen.causal)
            whole_lse = torch.logaddexp(lse[:, :, seen.rows], part_lse)
            kept = (lse[:, :, seen.rows] - whole_lse).exp().unsqueeze(-1)
            added = (part_lse - whole_lse).exp().unsqueeze(-1)
            result[:, :, seen.rows] = kept * result[:, :, seen.rows] + added * part.float()
            lse[:, :, seen.rows] = whole_lse
        result = result.to(q.dtype)
        ctx.save_for_backward(q, kv, result, lse, *dropout_state)
        ctx.ring = ring
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        """grad [B, H, L, C] to the gradients of q [B, H, L, C] and kv [2, B, K, L, C].

        Those of a rank's keys and values come from the queries of all ranks. Where all were gathered, all gradients
        are reduced and scattered; in rotation they travel along, and one step more brings them home.
        """
        q, kv, result, lse, *dropout_state = ctx.saved_tensors
        ring: Ring = ctx.ring
        grad_q = torch.zeros_like(q, dtype=torch.float32)
        ranks = ring.size if ring.gathers else 0
        grad_all = torch.zeros(
            (ranks, *kv.shape), dtype=torch.float32, device=kv.device
        )  # [R, 2, B, K, L, C]
        travelling = None
        for source, held in visit(kv, ring):
            grad_kv = (
                grad_all[source] if ring.gathers else torch.zeros_like(kv, dtype=torch.float32)
            )
            seen = visible(ring, source, q.shape[2])
            if seen is not None:
                g, rows_q, rows_result, rows_lse = (
                    x[:, :, seen.rows] for x in (grad, q, result, lse)
                )
                k, v = held[:, :, :, seen.columns].unbind(0)
                part_q, part_k, part_v = attend_backward(
                    g, rows_q, k, v, rows_result, rows_lse, dropout_state, seen.causal
                )
                grad_q[:, :, seen.rows] += part_q
                grad_kv[:, :, :, seen.columns] = torch.stack((part_k, part_v))
            if not ring.gathers:
                total = (
                    grad_kv if travelling is None else collectives.wait_tensor(travelling) + grad_kv
                )
                travelling = pass_on(total, ring)
        if ring.gathers:
            travelling = collectives.reduce_scatter_tensor(
                grad_all.flatten(0, 1), "sum", ring.size, ring.group
            )
        return grad_q.to(q.dtype), collectives.wait_tensor(travelling).to(kv.dtype), None


class Seen(NamedTuple):
    """What this rank's queries see of one rank's keys."""

    rows: slice
    """The queries that see any."""
    columns: slice
    """The keys that they see."""
    causal: bool
    """Whether each sees only those up to its own position, rather than all."""


def visible(ring: Ring, source: int, length: int) -> Seen | None:
    """What this rank's queries see of the keys of rank `source`, both `length` positions; None for nothing.

    Positions grow within a shard in either order, so that the own shard is seen through a plain causal mask. Under
    "headtail", the head of a lower rank lies before both own chunks and its tail after both; both chunks of a higher
    rank lie between the own head and the own tail.
    """
    everything, first, second = slice(0, length), slice(0, length // 2), slice(length // 2, length)
    if source == ring.rank:
        return Seen(everything, everything, causal=True)
    if source < ring.rank:
        return Seen(everything, first if ring.headtail else everything, causal=False)
    return Seen(second, everything, causal=False) if ring.headtail else None


def visit(kv: Tensor, ring: Ring) -> Iterator[tuple[int, Tensor]]:
    """Each rank of the ring with its keys and values [2, B, K, L, C], own first, then rank - 1, rank - 2, …

    While one is used the next is on its way.
    """
    if ring.gathers:
        coming = collectives.all_gather_into_tensor(kv.contiguous(), ring.size, ring.group)
        yield ring.rank, kv
        everyones = collectives.wait_tensor(coming).unflatten(0, (ring.size, 2))
        for step in range(1, ring.size):
            source = (ring.rank - step) % ring.size
            yield source, everyones[source]
        return
    for step in range(ring.size - 1):
        coming = pass_on(kv, ring)
        yield (ring.rank - step) % ring.size, kv
        kv = collectives.wait_tensor(coming)
    yield (ring.rank + 1) % ring.size, kv


def exchange(x: Tensor, sent: list[int], received: list[int], group: str) -> Tensor:
    """Begin an all-to-all along the first dimension: so many rows to and from each rank."""
    return collectives.all_to_all_single(x.contiguous(), received, sent, group)


def pass_on(x: Tensor, ring: Ring) -> Tensor:
    """Begin: x to the next rank of the ring, and that of the one before from it."""
    sent, received = [0] * ring.size, [0] * ring.size
    sent[(ring.rank + 1) % ring.size] = received[(ring.rank - 1) % ring.size] = x.shape[0]
    return exchange(x, sent, received, ring.group)


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, ...]:
    """One partial attention.

    Args:
        q: [B, H, Lq, C].
        k: [B, K, Lk, C].
        v: [B, K, Lk, C].
        causal: whether query i sees keys 0 .. i, Lq = Lk, rather than all.

    Returns:
        The result [B, H, Lq, C] in q's type; the log-sum-exps [B, H, Lq], fp32; and on CUDA two tensors that its
        backward asks for (the random state of a dropout, which is 0).
    """
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(
            q, *unshared(q, k, v), is_causal=causal
        )
    if q.dtype == torch.float32:  # the flash kernel has half precisions only
        k, v = unshared(q, k, v)
        result, lse, *state = aten._scaled_dot_product_efficient_attention(
            q, k, v, None, True, is_causal=causal
        )
        return result, lse[:, :, : q.shape[2]], *state  # lse comes padded to a multiple of 32
    result, lse, _, _, _, _, *state, _ = aten._scaled_dot_product_flash_attention(
        q, k, v, is_causal=causal
    )
    return result, lse, *state


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    result: Tensor,
    lse: Tensor,
    state: list[Tensor],
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The share of this part in the gradients of q, k and v, `result` and `lse` being those of the whole attention.

    Shapes as in `attend`; grad is that of the result.
    """
    kv_heads, length = k.shape[1], q.shape[2]
    if q.device.type == "cpu":
        grad_q, grad_k, grad_v = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, *unshared(q, k, v), result, lse, 0.0, causal
        )
    elif q.dtype == torch.float32:
        k, v = unshared(q, k, v)
        padded = F.pad(lse, (0, -length % 32), value=torch.inf)
        grad_q, grad_k, grad_v, _ = aten._scaled_dot_product_efficient_attention_backward(
            grad, q, k, v, None, result, padded, *state, 0.0, [True, True, True, False], causal
        )
    else:
        grad_q, grad_k, grad_v = aten._scaled_dot_product_flash_attention_backward(
            grad,
            q,
            k,
            v,
            result,
            lse.contiguous(),
            None,
            None,
            length,
            k.shape[2],
            0.0,
            causal,
            *state,
        )
    return grad_q, sum_heads(grad_k, kv_heads), sum_heads(grad_v, kv_heads)


def unshared(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """k and v, [B, K, L, C] to [B, H, L, C], each head once for every query head, for kernels that can't share them."""
    share = q.shape[1] // k.shape[1]
    return (
        (k, v)
        if share == 1
        else (k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1))
    )


def sum_heads(x: Tensor, heads: int) -> Tensor:
    """The backward of `unshared`: [B, H, L, C] to [B, K, L, C], in fp32."""
    return x.unflatten(1, (heads, -1)).sum(dim=2, dtype=torch.float32)
