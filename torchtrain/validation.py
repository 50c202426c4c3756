"""Validation: the loss on documents that are never trained on, at intervals of a run.

Two numbers. The loss is the sum of the token losses of all sequences over their number of valid
labels, in nats per token. Bits per byte is the same sum over ln 2 and the bytes of text that the
predicted tokens stand for: it compares models of different tokenizers. (BOS and EOS cost, and
stand for no byte.)

What is read is the same for any number of ranks, and so are the numbers, to rounding: sequences
are dealt out in turn, and a rank that gets fewer than others makes up for it with sequences
without a valid label, since all ranks must run the model equally often.

Letters: B sequences that a rank evaluates together, S sequence, V vocabulary.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from torchtrain.config.layout import Degrees
from torchtrain.config.plans import ValidationPlan
from torchtrain.config.schema import Data
from torchtrain.datasets.data_order import permuted
from torchtrain.datasets.documents import Separators
from torchtrain.datasets.loader import Microbatch, microbatches
from torchtrain.datasets.open import open_tokens
from torchtrain.datasets.samples import PackedDataset
from torchtrain.datasets.tokenizer import Tokenizer
from torchtrain.errors import UserError
from torchtrain.loss import count_valid
from torchtrain.utils import IGNORE_INDEX, user_errors

LEFT_OUT: dict[str, float | None] = {"val_loss": None, "val_bits_per_byte": None}
"""The results of a validation that a stop has left out."""


class ValidationSet:
    """The sequences to validate on: each source's documents joined and cut, the last filled up."""

    def __init__(
        self,
        plan: ValidationPlan,
        data: Data,
        tokenizer: Tokenizer,
        separators: Separators | None,
    ) -> None:
        """Read, and where need be tokenize, the plan's sources; without validation nothing.

        Args:
            plan: names the sources.
            data: how they are read.
            tokenizer: that of the model.
            separators: the ids of BOS and EOS under document masking.

        Raises:
            UserError: whatever is wrong with a source or the cache folder; nothing to hold out.
        """
        self.seq_len = plan.seq_len
        self.separators = separators
        self.datasets = []
        with user_errors("validation", UserError):
            for source in plan.sources:
                cache = open_tokens(source, data, tokenizer)
                self.datasets.append(PackedDataset(cache, self.seq_len, seed=0, keep_rest=True))
        self.n_samples = sum(dataset.n_samples for dataset in self.datasets)
        # What made a token file, and from what text, only its owner can know.
        manifests = [dataset.manifest for dataset in self.datasets]
        is_known = all(each.bytes is not None and not each.characters_lost for each in manifests)
        if manifests and is_known:
            self.token_bytes = tokenizer.token_bytes()
        else:
            self.token_bytes = np.full(tokenizer.vocab_size, np.nan)

    @property
    def fingerprint(self) -> str:
        """The fingerprint of contents, tokenizer and sequence length."""
        return "; ".join(dataset.fingerprint for dataset in self.datasets)

    def describe(self) -> str:
        """Return what it holds, in words."""
        return "; ".join(dataset.manifest.describe() for dataset in self.datasets)

    def read(self, numbers: np.ndarray) -> Microbatch:
        """Read the sequences with these numbers [B]; of a number below 0 no label is valid.

        Sequences are numbered across the sources in a fixed random order, so a prefix is a fair
        sample.
        """
        tokens = np.zeros((len(numbers), self.seq_len), dtype=np.int64)
        labels = np.full_like(tokens, IGNORE_INDEX)
        order = permuted(np.maximum(numbers, 0), self.n_samples, seed=0, epoch=0)
        samples = np.where(numbers < 0, -1, order)
        start = 0
        for dataset in self.datasets:
            rows = (samples >= start) & (samples < start + dataset.n_samples)
            tokens[rows], labels[rows] = dataset.read(samples[rows] - start)
            start += dataset.n_samples
        (batch,) = microbatches(tokens, labels, numbers, len(numbers), self.separators)
        return batch


@dataclass
class Validator:
    """Says when to validate, and validates. All ranks call it together."""

    plan: ValidationPlan
    """When, and on how many sequences."""
    samples: ValidationSet
    """The sequences to validate on."""
    degrees: Degrees
    """Of the mesh."""
    data_rank: int
    """Which of the `degrees.data_parallel` shares of a batch this rank reads."""
    device: torch.device
    """Of the computation."""

    def __post_init__(self) -> None:
        self.sequences = self.samples.n_samples
        if self.plan.max_sequences is not None:
            self.sequences = min(self.sequences, self.plan.max_sequences)

    def is_due(self, step: int) -> bool:
        """Check whether to validate after `step`."""
        is_turn = step % self.plan.freq == 0 or step == self.plan.last_step
        return self.sequences > 0 and is_turn

    @torch.no_grad()
    def run(
        self, losses_of: Callable[[Microbatch], Tensor], stop_reason: Callable[[], int] = int
    ) -> tuple[dict[str, float | None], int]:
        """Validate. Weights, gradients, random state and the training data are left as they are.

        Args:
            losses_of: from a microbatch of B sequences on the device to this rank's part of their
                losses [B], as in training.
            stop_reason: why this rank is to stop, 0 if it is not; asked before each batch.

        Returns:
            The same on every rank: `val_loss`, nats per token, and `val_bits_per_byte`, None where
            the number of bytes is not known; and 0. Or `LEFT_OUT`, and why a rank is to stop.
        """
        totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        token_bytes = torch.from_numpy(self.samples.token_bytes).to(self.device)
        size = self.plan.batch_size
        own = np.arange(size) + self.data_rank * size
        for first in range(0, self.sequences, self.degrees.data_parallel * size):
            reason = self._agree(stop_reason())
            if reason:
                return LEFT_OUT, reason
            numbers = np.where(first + own < self.sequences, first + own, -1)
            batch = self.samples.read(numbers).to(self.device)
            is_valid = batch.labels != IGNORE_INDEX
            label_bytes = token_bytes[batch.labels.clamp(min=0)].where(is_valid, 0.0)
            losses = losses_of(batch).double()
            totals[0] += losses.sum()
            totals[1] += count_valid(batch.labels).sum()
            totals[2] += label_bytes.sum()
        dist.all_reduce(totals)
        # Only ranks of the last stage hold the loss, each of the tensor-parallel ranks all of it;
        # all ranks that share a sample have counted its labels.
        loss = totals[0].item() / self.degrees.tp
        valid = totals[1].item() / self.degrees.ranks_per_sample
        text_bytes = totals[2].item() / self.degrees.ranks_per_sample
        bits_per_byte = None
        if text_bytes > 0:  # where they are not known it is NaN
            bits_per_byte = loss / math.log(2) / text_bytes
        return {"val_loss": loss / valid, "val_bits_per_byte": bits_per_byte}, 0

    def _agree(self, stop_reason: int) -> int:
        """Return the largest of the ranks' reasons to stop."""
        reason = torch.tensor(stop_reason, device=self.device)
        dist.all_reduce(reason, op=dist.ReduceOp.MAX)
        return int(reason.item())

    def describe(self) -> str:
        """Return what is validated, and how often, in words."""
        return (
            f"{self.samples.describe()}; {self.sequences:,} of {self.samples.n_samples:,} "
            f"sequences of {self.samples.seq_len:,} tokens after every {self.plan.freq} steps and "
            "the last"
        )
