"""Activation checkpointing: keep a block's input alone and run its forward again in the backward.

Source: Chen et al. 2016 (arXiv:1604.06174); https://docs.pytorch.org/docs/stable/checkpoint.html
"""

from functools import partial

from torch.utils.checkpoint import checkpoint

from torchtrain.models.llama import Transformer


def apply_activation_checkpoint(model: Transformer) -> None:
    """Recompute every block in full. The forward is replaced, not the module, so parameter names stay as they are."""
    for block in model.layers.values():
        # No dropout anywhere, so the random state need not be put back for the second forward.
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)  # type: ignore[method-assign]
