"""Special tokens of a tokenizer.json: which they are, and that no text can spell one.

A vocabulary lists the names of special tokens beside the pieces of text, and not every kind of
model tells them apart: a Unigram, a WordLevel, a WordPiece and a BPE with ignore_merges take a
`</s>` in a web page for the end of the document. What encodes texts therefore knows these tokens by
names that no text has, with the same ids, so that such a text is cut into other pieces, as
SentencePiece does. A token that stands for a byte must keep its name, `<0x41>`, by which the model
finds it: a text that spells it is cut behind its first character.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torchtrain.errors import UserError

WELL_KNOWN = (
    ("<|begin_of_text|>", "<|end_of_text|>"),
    ("<s>", "</s>"),
    ("<bos>", "<eos>"),
    ("<|endoftext|>", "<|endoftext|>"),
)
"""BOS and EOS of Llama 3, of Llama 2 and Mistral, of Gemma, of GPT-2 and OLMo."""

BYTE = re.compile("<0x[0-9A-F]{2}>")
"""The name of the token of a byte, in a vocabulary with bytes to fall back on."""
CUT_OF_BYTES = {
    "type": "Split",
    "pattern": {"Regex": "<(?=0x[0-9A-F]{2}>)"},
    "behavior": "MergedWithPrevious",
    "invert": False,
}
"""Cuts a text that spells one behind the first character (a step before the model)."""

SPECIAL_KEYS = ("bos_token", "eos_token")
OTHER_SPECIAL_KEYS = ("unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def separator_names(
    file: Path, given: dict[str, str], known: dict[str, int]
) -> tuple[str | None, str]:
    """Return what the files beside `file` call BOS and EOS, else the first well-known pair.

    BOS is None where they name EOS alone, as Qwen2's.
    """
    if not given:
        for bos, eos in WELL_KNOWN:
            if bos in known and eos in known:
                return bos, eos
    needed = SPECIAL_KEYS if "bos_token" in given or not given else ("eos_token",)
    unknown = [f"{key} = {given.get(key)!r}" for key in needed if given.get(key) not in known]
    if unknown:
        config = str(file.with_name("tokenizer_config.json"))
        raise UserError(
            f"tokenizer {str(file)!r} and the files beside it do not say what separates "
            f"documents: {', '.join(unknown)} is not in its vocabulary. Name tokens in "
            f'{config!r}: {{"bos_token": "…", "eos_token": "…"}}; they may be the same, and the '
            "first null"
        )
    return given.get("bos_token"), given["eos_token"]


def read_beside(file: Path) -> tuple[dict[str, str], list[Any], set[str]]:
    """Return what the files beside `file` say: BOS and EOS, tokens, and names of special tokens.

    BOS and EOS are under the keys bos_token and eos_token; the tokens (AddedToken) are in the order
    of the ids that the files give them.
    """
    from tokenizers import AddedToken

    given: dict[str, str] = {}
    added: list[Any] = []
    special: set[str] = set()
    # The latter counts where they differ.
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        beside = file.with_name(name)
        try:
            settings = json.loads(beside.read_bytes()) if beside.is_file() else {}
            tokens = settings.get("added_tokens_decoder") or {}
            added += [AddedToken(**tokens[id_]) for id_ in sorted(tokens, key=int)]
            for key in SPECIAL_KEYS:
                if token := settings.get(key):
                    given[key] = _content(token)
            named = [settings.get(key) for key in OTHER_SPECIAL_KEYS]
            named += settings.get("additional_special_tokens") or []
            special |= {_content(token) for token in named if token}
        except (OSError, ValueError, TypeError, AttributeError, LookupError) as error:
            raise UserError(
                f"{str(beside)!r}, which names BOS and EOS, cannot be read: {error!r}"
            ) from error
    return given, added, special


def _content(token: Any) -> str:
    return str(token["content"] if isinstance(token, dict) else token)


def find_spellable(settings: dict[str, Any], names: Iterable[str]) -> set[str]:
    """Return those of the special tokens `names` that the model would make of text.

    Args:
        settings: the content of a tokenizer.json.
        names: of special tokens, beside those that `settings` and its model say.
    """
    model = settings["model"]
    special = {token["content"] for token in settings["added_tokens"] if token["special"]}
    special |= {name for name in names if len(name) > 1}  # a "!" that pads is text as well
    if model["type"] == "Unigram":
        if model["unk_id"] is not None:
            special.add(model["vocab"][model["unk_id"]][0])
    elif model["type"] == "BPE":
        special |= {model["unk_token"]} - {None}
    else:
        special -= {model["unk_token"]}  # else it is unknown anyway
    return _made_of_text(model, special)


def spells_bytes(settings: dict[str, Any]) -> bool:
    """Return whether a text that spells the token of a byte would become it."""
    model = settings["model"]
    if "ByteFallback" not in json.dumps(settings["decoder"]) and not model.get("byte_fallback"):
        return False
    found = {token["content"] for token in settings["added_tokens"] if not token["special"]}
    found |= _made_of_text(model, {name for name in _vocabulary(model) if BYTE.fullmatch(name)})
    return any(BYTE.fullmatch(name) for name in found)


def _vocabulary(model: dict[str, Any]) -> set[str]:
    """Return the names of a model's tokens."""
    if model["type"] == "Unigram":
        return {piece for piece, _ in model["vocab"]}
    return set(model["vocab"])


def _made_of_text(model: dict[str, Any], names: set[str]) -> set[str]:
    """Return those of `names` that the model makes of a text that has them."""
    names = names & _vocabulary(model)
    if model["type"] != "BPE" or model["ignore_merges"]:
        return names
    merged = {_join(merge, model) for merge in model["merges"]}
    return {name for name in names if len(name) == 1 or name in merged}


def find_unknown(settings: dict[str, Any]) -> int | None:
    """Return the id that stands for text that the model of a tokenizer.json does not know."""
    model = settings["model"]
    if model["type"] == "Unigram":
        unknown: int | None = model["unk_id"]
        return unknown
    found: int | None = model["vocab"].get(model["unk_token"])
    return found


def knows_all(settings: dict[str, Any]) -> bool:
    """Return whether no text is unknown to the model, since it has a token for every byte."""
    steps = json.dumps([settings["pre_tokenizer"], settings["normalizer"]])
    if "ByteLevel" in steps:
        from tokenizers.pre_tokenizers import ByteLevel

        names = set(ByteLevel.alphabet())
    elif settings["model"].get("byte_fallback"):
        names = {f"<0x{byte:02X}>" for byte in range(256)}
    else:
        return False
    return names <= _vocabulary(settings["model"])


def can_decode(settings: dict[str, Any]) -> bool:
    """Return whether the characters of a text come back, where the vocabulary has bytes too."""
    has_bytes = "ByteLevel" in json.dumps(settings["pre_tokenizer"])
    has_bytes |= settings["model"].get("byte_fallback", False)
    return settings["decoder"] is not None or not has_bytes


def hide(
    settings: dict[str, Any], names: set[str], prefix: str, *, cuts_bytes: bool
) -> dict[str, Any]:
    """Return `settings` with `names` called otherwise, by names that begin with `prefix`.

    Ids stay. Merges that make such a token, or that it is a part of, are left out. With
    `cuts_bytes`, no text becomes the token of a byte by its spelling.
    """
    model = dict(settings["model"])

    def renamed(name: Any) -> Any:
        return f"{prefix} {name}" if name in names else name

    if model["type"] == "Unigram":
        model["vocab"] = [[renamed(piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {renamed(piece): id_ for piece, id_ in model["vocab"].items()}
        model["unk_token"] = renamed(model["unk_token"])
    if model["type"] == "BPE":
        model["merges"] = [
            merge for merge in model["merges"] if not names & {_join(merge, model), *_parts(merge)}
        ]
    added = [token | {"content": renamed(token["content"])} for token in settings["added_tokens"]]
    settings = settings | {"model": model, "added_tokens": added, "post_processor": None}
    return _cut_bytes(settings) if cuts_bytes else settings


def _cut_bytes(settings: dict[str, Any]) -> dict[str, Any]:
    """Return `settings` by which a text that spells the token of a byte is cut into other pieces.

    Tokens of bytes that are added ones too, which are found in a text before anything else, are
    left to the model.
    """
    in_model = {name for name in _vocabulary(settings["model"]) if BYTE.fullmatch(name)}
    added = [token for token in settings["added_tokens"] if token["content"] not in in_model]
    steps = [step for step in (settings["pre_tokenizer"], CUT_OF_BYTES) if step is not None]
    cut = {"type": "Sequence", "pretokenizers": steps}
    return settings | {"added_tokens": added, "pre_tokenizer": cut}


def _parts(merge: str | list[str]) -> list[str]:
    """Return the two pieces of a merge, which older files have as one string."""
    return merge.split(" ") if isinstance(merge, str) else merge


def _join(merge: str | list[str], model: dict[str, Any]) -> str:
    """Return the piece that a merge makes."""
    first, second = _parts(merge)
    return first + second.removeprefix(model["continuing_subword_prefix"] or "")
