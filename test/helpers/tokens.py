"""Texts as ids and back, one at a time, as tests want them."""

from collections.abc import Sequence


def encode(tokenizer, text: str) -> list[int]:
    """Return the ids of `text`, without BOS and EOS."""
    return tokenizer.encode_batch([text])[0].tolist()


def decode(tokenizer, ids: Sequence[int]) -> str:
    """Return the text of `ids`; BOS and EOS have none."""
    return tokenizer._model.decode([int(id_) for id_ in ids])
