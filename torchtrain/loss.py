"""The loss: sums of token cross-entropies, divided once by the valid labels of the global batch.

Letters: B batch, S sequence, V vocabulary.
"""

import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchtrain.utils import IGNORE_INDEX


def sequence_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sum, in nats, of the cross-entropies of each sequence's valid labels.

    Args:
        logits: [B, S, V], any floating-point type; may be sharded over V where cross entropy knows
            how to take that (`parallelisms.tensor_parallel.loss_context`). Labels and result are
            whole on each rank.
        labels: [B, S], int64, in 0 .. V-1 or IGNORE_INDEX.

    Returns:
        [B], computed in fp32. Sums, not means: they add up over microbatches and ranks whatever
        their numbers of valid labels.
    """
    token_losses = F.cross_entropy(
        logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    if isinstance(token_losses, DTensor):
        token_losses = token_losses.to_local()
    return token_losses.view_as(labels).sum(dim=1)


def count_valid(labels: Tensor) -> Tensor:
    """Return the number of valid labels of each sequence: [B, S] to [B], int64."""
    return (labels != IGNORE_INDEX).sum(dim=1)
