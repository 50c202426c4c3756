"""Recomputation of chosen operations, compiled: which matrix products run twice."""

from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from torchtrain.models.decoder import Decoder
from torchtrain.parallelisms.activation_checkpoint import save_costly

PRODUCTS = 7
"""As many as a block has."""
BACKWARD = 2 * PRODUCTS - 1
"""The input needs no gradient."""


def multiply(x, *weights):
    for weight in weights:
        x = torch.tanh(x @ weight)
    return x


def train_twice(network):
    """Return the products that the second step ran, and the gradients of both."""
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(8, 8, generator=generator).requires_grad_() for _ in range(PRODUCTS)]
    for _ in range(2):  # the first one compiles
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            network(torch.ones(4, 8), *weights).sum().backward()
    products = sum(event.name == "aten::mm" for event in profiled.events())
    return products, [weight.grad for weight in weights]


@pytest.mark.parametrize(("every", "again"), [(1, 0), (2, 3), (3, 4)])
def test_of_a_compiled_blocks_products_each_so_many_th_is_saved(every, again):
    contexts = partial(save_costly, Decoder.matrix_products, Decoder.ops_worth_saving, every)
    recomputed = partial(checkpoint, multiply, use_reentrant=False, context_fn=contexts)
    torch._dynamo.reset()
    compiler = CompileCounterWithBackend("aot_eager")
    products, gradients = train_twice(torch.compile(recomputed, backend=compiler, fullgraph=True))
    assert compiler.frame_count == 1
    assert products == PRODUCTS + BACKWARD + again
    for gradient, expected in zip(gradients, train_twice(multiply)[1], strict=True):
        assert torch.equal(gradient, expected)
