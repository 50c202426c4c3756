"""Positions of a sequence that ranks share, against those of the whole sequence."""

import pytest
import torch

from torchtrain.catalog.models import ModelShape
from torchtrain.models.rotary import RotaryPositions
from torchtrain.parallelisms.context_parallel import ShardPositions, shard_sequence
from torchtrain.parallelisms.ring_attention import Ring

SHAPE = ModelShape(dim=32, n_layers=1, n_heads=4, n_kv_heads=4, ffn_hidden_dim=64, vocab_size=50)
# Where the document of each of 8 tokens begins.
DOCUMENTS = torch.tensor([[0, 0, 0, 3, 3, 5, 5, 5], [0, 1, 1, 1, 1, 1, 6, 6]])


@pytest.mark.parametrize("headtail", [False, True])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("documents", [None, DOCUMENTS])
def test_a_shard_has_the_positions_it_has_in_the_whole(rank, headtail, documents):
    ring = Ring(group="none", rank=rank, size=2, headtail=headtail, gathers=True)
    whole = RotaryPositions(SHAPE)
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    expected = whole(tokens, documents).expand(2, 8, 1, 4)
    found = ShardPositions(whole, ring)(shard_sequence(tokens, ring), documents)
    assert torch.equal(found.expand(2, 4, 1, 4), shard_sequence(expected, ring))
