"""Tokenizers in another format than SentencePiece's: Hugging Face's tokenizer.json.

It is read by its own package, so that ids are what its authors' code gives. Text can spell no special token: what
looks like one is encoded as ordinary characters, and BOS and EOS are for the caller to add.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from torchtrain.errors import UserError

SPACE_MARK = "\u2581"
"""How SentencePiece, and what is made of its models, writes a space inside pieces."""

WELL_KNOWN = (
    ("<|begin_of_text|>", "<|end_of_text|>"),
    ("<s>", "</s>"),
    ("<bos>", "<eos>"),
    ("<|endoftext|>",) * 2,
)
"""BOS and EOS of Llama 3, of Llama 2 and Mistral, of Gemma, of GPT-2 and OLMo."""


def require_unicode(text: str) -> None:
    """Refuse `text` that holds a lone surrogate, which no UTF-8 text can.

    Raises:
        UserError: it does; says where.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"text with a lone surrogate, U+{ord(text[error.start]):04X} at character {error.start:,}, is no valid "
            "Unicode and cannot be encoded. Drop it, or read the text with the encoding it was written in"
        ) from error


def piece_bytes(piece: str) -> float:
    """Bytes of UTF-8 text that a piece of SentencePiece's stands for."""
    return float(len(piece.replace(SPACE_MARK, " ").encode("utf-8")))


class HuggingFaceTokenizer:
    """A tokenizer.json, as the package `tokenizers` reads it."""

    def __init__(self, content: bytes, file: Path) -> None:
        """Load `content`, that of `file`, and find BOS and EOS in the files beside it, else by well-known names.

        Raises:
            UserError: no tokenizer.json, or one whose BOS and EOS cannot be known.
        """
        import tokenizers

        try:
            self._model = tokenizers.Tokenizer.from_buffer(content)
        except Exception as error:  # the package raises nothing more special
            raise UserError(
                f"tokenizer {str(file)!r} is JSON, but no tokenizer.json: {error}"
            ) from error
        self._model.no_padding()
        self._model.no_truncation()
        self._model.encode_special_tokens = True
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        bos, eos = _special_names(file, vocabulary)
        self._model.add_special_tokens([bos, eos])  # which not every file calls special; ids stay
        self.bos_id: int = vocabulary[bos]
        self.eos_id: int = vocabulary[eos]
        self.fingerprint = hashlib.sha256(content + f"\0{bos}\0{eos}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of `text`, without BOS and EOS; UserError at a lone surrogate."""
        return self.encode_batch([text])[0].tolist()

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """As `encode` for each text, int32 `[tokens]`; any number of threads above one means all cores."""
        for text in texts:
            require_unicode(text)
        if threads == 1:
            encoded = [self._model.encode(text, add_special_tokens=False) for text in texts]
        else:
            encoded = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`; BOS and EOS have none."""
        return self._model.decode([int(id) for id in ids], skip_special_tokens=True)

    def token_bytes(self) -> np.ndarray:
        """Bytes that each id stands for, fp64 `[V]`; the decoder says how the vocabulary spells them, NaN if not."""
        settings = json.loads(self._model.to_str())
        decoder = settings["decoder"] or {}
        steps = {step["type"] for step in decoder.get("decoders", [decoder]) if step}
        sizes = np.full(self.vocab_size, np.nan)
        for piece, id in self._model.get_vocab(with_added_tokens=False).items():
            if "ByteLevel" in steps:
                sizes[id] = len(piece)  # a character for each byte
            elif steps & {"Metaspace", "ByteFallback"}:
                sizes[id] = 1 if re.fullmatch("<0x[0-9A-F]{2}>", piece) else piece_bytes(piece)
        unknown = settings["model"].get("unk_token")
        if isinstance(unknown, str) and unknown in self._model.get_vocab():
            sizes[self._model.token_to_id(unknown)] = np.nan
        for token in settings["added_tokens"]:
            sizes[token["id"]] = 0 if token["special"] else len(token["content"].encode("utf-8"))
        return sizes


def _special_names(file: Path, vocabulary: dict[str, int]) -> tuple[str, str]:
    """The tokens that the files beside `file` call bos_token and eos_token, else the first well-known pair."""
    given: dict[str, str] = {}
    for name in (
        "special_tokens_map.json",
        "tokenizer_config.json",
    ):  # the latter counts where they differ
        beside = file.with_name(name)
        try:
            settings = json.loads(beside.read_bytes()) if beside.is_file() else {}
            tokens = {key: settings[key] for key in ("bos_token", "eos_token") if settings.get(key)}
            given |= {
                key: str(token["content"] if isinstance(token, dict) else token)
                for key, token in tokens.items()
            }
        except (OSError, ValueError, AttributeError, LookupError) as error:
            raise UserError(
                f"{str(beside)!r}, which names BOS and EOS, cannot be read: {error!r}"
            ) from error
    if not given:
        pairs = (pair for pair in WELL_KNOWN if all(token in vocabulary for token in pair))
        given = dict(zip(("bos_token", "eos_token"), next(pairs, ()), strict=False))
    faults = [
        f"{key} = {given.get(key)!r}"
        for key in ("bos_token", "eos_token")
        if given.get(key) not in vocabulary
    ]
    if faults:
        raise UserError(
            f"tokenizer {str(file)!r} and the files beside it do not say what separates documents: {', '.join(faults)} "
            f"is none of its tokens. Name two in {str(file.with_name('tokenizer_config.json'))!r}: "
            '{"bos_token": "…", "eos_token": "…"}; they may be the same'
        )
    return given["bos_token"], given["eos_token"]
