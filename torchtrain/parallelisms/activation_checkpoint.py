"""Activation checkpointing: keep less of the forward, and run parts of it again in the backward.

Sources: Chen et al. 2016 (arXiv:1604.06174), Korthikanti et al. 2022 (arXiv:2205.05198, the selective form),
https://docs.pytorch.org/docs/stable/checkpoint.html and, for the compiler's budget,
https://pytorch.org/blog/activation-checkpointing-techniques/
"""

from functools import partial
from typing import Any

import torch
import torch._functorch.config
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from torchtrain.config_manager import ActivationCheckpoint
from torchtrain.models.llama import Transformer

# No dropout anywhere, so the random state need not be put back for the second forward.
RECOMPUTE: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}


def apply_within_blocks(model: Transformer, config: ActivationCheckpoint) -> None:
    """The modes that choose operations, to be applied before compilation, which traces them."""
    # A switch of the compiler's, for the whole process: put back where another mode is asked for.
    torch._functorch.config.activation_memory_budget = (
        config.memory_budget if config.mode == "memory_budget" else 1.0
    )
    if config.mode == "selective" and config.selective_ac_option == "op":
        chosen = partial(create_selective_checkpoint_contexts, keep_costly)
        for block in model.layers.values():
            block.forward = partial(checkpoint, block.forward, context_fn=chosen, **RECOMPUTE)  # type: ignore[method-assign]


def apply_around_blocks(model: Transformer, config: ActivationCheckpoint) -> None:
    """The modes that recompute whole blocks, to be applied after compilation: a block's compiled forward runs again.

    (Traced with the block they would be the same, but torch 2.13 fails there with tensor parallelism on a CPU.)
    The forward is replaced, not the module, so parameter names stay as they are.
    """
    every = {"full": "1", "selective": config.selective_ac_option}.get(config.mode, "op")
    for layer, block in model.layers.items():
        if every != "op" and int(layer) % int(every) == 0:
            block.forward = partial(checkpoint, block.forward, **RECOMPUTE)  # type: ignore[method-assign]


def keep_costly(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what is slow to compute for its size, matrix products and attention; recompute the rest."""
    return CheckpointPolicy.MUST_SAVE if op in COSTLY_OPS else CheckpointPolicy.PREFER_RECOMPUTE


aten = torch.ops.aten
COSTLY_OPS = frozenset(
    {
        aten.mm.default,
        aten.addmm.default,
        aten.bmm.default,
        aten._scaled_dot_product_flash_attention.default,
        aten._scaled_dot_product_efficient_attention.default,
        aten._scaled_dot_product_cudnn_attention.default,
        aten._scaled_dot_product_flash_attention_for_cpu.default,
        torch.ops.higher_order.flex_attention,
    }
)
