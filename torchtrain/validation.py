"""Validation: the loss on documents that are never trained on, after every so many steps of a run.

Two numbers. The loss is the sum of the token losses of all sequences over their number of valid labels, in nats a
token. Bits per byte is the same sum over ln 2 and the bytes of text that the predicted tokens stand for: it compares
models of different tokenizers. (BOS and EOS cost, and stand for no byte.)

What is read is the same for any number of ranks, and so are the numbers, to rounding: sequences are dealt out in turn,
and a rank that gets fewer than others makes up for it with rows without a valid label, since all ranks must run the
model equally often.

Letters: B sequences that a rank evaluates together, S sequence, V vocabulary.
"""

import math
from collections.abc import Callable, Collection

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from torchtrain.config.layout import BatchPlan
from torchtrain.config.sources import plan_validation_sources
from torchtrain.config_manager import JobConfig
from torchtrain.datasets.data_order import permuted
from torchtrain.datasets.loader import Microbatch, microbatches
from torchtrain.datasets.prepare import open_tokens
from torchtrain.datasets.samples import PackedDataset
from torchtrain.datasets.tokenizer import Tokenizer
from torchtrain.errors import UserError
from torchtrain.loss import count_valid
from torchtrain.models.decoder import Decoder
from torchtrain.parallelisms.fsdp import free_gathered
from torchtrain.parallelisms.mesh import ParallelDims
from torchtrain.utils import IGNORE_INDEX


class ValidationSet:
    """The sequences to validate on: each source's documents in a row, cut, the rest of them filled up."""

    def __init__(self, config: JobConfig, tokenizer: Tokenizer, log: Callable[[str], None]) -> None:
        """Read, and where need be tokenise, what `config.validation` names; without validation nothing.

        Raises:
            UserError: whatever is wrong with a source or the cache folder; nothing to hold out.
        """
        self.seq_len = config.validation.seq_len or config.training.seq_len
        try:
            caches = [
                open_tokens(source, config.data, tokenizer, log)
                for source in plan_validation_sources(config)
            ]
            self.datasets = [
                PackedDataset(cache, self.seq_len, seed=0, keep_rest=True) for cache in caches
            ]
        except UserError as fault:
            text = str(fault).replace("training.dataset", "validation.dataset")
            raise UserError(f"validation: {text}") from fault
        self.n_samples = sum(dataset.n_samples for dataset in self.datasets)
        known = self.datasets and all(
            dataset.manifest.bytes is not None for dataset in self.datasets
        )
        # What made a token file, and from what text, only its owner can know.
        self.token_bytes = (
            tokenizer.token_bytes() if known else np.full(tokenizer.vocab_size, np.nan)
        )

    @property
    def fingerprint(self) -> str:
        """Of contents, tokenizer and length."""
        return "; ".join(dataset.fingerprint for dataset in self.datasets)

    def describe(self) -> str:
        """What it holds, in words."""
        return "; ".join(dataset.manifest.describe() for dataset in self.datasets)

    def read(self, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and labels, int64 `[B, S]` each, of the sequences `[B]`; of a number below 0 no label is valid.

        Sequences are numbered across the sources in an order of no meaning, so that the first of them stand for all.
        """
        tokens = np.zeros((len(numbers), self.seq_len), dtype=np.int64)
        labels = np.full_like(tokens, IGNORE_INDEX)
        places = np.where(
            numbers < 0, -1, permuted(np.maximum(numbers, 0), self.n_samples, seed=0, epoch=0)
        )
        start = 0
        for dataset in self.datasets:
            rows = (places >= start) & (places < start + dataset.n_samples)
            tokens[rows], labels[rows] = dataset.read(places[rows] - start)
            start += dataset.n_samples
        return tokens, labels


class Validator:
    """Says when to validate, and does. All ranks call it together."""

    def __init__(
        self,
        config: JobConfig,
        samples: ValidationSet,
        separators: tuple[int, int] | None,
        batch: BatchPlan,
        dims: ParallelDims,
        parts: Collection[Decoder],
        device: torch.device,
    ) -> None:
        """`separators` (of documents) and `batch` are those of training, `parts` what this rank has of the model."""
        section = config.validation
        self.samples, self.dims, self.parts, self.device = samples, dims, parts, device
        self.separators = separators
        self.freq, self.last_step = section.freq, config.training.steps
        self.batch_size = section.local_batch_size or batch.microbatch_size
        self.sequences = samples.n_samples
        if section.steps != -1:
            self.sequences = min(self.sequences, section.steps * batch.global_batch_size)

    def is_due(self, step: int) -> bool:
        """Whether to validate after `step`."""
        return self.sequences > 0 and (step % self.freq == 0 or step == self.last_step)

    @torch.no_grad()
    def run(self, losses_of: Callable[[Microbatch], Tensor]) -> dict[str, float | None]:
        """`val_loss`, nats a token, and `val_bits_per_byte`, None where bytes are not known; the same on every rank.

        `losses_of` B sequences are this rank's part of their losses [B], as it is in training.
        Weights, gradients, random state and the training data are left as they are.
        """
        dims, device = self.dims, self.device
        token_bytes = torch.from_numpy(self.samples.token_bytes).to(device)
        totals = torch.zeros(
            3, dtype=torch.float64, device=device
        )  # loss, valid labels, their bytes
        together = dims.data_parallel * self.batch_size
        mine = np.arange(self.batch_size) + dims.data_rank(dist.get_rank()) * self.batch_size
        for first in range(0, self.sequences, together):
            numbers = np.where(first + mine < self.sequences, first + mine, -1)
            (batch,) = microbatches(
                *self.samples.read(numbers), numbers, self.batch_size, self.separators
            )
            batch = batch.to(device)
            known = token_bytes[batch.labels.clamp(min=0)].where(batch.labels != IGNORE_INDEX, 0.0)
            losses = losses_of(batch).double()
            totals += torch.stack([losses.sum(), count_valid(batch.labels).sum(), known.sum()])
        free_gathered(self.parts)
        # Ranks that share a sample all read it. Its loss only those of the last stage have, each of the tensor ranks.
        dist.all_reduce(totals)
        loss, valid, size = (
            totals / totals.new_tensor([dims.tp, dims.ranks_a_sample, dims.ranks_a_sample])
        ).tolist()
        bits = loss / math.log(2) / size if size > 0 else None  # a NaN is not
        return {"val_loss": loss / valid, "val_bits_per_byte": bits}

    def describe(self) -> str:
        """What is validated, and how often."""
        return (
            f"{self.samples.describe()}; {self.sequences:,} of {self.samples.n_samples:,} sequences of "
            f"{self.samples.seq_len:,} tokens after every {self.freq} steps and the last"
        )
