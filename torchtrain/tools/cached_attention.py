"""A key/value cache for a model, put in place of its attention kernels and its positions.

Each forward is given the tokens that are new; keys and values of those before are kept. Prompts of
different lengths are padded on the left: a row's positions begin where its padding ends.

Letters: B batch, S new tokens, T tokens that there is room for, H query heads, K key/value heads,
C head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchtrain.models.decoder import Decoder
from torchtrain.models.document_masking import Mask
from torchtrain.models.moe import SparseFeedForward
from torchtrain.models.rotary import RotaryPositions


class CacheState:
    """How far the sequences are, and what each new token sees."""

    def __init__(self, padding: Tensor, room: int) -> None:
        """Begin sequences with this padding [B] and room for so many tokens, padding included."""
        self.padding = padding
        self.room = room
        self.length = 0
        """Tokens before those that are new."""
        self.mask = torch.empty(0)
        """[B, 1, S, T], boolean."""

    def advance(self, count: int) -> Tensor:
        """Take in so many new tokens; return their positions [B, S]."""
        device = self.padding.device
        places = torch.arange(self.length, self.length + count, device=device)
        keys = torch.arange(self.length + count, device=device)
        is_past = keys <= places.unsqueeze(1)
        is_real = keys >= self.padding.view(-1, 1, 1)
        # Padding sees itself: a row that sees nothing would be NaN, and spread.
        is_same = keys == places.unsqueeze(1)
        self.mask = (is_past & is_real | is_same).unsqueeze(1)
        self.length += count
        return (places - self.padding.unsqueeze(1)).clamp(min=0)


class CachedPositions(RotaryPositions):
    """The rotations of new tokens; it is asked first in each forward."""

    def __init__(self, rope: RotaryPositions, state: CacheState) -> None:
        super().__init__(rope.shape)
        self.state = state

    def forward(self, tokens: Tensor, documents: Tensor | None = None) -> Tensor:
        """Return the rotations [B, S, 1, C/2] of new tokens [B, S]."""
        return self.at(self.state.advance(tokens.shape[1]))


class CachedAttention(nn.Module):
    """The kernel of one layer, with that layer's keys and values."""

    def __init__(self, state: CacheState) -> None:
        super().__init__()
        self.state = state
        self.keys = torch.empty(0)
        self.values = torch.empty(0)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Tensor:
        """Take the new tokens' q [B, H, S, C] and k, v [B, K, S, C] to [B, H, S, C]."""
        state = self.state
        if self.keys.numel() == 0:
            size = (*k.shape[:2], state.room, k.shape[3])
            self.keys, self.values = k.new_zeros(size), v.new_zeros(size)
        before = state.length - k.shape[2]
        self.keys[:, :, before : state.length] = k
        self.values[:, :, before : state.length] = v
        keys, values = self.keys[:, :, : state.length], self.values[:, :, : state.length]
        is_grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(q, keys, values, state.mask, enable_gqa=is_grouped)


def begin_sequences(model: Decoder, padding: Tensor, room: int) -> None:
    """Give a model an empty cache: its next forward is given the first tokens of new sequences.

    Args:
        model: with its own attention kernels, or with those of earlier sequences.
        padding: tokens of padding at the left of each row, [B].
        room: tokens of a whole sequence at most, padding included.
    """
    state = CacheState(padding, room)
    model.replace_attention_kernels(lambda kernel: CachedAttention(state))
    model.rope = CachedPositions(model.rope, state)


class PaddedSequence(nn.Module):
    """A module of which each tensor-parallel rank computes an equal shard of the sequence."""

    def __init__(self, module: nn.Module, ranks: int) -> None:
        super().__init__()
        self.module = module
        self.ranks = ranks

    def forward(self, x: Tensor) -> Tensor:
        """Take x [B, S, D] to [B, S, D], S filled up with zeros to what the ranks can share."""
        filled = F.pad(x, (0, 0, 0, -x.shape[1] % self.ranks))
        return self.module(filled)[:, : x.shape[1]]


def pad_sparse_layers(model: Decoder, ranks: int) -> None:
    """Let so many tensor-parallel ranks share any number of tokens in the sparse layers."""
    for block in model.layers.values():
        for name, child in list(block.named_children()):
            if isinstance(child, SparseFeedForward):
                setattr(block, name, PaddedSequence(child, ranks))
