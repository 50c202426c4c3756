"""Best-fit packing: documents whole in their sequences, as tightly as they go (Ding et al. 2024, arXiv:2404.10830).

Only a document longer than a sequence is cut, into full sequences and a rest. Pieces, the longest first, go each into
the row with the least space that still takes it; what stays free is padding. The corpus is packed in windows of tokens
one after the other, so that memory is bounded. Which pieces make which row is a pure function of tokens and sequence
length, worked out once a host and kept in the cache folder:

    packings/<key>/pieces.bin   int64 [P, 2], first token and length of every piece, row by row
    packings/<key>/rows.bin     int64 [N + 1], the first piece of every row, and P

Shapes: B samples, S tokens of a sequence, N rows, P pieces.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from torchtrain.datasets.data_order import locate
from torchtrain.datasets.documents import HIDDEN
from torchtrain.datasets.samples import PackedDataset
from torchtrain.datasets.token_cache import TokenCache, locked, short_hash
from torchtrain.datasets.tokenizer import Tokenizer
from torchtrain.utils import fsync_folder

FORMAT = 1
"""Goes up when the same tokens would be packed differently."""
WINDOW = 1 << 24
"""Tokens packed together: some ten thousand documents, enough to fill rows; seconds, and some hundred MB."""


class BestFitDataset(PackedDataset):
    """Rows of whole documents. The last label of a piece, and those of the padding (EOS), are -100."""

    def __init__(
        self,
        cache: TokenCache,
        seq_len: int,
        seed: int,
        tokenizer: Tokenizer,
        root: Path,
        log: Callable[[str], None],
    ) -> None:
        """As PackedDataset; `root` is the cache folder, `log` takes what is said when the packing has to be made."""
        super().__init__(cache, seq_len, seed)
        folder = open_packing(cache, seq_len, tokenizer, root, log)
        self._pieces = np.memmap(folder / "pieces.bin", np.int64, mode="r").reshape(-1, 2)
        self._rows = np.memmap(folder / "rows.bin", np.int64, mode="r")
        self._padding = tokenizer.eos_id
        self.n_samples = len(self._rows) - 1
        padding = 1 - int(self._pieces[:, 1].sum()) / (self.n_samples * (seq_len + 1))
        self._remark = f"documents whole by best fit, {padding:.1%} padding"

    def identity(self) -> dict[str, Any]:
        return super().identity() | {"packing": f"best_fit {FORMAT}"}

    def read(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tokens = np.full((len(sample_ids), self.seq_len + 1), self._padding, dtype=np.int64)
        labels = np.full((len(sample_ids), self.seq_len), HIDDEN, dtype=np.int64)
        for sample, row in enumerate(locate(sample_ids, self.n_samples, self.seed)):
            at = 0
            for start, length in self._pieces[self._rows[row] : self._rows[row + 1]].tolist():
                piece = self._tokens[start : start + length]
                tokens[sample, at : at + length] = piece
                labels[sample, at : at + length - 1] = piece[1:]
                at += length
        return np.ascontiguousarray(tokens[:, :-1]), labels


def open_packing(
    cache: TokenCache, seq_len: int, tokenizer: Tokenizer, root: Path, log: Callable[[str], None]
) -> Path:
    """The folder with the packing: found, or made while other processes that ask for it wait.

    Raises:
        UserError: the cache folder cannot be written.
    """
    manifest, folder = cache.manifest, root / "packings"
    fingerprints = [manifest.corpus_fingerprint, manifest.tokenizer_fingerprint]
    key = short_hash([str(FORMAT), *fingerprints, str(seq_len)])
    target, building = folder / key, folder / f"{key}.building"
    with locked(folder, key, log) as progress:
        if target.exists():
            return target
        log(f"packing the documents of {manifest.source} into sequences of {seq_len:,} tokens")
        shutil.rmtree(
            building, ignore_errors=True
        )  # of a process that was killed: the lock is ours
        building.mkdir()
        pieces_before = 0
        with (
            open(building / "pieces.bin", "wb") as pieces_file,
            open(building / "rows.bin", "wb") as rows_file,
        ):
            for pieces in pieces_of(cache.tokens, seq_len, tokenizer.bos_id, tokenizer.eos_id):
                rows = best_fit(pieces[:, 1], seq_len + 1)
                order = np.argsort(rows, kind="stable")
                pieces[order].tofile(pieces_file)
                firsts = np.flatnonzero(np.diff(rows[order], prepend=-1))
                (pieces_before + firsts).tofile(rows_file)
                pieces_before += len(pieces)
                progress.show(
                    f"packing {manifest.source}: {pieces_before:,} documents and parts of long ones"
                )
            np.array([pieces_before]).tofile(rows_file)
            for file in (pieces_file, rows_file):
                file.flush()
                os.fsync(file.fileno())
        os.rename(building, target)
        fsync_folder(folder)
    return target


def pieces_of(tokens: np.ndarray, seq_len: int, bos: int, eos: int) -> Iterator[np.ndarray]:
    """First token and length, int64 `[P, 2]`, of the pieces in each window of `tokens`, in their order.

    Those of one document overlap by a token, as the sequences of a corpus that is cut do: the label of one is the first
    token of the next. Where one token separates documents, it ends one and begins the next.
    """
    begun = 0  # where the document begins that the windows so far have not ended
    for at in range(0, len(tokens), WINDOW):
        part = tokens[at : at + WINDOW + 1]
        begins = part[:-1] == bos
        if bos == eos:
            begins &= part[1:] != bos  # the first of a pair is an end
        borders = at + np.flatnonzero(begins)
        borders = np.concatenate(([begun], borders[borders > begun]))
        begun = borders[-1]
        if at + WINDOW >= len(tokens):
            borders = np.append(borders, len(tokens))
        ends = borders[1:]
        if bos == eos:
            ends = np.minimum(ends + (tokens[ends - 1] != eos), len(tokens))
        lengths = ends - borders[:-1]
        cuts = np.maximum(1, -(-(lengths - 1) // seq_len))
        number = np.arange(cuts.sum()) - np.repeat(
            np.cumsum(cuts) - cuts, cuts
        )  # of a piece in its document
        offsets = number * seq_len
        sizes = np.minimum(np.repeat(lengths, cuts) - offsets, seq_len + 1)
        pieces = np.stack((np.repeat(borders[:-1], cuts) + offsets, sizes), axis=1)
        yield pieces[sizes > 1]  # a single token predicts nothing


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row, int64 `[P]`, of each piece of a length `[P]` up to `capacity`."""
    rows = np.empty(len(lengths), dtype=np.int64)
    rows_by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0  # bit n is set where some row has room for n tokens: the lowest set bit from a length on is the best fit
    count = 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = rows_by_space[space].pop()
            spaces ^= 0 if rows_by_space[space] else 1 << space
        else:
            space, row = capacity, count
            count += 1
        rows[piece] = row
        rows_by_space[space - length].append(row)
        spaces |= 1 << (space - length)
    return rows
