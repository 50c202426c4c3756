"""Streaming: documents that become tokens while a run reads them, without a cache.

There are V streams, as `data.streams` says, for any number of ranks: sample i is number i div V of
stream i mod V. The documents of stream v are v, v+V, … of the corpus; or, of a dataset of the hub
whose number of files V divides, all of the files v, v+V, …, so that no other stream has to read
them. Documents come in the corpus' order, and each stream begins its next epoch by itself.

So what a sample holds follows from the corpus, the tokenizer, S, V and i. To find it without
reading all that comes before, a checkpoint has every stream's position.

Shapes: B samples, S tokens of a sequence.
"""

import os
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from torchtrain.datasets.cache_folder import short_hash
from torchtrain.datasets.corpora import Corpus, Skipped
from torchtrain.datasets.round_trip import try_first_documents
from torchtrain.datasets.samples import Dataset, Identity
from torchtrain.datasets.token_stream import Position, TokenStream
from torchtrain.datasets.tokenizer import Tokenizer
from torchtrain.utils import plural, user_errors


class StreamDataset(Dataset):
    """Samples of a corpus that is read from its beginning to its end, again and again.

    The samples of a stream can only be read in ascending order. Those that are not asked for are
    read all the same, so a rank should take as few streams as it can, see `stream_of`.
    """

    def __init__(self, corpus: Corpus, tokenizer: Tokenizer, seq_len: int, streams: int) -> None:
        """Deal `corpus` out to so many `streams`; nothing is read yet."""
        self.name = corpus.name
        self._identity: Identity = {
            "corpus": _corpus_identity(corpus),
            "streams": streams,
            "tokenizer": tokenizer.fingerprint,
            "seq_len": seq_len,
        }
        self._corpus, self._tokenizer = corpus, tokenizer
        corpus = replace(corpus, skipped=Skipped(log_as=corpus.name))
        self._by_part = corpus.even_parts and len(corpus.parts) % streams == 0
        self.streams = [
            TokenStream(corpus, tokenizer, seq_len, v, streams, by_part=self._by_part)
            for v in range(streams)
        ]

    def identity(self) -> Identity:
        return self._identity

    def try_tokenizer(self) -> None:
        try_first_documents(self._corpus, self._tokenizer)

    def stream_of(self, sample_ids: np.ndarray) -> np.ndarray:
        return sample_ids % len(self.streams)

    def read(self, sample_ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sequences = []
        for sample in sample_ids.tolist():
            number, stream = divmod(sample, len(self.streams))
            sequences.append(self.streams[stream].read(number))
        tokens = np.stack(sequences).astype(np.int64)
        return np.ascontiguousarray(tokens[:, :-1]), np.ascontiguousarray(tokens[:, 1:])

    def resume(self, saved: Identity, positions: Sequence[Position], samples: int) -> None:
        """Resume each stream; those of another corpus, or another number of them, begin anew.

        With another tokenizer a stream resumes at the beginning of the document it was in.
        """
        is_same = all(saved.get(key) == self._identity[key] for key in ("corpus", "streams"))
        is_same_tokenizer = saved.get("tokenizer") == self._identity["tokenizer"]
        for v, stream in enumerate(self.streams):
            start = positions[v] if is_same else Position()
            if not is_same_tokenizer:
                start = start._replace(token=0)
            samples_of_stream = (samples - v + len(self.streams) - 1) // len(self.streams)
            stream.start = start._replace(sample=samples_of_stream)

    def describe(self, samples: int) -> str:
        count = len(self.streams)
        share = f"1 document in {count}"
        if self._by_part:
            share = f"{len(self.streams[0].parts)} of its files"
        return f"{self.name}: tokenized as read, by {plural(count, 'stream')}, each with {share}"


def _corpus_identity(corpus: Corpus) -> str:
    """Return what stands for the contents, which are not read.

    That is name and revision of a dataset of the hub; names and sizes of files, wherever they are.
    """
    if not corpus.files:
        return f"{corpus.name} {corpus.revision or ''}".strip()
    files = [file.absolute() for file in corpus.files]
    root = os.path.commonpath([file.parent for file in files])
    with user_errors(f"cannot read {corpus.name}", OSError):
        sizes = [f"{os.path.relpath(file, root)} {os.stat(file).st_size}" for file in files]
    return short_hash([corpus.kind, *sizes])
