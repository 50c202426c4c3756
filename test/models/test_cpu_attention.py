"""The backward of attention that a compiled block has on a CPU, against PyTorch's kernel."""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from torchtrain.models import cpu_attention
from torchtrain.models.attention import CausalAttention
from torchtrain.models.cpu_attention import BlockwiseAttention
from torchtrain.models.decoder import Decoder
from torchtrain.models.document_masking import build_document_mask
from torchtrain.parallelisms.activation_checkpoint import save_costly

BATCH, HEADS, WIDTH = 2, 4, 16
BLOCK, BLOCKS = 8, 3


@pytest.fixture(autouse=True)
def few_small_blocks(monkeypatch):
    """What takes long is to trace many blocks."""
    monkeypatch.setattr(cpu_attention, "SMALLEST_BLOCK", BLOCK)
    monkeypatch.setattr(cpu_attention, "BLOCKS", BLOCKS)
    yield
    torch.compiler.reset()


def draw(length, kv_heads=HEADS, dtype=torch.float64):
    """Return q, k, v as a model lays them out, and the gradient of the result.

    The scores have a deviation of 9: what a kernel rounds is then seen in an exponential.
    """
    generator = torch.Generator().manual_seed(length)
    shapes = [(BATCH, length, heads, WIDTH) for heads in (HEADS, kv_heads, kv_heads, HEADS)]
    q, k, v, grad = (torch.randn(shape, generator=generator).transpose(1, 2) for shape in shapes)
    return [x.to(dtype) for x in (3 * q, 3 * k, v, grad)]


def result_and_gradients(attend, q, k, v, grad, mask=None):
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    result = attend(*leaves, mask)
    return [result.detach(), *torch.autograd.grad(result, leaves, grad)]


def compiled(attend):
    return torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=False)


def relative_error(value, reference):
    return float((value.double() - reference).norm() / reference.norm())


@pytest.mark.parametrize(
    ("length", "kv_heads", "documents"),
    [
        (1, 1, False),
        (BLOCK, HEADS, False),
        (BLOCK + 1, 1, True),
        (4 * BLOCK + 1, 1, False),
        (4 * BLOCK + 1, HEADS, False),
        (4 * BLOCK + 1, 1, True),
    ],
)
def test_result_is_the_kernels_and_gradients_agree(length, kv_heads, documents):
    inputs = draw(length, kv_heads)
    if documents:  # of different lengths in each sequence, one of them over a block's edge
        starts = [[(i // 5) * 5 for i in range(length)], [(i // 13) * 13 for i in range(length)]]
        inputs.append(build_document_mask(torch.tensor(starts)))
    kernel = result_and_gradients(CausalAttention(), *inputs)
    ours = result_and_gradients(compiled(BlockwiseAttention(CausalAttention())), *inputs)
    assert torch.equal(ours[0], kernel[0])
    for value, reference in zip(ours, kernel, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-10, atol=1e-10)


def no_gradients(grad, q, k, v, lse, mask):
    return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)


def test_it_is_of_compiled_and_not_too_long_sequences_alone(monkeypatch):
    monkeypatch.setattr(cpu_attention, "compute_gradients", no_gradients)
    inputs = draw(BLOCK)
    kernel = BlockwiseAttention(CausalAttention())
    assert all(x.any() for x in result_and_gradients(kernel, *inputs))
    result, *gradients = result_and_gradients(compiled(kernel), *inputs)
    assert result.any()
    assert not any(x.any() for x in gradients)
    monkeypatch.setattr(cpu_attention, "LONGEST", BLOCK - 1)
    torch.compiler.reset()
    assert all(x.any() for x in result_and_gradients(compiled(kernel), *inputs))


def test_in_bf16_it_is_as_close_to_the_formula_as_pytorchs_kernel():
    inputs = draw(23, dtype=torch.bfloat16)
    exact = result_and_gradients(CausalAttention(), *(x.double() for x in inputs))
    kernel = result_and_gradients(CausalAttention(), *inputs)
    ours = result_and_gradients(compiled(BlockwiseAttention(CausalAttention())), *inputs)
    for value, other, reference in zip(ours, kernel, exact, strict=True):
        assert value.dtype == torch.bfloat16
        assert relative_error(value, reference) < 1.5 * relative_error(other, reference)


@pytest.mark.parametrize("saves_operations", [False, True])
def test_recomputed_it_gives_the_same(saves_operations):
    contexts = partial(save_costly, Decoder.matrix_products, Decoder.ops_worth_saving, 1)
    options = {"context_fn": contexts} if saves_operations else {}

    def attend(q, k, v, mask):
        scaled = (q * 2, k * 0.5, v + 1)
        return checkpoint(
            BlockwiseAttention(CausalAttention()), *scaled, mask, use_reentrant=False, **options
        )

    inputs = draw(BLOCK + 9, kv_heads=2)
    kernel = result_and_gradients(attend, *inputs)
    ours = result_and_gradients(compiled(attend), *inputs)
    for value, reference in zip(ours, kernel, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-10, atol=1e-10)
