"""Context parallelism: each rank holds a shard of every sequence; only attention looks beyond it.

There are two methods: the ring (ring_attention.py) and *Ulysses* (Jacobs et al. 2023,
arXiv:2309.14509), in which an all-to-all gives each rank the whole sequence for a share of the
heads, and another gives the result back.

With contiguous shards the last rank has most of the causal work. "headtail" cuts the sequence into
2R chunks and gives rank r the chunks r and 2R-1-r, so that each rank has the same (Llama 3,
arXiv:2407.21783, section 3.3.2).

Letters: B batch, S sequence, H query heads, K key/value heads, C head width, R ranks of the
context mesh, L = S/R.
"""

from typing import Any

import torch
from torch import Tensor, nn

from torchtrain.models.decoder import Decoder
from torchtrain.models.document_masking import Mask
from torchtrain.models.rotary import RotaryPositions
from torchtrain.parallelisms.ring_attention import Ring, RingAttention, collectives, exchange


def apply_context_parallel(model: Decoder, ring: Ring, method: str) -> None:
    """Replace, in place, the attention kernels and the positions by ones that know other shards.

    Args:
        model: has no parameter changed, and may hold part of the heads only (tensor parallelism).
        ring: the ranks that share each sequence; each feeds the model its own `shard_sequence`.
        method: "ring", or "ulysses", for which the degree must divide the query heads and the
            key/value heads.
    """

    def replacement(kernel: nn.Module) -> nn.Module:
        return UlyssesAttention(kernel, ring) if method == "ulysses" else RingAttention(ring)

    model.replace_attention_kernels(replacement)
    model.rope = ShardPositions(model.rope, ring)


def shard_sequence(x: Tensor, ring: Ring) -> Tensor:
    """Return this rank's shard of a sequence, tokens and labels alike: [B, S] to [B, S/R].

    R divides S; 2R does under "headtail" (the config check sees to it).
    """
    count = 2 * ring.size if ring.headtail else ring.size
    assert x.shape[1] % count == 0, f"{x.shape[1]} positions do not make {count} equal chunks"
    chunks = x.chunk(count, dim=1)
    if ring.headtail:
        return torch.cat((chunks[ring.rank], chunks[-1 - ring.rank]), dim=1)
    return chunks[ring.rank].contiguous()


class ShardPositions(RotaryPositions):
    """The rotations of the positions that this rank's shard has in the whole sequence."""

    def __init__(self, whole: RotaryPositions, ring: Ring) -> None:
        super().__init__(whole.shape)
        self.ring = ring

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """Return the rotations [L, 1, C/2], complex64, of the shard's tokens [B, L].

        With `documents` [B, S], of whole sequences, they are [B, L, 1, C/2].
        """
        length = tokens.shape[1] * self.ring.size
        positions = torch.arange(length, device=tokens.device).unsqueeze(0)
        if documents is not None:
            positions = positions - documents
        return self.at(shard_sequence(positions, self.ring).squeeze(0))


class UlyssesAttention(nn.Module):
    """The kernel on whole sequences of a share of the heads; before and after it, all-to-alls."""

    def __init__(self, kernel: nn.Module, ring: Ring) -> None:
        super().__init__()
        self.kernel = kernel
        self.ring = ring

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor:
        """Take q [B, H, L, C] and k, v [B, K, L, C] to [B, H, L, C].

        The mask is of whole sequences.
        """
        q, k, v = (self._whole_sequence(x) for x in (q, k, v))
        mixed = self.kernel(q, k, v, mask)  # [B, H/R, S, C]
        if self.ring.headtail:
            mixed = reorder(mixed, self._chunk_order())
        shards = mixed.unflatten(2, (self.ring.size, -1)).movedim(2, 0)  # [R, B, H/R, L, C]
        return ExchangeParts.apply(shards, self.ring.group).movedim(0, 1).flatten(1, 2)

    def _whole_sequence(self, x: Tensor) -> Tensor:
        """Take [B, heads, L, C] to [B, heads/R, S, C], the positions in their own order."""
        shares = x.unflatten(1, (self.ring.size, -1)).movedim(1, 0)  # [R, B, heads/R, L, C]
        whole = ExchangeParts.apply(shares, self.ring.group).movedim(0, 2).flatten(2, 3)
        if not self.ring.headtail:
            return whole
        order = self._chunk_order()
        return reorder(whole, [order.index(chunk) for chunk in range(len(order))])

    def _chunk_order(self) -> list[int]:
        """Return the 2R chunks as the ranks hold them: 0, 2R-1, 1, 2R-2, …"""
        size = self.ring.size
        return [chunk for rank in range(size) for chunk in (rank, 2 * size - 1 - rank)]


def reorder(x: Tensor, order: list[int]) -> Tensor:
    """Cut x [B, heads, S, C] into equal chunks along S and join them in this order."""
    chunks = x.chunk(len(order), dim=2)
    return torch.cat([chunks[chunk] for chunk in order], dim=2)


class ExchangeParts(torch.autograd.Function):
    """An all-to-all of equal parts, its own inverse: x [R, ...], part r to rank r and from it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: str) -> Tensor:  # type: ignore[override]
        ctx.group = group
        return exchange_parts(x, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return exchange_parts(grad, ctx.group), None


def exchange_parts(x: Tensor, group: str) -> Tensor:
    """Give rank r part r of x [R, ...], and return the parts from all ranks."""
    one_each = [1] * x.shape[0]
    return collectives.wait_tensor(exchange(x, one_each, one_each, group))
