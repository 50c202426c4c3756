"""Document masking: a sequence that holds several documents trains as if each stood alone.

`documents` [B, S], int64, says where they are: for each token, the index in its sequence at which
its document begins. Two tokens are of one document where these are equal, and `index - documents`
is a token's position in its own document.

On a CPU the mask is a boolean tensor. Elsewhere that would grow with S², so FlexAttention (Dong et
al. 2024, arXiv:2412.05496,
https://docs.pytorch.org/docs/stable/nn.attention.flex_attention.html) keeps it in blocks of
128 x 128 and leaves out those in which nothing is seen.

Letters: B batch, S sequence, H query heads, K key/value heads, C head width.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

Mask = Tensor | BlockMask
"""What each query sees: itself, and what comes before it in its document."""


def build_document_mask(documents: Tensor) -> Mask:
    """Build the mask of `documents` [B, S]: boolean [B, 1, S, S], or in blocks."""
    batch, length = documents.shape
    if documents.device.type == "cpu":
        same_document = documents.unsqueeze(2) == documents.unsqueeze(1)
        return same_document.tril().unsqueeze(1)

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[b, query] == documents[b, key])

    return compiled(create_block_mask)(sees, batch, None, length, length, device=documents.device)


def attend_masked(q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
    """Take q [B, H, S, C] and k, v [B, K, S, C] to [B, H, S, C]: attention under a mask."""
    is_grouped = q.shape[1] != k.shape[1]
    if isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=is_grouped)
    # Inside a compiled block it is compiled with the rest; by itself it would write down all S x S
    # scores.
    kernel: Any = flex_attention if torch.compiler.is_compiling() else compiled(flex_attention)
    return kernel(q, k, v, block_mask=mask, enable_gqa=is_grouped)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function compiled, once for all that call it."""
    return torch.compile(function, dynamic=False)
