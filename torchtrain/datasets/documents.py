"""Where documents begin in rows of tokens, for document masking and packing.

A document begins at each BOS; what stands before a row's first BOS is the rest of one. Where BOS and EOS are one token
a pair of it is an end and a beginning, and one alone, as in nanoGPT's files, is both.

Shapes: B rows, S tokens of a sequence.
"""

import numpy as np

from torchtrain.datasets.token_cache import TokenCache
from torchtrain.datasets.tokenizer import Tokenizer
from torchtrain.errors import UserError

CHUNK = 1 << 24
HIDDEN = -100
"""A label that does not count."""


def split_documents(tokens: np.ndarray, labels: np.ndarray, bos: int, eos: int) -> np.ndarray:
    """Hide, in place, the labels that are the beginning of another document, and say where documents begin.

    Args:
        tokens: int64 `[B, S]`.
        labels: int64 `[B, S]`; after one of HIDDEN another document begins, whatever its first token is.
        bos: The token that documents begin with.
        eos: The one that they end with, which may be the same: then a single one is learned, as the end that it is.

    Returns:
        int64 `[B, S]`, for each token the place in its row at which its document begins.
    """
    labels[(labels == bos) & ((tokens == bos) | (bos != eos))] = HIDDEN
    begins = tokens == bos
    begins[:, 1:] |= labels[:, :-1] == HIDDEN
    return np.maximum.accumulate(np.where(begins, np.arange(tokens.shape[1]), 0), axis=1)


def require_documents(cache: TokenCache, tokenizer: Tokenizer) -> None:
    """Refuse tokens in which no document begins; reads up to the first that does.

    Raises:
        UserError: there is no BOS, as in token files that others have made without one.
    """
    tokens, bos = cache.tokens, tokenizer.bos_id
    if not any((tokens[at : at + CHUNK] == bos).any() for at in range(0, len(tokens), CHUNK)):
        raise UserError(
            f"{cache.manifest.source} does not say where documents begin: it holds no BOS (token {bos} of the run's "
            "tokenizer). Write the file with BOS before each document, or do without training.document_masking and "
            'data.packing = "best_fit"'
        )
