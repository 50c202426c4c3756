"""Continuing texts token by token.

Letters: B prompts, S tokens.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from torchtrain.models.decoder import Decoder
from torchtrain.sampling import Sampling, choose
from torchtrain.tools.cached_attention import begin_sequences


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Where a text ends."""

    max_new_tokens: int
    """Most tokens per prompt."""
    eos_id: int
    """The token that ends a text."""
    vocab_size: int
    """Ids of the tokenizer; rows of the vocabulary beyond them are never chosen."""


def make_generators(prompts: Sequence[list[int]], seed: int) -> list[torch.Generator]:
    """Return a random generator for each prompt, on the CPU.

    Its choices do not depend on the other prompts, but for the same one given before, which would
    else get the same text.
    """
    generators = []
    before: Counter[tuple[int, ...]] = Counter()
    for prompt in prompts:
        key = tuple(prompt)
        digest = hashlib.sha256(f"{seed}/{before[key]}/{key}".encode()).digest()
        generators.append(torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1))
        before[key] += 1
    return generators


@torch.no_grad()
def continue_prompts(
    model: Decoder,
    prompts: list[list[int]],
    sampling: Sampling,
    limits: Limits,
    on_tokens: Callable[[list[int]], None] = lambda tokens: None,
) -> list[list[int]]:
    """Return the tokens that continue each prompt, EOS last where it came. A collective call.

    Args:
        model: whole on this rank, sharded or not; gets a cache for its attention.
        prompts: tokens, at least one each, the same on all ranks.
        sampling: how tokens are chosen; rank 0 does.
        limits: where a text ends.
        on_tokens: is given each step's tokens, one per prompt.
    """
    device = next(model.parameters()).device
    eos_id = limits.eos_id
    longest = max(map(len, prompts))
    padding = torch.tensor([longest - len(prompt) for prompt in prompts], device=device)
    begin_sequences(model, padding, longest + limits.max_new_tokens)
    generators = make_generators(prompts, sampling.seed)
    rows = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
    tokens = torch.tensor(rows, device=device)
    continued: list[list[int]] = [[] for _ in prompts]
    for _ in range(limits.max_new_tokens):
        logits = model(tokens)[:, -1]
        if isinstance(logits, DTensor):
            logits = logits.full_tensor()
        chosen = choose(logits[:, : limits.vocab_size].float().cpu(), sampling, generators)
        dist.broadcast(chosen, src=0)
        step = chosen.tolist()
        for text, token in zip(continued, step, strict=True):
            if not text or text[-1] != eos_id:
                text.append(token)
        on_tokens(step)
        if all(text[-1] == eos_id for text in continued):
            break
        tokens = chosen.unsqueeze(1).to(device)
    return continued
