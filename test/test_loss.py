"""The loss is a sum over valid labels, in fp32, and sums of parts are the sum of the whole.

Cut into chunks, it and every gradient are the same to the bit, in every layout.
"""

import math
import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers.forking import in_group
from helpers.launching import options
from torch.utils._python_dispatch import TorchDispatchMode

from torchtrain.config.schema import Compile
from torchtrain.config_manager import JobConfig
from torchtrain.loss import CHUNK, count_valid, sequence_losses
from torchtrain.set_up import build_losses, set_up
from torchtrain.shards import local
from torchtrain.utils import IGNORE_INDEX
from train import forward_backward, losses_of

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4, B * S - 1])
def test_chunks_change_no_bit_of_losses_and_gradients(dtype, rows):
    logits, labels = example(dtype)
    weights = torch.tensor([0.1, 3.0, 1 / 7])  # a sequence's part of the gradient
    found = []
    for chunk in (rows * V + V - 1, B * S * V):
        own = logits.detach().clone().requires_grad_()
        losses = sequence_losses(own, labels, chunk)
        (losses * weights).sum().backward()
        found.append((losses.detach(), own.grad))
    (losses, gradient), (whole_losses, whole_gradient) = found
    assert torch.equal(losses, whole_losses)
    assert torch.equal(gradient, whole_gradient)


def test_gradients_of_hidden_states_and_output_weight_are_exact_in_fp32():
    """Against fp64, of hidden states and weight: what is left is fp32's own rounding."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(B, S, 8, generator=generator)
    weight = torch.randn(V, 8, generator=generator)
    _, labels = example()
    found = []
    for dtype in (torch.float32, torch.float64):
        given = [tensor.to(dtype).requires_grad_() for tensor in (hidden, weight)]
        logits = F.linear(*given)
        if dtype == torch.float32:
            loss = sequence_losses(logits, labels, 5 * V).sum() / 22
        else:
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / 22
        found.append([loss, *torch.autograd.grad(loss, given)])
    for ours, exact in zip(*found, strict=True):
        assert (ours - exact).norm() <= 1e-6 * exact.norm()


class LargestWide(TorchDispatchMode):
    """Notes the number of elements of the largest fp32 tensor that an operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        for result in results if isinstance(results, tuple | list) else [results]:
            if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
                self.elements = max(self.elements, result.numel())
        return results


def test_no_more_than_a_chunk_is_ever_in_fp32():
    tokens, vocabulary = 160, 128_256
    assert tokens * vocabulary > CHUNK
    logits = torch.zeros(2, tokens // 2, vocabulary, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(2, tokens // 2, dtype=torch.int64)
    with LargestWide() as seen:
        (gradient,) = torch.autograd.grad(sequence_losses(logits, labels).sum(), logits)
    assert 0 < seen.elements <= CHUNK
    assert gradient.data_ptr() == logits.data_ptr()


def test_without_a_gradient_the_logits_stay_as_they_are():
    logits, labels = example()
    before = logits.detach().clone()
    with torch.no_grad():
        losses = sequence_losses(logits, labels, 4 * V)
    assert torch.equal(losses, sequence_losses(logits, labels).detach())
    assert torch.equal(logits, before)


def test_an_operation_that_needs_its_own_result_is_refused():
    logits, labels = example()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        sequence_losses(logits.tanh(), labels, 4 * V).sum().backward()


TP = {"parallelism.tensor_parallel_degree": 2}
BF16 = {"training.mixed_precision_param": "bfloat16"}
TIED = {"model.tied_embeddings": True}


def pipeline(schedule):
    return {
        "model.n_layers": 4,
        "parallelism.pipeline_parallel_degree": 2,
        "parallelism.pipeline_parallel_schedule": schedule,
    }


LAYOUTS = {
    "fsdp": BF16,
    "fsdp, accumulated and tied": {**TIED, "training.local_batch_size": 2},
    "tensor, uneven": {**TP, **BF16, "model.vocab_size": 2049},
    "tensor, whole logits": {**TP, "parallelism.disable_loss_parallel": True},
    "context": {"parallelism.context_parallel_degree": 2, **BF16},
    "pipeline": {**pipeline("1F1B"), **TIED},
    "pipeline, zero bubble": pipeline("InterleavedZeroBubble"),
    "pipeline, V": {**pipeline("ZBVZeroBubble"), **BF16, **TIED},
    "pipeline, both ways and recomputed": {
        **pipeline("DualPipeV"),
        "activation_checkpoint.mode": "full",
    },
}


def use_chunks(trainer, chunk):
    """Let a trainer, and its pipeline, compute the loss in chunks of this size."""
    trainer.sequence_losses = partial(sequence_losses, chunk=chunk)
    if trainer.pipeline is not None:
        trainer.pipeline.sequence_losses = trainer.sequence_losses


def compare_chunks(data):
    """Compute, on a rank, losses and gradients of each layout in one chunk and in several."""
    for name, given in LAYOUTS.items():
        trainer = set_up(JobConfig().parse_args(options({**data, **given})), torch.device("cpu"))
        batches = trainer.loader.step_batches(1)
        batches[0].labels[0, 3:] = IGNORE_INDEX
        numbers = torch.arange(trainer.validator.plan.batch_size).numpy()
        held_out = trainer.validator.samples.read(numbers)
        found = []
        for chunk in (sys.maxsize, 5 * trainer.plan.shape.vocab_size):
            use_chunks(trainer, chunk)
            with torch.no_grad():
                evaluated = losses_of(trainer, held_out)
            losses = torch.stack(forward_backward(trainer, batches)[:2])
            gradients = {name: local(each.grad) for name, each in trainer.weights.items()}
            found.append({**gradients, "losses": losses, "validation": evaluated})
            trainer.optimizer.zero_grad()
        whole, chunked = found
        for what, expected in whole.items():
            assert torch.equal(chunked[what], expected), f"{name}: {what}"


@pytest.mark.slow
def test_chunks_change_no_bit_in_any_layout(data):
    held_out = {
        "validation.enable": True,
        "validation.dataset": data["training.dataset"],
        "validation.dataset_path": data["training.dataset_path"],
    }
    in_group(2, compare_chunks, {**data, **held_out})


@pytest.mark.slow
def test_compiled_is_eager():
    logits, labels = example()
    section = Compile(enable=True)
    assert "loss" in section.components
    compiled = build_losses(section)
    losses, gradients = [], []
    for function in (compiled, sequence_losses):
        value = function(logits, labels)
        losses.append(value.detach())
        gradients.append(torch.autograd.grad(value.sum(), logits)[0])
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=1e-7)
