"""The loss: sums of token cross-entropies, divided once by the valid labels of the global batch.

The logits are the largest tensor of a step. They stay in the compute precision, and are widened to
fp32 a chunk of tokens at a time.

Letters: B batch, S sequence, V vocabulary, T tokens.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchtrain.utils import IGNORE_INDEX

CHUNK = 2**24
"""Logits per chunk: 64 MiB in fp32."""


class BatchLoss(NamedTuple):
    """The loss of a global batch as a rank knows it: 0-dim tensors on the device."""

    own: Tensor
    """The sum of the token losses of this rank's samples, divided by `valid`: fp64, the same on
    ranks that share samples, but 0 on those without the last stage of a pipeline."""
    largest: Tensor
    """The largest mean loss of one of these samples, likewise."""
    valid: Tensor
    """The valid labels of the whole global batch, the same on all ranks; 0: there must be no
    update."""


def sequence_losses(logits: Tensor, labels: Tensor, chunk: int = CHUNK) -> Tensor:
    """Return the sum, in nats, of the cross-entropies of each sequence's valid labels.

    Where there are several chunks, the backward writes the gradient of the logits in their place.
    So the operation that made them must not need its own result again, as tanh and log_softmax do
    (autograd refuses it).

    Args:
        logits: [B, S, V], any floating-point type; may be sharded over V where cross entropy knows
            how to take that (`parallelisms.tensor_parallel.loss_context`). Labels and result are
            whole on each rank.
        labels: [B, S], int64, in 0 .. V-1 or IGNORE_INDEX.
        chunk: how many of this rank's logits are in fp32 at a time; changes no bit of the result.

    Returns:
        [B], computed in fp32. Sums, not means: they add up over microbatches and ranks whatever
        their numbers of valid labels.
    """
    rows, row_labels = logits.flatten(0, 1), labels.flatten()
    shards = logits.device_mesh.size() if isinstance(logits, DTensor) else 1
    length = max(1, chunk * shards // logits.shape[-1])  # the same on ranks with uneven shards
    if length >= len(rows):
        losses = compute_token_losses(rows, row_labels)
    else:
        losses = ChunkedCrossEntropy.apply(rows, row_labels, length)
    return losses.view_as(labels).sum(dim=1)


def compute_token_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the cross entropy of each token, 0 without a valid label: [T, V], [T] to fp32 [T]."""
    losses = F.cross_entropy(logits.float(), labels, ignore_index=IGNORE_INDEX, reduction="none")
    return losses.to_local() if isinstance(losses, DTensor) else losses


class ChunkedCrossEntropy(torch.autograd.Function):
    """`compute_token_losses` of chunks of tokens, each of which the backward computes again.

    What is saved is the logits alone; autograd would save their log-softmax in fp32.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor, length: int) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(logits, labels)
        ctx.length = length
        chunks = zip(logits.split(length), labels.split(length), strict=True)
        return torch.cat([compute_token_losses(*chunk) for chunk in chunks])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        logits, labels = ctx.saved_tensors
        logits = logits.detach()
        parts = [tensor.split(ctx.length) for tensor in (logits, labels, gradient)]
        for chunk, chunk_labels, chunk_gradient in zip(*parts, strict=True):
            with torch.enable_grad():
                leaf = chunk.detach().requires_grad_()
                losses = compute_token_losses(leaf, chunk_labels)
            (of_logits,) = torch.autograd.grad(losses, leaf, chunk_gradient)
            chunk.copy_(of_logits)
        return logits, None, None


def count_valid(labels: Tensor) -> Tensor:
    """Return the number of valid labels of each sequence: [B, S] to [B], int64."""
    return (labels != IGNORE_INDEX).sum(dim=1)
