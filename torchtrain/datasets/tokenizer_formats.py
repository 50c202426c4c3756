"""Tokenizers in a format other than SentencePiece's: Hugging Face's tokenizer.json.

It is read by its own package, so that ids are what its authors' code gives. Tokens that only
tokenizer_config.json knows get the ids that transformers gives them: the next ones, in order. Text
cannot spell a special token: what looks like one is encoded as ordinary characters; the caller adds
BOS and EOS.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from torchtrain.errors import UserError
from torchtrain.utils import user_errors

SPACE_MARK = "\u2581"
"""How SentencePiece, and what is made of its models, writes a space inside pieces."""

WELL_KNOWN = (
    ("<|begin_of_text|>", "<|end_of_text|>"),
    ("<s>", "</s>"),
    ("<bos>", "<eos>"),
    ("<|endoftext|>", "<|endoftext|>"),
)
"""BOS and EOS of Llama 3, of Llama 2 and Mistral, of Gemma, of GPT-2 and OLMo."""


def require_unicode(text: str) -> None:
    """Check that `text` holds no lone surrogate, which no UTF-8 text can.

    Raises:
        UserError: it does; says where.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(
            f"text with a lone surrogate, U+{ord(text[error.start]):04X} at character "
            f"{error.start:,}, is not valid Unicode and cannot be encoded. Drop it, or read the "
            "text with the encoding it was written in"
        ) from error


def piece_bytes(piece: str) -> float:
    """Return the bytes of UTF-8 text that a piece of SentencePiece's stands for."""
    return float(len(piece.replace(SPACE_MARK, " ").encode("utf-8")))


class HuggingFaceTokenizer:
    """A tokenizer.json, as the package `tokenizers` reads it."""

    def __init__(self, content: bytes, file: Path) -> None:
        """Load `content`, that of `file`, and find BOS and EOS.

        The files beside it name them, or else they have well-known names.

        Raises:
            UserError: not a tokenizer.json, or one whose BOS and EOS cannot be known.
        """
        import tokenizers

        message = f"tokenizer {str(file)!r} is JSON, but not a tokenizer.json"
        with user_errors(message, Exception):  # the package raises nothing more special
            self._model = tokenizers.Tokenizer.from_buffer(content)
        self._model.no_padding()
        self._model.no_truncation()
        self._model.encode_special_tokens = True
        names, added = read_beside(file)
        missing = [token for token in added if self._model.token_to_id(token.content) is None]
        self._model.add_tokens(missing)
        vocabulary = self._model.get_vocab()
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        bos, eos = _special_names(file, names, vocabulary)
        self._model.add_special_tokens([bos, eos])  # not every file calls them special; ids stay
        self.bos_id: int = vocabulary[bos]
        self.eos_id: int = vocabulary[eos]
        beside = "\0".join(["", bos, eos, *(str(token.__getstate__()) for token in missing)])
        self.fingerprint = hashlib.sha256(content + beside.encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """Return the ids of each text, int32 `[tokens]`, without BOS and EOS.

        Several `threads` mean all cores. UserError at a lone surrogate.
        """
        for text in texts:
            require_unicode(text)
        if threads == 1:
            encoded = [self._model.encode(text, add_special_tokens=False) for text in texts]
        else:
            encoded = self._model.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.int32) for encoding in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out.

        A character whose bytes are not all there is U+FFFD, one or several. Text that is printed as
        it is made waits while it ends with one.
        """
        return str(self._model.decode(list(ids), skip_special_tokens=True))

    def token_bytes(self) -> np.ndarray:
        """Return the bytes of UTF-8 text that each id stands for, fp64 `[V]`.

        The decoder says how the vocabulary spells them; NaN where it does not, 0 for BOS and EOS.
        """
        settings = json.loads(self._model.to_str())
        decoder = settings["decoder"] or {}
        steps = {step["type"] for step in decoder.get("decoders", [decoder]) if step}
        vocabulary = self._model.get_vocab(with_added_tokens=False)
        sizes = np.full(self.vocab_size, np.nan)
        for token, id_ in vocabulary.items():
            if "ByteLevel" in steps:
                sizes[id_] = len(token)  # a character for each byte
            elif steps & {"Metaspace", "ByteFallback"}:
                is_byte = re.fullmatch("<0x[0-9A-F]{2}>", token)
                sizes[id_] = 1 if is_byte else piece_bytes(token)
        unknown = settings["model"].get("unk_token")
        if isinstance(unknown, str) and unknown in self._model.get_vocab():
            sizes[self._model.token_to_id(unknown)] = np.nan
        for added in settings["added_tokens"]:
            sizes[added["id"]] = 0 if added["special"] else len(added["content"].encode("utf-8"))
        return sizes


SPECIAL_KEYS = ("bos_token", "eos_token")


def _special_names(file: Path, given: dict[str, str], known: dict[str, int]) -> tuple[str, str]:
    """Return what the files beside `file` call BOS and EOS, else the first well-known pair."""
    if not given:
        for bos, eos in WELL_KNOWN:
            if bos in known and eos in known:
                return bos, eos
    unknown = [f"{key} = {given.get(key)!r}" for key in SPECIAL_KEYS if given.get(key) not in known]
    if unknown:
        config = str(file.with_name("tokenizer_config.json"))
        raise UserError(
            f"tokenizer {str(file)!r} and the files beside it do not say what separates "
            f"documents: {', '.join(unknown)} is not in its vocabulary. Name two tokens in "
            f'{config!r}: {{"bos_token": "…", "eos_token": "…"}}; they may be the same'
        )
    return given["bos_token"], given["eos_token"]


def read_beside(file: Path) -> tuple[dict[str, str], list[Any]]:
    """Return what the files beside `file` call BOS and EOS, by bos_token and eos_token, and tokens.

    The tokens (AddedToken) come in the order of the ids that they are said to have.
    """
    from tokenizers import AddedToken

    given: dict[str, str] = {}
    added: list[Any] = []
    # The latter counts where they differ.
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        beside = file.with_name(name)
        try:
            settings = json.loads(beside.read_bytes()) if beside.is_file() else {}
            tokens = settings.get("added_tokens_decoder") or {}
            added += [AddedToken(**tokens[id_]) for id_ in sorted(tokens, key=int)]
            for key in SPECIAL_KEYS:
                if token := settings.get(key):
                    given[key] = str(token["content"] if isinstance(token, dict) else token)
        except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
            raise UserError(
                f"{str(beside)!r}, which names BOS and EOS, cannot be read: {error!r}"
            ) from error
    return given, added
