"""transformers makes the same ids of every text, and the same text of them."""

import io
import json
import logging
import random
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from helpers.tokens import encode
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from torchtrain.config.plans import DEBUG_TOKENIZER
from torchtrain.datasets.tokenizer import begin_document, load_tokenizer
from torchtrain.errors import UserError
from torchtrain.tools import hf_tokenizer
from torchtrain.tools.hf_tokenizer import write_tokenizer

CODE = Path(__file__).read_text(encoding="utf-8")
HOSTILE = [
    "",
    " ",
    "  leading, trailing  ",
    " " * 300 + "x" + " " * 77,
    "\n",
    "\n\n\r\n\r line\r\n",
    "\t\tx\t",
    "\0",
    "a\0b\x01\x1b\x7f\x85",
    "\x0b\x0c\x1c\u2028\u2029",
    "\u2581",
    "a\u2581b \u2581\u2581 \u2581 ",
    "<s>",
    "a</s> <s>b<unk><pad><mask>",
    "<|endoftext|><|begin_of_text|>a<|end_of_text|>",
    "<0x41><0xE2><0x96><0x81>",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f3f3\ufe0f",
    "e\u0301 \u00e9 \u1112\u1161\u11ab \ufb01 a\u0300\u0301\u0302",
    "漢字かな交じり文",
    "العربية עברית हिन्दी",
    "\u00a0\u3000\u200b\u200e\u202e\ufeff",
    "\ufffd\ufffe\uffff\U0010ffff",
    "a" * 3000,
    "abcdefghij" * 200,
    "0123456789 3.14159 1e-5 1,000,000",
    "it's we'll I'D don't",
    "def f(x):\n    return x ** 2  # square\n",
    CODE[:3000],
]


def random_texts(count=150):
    """Texts of what is likely to be cut otherwise."""
    parts = [*"ab <>/s01x_\n\t\u2581", "  ", "    ", "<s>", "</s>", "<0x41>", "e\u0301", "漢", "🙂"]
    draw = random.Random(1)
    return ["".join(draw.choices(parts, k=draw.randint(1, 30))) for _ in range(count)]


TEXTS = [*HOSTILE, *random_texts()]


def sentencepiece_model(path, **options):
    """A model of this file, Llama 2's options by default."""
    content = io.BytesIO()
    llama2 = {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
        "vocab_size": 450,
        "model_type": "bpe",
    }
    lines = [line for line in CODE.splitlines() if line]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=content, minloglevel=2, **(llama2 | options)
    )
    path.write_bytes(content.getvalue())
    return path


def byte_level(folder, *special, split=False, **beside):
    """A byte-level BPE, with Llama 3's way to split words if asked for, in a folder."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split)
    if split:
        pattern = r"(?i:'s|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|\s*[\r\n]+|\s+(?!\S)|\s+|.+?"
        isolate = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
        made.pre_tokenizer = pre_tokenizers.Sequence([isolate, made.pre_tokenizer])
    made.decoder = decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=list(special),
        show_progress=False,
    )
    made.train_from_iterator([CODE], trainer)
    return save(made, folder, **beside)


def save(made, folder, **beside):
    folder.mkdir(exist_ok=True, parents=True)
    made.save(str(folder / "tokenizer.json"))
    for name, content in beside.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def gpt2(folder):
    """One token is BOS and EOS; a space comes before each text."""
    byte_level(folder, "<|endoftext|>")
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    config = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": False}
    return save(made, folder, tokenizer_config=config)


def llama3(folder):
    return byte_level(folder, "<|begin_of_text|>", "<|end_of_text|>", split=True)


def qwen2(folder):
    """Without BOS, and with a template that would put EOS before a text."""
    config = {"bos_token": None, "eos_token": "<|endoftext|>", "add_bos_token": False}
    byte_level(folder, "<|endoftext|>", split=True, tokenizer_config=config)
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    return save(made, folder)


def llama2(folder):
    """As Llama 2's tokenizer.json, whose class transformers 5 would build anew, and otherwise."""
    vocabulary = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary += ["\u2581", "a", "b", "\u2581a", "\u2581\u2581", "ab"]
    made = tokenizers.Tokenizer(
        models.BPE(
            {text: id_ for id_, text in enumerate(vocabulary)},
            [("\u2581", "a"), ("\u2581", "\u2581"), ("a", "b")],
            unk_token="<unk>",
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    made.normalizer = normalizers.Sequence(steps)
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True}
    return save(made, folder, tokenizer_config=config)


def word_level(folder):
    made = tokenizers.Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "?": 2}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.add_special_tokens(["<s>"])
    return save(made, folder, tokenizer_config={"bos_token": "<s>", "eos_token": "<s>"})


def unigram(folder):
    pieces = [("<unk>", 0.0), ("<s>", -9.0), ("</s>", -9.0)]
    pieces += [(character, -3.0 - ord(character) / 99) for character in sorted(set(CODE))]
    made = tokenizers.Tokenizer(models.Unigram([*pieces, ("def ", -3.0)], 0, False))
    made.add_special_tokens(["<s>", "</s>"])
    return save(made, folder)


def torchtitan(folder):
    """As torchtitan's own: BOS, EOS are in the config alone, with other ids, and a pad in none."""
    token = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    names = {"128000": "<|begin_of_text|>", "128001": "<|end_of_text|>"}
    config = {
        "added_tokens_decoder": {
            id_: {"content": name, "special": True, **token} for id_, name in names.items()
        },
        "bos_token": names["128000"],
        "eos_token": names["128001"],
        "pad_token": "<|pad|>",
        "clean_up_tokenization_spaces": True,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    return byte_level(folder, "<|endoftext|>", "<|image|>", tokenizer_config=config)


SOURCES = {
    "debug": lambda folder: DEBUG_TOKENIZER,
    "sentencepiece llama2": lambda folder: sentencepiece_model(folder / "t.model"),
    "sentencepiece no prefix": lambda folder: sentencepiece_model(
        folder / "t.model", add_dummy_prefix=False, allow_whitespace_only_pieces=True
    ),
    "sentencepiece unigram": lambda folder: sentencepiece_model(
        folder / "t.model", model_type="unigram", hard_vocab_limit=False
    ),
    "sentencepiece unigram, no prefix": lambda folder: sentencepiece_model(
        folder / "t.model", model_type="unigram", add_dummy_prefix=False, vocab_size=400
    ),
    "sentencepiece with user's pieces": lambda folder: sentencepiece_model(
        folder / "t.model", add_dummy_prefix=False, user_defined_symbols=["<mask>", "\n", "aa"]
    ),
    "sentencepiece that trims": lambda folder: sentencepiece_model(
        folder / "t.model", remove_extra_whitespaces=True
    ),
    "sentencepiece that trims, no prefix": lambda folder: sentencepiece_model(
        folder / "t.model", remove_extra_whitespaces=True, add_dummy_prefix=False
    ),
    "llama3": llama3,
    "llama2": llama2,
    "qwen2": qwen2,
    "sentencepiece without BOS": lambda folder: sentencepiece_model(
        folder / "t.model", bos_id=-1, eos_id=1
    ),
    "gpt2": gpt2,
    "torchtitan": torchtitan,
    "word level": word_level,
    "unigram": unigram,
}


def reload(source, folder, **options):
    """What transformers loads of what is written."""
    from transformers import AutoTokenizer

    folder.mkdir()
    write_tokenizer(source, folder, **options)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module", params=SOURCES)
def pair(request, tmp_path_factory):
    """Our tokenizer, and transformers' of what was written of it."""
    folder = tmp_path_factory.mktemp("source")
    source = SOURCES[request.param](folder)
    return load_tokenizer(source), reload(source, folder / "written", model_max_length=77)


def test_both_make_the_same_ids_of_every_text_and_the_same_text_of_them(pair):
    ours, theirs = pair
    for text in TEXTS:
        if has_spellable_names(ours) and any(name in text for name in ("<s>", "</s>", "<unk>")):
            continue  # see test_a_unigram_there_reads_special_tokens_in_a_text
        ids = encode(ours, text)
        assert theirs(text, add_special_tokens=False).input_ids == ids, ascii(text)
        assert theirs(text).input_ids == [*begin_document(ours), *ids], ascii(text)
        assert theirs.decode(ids, skip_special_tokens=True) == ours.decode(ids), ascii(text)
        if not set(ids) & set(theirs.all_special_ids):
            assert theirs.decode(ids) == ours.decode(ids), ascii(text)
    document = [*begin_document(ours), *ids, ours.eos_id]
    assert theirs.decode(document, skip_special_tokens=True) == ours.decode(document)


def has_spellable_names(tokenizer):
    """Whether transformers' tokenizer reads special tokens in a text."""
    return getattr(tokenizer, "_encoder", None) is not getattr(tokenizer, "_model", None)


def test_a_unigram_there_reads_special_tokens_in_a_text(tmp_path, monkeypatch):
    source = unigram(tmp_path / "source")
    said = []
    monkeypatch.setattr(hf_tokenizer.logger, "warning", said.append)
    ours, theirs = load_tokenizer(source), reload(source, tmp_path / "hf")
    assert 2 in theirs("a</s>", add_special_tokens=False).input_ids
    assert 2 not in encode(ours, "a</s>")
    (warning,) = said
    assert "</s>" in warning
    assert "as in training" in warning


def test_what_generation_and_evaluation_need_is_there(pair):
    ours, theirs = pair
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    assert len(theirs) == ours.vocab_size, "no token without a row of the embedding"
    assert theirs.model_max_length == 77
    assert set(theirs("a")) == {"input_ids", "attention_mask"}, "what a model's forward takes"
    assert theirs.is_fast


def test_what_was_written_is_read_back_with_the_same_ids(tmp_path):
    for number, source in enumerate([DEBUG_TOKENIZER, torchtitan(tmp_path / "torchtitan")]):
        folder = tmp_path / str(number)
        folder.mkdir()
        write_tokenizer(source, folder)
        before, after = load_tokenizer(source), load_tokenizer(folder)
        assert (after.bos_id, after.eos_id) == (before.bos_id, before.eos_id)
        assert after.vocab_size == before.vocab_size
        for text in TEXTS:
            assert encode(after, text) == encode(before, text)
        assert after.token_bytes().tolist()[3:] == before.token_bytes().tolist()[3:]


@pytest.mark.parametrize("model_type", ["llama", "mixtral", "qwen3", "qwen3_moe"])
def test_a_config_of_the_model_beside_it_changes_nothing(model_type, tmp_path):
    from transformers import AutoTokenizer

    ours, theirs = load_tokenizer(DEBUG_TOKENIZER), reload(DEBUG_TOKENIZER, tmp_path / "hf")
    (tmp_path / "hf/config.json").write_text(json.dumps({"model_type": model_type}))
    beside = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for text in HOSTILE:
        assert beside(text).input_ids == theirs(text).input_ids == [1, *encode(ours, text)]


def test_torchtitans_folder_has_the_ids_that_transformers_gives_it(tmp_path):
    from transformers import AutoTokenizer

    folder = torchtitan(tmp_path)
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)
    for text in TEXTS:
        split = theirs(text, add_special_tokens=False, split_special_tokens=True)
        assert split.input_ids == encode(ours, text)


def test_sentencepiece_lies_beside_and_transformers_saves_what_it_read(tmp_path):
    theirs = reload(DEBUG_TOKENIZER, tmp_path / "hf")
    assert (tmp_path / "hf/tokenizer.model").read_bytes() == Path(DEBUG_TOKENIZER).read_bytes()
    theirs.save_pretrained(tmp_path / "again")
    ours = load_tokenizer(tmp_path / "again")
    for text in HOSTILE:
        assert encode(ours, text) == theirs(text, add_special_tokens=False).input_ids


def test_ids_of_a_normalizing_model_differ_only_where_it_is_known(tmp_path):
    """`tokenizers` composes letters grapheme by grapheme, SentencePiece along the text."""
    source = sentencepiece_model(
        tmp_path / "t.model", normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True
    )
    ours, theirs = load_tokenizer(source), reload(source, tmp_path / "hf")
    differ = [
        text
        for text in [*TEXTS, "e\u0301\u200d"]
        if theirs(text, add_special_tokens=False).input_ids != encode(ours, text)
    ]
    assert differ == [
        "e\u0301 \u00e9 \u1112\u1161\u11ab \ufb01 a\u0300\u0301\u0302",
        "e\u0301\u200d",
    ]


def test_unfinished_characters_decode_to_replacements_at_the_end(tmp_path):
    ours, theirs = load_tokenizer(DEBUG_TOKENIZER), reload(DEBUG_TOKENIZER, tmp_path / "hf")
    ids = encode(ours, "a🙂b")
    for count in range(len(ids) + 1):
        ends = count - 1 if 1 < count < 5 else 0
        text = "a🙂b"[: count if count < 2 else 1 if ends else count - 3]
        assert ours.decode(ids[:count]) == text + "\ufffd" * ends
        assert theirs.decode(ids[:count]).startswith(text)
        assert theirs.decode(ids[:count]).endswith("\ufffd") == (ends > 0)


def test_a_file_that_begins_with_bos_is_taken_as_it_is(tmp_path):
    folder = llama3(tmp_path / "source")
    made = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    bos, eos = "<|begin_of_text|>", "<|end_of_text|>"
    template = {"special_tokens": [(bos, 0), (eos, 1)]}
    for single, is_kept in ((f"{bos} $A", True), (f"{bos} $A {eos}", False), ("$A", False)):
        made.post_processor = processors.TemplateProcessing(single=single, **template)
        save(made, folder)
        theirs = reload(folder, tmp_path / "hf")
        written = (tmp_path / "hf/tokenizer.json").read_bytes()
        assert (written == (folder / "tokenizer.json").read_bytes()) == is_kept
        assert theirs("a").input_ids == [0, *encode(load_tokenizer(folder), "a")]
        shutil.rmtree(tmp_path / "hf")


def test_what_the_files_beside_say_is_kept_but_for_what_changes_ids(tmp_path):
    chat = "{% for m in messages %}<|end_of_text|>{{ m.content }}{% endfor %}"
    folder = byte_level(
        tmp_path / "source",
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<pad>",
        special_tokens_map={"eos_token": "<pad>", "pad_token": "<pad>"},
        tokenizer_config={
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|end_of_text|>",
            "unk_token": "<nowhere>",
            "additional_special_tokens": ["<pad>", "<neither>"],
            "padding_side": "left",
            "model_max_length": 5,
            "clean_up_tokenization_spaces": True,
            "add_eos_token": True,
            "auto_map": {"AutoTokenizer": ["code.Tokenizer", None]},
        },
    )
    (folder / "chat_template.jinja").write_text(chat)
    ours, theirs = load_tokenizer(folder), reload(folder, tmp_path / "hf")
    config = json.loads((tmp_path / "hf/tokenizer_config.json").read_text())
    assert "auto_map" not in config
    assert (theirs.padding_side, theirs.model_max_length, theirs.pad_token) == ("left", 5, "<pad>")
    assert len(theirs) == ours.vocab_size
    assert theirs.eos_token_id == ours.eos_id
    assert theirs("a .").input_ids == [0, *encode(ours, "a .")]
    assert theirs.decode(encode(ours, "a .")) == "a ."
    assert theirs.chat_template == chat
    ids = theirs.apply_chat_template([{"role": "user", "content": "a"}], tokenize=True)
    ids = getattr(ids, "input_ids", ids)
    assert list(ids) == [ours.eos_id, *encode(ours, "a")], "a template's tokens are tokens"


def test_a_model_that_cannot_be_the_same_is_named(tmp_path, caplog):
    source = sentencepiece_model(tmp_path / "t.model", treat_whitespace_as_suffix=True)
    (tmp_path / "hf").mkdir()
    with caplog.at_level(logging.WARNING, logger="torchtrain"):
        write_tokenizer(source, tmp_path / "hf")
    assert "becomes the ids" in caplog.text
    words = sentencepiece_model(tmp_path / "words.model", model_type="word", byte_fallback=False)
    with pytest.raises(UserError, match="of words, which Hugging Face"):
        write_tokenizer(words, tmp_path / "hf")
    source = shutil.copyfile(DEBUG_TOKENIZER, tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text('{"bos')
    with pytest.raises(UserError, match=r"tokenizer_config\.json' cannot be read"):
        write_tokenizer(source, tmp_path / "hf")
