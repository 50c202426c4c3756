"""Activation checkpointing: keep less of the forward, and run parts of it again in the backward.

Sources: Chen et al. 2016 (arXiv:1604.06174), Korthikanti et al. 2022 (arXiv:2205.05198, the
selective form), https://docs.pytorch.org/docs/stable/checkpoint.html and, for the compiler's
budget, https://pytorch.org/blog/activation-checkpointing-techniques/
"""

from collections.abc import Callable
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


def apply_within_blocks(model: Decoder, config: ActivationCheckpoint) -> None:
    """Apply the modes that choose operations, before compilation, which traces them."""
    # A switch of the compiler's for the whole process: restored where another mode is asked for.
    uses_budget = config.mode == "memory_budget"
    torch._functorch.config.activation_memory_budget = config.memory_budget if uses_budget else 1.0
    if config.mode == "selective" and config.selective_ac_option == "op":
        # FSDP's marks for the profiler, of experts within the block: the recomputation has others.
        SAC_IGNORED_OPS.update(PROFILER_MARKS)
        policy = save_only(model.ops_worth_saving)
        contexts = partial(create_selective_checkpoint_contexts, policy)
        for block in model.layers.values():
            recompute(block, context_fn=contexts)


def apply_around_blocks(model: Decoder, config: ActivationCheckpoint) -> None:
    """Apply the modes that recompute whole blocks, after compilation: the compiled forward reruns.

    (Traced with the block they would be the same, but torch 2.13 fails there with tensor
    parallelism on a CPU.)
    """
    if config.mode == "full":
        every = 1
    elif config.mode == "selective" and config.selective_ac_option != "op":
        every = int(config.selective_ac_option)
    else:
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


def save_only(operations: frozenset[Any]) -> Callable[..., CheckpointPolicy]:
    """Return the policy that saves the results of these operations and recomputes all others."""

    def policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operation in operations:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    return policy
