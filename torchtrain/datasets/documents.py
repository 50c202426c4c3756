"""Where documents begin in sequences, for document masking and packing.

A document begins at each BOS; what precedes a sequence's first BOS is the rest of one. Where BOS
and EOS are one token, two in a row are an end and a beginning, and a single one, as in nanoGPT's
files, is both. Where there is no BOS, a document begins after each EOS.

Shapes: B sequences, S tokens of a sequence.
"""

import numpy as np

from torchtrain.datasets.token_cache import TokenCache
from torchtrain.datasets.tokenizer import Tokenizer
from torchtrain.errors import UserError
from torchtrain.logging_utils import logger
from torchtrain.utils import IGNORE_INDEX

Separators = tuple[int | None, int]
"""The ids of BOS, None where the tokenizer has none, and EOS."""

CHUNK = 1 << 24
"""Tokens that are searched at a time."""


def split_documents(
    tokens: np.ndarray, labels: np.ndarray, bos: int | None, eos: int
) -> np.ndarray:
    """Mask, in place, the labels that begin another document; return where documents begin.

    Args:
        tokens: int64 `[B, S]`.
        labels: int64 `[B, S]`; after an IGNORE_INDEX another document begins, whatever its first
            token is.
        bos: the token that documents begin with; None if there is none.
        eos: the token that they end with. If it is the same, a single one is learned as the end.

    Returns:
        int64 `[B, S]`: for each token the index in its sequence at which its document begins.
    """
    if bos is None:
        is_beginning, begins = tokens == eos, np.zeros_like(tokens, dtype=bool)
    else:
        is_beginning, begins = labels == bos, tokens == bos
    if bos == eos:
        is_beginning &= tokens == bos
    labels[is_beginning] = IGNORE_INDEX
    begins[:, 1:] |= labels[:, :-1] == IGNORE_INDEX
    return np.maximum.accumulate(np.where(begins, np.arange(tokens.shape[1]), 0), axis=1)


def say_where_documents_end(tokenizer: Tokenizer) -> None:
    """Log it where there is no BOS, which most would expect."""
    if tokenizer.bos_id is None:
        logger.info(
            "the tokenizer has no BOS: each document ends with EOS (token "
            f"{tokenizer.eos_id}), and the next one begins after it"
        )


def require_documents(cache: TokenCache, tokenizer: Tokenizer) -> None:
    """Check that some document begins, or without BOS ends; reads up to the first that does.

    Raises:
        UserError: there is no BOS, or where documents have none no EOS, as in token files that
            others have made without one.
    """
    kind, id_, verb, place = "BOS", tokenizer.bos_id, "begin", "before"
    if id_ is None:
        kind, id_, verb, place = "EOS", tokenizer.eos_id, "end", "after"
    for start in range(0, len(cache.tokens), CHUNK):
        if (cache.tokens[start : start + CHUNK] == id_).any():
            return
    raise UserError(
        f"{cache.manifest.source} does not say where documents {verb}: it holds no {kind} (token "
        f"{id_} of the run's tokenizer). Write the file with {kind} {place} each "
        "document, or do without training.document_masking and "
        'data.packing = "best_fit"'
    )
