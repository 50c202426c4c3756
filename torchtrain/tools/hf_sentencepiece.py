"""A SentencePiece model as Hugging Face's tokenizer.json, with equal ids.

The usual conversion writes a space as U+2581, as the model does, so that a U+2581 of the text is
read as a space. Here the vocabulary has spaces: a U+2581 of the text is a character like any other
and, as in training, is spelled in bytes.

What stays different, beside the text of an unknown token:

- a model with a rule of normalization (nmt_nfkc; Llama's have none): a character of several letters
  (decomposed Hangul), or with combining marks and a zero-width joiner, is not composed;
- a unigram model: of two ways to cut a text that are equally likely, such as the place of a pair
  in three equal characters, rounding may choose the other one; without byte fallback, a name such
  as `<s>` in the text may become one unknown token more;
- a BPE with pieces defined by the user that adds a space before a text: here also after such a
  piece.
"""

import re
from typing import TYPE_CHECKING, Any

from torchtrain.datasets.tokenizer import SPACE_MARK
from torchtrain.errors import UserError

if TYPE_CHECKING:
    import tokenizers

UNIGRAM, BPE, CHARACTERS = 1, 2, 4
"""Types of a model; `CHARACTERS` is BPE without merges."""
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
"""Types of a piece. The numbers are of sentencepiece_model.proto."""


def convert_sentencepiece(content: bytes, name: str) -> "tokenizers.Tokenizer":
    """Return the tokenizer of a SentencePiece model, without a post-processor.

    Args:
        content: the model file's bytes.
        name: its name in messages.

    Raises:
        UserError: a type of model that `tokenizers` does not have.
    """
    import tokenizers
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import decoders, normalizers, pre_tokenizers

    proto = sentencepiece_model_pb2.ModelProto.FromString(content)  # type: ignore[attr-defined]
    kind = proto.trainer_spec.model_type
    if kind not in (UNIGRAM, BPE, CHARACTERS):
        raise UserError(
            f"tokenizer {name!r} is a SentencePiece model of words, which Hugging Face's "
            "tokenizers cannot be. Supported: BPE, unigram and characters"
        )
    converted = tokenizers.Tokenizer(_make_unigram(proto) if kind == UNIGRAM else _make_bpe(proto))
    steps = _list_normalizers(proto)
    if steps:
        converted.normalizer = normalizers.Sequence(steps)
    cuts = _list_cuts(proto)
    if cuts:
        converted.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    decoder: list[Any] = [decoders.ByteFallback(), decoders.Fuse()]
    dropped = _count_dropped_spaces(proto.normalizer_spec)
    if dropped:
        decoder.append(decoders.Strip(" ", dropped, 0))
    converted.decoder = decoders.Sequence(decoder)
    # Tokens of the vocabulary, so the ids stay.
    for piece in proto.pieces:
        is_special = piece.type in (UNKNOWN, CONTROL)
        if is_special or (piece.type == USER_DEFINED and kind != UNIGRAM):
            token = tokenizers.AddedToken(_spell(piece), normalized=False, special=is_special)
            converted.add_tokens([token])
    return converted


def _spell(piece: Any) -> str:
    """Return a piece as the vocabulary has it: names as they are, text with its spaces."""
    is_text = piece.type in (NORMAL, USER_DEFINED, UNUSED)
    return piece.piece.replace(SPACE_MARK, " ") if is_text else piece.piece


def _list_normalizers(proto: Any) -> list[Any]:
    """Return what SentencePiece does to a text before it is cut into pieces, in its order."""
    from tokenizers import Regex
    from tokenizers.normalizers import Precompiled, Prepend, Replace

    spec = proto.normalizer_spec
    spells_mark = proto.trainer_spec.byte_fallback and not spec.add_dummy_prefix
    steps: list[Any] = []
    if spec.precompiled_charsmap:
        steps.append(Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        ends = rf"\A +|[ {SPACE_MARK}]+\z"
        if spells_mark:  # what is on its sides is encoded by itself
            ends = rf"\A +| +\z|(?<={SPACE_MARK}) +| +(?={SPACE_MARK})"
        steps += [Replace(Regex(ends), ""), Replace(Regex(" {2,}"), " ")]
    if not spells_mark:  # to such a model it is a space
        steps.append(Replace(SPACE_MARK, " "))
    if spec.add_dummy_prefix:
        steps.append(Prepend(" "))
    return steps


def _count_dropped_spaces(spec: Any) -> int:
    """Return how many spaces at most are dropped before the text of tokens."""
    if spec.remove_extra_whitespaces:
        return 1 << 16
    return int(spec.add_dummy_prefix)


def _make_bpe(proto: Any) -> Any:
    """Return a BPE whose merges are all that make a piece of two, the best piece first."""
    from tokenizers.models import BPE as Model

    vocabulary = {_spell(piece): id_ for id_, piece in enumerate(proto.pieces)}
    scores = {_spell(piece): piece.score for piece in proto.pieces if piece.type == NORMAL}
    merges = []
    for text, score in scores.items():
        for cut in range(1, len(text)):
            pair = text[:cut], text[cut:]
            if pair[0] in scores and pair[1] in scores:
                merges.append((-score, vocabulary[pair[0]], vocabulary[pair[1]], pair))
    return Model(
        vocabulary,
        [pair for *_, pair in sorted(merges)],
        unk_token=proto.trainer_spec.unk_piece,
        fuse_unk=True,
        byte_fallback=proto.trainer_spec.byte_fallback,
    )


def _make_unigram(proto: Any) -> Any:
    """Return a unigram model in which no text of known characters is read as a special name.

    There every entry of the vocabulary can match, names like `<s>` and `<0x41>` too: their score is
    below that of the same text in single characters.
    """
    from tokenizers.models import Unigram

    scores = [piece.score for piece in proto.pieces if piece.type == NORMAL]
    longest = max(len(piece.piece) for piece in proto.pieces)
    below = min(-1.0, *scores) * (longest + 1)
    entries = []
    for piece in proto.pieces:
        score = piece.score if piece.type == NORMAL else below
        if piece.type == USER_DEFINED:  # as SentencePiece counts them
            score = max(scores) * len(piece.piece.encode()) - 0.1
        entries.append((_spell(piece), score))
    unknown = next(id_ for id_, piece in enumerate(proto.pieces) if piece.type == UNKNOWN)
    return Unigram(entries, unknown, proto.trainer_spec.byte_fallback)


def _list_cuts(proto: Any) -> list[Any]:
    """Return what cuts a text where it changes no ids.

    It is cut before a space after another character, if no piece has both: words are fast, whole
    texts are not. A unigram model also cuts names of unknown characters (`<s>`) at the first of
    those, which is by itself in any case.
    """
    from tokenizers import Regex
    from tokenizers.pre_tokenizers import Split

    texts = {_spell(piece) for piece in proto.pieces if piece.type in (NORMAL, USER_DEFINED)}
    cuts = []
    if not any(re.search("[^ ] ", text) for text in texts):
        cuts.append(Split(Regex("(?<=[^ ]) "), "merged_with_next"))
    patterns = []
    for piece in proto.pieces:
        name = piece.piece
        strange = [at for at, character in enumerate(name) if character not in texts]
        if piece.type in (UNKNOWN, CONTROL, BYTE) and strange:
            at = strange[0]
            before, here, after = map(re.escape, (name[:at], name[at], name[at + 1 :]))
            patterns.append(f"(?<={before}){here}(?={after})")
    if patterns and proto.trainer_spec.model_type == UNIGRAM:
        cuts.append(Split(Regex("|".join(patterns)), "isolated"))
    return cuts
