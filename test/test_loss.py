"""The loss is a sum over valid labels, in fp32, and sums of parts are the sum of the whole."""

import math

import pytest
import torch
import torch.nn.functional as F

from torchtrain.loss import count_valid, sequence_losses
from torchtrain.utils import IGNORE_INDEX

B, S, V = 3, 17, 29


def example(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    logits = (3 * torch.randn(B, S, V, generator=generator)).to(dtype).requires_grad_()
    labels = torch.randint(V, (B, S), generator=generator)
    labels[0, 5:] = IGNORE_INDEX
    labels[1] = IGNORE_INDEX
    return logits, labels


def by_hand(logits, labels):
    """Token by token, in double precision."""
    sums = []
    for row, row_labels in zip(logits.detach().double(), labels, strict=True):
        terms = [
            math.log(x.exp().sum()) - x[y]
            for x, y in zip(row, row_labels, strict=True)
            if y != IGNORE_INDEX
        ]
        sums.append(float(sum(terms)))
    return torch.tensor(sums, dtype=torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_sequence_is_the_sum_of_its_valid_tokens(dtype):
    logits, labels = example(dtype)
    losses = sequence_losses(logits, labels)
    assert losses.shape == (B,)
    assert losses.dtype == torch.float32
    assert losses[1] == 0
    torch.testing.assert_close(losses.double(), by_hand(logits, labels), rtol=1e-6, atol=0)


def test_gradient_is_that_of_the_summed_cross_entropy():
    logits, labels = example()
    (ours,) = torch.autograd.grad(sequence_losses(logits, labels).sum(), logits)
    whole = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), reduction="sum", ignore_index=-100
    )
    (theirs,) = torch.autograd.grad(whole, logits)
    assert torch.equal(ours, theirs)
    assert (ours[labels == IGNORE_INDEX] == 0).all()
    assert (ours[labels != IGNORE_INDEX].abs().amax(dim=-1) > 0).all()


def test_gradient_in_bf16_is_the_rounded_fp32_gradient():
    logits, labels = example(torch.bfloat16)
    wide = logits.detach().float().requires_grad_()
    (ours,) = torch.autograd.grad(sequence_losses(logits, labels).sum(), logits)
    (exact,) = torch.autograd.grad(sequence_losses(wide, labels).sum(), wide)
    assert torch.equal(ours, exact.to(torch.bfloat16))


def test_microbatches_add_up_whatever_their_valid_labels():
    logits, labels = example()
    whole = sequence_losses(logits, labels)
    parts = torch.cat(
        [sequence_losses(logits[:1], labels[:1]), sequence_losses(logits[1:], labels[1:])]
    )
    assert torch.equal(parts, whole)
    assert count_valid(labels).tolist() == [5, 0, S]
    assert count_valid(labels).dtype == torch.int64


@pytest.mark.slow
def test_compiled_is_eager():
    logits, labels = example()
    compiled = torch.compile(sequence_losses, dynamic=False)
    losses, gradients = [], []
    for function in (compiled, sequence_losses):
        value = function(logits, labels)
        losses.append(value.detach())
        gradients.append(torch.autograd.grad(value.sum(), logits)[0])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-7)
