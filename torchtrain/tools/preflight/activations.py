"""What a layer's forward keeps for its backward, and what both take beside that: traced, not
calculated.

One block of each kind runs forward and backward on fake tensors, with the techniques of the run,
and the tensors that live are counted. FSDP's part in it is added up in `memory`.

Letters: B batch, S sequence, D model width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from torchtrain.config.schema import Parallelism
from torchtrain.dtypes import DTYPES
from torchtrain.loss import sequence_losses
from torchtrain.models.decoder import Decoder
from torchtrain.models.document_masking import build_document_mask
from torchtrain.parallelisms.mesh import Mesh
from torchtrain.parallelisms.tensor_parallel import loss_context
from torchtrain.shards import local
from torchtrain.tools.preflight.allocator import Change
from torchtrain.tools.preflight.live_bytes import LiveBytes
from torchtrain.tools.preflight.specimen import (
    Kind,
    Request,
    build_specimen,
    fake_ranks,
    fake_tensors,
    make_fake,
    rank_with_most,
)


@dataclass(frozen=True)
class Trace:
    """The bytes that a layer takes, beside its weights and its input."""

    saved: int
    """After its forward: what its backward needs, and its result."""
    forward: int
    """Most at a time in its forward."""
    backward: int
    """Most at a time in its backward: the rest of `saved`, gradients of activations and weights,
    and what is computed again."""
    gradient: int
    """That of its input, after its backward."""
    forward_changes: tuple[Change, ...] = ()
    """The tensors that come and go in its forward; those that are left are `saved`."""
    backward_changes: tuple[Change, ...] = ()
    """And in its backward, of the output also in the loss; those that are left are gradients."""


@dataclass(frozen=True)
class Traces:
    """The layers of a run, traced."""

    rotations: int
    """Bytes of the positions' rotations and of a mask, which all blocks of a forward share."""
    passed_on: int
    """Bytes of what a block passes to the next."""
    embedding: Trace
    blocks: dict[Kind, Trace]
    output: Trace
    """Of the final norm and the projection onto the vocabulary; saved are the logits, too."""
    loss: int
    """Most at a time in the forward and the backward of the loss, with what the output saved."""
    local_shapes: dict[str, torch.Size]
    """Of each weight, by its name in the whole model, this rank's shape before FSDP shards it."""


@cache
def trace_layers(request: Request) -> Traces:
    """Trace a run's layers: some tenths of a second, once for all runs that ask for the same."""
    degrees = request.degrees
    ranks = degrees.dp_shard * degrees.cp * degrees.tp
    length = request.seq_len // degrees.cp
    tokens = request.sequences * length
    in_a_block = tokens if degrees.tp == 1 else tokens // degrees.tp
    rows = in_a_block * request.shape.experts_per_token
    with fake_ranks(rank_with_most(degrees), ranks):
        part, mesh = build_specimen(request)
        with fake_tensors(rows):
            make_fake(part)
            return _trace(part, mesh, request, length)


def _trace(part: Decoder, mesh: Mesh, request: Request, length: int) -> Traces:
    batch = request.sequences
    tokens = torch.zeros(batch, length, dtype=torch.int64)
    labels = torch.zeros_like(tokens)
    documents = None
    if request.read_training().document_masking:
        documents = torch.zeros(batch, request.seq_len, dtype=torch.int64)

    def make_input() -> Tensor:
        size = (batch, length // request.sequence_shards, request.shape.dim)
        return torch.empty(size, dtype=DTYPES[request.dtype], requires_grad=True)

    shared = LiveBytes()
    with shared:
        rotations = part.rope(tokens, documents)
        mask = None if documents is None else build_document_mask(documents)
    blocks = {
        kind: trace_layer(
            partial(part.layers[str(layer)], rotations=rotations, mask=mask), make_input()
        )
        for kind, layer in request.choose_blocks().items()
    }
    sharing = Parallelism.model_validate_json(request.parallelism)
    vocabulary_sharded = mesh.has("tp") and not sharing.disable_loss_parallel
    with loss_context(vocabulary_sharded=vocabulary_sharded):
        losses = FusedLoss.apply if request.compiles_loss else sequence_losses
        output, loss = trace_output(part, make_input(), labels, losses)
    return Traces(
        rotations=shared.now,
        passed_on=make_input().nbytes,
        embedding=trace_layer(part.tok_embeddings, tokens),
        blocks=blocks,
        output=output,
        loss=loss,
        local_shapes={name: local(weight).shape for name, weight in part.named_parameters()},
    )


def trace_layer(layer: Callable[[Tensor], Tensor] | nn.Module, given: Tensor) -> Trace:
    """Run a layer forward and backward, and count."""
    live = LiveBytes()
    with live:
        result = layer(given)
        saved, forward = live.now, live.begin_phase()
        begun = len(live.changes)
        seeded = Seed.apply(result)
        del result
        seeded.backward()
    gradient = 0 if given.grad is None else given.grad.nbytes
    first, second = tuple(live.changes[:begun]), tuple(live.changes[begun:])
    return Trace(saved, forward, live.peak, gradient, first, second)


def trace_output(
    part: Decoder, given: Tensor, labels: Tensor, losses: Callable[..., Any]
) -> tuple[Trace, int]:
    """Run the final norm, the output and the loss, and count; return the trace and the loss's."""
    live = LiveBytes()
    peaks: list[int] = []
    with live:
        logits = part.output(part.norm(given))
        saved, forward = live.now, live.begin_phase()
        begun = len(live.changes)
        logits.register_hook(lambda gradient: peaks.append(live.begin_phase()))
        loss = losses(logits, labels).sum()
        del logits
        loss.backward()
    gradient = 0 if given.grad is None else given.grad.nbytes
    first, second = tuple(live.changes[:begun]), tuple(live.changes[begun:])
    return Trace(saved, forward, live.peak, gradient, first, second), peaks[0]


class Seed(torch.autograd.Function):
    """Takes what a layer returns to a number, and back to a gradient, keeping nothing."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        """Return a number."""
        ctx.like = x.shape, x.dtype
        return x.new_empty(())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        """Return a gradient of the layer's result."""
        shape, dtype = ctx.like
        return torch.empty(shape, dtype=dtype)


class FusedLoss(torch.autograd.Function):
    """The compiled loss, as far as memory goes: Inductor widens the logits as it reads them, and
    writes their gradient beside them."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:  # type: ignore[override]
        """Return a loss for each sequence."""
        ctx.save_for_backward(logits)
        return labels.new_empty(labels.shape[0], dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """Return a gradient of the logits."""
        (logits,) = ctx.saved_tensors
        return torch.empty_like(logits), None
