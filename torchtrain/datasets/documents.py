"""Where documents begin in sequences, for document masking and packing.

A document begins at each BOS; what precedes a sequence's first BOS is the rest of one. Where BOS
and EOS are one token, two in a row are an end and a beginning, and a single one, as in nanoGPT's
files, is both.

Shapes: B sequences, S tokens of a sequence.
"""

import numpy as np

from torchtrain.datasets.token_cache import TokenCache
from torchtrain.datasets.tokenizer import Tokenizer
from torchtrain.errors import UserError
from torchtrain.utils import IGNORE_INDEX

CHUNK = 1 << 24
"""Tokens that are searched at a time."""


def split_documents(tokens: np.ndarray, labels: np.ndarray, bos: int, eos: int) -> np.ndarray:
    """Mask, in place, the labels that begin another document; return where documents begin.

    Args:
        tokens: int64 `[B, S]`.
        labels: int64 `[B, S]`; after an IGNORE_INDEX another document begins, whatever its first
            token is.
        bos: the token that documents begin with.
        eos: the token that they end with. If it is the same, a single one is learned as the end.

    Returns:
        int64 `[B, S]`: for each token the index in its sequence at which its document begins.
    """
    is_beginning = labels == bos
    if bos == eos:
        is_beginning &= tokens == bos
    labels[is_beginning] = IGNORE_INDEX
    begins = tokens == bos
    begins[:, 1:] |= labels[:, :-1] == IGNORE_INDEX
    return np.maximum.accumulate(np.where(begins, np.arange(tokens.shape[1]), 0), axis=1)


def require_documents(cache: TokenCache, tokenizer: Tokenizer) -> None:
    """Check that some document begins; reads up to the first that does.

    Raises:
        UserError: there is no BOS, as in token files that others have made without one.
    """
    for start in range(0, len(cache.tokens), CHUNK):
        if (cache.tokens[start : start + CHUNK] == tokenizer.bos_id).any():
            return
    raise UserError(
        f"{cache.manifest.source} does not say where documents begin: it holds no BOS (token "
        f"{tokenizer.bos_id} of the run's tokenizer). Write the file with BOS before each "
        "document, or do without training.document_masking and "
        'data.packing = "best_fit"'
    )
