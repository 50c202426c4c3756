"""Tokenizers: SentencePiece models, and Hugging Face's tokenizer.json.

Each kind is read by its own package, so that ids are what its authors' code gives; the caller adds
EOS, and BOS where there is one (else `bos_id` is None). The committed `debug_tokenizer.model` is
what `python -m torchtrain.tools.train_tokenizer` makes of `python_stdlib`.

SentencePiece (Kudo & Richardson 2018, arXiv:1808.06226) calls the strings of its vocabulary pieces
and writes a space inside them as U+2581, so by itself it reads a U+2581 of the text as a space.
Wherever the model allows it, `encode_batch` spells that character in byte pieces instead; with a
model that puts a space before every text (Llama 2's) it stays a space, as in Meta's own use.

Of Hugging Face's, tokens that only tokenizer_config.json knows get the ids that transformers gives
them: the next ones, in order. Text cannot spell a special token: what looks like one is encoded as
ordinary characters.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import sentencepiece

from torchtrain.datasets.special_tokens import (
    can_decode,
    find_spellable,
    find_unknown,
    hide,
    knows_all,
    read_beside,
    separator_names,
    spells_bytes,
)
from torchtrain.errors import UserError
from torchtrain.utils import expand_user, import_package, user_errors

SPACE_MARK = "\u2581"
"""How SentencePiece, and what is made of its models, writes a space inside pieces."""

WORD_BEGINS = re.compile(f"(?<=[^\\s{SPACE_MARK}]) (?!\\Z)")
LONG_TEXT = 1 << 12
"""Characters after which a text is cut for encoding. SentencePiece's time grows faster than a
text's length (uncut source code takes up to twice as long), so does its memory, and one text keeps
only one thread busy."""
BATCH_CHARACTERS = 1 << 20
"""Texts are encoded together up to this many characters: enough for all threads, little enough to
hold as ids."""


class SentencePieceTokenizer:
    """A SentencePiece model, with token ids 0 to vocab_size - 1; the caller adds BOS and EOS."""

    def __init__(self, model: bytes, name: str) -> None:
        """Load `model`, the bytes of a model file; `name` is its name in messages.

        Raises:
            UserError: not a SentencePiece model, or one without EOS.
        """
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, ValueError) as error:
            raise UserError(
                f"tokenizer {name!r} is damaged, or not a SentencePiece model. Supported: "
                "SentencePiece models (Llama 2's tokenizer.model) and Hugging Face's "
                "tokenizer.json; `python -m torchtrain.tools.train_tokenizer` makes one of your "
                "own text"
            ) from error
        self.vocab_size: int = self._model.vocab_size()
        bos = self._model.bos_id()
        self.bos_id: int | None = bos if bos >= 0 else None
        self.eos_id: int = self._model.eos_id()
        self.unknown_id: int = self._model.unk_id()
        self.decodes = True
        self.fingerprint = hashlib.sha256(model).hexdigest()
        if self.eos_id < 0:
            raise UserError(
                f"tokenizer {name!r} has no EOS piece, which documents end with. Train it with "
                "eos_id set"
            )
        self._cut_keeps_space = self._rule_for_cuts()
        self._space_mark_ids = self._bytes_of_space_mark()

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """Return the ids of each text, int32 `[tokens]`, without BOS and EOS.

        `threads` share the work.

        Raises:
            UserError: a text holds a lone surrogate, which no UTF-8 text can.
        """
        cuts_by_text = [self._cut_for_encoding(text) for text in texts]
        encoded = self._encode_cuts(chain.from_iterable(cuts_by_text), threads)
        return [np.concatenate([next(encoded) for _ in cuts]) for cuts in cuts_by_text]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out.

        A character whose bytes are not all there is U+FFFD, one or several. Text that is printed as
        it is made waits while it ends with one.
        """
        return str(self._model.decode(list(ids)))

    def token_bytes(self) -> np.ndarray:
        """Return the bytes of UTF-8 text that each id stands for, fp64 `[V]`.

        That is 0 for BOS and EOS, and NaN where nobody can know.
        """
        model = self._model
        sizes = np.empty(self.vocab_size)
        for id_ in range(self.vocab_size):
            if model.is_control(id_) or model.is_unused(id_):
                sizes[id_] = 0
            elif model.is_byte(id_):
                sizes[id_] = 1
            else:
                sizes[id_] = _piece_bytes(model.id_to_piece(id_))
        sizes[self.unknown_id] = np.nan
        return sizes

    def _cut_for_encoding(self, text: str) -> list[str]:
        """Cut `text` without changing its ids, every U+2581 by itself where it is kept."""
        _require_unicode(text)
        stretches = re.split(f"({SPACE_MARK})", text) if self._space_mark_ids else [text]
        return [cut for stretch in stretches for cut in self._cut(stretch)]

    def _encode_cuts(self, cuts: Iterable[str], threads: int) -> Iterator[np.ndarray]:
        for batch in in_batches(cuts, BATCH_CHARACTERS):
            encoded = self._model.encode(batch, num_threads=threads)
            for cut, ids in zip(batch, encoded, strict=True):
                if cut == SPACE_MARK and self._space_mark_ids:
                    ids = self._space_mark_ids
                yield np.array(ids, dtype=np.int32)

    def _cut(self, text: str) -> list[str]:
        """Cut `text` into a little over LONG_TEXT characters, each before a space before a word."""
        cuts = []
        start = 0
        while self._cut_keeps_space is not None and len(text) - start > LONG_TEXT:
            space = WORD_BEGINS.search(text, start + LONG_TEXT)
            if space is None:
                break
            cuts.append(text[start : space.start()])
            start = space.start() if self._cut_keeps_space else space.end()
        return [*cuts, text[start:]]

    def _rule_for_cuts(self) -> bool | None:
        """Return whether a cut keeps the space before it, or loses it (the model adds one).

        None if ids would change either way.
        """
        pieces = self._model.id_to_piece(list(range(self.vocab_size)))
        if any(re.search(f"[^{SPACE_MARK}]{SPACE_MARK}", piece) for piece in pieces):
            return None
        encode = self._model.encode
        if encode("a b") == encode("a") + encode(" b"):
            return True
        if encode("a b") == encode("a") + encode("b"):
            return False
        return None

    def _bytes_of_space_mark(self) -> list[int]:
        """Return the ids of U+2581's bytes; none if the model has none, or adds a space to cuts."""
        model = self._model
        ids = [model.piece_to_id(f"<0x{byte:02X}>") for byte in SPACE_MARK.encode("utf-8")]
        spelled = model.encode("a") + ids + model.encode("b")
        are_bytes = all(model.is_byte(id_) for id_ in ids)
        is_kept = are_bytes and model.decode(spelled) == f"a{SPACE_MARK}b"
        return ids if is_kept else []


class HuggingFaceTokenizer:
    """A tokenizer.json, as the package `tokenizers` reads it."""

    def __init__(self, content: bytes, file: Path) -> None:
        """Load `content`, that of `file`, and find BOS and EOS.

        The files beside it name them, or else they have well-known names.

        Raises:
            UserError: not a tokenizer.json, or one whose BOS or EOS cannot be known.
        """
        tokenizers = import_package("tokenizers", f"tokenizer {str(file)!r}")
        message = f"tokenizer {str(file)!r} is JSON, but not a tokenizer.json"
        with user_errors(message, Exception):  # the package raises nothing more special
            self._model = tokenizers.Tokenizer.from_buffer(content)
        self._model.no_padding()
        self._model.no_truncation()
        self._model.encode_special_tokens = True
        names, added, special = read_beside(file)
        missing = [token for token in added if self._model.token_to_id(token.content) is None]
        self._model.add_tokens(missing)
        vocabulary = self._model.get_vocab()
        self.vocab_size: int = max(vocabulary.values(), default=-1) + 1
        bos, eos = separator_names(file, names, vocabulary)
        separators = [token for token in (bos, eos) if token is not None]
        self._model.add_special_tokens(separators)  # not every file calls them special; ids stay
        self.bos_id: int | None = None if bos is None else vocabulary[bos]
        self.eos_id: int = vocabulary[eos]
        separator_ids = [vocabulary[token] for token in separators]
        beside = "\0".join(["", bos or "", eos, *(str(token.__getstate__()) for token in missing)])
        self.fingerprint = hashlib.sha256(content + beside.encode()).hexdigest()
        self._encoder = self._model
        settings = json.loads(self._model.to_str())
        self.unknown_id = find_unknown(settings)
        self.decodes = can_decode(settings)
        spellable, cuts_bytes = find_spellable(settings, special), spells_bytes(settings)
        if spellable or cuts_bytes:
            hidden = hide(settings, spellable, self.fingerprint, cuts_bytes=cuts_bytes)
            self._encoder = tokenizers.Tokenizer.from_str(json.dumps(hidden))
            self._encoder.encode_special_tokens = True
            kinds = ["the tokens of bytes"] if cuts_bytes else []
            beside += "\0".join(["", "text spells none of", *sorted(spellable), *kinds])
        self._drops_unknown = self.unknown_id in separator_ids and not knows_all(settings)
        if self._drops_unknown:
            beside += "\0".join(["", "what is unknown is dropped"])
        self.fingerprint = hashlib.sha256(content + beside.encode()).hexdigest()

    def encode_batch(self, texts: Sequence[str], threads: int = 1) -> list[np.ndarray]:
        """Return the ids of each text, int32 `[tokens]`, without BOS and EOS.

        Several `threads` mean all cores.

        Raises:
            UserError: a lone surrogate, or a character that the tokenizer has no token for.
        """
        for text in texts:
            _require_unicode(text)
        with user_errors("the tokenizer cannot encode a text", Exception):
            # It raises nothing more special, such as where it has no unknown token.
            if threads == 1:
                encoded = [self._encoder.encode(text, add_special_tokens=False) for text in texts]
            else:
                encoded = self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        return [self._without_separators(encoding.ids) for encoding in encoded]

    def _without_separators(self, ids: list[int]) -> np.ndarray:
        """Drop what the model does not know where BOS or EOS is also the unknown token."""
        own = np.array(ids, dtype=np.int32)
        return own[own != self.unknown_id] if self._drops_unknown else own

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
                sizes[id_] = 1 if is_byte else _piece_bytes(token)
        for added in settings["added_tokens"]:
            sizes[added["id"]] = 0 if added["special"] else len(added["content"].encode("utf-8"))
        if self.unknown_id is not None and self.unknown_id not in (self.bos_id, self.eos_id):
            sizes[self.unknown_id] = np.nan
        return sizes


def _require_unicode(text: str) -> None:
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


def _piece_bytes(piece: str) -> float:
    """Return the bytes of UTF-8 text that a piece of SentencePiece's stands for."""
    return float(len(piece.replace(SPACE_MARK, " ").encode("utf-8")))


Tokenizer = SentencePieceTokenizer | HuggingFaceTokenizer
"""Both do the same by the same names; equal fingerprints give equal ids."""


def begin_document(tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that a document has before those of its text: BOS, if there is one."""
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def encode_documents(
    tokenizer: Tokenizer, texts: Sequence[str], threads: int = 1
) -> list[np.ndarray]:
    """Return the tokens of each document, int32 `[tokens]`: BOS if any, its text's ids, EOS."""
    bos, eos = np.array(begin_document(tokenizer), dtype=np.int32), [tokenizer.eos_id]
    encoded = tokenizer.encode_batch(texts, threads)
    return [np.concatenate((bos, ids, eos), dtype=np.int32) for ids in encoded]


def in_batches(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    """Return `texts` in lists, each closed by the text that reaches `size` characters."""
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
    """Load the tokenizer at `path`: a file, or a folder with tokenizer.json or tokenizer.model.

    The content tells the format, not the name: Llama 2 and Llama 3 call different things
    tokenizer.model.

    Raises:
        UserError: nothing there, an unknown format, damaged, or without EOS.
    """
    file = _find_file(path)
    name = str(file)
    with user_errors(f"cannot read model.tokenizer_path = {name!r}", OSError):
        content = file.read_bytes()
    if not content:
        raise UserError(f"tokenizer {name!r} is an empty file")
    if content.startswith(b"version https://git-lfs"):
        raise UserError(
            f"tokenizer {name!r} is a Git LFS pointer, not the file itself: run `git lfs pull` in "
            "its repository"
        )
    if re.match(rb"[A-Za-z0-9+/]+=* [0-9]+\r?\n", content):
        raise UserError(
            f"tokenizer {name!r} is in tiktoken format (as Llama 3's original tokenizer.model), "
            "which does not say how text is split. Give the tokenizer.json of the same model's "
            "Hugging Face repository instead"
        )
    if content.lstrip().startswith(b"{"):
        return HuggingFaceTokenizer(content, file)
    return SentencePieceTokenizer(content, name)


def _find_file(path: str | Path) -> Path:
    given = f"model.tokenizer_path = {str(path)!r}"
    file = expand_user(path)
    if file.is_dir():
        for name in ("tokenizer.json", "tokenizer.model"):
            if (file / name).is_file():
                return file / name
        raise UserError(f"{given} is a folder without tokenizer.json or tokenizer.model")
    if not file.exists():
        raise UserError(
            f"{given} does not exist (looked from {Path.cwd()}): give the path of a tokenizer.json "
            "or tokenizer.model, or of its folder; a name on the Hub is not downloaded"
        )
    if not file.is_file():
        raise UserError(f"{given} is neither a file nor a folder")
    return file
