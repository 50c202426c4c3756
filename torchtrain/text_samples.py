"""Text that the model writes while it trains, at intervals of a run, to be read.

Each new token costs a whole forward of all prompts: no cache of keys and values, which every layout
would have to share in its own way. All data-parallel ranks write the same texts. The rank that
holds the logits of a text's last token chooses the next one, and tells the others.

Letters: B prompts, S tokens of a forward, V vocabulary.
"""

import hashlib
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchtrain.config.layout import Degrees
from torchtrain.config.schema import TextSamples
from torchtrain.datasets.tokenizer import Tokenizer
from torchtrain.errors import UserError
from torchtrain.metrics import TextSample
from torchtrain.sampling import Sampling, choose, encode_prompts, text_after
from torchtrain.utils import IGNORE_INDEX

OfLogits = Callable[[Tensor, Tensor], Tensor]
"""From logits [B, S, V] and labels [B, S] to a value of each sequence, [B]."""


class TextSampler:
    """Says when the model writes, and lets it write. All ranks call it together."""

    def __init__(
        self,
        section: TextSamples,
        tokenizer: Tokenizer,
        degrees: Degrees,
        *,
        seq_len: int,
        last_step: int,
        seed: int,
    ) -> None:
        """Encode the prompts.

        Args:
            section: the config's.
            tokenizer: that of the model.
            degrees: of the mesh.
            seq_len: of training; no text gets longer.
            last_step: the run's, after which the model writes too.
            seed: of the choices, which also depend on the step, the prompt and the position alone.

        Raises:
            UserError: a prompt is as long as `seq_len`, or has no token.
        """
        self.section = section
        self.tokenizer = tokenizer
        self.last_step = last_step
        self.sampling = Sampling(temperature=section.temperature, seed=seed)
        self.prompts = encode_prompts(tokenizer, section.prompts or [])
        longest = max(map(len, self.prompts), default=0)
        if longest >= seq_len:
            bos = "" if tokenizer.bos_id is None else ", BOS included"
            raise UserError(
                f"text_samples.prompts: one has {longest} tokens{bos}, which leaves "
                f"nothing of training.seq_len = {seq_len} to write"
            )
        # Every layout can cut it; and what training uses can be cut, whatever its length.
        unit = 2 * degrees.cp * degrees.tp
        self.length = min(-(-(longest + section.max_new_tokens) // unit) * unit, seq_len)

    def is_due(self, step: int) -> bool:
        """Check whether the model writes after `step`."""
        is_turn = step % self.section.freq == 0 or step == self.last_step
        return bool(self.prompts) and is_turn

    @torch.no_grad()
    def run(
        self,
        step: int,
        compute: Callable[[OfLogits, Tensor, Tensor], Tensor],
        device: torch.device,
        stop_reason: Callable[[], int] = int,
    ) -> tuple[list[TextSample], int]:
        """Let the model continue each prompt; random states and training's data are left alone.

        Args:
            step: after which it writes.
            compute: takes a function of logits and labels, tokens [B, S] and labels [B, S] to this
                rank's values [B] of that function: 0 where another rank has the logits.
            device: of the computation.
            stop_reason: why this rank is to stop, 0 if it is not; asked before each token.

        Returns:
            The same on every rank: the texts and 0. Or nothing, and why a rank is to stop.
        """
        texts = [list(prompt) for prompt in self.prompts]
        ended = [False for _ in texts]
        while not all(ended):
            reason = torch.tensor([stop_reason()], device=device)
            tokens, draws = self._lay_out(texts, device)
            chosen = compute(partial(self._choose, step), tokens, draws).long()
            agreed = torch.cat([chosen, reason])
            dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
            *new_tokens, stopped_by = agreed.tolist()
            if stopped_by:
                return [], stopped_by
            for row, token in enumerate(new_tokens):
                if not ended[row]:
                    texts[row].append(token)
                    ended[row] = token == self.tokenizer.eos_id or self._is_full(texts[row], row)
        return self._decode(texts), 0

    def _is_full(self, text: list[int], row: int) -> bool:
        """Return whether the text of this prompt may not get longer."""
        written = len(text) - len(self.prompts[row])
        return written == self.section.max_new_tokens or len(text) == self.length

    def _lay_out(self, texts: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
        """Return tokens [B, S], filled up with zeros, and draws [B, S].

        A draw takes a label's place at a text's last token, numbered by prompt and position;
        elsewhere stands IGNORE_INDEX.
        """
        tokens = torch.zeros(len(texts), self.length, dtype=torch.int64)
        draws = torch.full_like(tokens, IGNORE_INDEX)
        for row, text in enumerate(texts):
            tokens[row, : len(text)] = torch.tensor(text)
            draws[row, len(text) - 1] = (row << 32) + len(text)
        return tokens.to(device), draws.to(device)

    def _choose(self, step: int, logits: Tensor, draws: Tensor) -> Tensor:
        """Return the next token of each sequence whose draw is on this rank, [B]; else 0.

        A model whose logits are not finite has nothing more to say: the next step reports it.
        """
        chosen = torch.zeros(len(draws), dtype=torch.int64, device=draws.device)
        for row, position in (draws != IGNORE_INDEX).nonzero().tolist():
            of_token = logits[row, position]
            if isinstance(of_token, DTensor):
                of_token = of_token.full_tensor()
            of_token = of_token[: self.tokenizer.vocab_size].float().cpu()
            if not of_token.isfinite().all():
                chosen[row] = self.tokenizer.eos_id
                continue
            key = f"{self.sampling.seed}/{step}/{draws[row, position].item()}"
            digest = hashlib.sha256(key.encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            chosen[row] = choose(of_token.unsqueeze(0), self.sampling, [generator]).item()
        return chosen

    def _decode(self, texts: Sequence[list[int]]) -> list[TextSample]:
        """Return the texts apart from their prompts."""
        decode = self.tokenizer.decode
        given = zip(self.section.prompts or [], self.prompts, texts, strict=True)
        return [
            TextSample(prompt, text_after(decode(text), decode(encoded)))
            for prompt, encoded, text in given
        ]
