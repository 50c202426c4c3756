"""Document masking: a row of tokens that holds several documents is to the model as if each stood alone.

`documents` [B, S], int64, says where: for each token, the place in its row at which its document begins. Tokens are of
one document where these are equal, and `place - documents` is a token's position in its own.

On a CPU the mask is a boolean tensor. Elsewhere it would grow with S², so that FlexAttention (Dong et al. 2024,
arXiv:2412.05496, https://docs.pytorch.org/docs/stable/nn.attention.flex_attention.html) keeps it in blocks of
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


def document_mask(documents: Tensor) -> Tensor | BlockMask:
    """What each query sees, itself and what comes before it in its document; boolean [B, 1, S, S] or in blocks."""
    batch, length = documents.shape
    if documents.device.type == "cpu":
        return (documents.unsqueeze(2) == documents.unsqueeze(1)).tril().unsqueeze(1)

    def sees(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[b, query] == documents[b, key])

    return compiled(create_block_mask)(sees, batch, None, length, length, device=documents.device)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | BlockMask) -> Tensor:
    """q [B, H, S, C]; k, v [B, K, S, C]; to [B, H, S, C]: the attention kernel under a `document_mask`."""
    grouped = q.shape[1] != k.shape[1]
    if isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=grouped)
    # Inside a compiled block it is compiled with the rest; by itself it would write down all S x S scores.
    kernel: Any = flex_attention if torch.compiler.is_compiling() else compiled(flex_attention)
    return kernel(q, k, v, block_mask=mask, enable_gqa=grouped)


@cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled when it is first called, once for all that call it."""
    return torch.compile(function, dynamic=False)
