"""Activation checkpointing: keep less of the forward, and run parts of it again in the backward.

Sources: Chen et al. 2016 (arXiv:1604.06174), Korthikanti et al. 2022 (arXiv:2205.05198, the
selective form), torchtitan (that "op" saves every second product),
https://docs.pytorch.org/docs/stable/checkpoint.html and, for the compiler's budget,
https://pytorch.org/blog/activation-checkpointing-techniques/
"""

from collections import Counter
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch._functorch.config
from torch.utils.checkpoint import (
    SAC_IGNORED_OPS,
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from torchtrain.config.schema import ActivationCheckpoint
from torchtrain.models.decoder import Decoder

PROFILER_MARKS = (
    torch.ops.profiler._record_function_enter_new.default,
    torch.ops.profiler._record_function_exit._RecordFunction,
)

SAVED_PRODUCTS = {"op": 2, "op_all": 1}
"""By `selective_ac_option`: of a block's matrix products, each so many-th is saved."""


def apply_within_blocks(model: Decoder, config: ActivationCheckpoint) -> None:
    """Apply the modes that choose operations, before compilation, which traces them."""
    # A switch of the compiler's for the whole process: restored where another mode is asked for.
    uses_budget = config.mode == "memory_budget"
    torch._functorch.config.activation_memory_budget = config.memory_budget if uses_budget else 1.0
    if config.mode == "selective" and config.selective_ac_option in SAVED_PRODUCTS:
        # FSDP's marks for the profiler, of experts within the block: the recomputation has others.
        SAC_IGNORED_OPS.update(PROFILER_MARKS)
        every = SAVED_PRODUCTS[config.selective_ac_option]
        contexts = partial(save_costly, model.matrix_products, model.ops_worth_saving, every)
        for block in model.layers.values():
            recompute(block, context_fn=contexts)


def apply_around_blocks(model: Decoder, config: ActivationCheckpoint) -> None:
    """Apply the modes that recompute whole blocks, after compilation: the compiled forward reruns.

    (Traced with the block they would be the same, but torch 2.13 fails there with tensor
    parallelism on a CPU.)
    """
    every = config.recomputed_blocks
    if every is None:
        return
    for layer, block in model.layers.items():
        if int(layer) % every == 0:
            recompute(block)


def recompute(block: torch.nn.Module, **options: Any) -> None:
    """Run the block's forward again in the backward.

    The forward is replaced, not the module, so parameter names stay as they are. There is no
    dropout anywhere, so the random state need not be restored for the second forward.
    """
    block.forward = partial(  # type: ignore[method-assign]
        checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False, **options
    )


def save_costly(
    products: frozenset[Any], others: frozenset[Any], every: int
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts of one forward and of its recomputation, which decide what is saved.

    Args:
        products: the matrix products. Of these the first is saved, and from there on each
            `every`-th, counted in the order in which they run: the same both times.
        others: the other operations whose results are saved. All the rest is computed again.
        every: 1 or more.
    """
    seen: Counter[bool] = Counter()

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        is_saved = operation in others
        if operation in products:
            is_saved = seen[context.is_recompute] % every == 0
            seen[context.is_recompute] += 1
        return CheckpointPolicy.MUST_SAVE if is_saved else CheckpointPolicy.PREFER_RECOMPUTE

    forward, recomputation = create_selective_checkpoint_contexts(policy)
    return forward, recomputation
