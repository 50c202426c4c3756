"""Choosing the tokens of a text, one after the other.

Letters: B prompts, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from torchtrain.datasets.tokenizer import Tokenizer, begin_document
from torchtrain.errors import UserError

INCOMPLETE = "\ufffd"
"""What the bytes of an unfinished character decode to."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a token is chosen."""

    temperature: float = 0.8
    """Divides the logits; 0 takes the likeliest token."""
    top_k: int = 0
    """Only so many of the likeliest are chosen from; 0: all."""
    top_p: float = 1.0
    """Only the likeliest that together have this probability are chosen from."""
    seed: int = 0
    """Of the choices."""


def choose(logits: Tensor, sampling: Sampling, generators: list[torch.Generator]) -> Tensor:
    """Return a token for each row of logits [B, V], on the CPU: [B].

    Top-k comes before top-p; the token with which the probability is reached stays (Holtzman et al.
    2019, arXiv:1904.09751).
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    # In fp64, and none above 0: no temperature is so low that the likeliest would overflow.
    logits = logits.double() - logits.amax(dim=-1, keepdim=True)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    ordered, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
    before = ordered.cumsum(dim=-1) - ordered
    kept = ordered.masked_fill(before >= sampling.top_p, 0.0)
    kept[:, 0] = ordered[:, 0]
    chosen = [
        torch.multinomial(row, 1, generator=generator)
        for row, generator in zip(kept, generators, strict=True)
    ]
    return order.gather(1, torch.stack(chosen)).squeeze(1)


def encode_prompts(tokenizer: Tokenizer, prompts: Sequence[str]) -> list[list[int]]:
    """Return the tokens of each prompt, after the BOS, if any, with which documents begin in
    training.

    Raises:
        UserError: a prompt has no token.
    """
    begin = begin_document(tokenizer)
    encoded = [begin + ids.tolist() for ids in tokenizer.encode_batch(prompts)]
    for prompt, ids in zip(prompts, encoded, strict=True):
        if not ids:
            raise UserError(
                f"the prompt {prompt!r} has no token to begin with: the tokenizer has no BOS, and "
                "knows none of this text"
            )
    return encoded


def text_after(whole: str, before: str) -> str:
    """Return what a text adds to its beginning, whose last character may have been incomplete."""
    return whole[len(before.rstrip(INCOMPLETE)) :]
