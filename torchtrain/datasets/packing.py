"""Best-fit packing: documents whole in their sequences, packed tightly (Ding et al. 2024,
arXiv:2404.10830).

Only a document longer than a sequence is cut, into full sequences and a rest. A document, or each
cut of a long one, is a segment. Segments, the longest first, go each into the sequence with the
least space that still takes it; what stays free is padding. The corpus is packed in windows of
tokens one after the other, so that memory is bounded. Which segments make which sequence is a pure
function of tokens and sequence length, worked out once per host and kept in the cache folder
(in files whose names are older than these words):

    packings/<key>/pieces.bin   int64 [P, 2], first token and length of every segment, sequence by
                                sequence
    packings/<key>/rows.bin     int64 [N + 1], the first segment of every sequence, and P

Shapes: B samples, S tokens of a sequence, N sequences, P segments.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from torchtrain.datasets.cache_folder import Progress, locked, short_hash
from torchtrain.datasets.data_order import locate
from torchtrain.datasets.samples import Identity, PackedDataset
from torchtrain.datasets.token_cache import TokenCache
from torchtrain.datasets.tokenizer import Tokenizer
from torchtrain.logging_utils import logger
from torchtrain.utils import IGNORE_INDEX, fsync_folder

FORMAT = 1
"""Bump when the same tokens are packed differently."""
WINDOW = 1 << 24
"""Tokens packed together: some ten thousand documents, enough to fill sequences; takes seconds, and
some hundred MB."""


class BestFitDataset(PackedDataset):
    """Sequences of whole documents; the last label of a segment, and padding's, are not valid."""

    def __init__(
        self, cache: TokenCache, seq_len: int, seed: int, tokenizer: Tokenizer, root: Path
    ) -> None:
        """Pack `cache` as PackedDataset does; `root` is the cache folder."""
        super().__init__(cache, seq_len, seed)
        folder = open_packing(cache, seq_len, tokenizer, root)
        self._segments = np.memmap(folder / "pieces.bin", np.int64, mode="r").reshape(-1, 2)
        self._firsts = np.memmap(folder / "rows.bin", np.int64, mode="r")
        self._padding = tokenizer.eos_id
        self.n_samples = len(self._firsts) - 1
        used = int(self._segments[:, 1].sum())
        padding = 1 - used / (self.n_samples * (seq_len + 1))
        self._remark = f"documents whole by best fit, {padding:.1%} padding"

    def identity(self) -> Identity:
        return super().identity() | {"packing": f"best_fit {FORMAT}"}

    def read(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        shape = (len(sample_ids), self.seq_len + 1)
        tokens = np.full(shape, self._padding, dtype=np.int64)
        labels = np.full(shape, IGNORE_INDEX, dtype=np.int64)
        for sample, sequence in enumerate(locate(sample_ids, self.n_samples, self.seed)):
            begin = 0
            segments = self._segments[self._firsts[sequence] : self._firsts[sequence + 1]]
            for start, length in segments.tolist():
                segment = self._tokens[start : start + length]
                end = begin + length
                tokens[sample, begin:end] = segment
                labels[sample, begin : end - 1] = segment[1:]
                begin = end
        return np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(labels[:, :-1])


def open_packing(cache: TokenCache, seq_len: int, tokenizer: Tokenizer, root: Path) -> Path:
    """Return the folder with the packing, made if need be while others who ask for it wait.

    Raises:
        UserError: the cache folder cannot be written.
    """
    manifest = cache.manifest
    folder = root / "packings"
    fingerprints = [manifest.corpus_fingerprint, manifest.tokenizer_fingerprint]
    key = short_hash([str(FORMAT), *fingerprints, str(seq_len)])
    target = folder / key
    building = folder / f"{key}.building"
    if target.exists():  # then nothing is written, which this user may not be allowed to
        return target
    with locked(folder, key) as progress:
        if target.exists():
            return target
        name = manifest.source
        logger.info(f"packing the documents of {name} into sequences of {seq_len:,} tokens")
        shutil.rmtree(building, ignore_errors=True)  # of a process that was killed
        building.mkdir()
        segments = find_segments(cache.tokens, seq_len, tokenizer.bos_id, tokenizer.eos_id)
        _write_packing(segments, seq_len, building, name, progress)
        os.rename(building, target)
        fsync_folder(folder)
    return target


def _write_packing(
    windows: Iterator[np.ndarray], seq_len: int, building: Path, name: str, progress: Progress
) -> None:
    written = 0
    with (
        open(building / "pieces.bin", "wb") as segments_file,
        open(building / "rows.bin", "wb") as firsts_file,
    ):
        for segments in windows:
            sequences = best_fit(segments[:, 1], seq_len + 1)
            order = np.argsort(sequences, kind="stable")
            segments[order].tofile(segments_file)
            firsts = np.flatnonzero(np.diff(sequences[order], prepend=-1))
            (written + firsts).tofile(firsts_file)
            written += len(segments)
            progress.show(f"packing {name}: {written:,} documents and cuts of long ones")
        np.array([written]).tofile(firsts_file)
        for file in (segments_file, firsts_file):
            file.flush()
            os.fsync(file.fileno())


def find_segments(
    tokens: np.ndarray, seq_len: int, bos: int | None, eos: int
) -> Iterator[np.ndarray]:
    """Return first token and length, int64 `[P, 2]`, of the segments in each window of `tokens`.

    The segments of one document overlap by a token, as the sequences of a corpus that is cut do:
    the last label of one is the first token of the next. Where one token separates documents, it
    ends one and begins the next. Where there is no BOS, one begins after each EOS.
    """
    begun = 0  # where the document begins that the windows so far have not ended
    for start in range(0, len(tokens), WINDOW):
        window = tokens[start : start + WINDOW + 1]
        begins = window[:-1] == (eos if bos is None else bos)
        if bos == eos:
            begins &= window[1:] != bos  # the first of two is an end
        borders = start + np.flatnonzero(begins) + (bos is None)
        borders = np.concatenate(([begun], borders[borders > begun]))
        begun = borders[-1]
        if start + WINDOW >= len(tokens):
            has_own_bos = bos is not None and bos != eos
            last_is_bos = has_own_bos and window[-1] == bos  # of a document that holds no more
            borders = np.append(borders, len(tokens) - last_is_bos)
        ends = borders[1:]
        if bos == eos:
            ends = np.minimum(ends + (tokens[ends - 1] != eos), len(tokens))
        segments = _cut_documents(borders[:-1], ends - borders[:-1], seq_len)
        yield segments[segments[:, 1] > 1]  # a single token predicts nothing


def _cut_documents(firsts: np.ndarray, lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """Return first token and length, int64 `[P, 2]`, of the segments of documents."""
    counts = np.maximum(1, -(-(lengths - 1) // seq_len))
    segments_before = np.cumsum(counts) - counts
    numbers = np.arange(counts.sum()) - np.repeat(segments_before, counts)  # in its document
    offsets = numbers * seq_len
    sizes = np.minimum(np.repeat(lengths, counts) - offsets, seq_len + 1)
    return np.stack((np.repeat(firsts, counts) + offsets, sizes), axis=1)


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Return the sequence, int64 `[P]`, of each segment of a length `[P]` up to `capacity`."""
    sequences = np.empty(len(lengths), dtype=np.int64)
    by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    # Bit n is set where some sequence has room for n tokens: from a length on, the lowest bit that
    # is set is the best fit.
    spaces = 0
    count = 0
    for segment in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[segment])
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            sequence = by_space[space].pop()
            if not by_space[space]:
                spaces ^= 1 << space
        else:
            space = capacity
            sequence = count
            count += 1
        sequences[segment] = sequence
        by_space[space - length].append(sequence)
        spaces |= 1 << (space - length)
    return sequences
