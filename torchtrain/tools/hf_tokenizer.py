"""A tokenizer's files as `AutoTokenizer.from_pretrained` of transformers loads them.

Ids are those of training: what looks like a special token in a text is text, unless there is a chat
template, which writes such tokens. A document's tokens begin with BOS, if there is one; so do those
of a text there.

Source: https://huggingface.co/docs/transformers/main_classes/tokenizer.
"""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchtrain.datasets.special_tokens import OTHER_SPECIAL_KEYS, SPECIAL_KEYS, read_beside
from torchtrain.datasets.tokenizer import (
    HuggingFaceTokenizer,
    Tokenizer,
    begin_document,
    load_tokenizer,
)
from torchtrain.logging_utils import logger
from torchtrain.tools.hf_sentencepiece import convert_sentencepiece
from torchtrain.utils import expand_user, user_errors

if TYPE_CHECKING:
    import tokenizers

JSON, MODEL, CONFIG = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
SPECIAL_MAP, TEMPLATE = "special_tokens_map.json", "chat_template.jinja"
DROPPED = ("added_tokens_decoder", "auto_map", "tokenizer_file", "legacy")
"""What says again, or otherwise, what tokenizer.json has, or names code."""
PROBES = (
    "",
    " two  spaces and a tail ",
    "\t\r\n\n line\x00\x1b",
    "<s>a</s><unk><0x41>",
    "x\u2581y \u2581",
    "漢字 e\u0301 \u0645\u0631 🙂\u200d",
    "def f(x1):\n        return 3.14159",
)
"""Texts of which a converted tokenizer makes the same ids."""


def write_tokenizer(source: Path, folder: Path, *, model_max_length: int | None = None) -> None:
    """Write the files of a tokenizer into a folder: ids there are those of training.

    tokenizer.json is as it was given, if it begins a text as a document does, or made from a
    SentencePiece model, which is beside it for what reads that. What tokenizer_config.json says
    beside `source` stays (a chat template too), but for what would change ids or text.

    Args:
        source: its file or folder, as `model.tokenizer_path` takes it.
        folder: is there.
        model_max_length: tokens of the longest sequence that the model was trained on; None: as
            the config beside `source` says.

    Raises:
        UserError: as `load_tokenizer`; a SentencePiece model of words; a damaged file beside it.
    """
    from sentencepiece import SentencePieceProcessor

    tokenizer = load_tokenizer(source)
    file = expand_user(source)
    if file.is_dir():
        file = file / (JSON if (file / JSON).is_file() else MODEL)
    config = _read(file.with_name(SPECIAL_MAP)) | _read(file.with_name(CONFIG))
    if file.with_name(TEMPLATE).is_file():
        shutil.copyfile(file.with_name(TEMPLATE), folder / TEMPLATE)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        made = _write_json(tokenizer, file, folder)
        model = file.with_name(MODEL)
    else:
        made = _convert(tokenizer, file, folder)
        unknown = SentencePieceProcessor(model_file=str(file)).unk_id()
        config["unk_token"] = made.id_to_token(unknown)
        model = file
    if model.is_file() and model.name != JSON:
        shutil.copyfile(model, folder / MODEL)
    if not (config.get("chat_template") or (folder / TEMPLATE).is_file()):
        config["split_special_tokens"] = True
    config = _keep_right(config, made.get_vocab()) | _describe(made, tokenizer)
    if model_max_length is not None:
        config["model_max_length"] = model_max_length
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def _read(file: Path) -> dict[str, Any]:
    """Return an object of JSON; nothing if there is no such file."""
    if not file.is_file():
        return {}
    with user_errors(f"{str(file)!r} cannot be read", OSError, ValueError, TypeError):
        return dict(json.loads(file.read_text(encoding="utf-8")))


def _write_json(
    tokenizer: HuggingFaceTokenizer, file: Path, folder: Path
) -> "tokenizers.Tokenizer":
    """Write tokenizer.json with all tokens, and BOS, if any, before a text; return what it has."""
    import tokenizers

    made = tokenizers.Tokenizer.from_file(str(file))
    size = made.get_vocab_size()
    _, added, _ = read_beside(file)
    made.add_tokens([token for token in added if made.token_to_id(token.content) is None])
    ids = made.encode("a", add_special_tokens=False).ids
    begins = made.encode("a").ids == [*begin_document(tokenizer), *ids]
    if begins and made.get_vocab_size() == size:
        shutil.copyfile(file, folder / JSON)
    else:
        _begin_as_document(made, tokenizer)
        made.save(str(folder / JSON))
    _warn_where_ids_differ(tokenizer, made, file, folder)
    return made


def _convert(tokenizer: Tokenizer, file: Path, folder: Path) -> "tokenizers.Tokenizer":
    """Write tokenizer.json of a SentencePiece model; return what it has."""
    made = convert_sentencepiece(file.read_bytes(), str(file))
    _begin_as_document(made, tokenizer)
    made.save(str(folder / JSON))
    _warn_where_ids_differ(tokenizer, made, file, folder)
    return made


def _warn_where_ids_differ(
    tokenizer: Tokenizer, made: "tokenizers.Tokenizer", file: Path, folder: Path
) -> None:
    """Show a text, if there is one, of which what was written makes other ids than training."""
    made.encode_special_tokens = True
    for text in [*PROBES, f"a {made.id_to_token(tokenizer.eos_id)} b"]:
        ids = tokenizer.encode_batch([text])[0].tolist()
        theirs = made.encode(text, add_special_tokens=False).ids
        if ids != theirs:
            logger.warning(
                f"tokenizer {str(file)!r} does what Hugging Face's tokenizers cannot: in "
                f"{str(folder)!r}, {text!r} becomes the ids {theirs}, not {ids} as in training"
            )
            break


def _begin_as_document(made: "tokenizers.Tokenizer", tokenizer: Tokenizer) -> None:
    from tokenizers.processors import TemplateProcessing

    special_tokens = [(made.id_to_token(id_), id_) for id_ in begin_document(tokenizer)]
    begin = [token for token, _ in special_tokens]
    made.post_processor = TemplateProcessing(
        single=[*begin, "$A"], pair=[*begin, "$A", *begin, "$B"], special_tokens=special_tokens
    )


def _keep_right(config: dict[str, Any], vocabulary: dict[str, int]) -> dict[str, Any]:
    """Return what is kept of a tokenizer_config.json: no token that the model has no row for."""

    def is_known(token: Any) -> bool:
        return (token["content"] if isinstance(token, dict) else token) in vocabulary

    kept = {key: value for key, value in config.items() if key not in DROPPED}
    for key in OTHER_SPECIAL_KEYS:
        if key in kept and not (kept[key] and is_known(kept[key])):
            del kept[key]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        if isinstance(kept.get(key), list):
            kept[key] = [token for token in kept[key] if is_known(token)]
    return kept


def _describe(made: "tokenizers.Tokenizer", tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what must be in tokenizer_config.json for these ids and this text.

    The class takes tokenizer.json as it is; those of a model build it anew by their own rules.
    """
    settings = json.loads(made.to_str())
    pre_tokenizer = settings["pre_tokenizer"] or {}
    normalizers = (settings["normalizer"] or {}).get("normalizers", [])
    adds_space = any(step["type"] == "Prepend" for step in normalizers)
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": tokenizer.bos_id is not None,
        "add_eos_token": False,
        "add_prefix_space": pre_tokenizer.get("add_prefix_space", adds_space),
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
    }
    for key, id_ in zip(SPECIAL_KEYS, (tokenizer.bos_id, tokenizer.eos_id), strict=True):
        described[key] = None if id_ is None else made.id_to_token(id_)
    return described
