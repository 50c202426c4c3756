"""Which heads the kernel of plain attention is given, and that repeating them changes nothing."""

import pytest
import torch
import torch.nn.functional as F

from torchtrain.models import attention
from torchtrain.models.attention import CausalAttention, kernel_shares_heads

HEADS, KV_HEADS, LENGTH, WIDTH = 8, 2, 24, 16


def draw(dtype=torch.float32, device="cpu", kv_heads=KV_HEADS):
    """Return q [B, H, S, C], k and v [B, K, S, C]."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, heads, LENGTH, WIDTH, generator=generator).to(device, dtype)
        for heads in (HEADS, kv_heads, kv_heads)
    ]


@pytest.mark.parametrize(
    ("device", "dtype", "heads_given"),
    [
        ("cpu", torch.float32, KV_HEADS),
        ("cpu", torch.bfloat16, KV_HEADS),
        ("meta", torch.bfloat16, KV_HEADS),  # which stands for a GPU
        ("meta", torch.float32, HEADS),
    ],
)
def test_heads_are_repeated_for_the_kernel_that_cannot_share_them(
    device, dtype, heads_given, monkeypatch
):
    given = []
    kernel = F.scaled_dot_product_attention

    def spy(q, k, v, **options):
        given.append((k.shape[1], v.shape[1], options["enable_gqa"]))
        return kernel(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    q, k, v = draw(dtype, device)
    assert CausalAttention()(q, k, v).shape == q.shape
    assert given == [(heads_given, heads_given, heads_given != HEADS)]


def result_and_gradients(inputs):
    leaves = [x.clone().requires_grad_() for x in inputs]
    result = CausalAttention()(*leaves)
    generator = torch.Generator().manual_seed(1)
    grads = torch.autograd.grad(result, leaves, torch.randn(result.shape, generator=generator))
    return [result, *grads]


@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_repeated_heads_compute_the_same(kv_heads, monkeypatch):
    inputs = draw(kv_heads=kv_heads)
    assert kernel_shares_heads(inputs[0])
    shared = result_and_gradients(inputs)
    monkeypatch.setattr(attention, "kernel_shares_heads", lambda q: False)
    repeated = result_and_gradients(inputs)
    assert torch.equal(repeated[0], shared[0])
    for mine, theirs in zip(repeated[1:], shared[1:], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
