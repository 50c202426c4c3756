"""Tokenizers: loading one of any kind, and SentencePiece's own.

The committed `debug_tokenizer.model` is what `python -m torchtrain.tools.train_tokenizer` makes of `python_stdlib`.

SentencePiece (Kudo & Richardson 2018, arXiv:1808.06226) writes a space as U+2581 inside its pieces, so by itself it
reads a U+2581 of the text as a space. Wherever the model allows it, `encode` spells that character in byte pieces
instead; with a model that puts a space before every text (Llama 2's) it stays a space, as in Meta's own use.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from torchtrain.datasets.tokenizer_formats import (
    SPACE_MARK,
    HuggingFaceTokenizer,
    piece_bytes,
    require_unicode,
)
from torchtrain.errors import UserError
from torchtrain.utils import expanded, reading

WORD_BEGINS = re.compile(f"(?<=[^\\s{SPACE_MARK}]) (?!\\Z)")
LONG_TEXT = 1 << 12
"""Characters after which a text is cut for encoding. SentencePiece's time grows faster than a text's length (uncut
source code takes up to twice as long), so does its memory, and one text keeps one thread alone busy."""
BATCH_CHARACTERS = 1 << 20
"""Texts are encoded together up to this many characters: enough for all threads, little enough to hold as ids."""


class SentencePieceTokenizer:
    """A SentencePiece model. Token ids run from 0 to vocab_size - 1; BOS and EOS are for the caller to add."""

    def __init__(self, model: bytes, name: str) -> None:
        """Load `model`, the bytes of a model file; `name` is how messages call it.

        Raises:
            UserError: not a SentencePiece model, or one without BOS or EOS.
        """
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"tokenizer {name!r} is damaged, or no SentencePiece model. What can be read: SentencePiece models "
                "(Llama 2's tokenizer.model) and Hugging Face's tokenizer.json; "
                "`python -m torchtrain.tools.train_tokenizer` makes one of your own text"
            ) from error
        self.vocab_size: int = self._model.vocab_size()
        self.bos_id: int = self._model.bos_id()
        self.eos_id: int = self._model.eos_id()
        self.fingerprint = hashlib.sha256(model).hexdigest()
        missing = [kind for kind, id in (("BOS", self.bos_id), ("EOS", self.eos_id)) if id < 0]
        if missing:
            raise UserError(
                f"tokenizer {name!r} has no {' and no '.join(missing)} piece, which separate the documents. "
                "Train it with bos_id and eos_id set"
            )
        self._cut_keeps_space = self._rule_for_cuts()
        self._space_mark_ids = self._bytes_of_space_mark()

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without BOS and EOS.

        Raises:
            UserError: `text` holds a lone surrogate, which no UTF-8 text can.
        """
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """As `encode` for each text, int32 `[tokens]`, but faster, on several threads, and in bounded extra memory."""
        parts_of = [self._parts(text) for text in texts]
        encoded = self._encoded((part for parts in parts_of for part in parts), threads)
        return [np.concatenate([next(encoded) for _ in parts]) for parts in parts_of]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; BOS and EOS have none, and bytes that are not UTF-8 become U+FFFD."""
        return self._model.decode([int(id) for id in ids])

    def token_bytes(self) -> np.ndarray:
        """Bytes of UTF-8 text that each id stands for, fp64 `[V]`: 0 for BOS and EOS, NaN where nobody can know."""
        model, ids = self._model, range(self.vocab_size)
        sizes = np.array([piece_bytes(piece) for piece in model.id_to_piece(list(ids))])
        sizes[[id for id in ids if model.is_byte(id)]] = 1
        sizes[[id for id in ids if model.is_control(id) or model.is_unused(id)]] = 0
        sizes[model.unk_id()] = np.nan
        return sizes

    def _parts(self, text: str) -> list[str]:
        """`text` cut so that the parts' ids in a row are the text's, with every U+2581 on its own where it is kept."""
        require_unicode(text)
        if self._space_mark_ids and SPACE_MARK in text:
            return [
                part for piece in re.split(f"({SPACE_MARK})", text) for part in self._cut(piece)
            ]
        return self._cut(text)

    def _encoded(self, parts: Iterable[str], threads: int) -> Iterator[np.ndarray]:
        for batch in in_batches(parts, BATCH_CHARACTERS):
            for part, ids in zip(
                batch, self._model.encode(batch, num_threads=threads), strict=True
            ):
                kept_mark = part == SPACE_MARK and self._space_mark_ids
                yield np.array(self._space_mark_ids if kept_mark else ids, dtype=np.int32)

    def _cut(self, text: str) -> list[str]:
        """`text` in parts of a little over LONG_TEXT characters, each cut before a space that begins a word."""
        parts = []
        start = 0
        while self._cut_keeps_space is not None and len(text) - start > LONG_TEXT:
            space = WORD_BEGINS.search(text, start + LONG_TEXT)
            if space is None:
                break
            parts.append(text[start : space.start()])
            start = space.start() if self._cut_keeps_space else space.end()
        return [*parts, text[start:]]

    def _rule_for_cuts(self) -> bool | None:
        """Whether a part keeps the space it was cut at, or loses it (the model adds one); None: ids would change."""
        pieces = self._model.id_to_piece(list(range(self.vocab_size)))
        if any(re.search(f"[^{SPACE_MARK}]{SPACE_MARK}", piece) for piece in pieces):
            return None
        whole = self._model.encode("a b")
        if whole == self._model.encode("a") + self._model.encode(" b"):
            return True
        return False if whole == self._model.encode("a") + self._model.encode("b") else None

    def _bytes_of_space_mark(self) -> list[int]:
        """The byte pieces of U+2581; none where the model has none, or puts a space before every part."""
        ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode("utf-8")]
        spelled = self._model.encode("a") + ids + self._model.encode("b")
        kept = (
            all(self._model.is_byte(id) for id in ids)
            and self._model.decode(spelled) == f"a{SPACE_MARK}b"
        )
        return ids if kept else []


Tokenizer = SentencePieceTokenizer | HuggingFaceTokenizer
"""Both do the same by the same names; two with equal fingerprints give equal ids, however many threads there are."""


def in_batches(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """`texts` in lists that are closed at `size` characters."""
    batch: list[str] = []
    characters = 0
    for text in texts:
        batch.append(text)
        characters += len(text)
        if characters >= size:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer at `path`: a file, or a folder that holds tokenizer.json or else tokenizer.model.

    The content tells the format, not the name: Llama 2 and Llama 3 call different things tokenizer.model.

    Raises:
        UserError: nothing there, a format that is not known, damaged, or without BOS or EOS.
    """
    given = f"model.tokenizer_path = {str(path)!r}"
    file = expanded(path)
    if file.is_dir():
        found = [
            file / name for name in ("tokenizer.json", "tokenizer.model") if (file / name).is_file()
        ]
        if not found:
            raise UserError(f"{given} is a folder without tokenizer.json or tokenizer.model")
        file = found[0]
    if not file.exists():
        raise UserError(f"{given} does not exist (from {str(Path.cwd())!r})")
    if not file.is_file():
        raise UserError(f"{given} is neither a file nor a folder")
    with reading(f"model.tokenizer_path = {str(file)!r}"):
        content = file.read_bytes()
    name = str(file)
    if not content:
        raise UserError(f"tokenizer {name!r} is an empty file")
    if content.startswith(b"version https://git-lfs"):
        raise UserError(
            f"tokenizer {name!r} is a Git LFS pointer, not the file itself: run `git lfs pull` where it lies"
        )
    if re.match(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n", content):
        raise UserError(
            f"tokenizer {name!r} is in tiktoken format (as Llama 3's original tokenizer.model), which does not say how "
            "text is split. Give the tokenizer.json of the same model's Hugging Face repository instead"
        )
    if content.lstrip().startswith(b"{"):
        return HuggingFaceTokenizer(content, file)
    return SentencePieceTokenizer(content, name)
