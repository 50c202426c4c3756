"""A tokenizer's files as `AutoTokenizer.from_pretrained` of transformers loads them.

A document's tokens begin with BOS in training; so do those of a text there.

Source: https://huggingface.co/docs/transformers/main_classes/tokenizer.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from torchtrain.datasets.tokenizer import Tokenizer, load_tokenizer
from torchtrain.datasets.tokenizer_formats import HuggingFaceTokenizer
from torchtrain.utils import expand_user

JSON, MODEL, CONFIG = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
KEPT = (CONFIG, "special_tokens_map.json", "added_tokens.json", "chat_template.jinja")
"""Files beside a tokenizer.json that are taken as they are."""


def write_tokenizer(source: Path, folder: Path, *, model_max_length: int) -> None:
    """Write the files of a tokenizer into a folder.

    Args:
        source: its file or folder, as `model.tokenizer_path` takes it.
        folder: is there.
        model_max_length: tokens of the longest sequence that the model was trained on.

    Raises:
        UserError: as `load_tokenizer`.
    """
    tokenizer = load_tokenizer(source)
    file = expand_user(source)
    if file.is_dir():
        file = file / (JSON if (file / JSON).is_file() else MODEL)
    if isinstance(tokenizer, HuggingFaceTokenizer):
        config = _write_json(tokenizer, file, folder)
    else:
        shutil.copyfile(file, folder / MODEL)
        config = _describe_sentencepiece(file)
    config["model_max_length"] = model_max_length
    text = json.dumps(config, indent=2, ensure_ascii=False)
    (folder / CONFIG).write_text(text + "\n", encoding="utf-8")


def _write_json(tokenizer: Tokenizer, file: Path, folder: Path) -> dict[str, Any]:
    """Write tokenizer.json, with BOS before each text, and what is beside it; return the config."""
    import tokenizers
    from tokenizers.processors import Sequence, TemplateProcessing

    for name in KEPT:
        if (file.parent / name).is_file():
            shutil.copyfile(file.parent / name, folder / name)
    model = tokenizers.Tokenizer.from_file(str(file))
    bos = model.id_to_token(tokenizer.bos_id)
    eos = model.id_to_token(tokenizer.eos_id)
    if tokenizer.bos_id not in model.encode("a").ids:
        template = TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_id)]
        )
        before = model.post_processor
        model.post_processor = template if before is None else Sequence([before, template])
        model.save(str(folder / JSON))
    else:
        shutil.copyfile(file, folder / JSON)
    if (folder / CONFIG).is_file():
        config: dict[str, Any] = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    else:
        config = {"tokenizer_class": "PreTrainedTokenizerFast"}
        config["clean_up_tokenization_spaces"] = False
    return config | {"bos_token": bos, "eos_token": eos}


def _describe_sentencepiece(file: Path) -> dict[str, Any]:
    """Return the tokenizer_config.json of a SentencePiece model."""
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(file))
    # Whether the model puts a space before a text shows in what it makes of one.
    adds_space = model.encode("a", out_type=str)[0].startswith("\u2581")
    return {
        "tokenizer_class": "LlamaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": adds_space,
        "bos_token": model.id_to_piece(model.bos_id()),
        "eos_token": model.id_to_piece(model.eos_id()),
        "unk_token": model.id_to_piece(model.unk_id()),
        "clean_up_tokenization_spaces": False,
        "legacy": False,
    }
