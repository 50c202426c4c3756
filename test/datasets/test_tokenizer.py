"""The tokenizer gives back every text exactly, knows what it cannot read, and trains to the same
bytes."""

import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
from helpers.tokens import decode, encode
from hypothesis import given, settings
from hypothesis import strategies as st

from torchtrain.datasets import tokenizer as module
from torchtrain.datasets.tokenizer import SentencePieceTokenizer, encode_documents, load_tokenizer
from torchtrain.errors import UserError
from torchtrain.tools.train_tokenizer import main, train_tokenizer

DEBUG_MODEL = Path(module.__file__).with_name("debug_tokenizer.model")
TEXT = [
    "The quick brown fox jumps over the lazy dog. " * 20,
    "def f(x):\n    return x + 1\n" * 20,
    "0123456789 " * 9,
]

HOSTILE = [
    "",
    " ",
    "\0",
    "a\0b",
    "\t\tx\t",
    "\r\n\r\n",
    "line\r\nline\rline\n",
    "\x0b\x0c\x1c\x85\u2028\u2029",
    " " * 5000 + "x" + " " * 777,
    "    " * 300 + "\t" * 300,
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467\U0001f3f3\ufe0f",
    "\u2581",
    "a\u2581b \u2581\u2581 \u2581",
    "\ufeffbyte order mark",
    "\ufffd\ufffe\uffff\U0010ffff",
    "e\u0301 \u00e9 \u1112\u1161\u11ab \ufb01",
    "\u00a0\u3000\u200b\u200e\u202e",
    "<s></s><unk><pad><0x41>",
    "0123456789 3.14159 1e-5",
    "漢字かな交じり文 العربية עברית हिन्दी",
    "a" * 70_000,
]


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return load_tokenizer(DEBUG_MODEL)


def foreign_model(**options) -> SentencePieceTokenizer:
    """A model as others train them, Llama 2's options by default."""
    model = io.BytesIO()
    llama2 = {
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
        "vocab_size": 330,
        "model_type": "bpe",
    }
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT), model_writer=model, minloglevel=2, **(llama2 | options)
    )
    return SentencePieceTokenizer(model.getvalue(), "foreign")


@pytest.mark.parametrize("text", HOSTILE, ids=[ascii(text)[:30] for text in HOSTILE])
def test_hostile_text_comes_back_exactly(tokenizer, text):
    ids = encode(tokenizer, text)
    assert decode(tokenizer, ids) == text
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids), (
        "text must not be able to spell BOS or EOS"
    )


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_exactly(text):
    tokenizer = load_tokenizer(DEBUG_MODEL)
    assert decode(tokenizer, encode(tokenizer, text)) == text


def test_lone_surrogate_is_refused_with_its_position(tokenizer):
    with pytest.raises(UserError, match=r"lone surrogate, U\+D800 at character 2"):
        encode(tokenizer, "ok\ud800")


def test_debug_model_has_the_shape_the_debug_runs_rely_on(tokenizer):
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (2048, 1, 2)


def test_batch_on_threads_equals_one_by_one(tokenizer):
    texts = [text for text in HOSTILE if len(text) < 100] * 3
    assert [ids.tolist() for ids in tokenizer.encode_batch(texts, threads=2)] == [
        encode(tokenizer, t) for t in texts
    ]


@pytest.mark.parametrize(
    "options",
    [
        {"add_dummy_prefix": False, "allow_whitespace_only_pieces": True},
        {},
        {"model_type": "unigram", "vocab_size": 305},
    ],
    ids=["ours", "llama2", "unigram"],
)
def test_cutting_a_long_text_does_not_change_its_ids(monkeypatch, options):
    tokenizer = foreign_model(**options)
    text = "The  quick\n   brown fox\u00e9, lazy    dogs. \r\n 0123 return x\t jumps " * 40
    whole = encode(tokenizer, text)
    monkeypatch.setattr(module, "LONG_TEXT", 7)
    assert len(tokenizer._cut_for_encoding(text)) > 50
    assert encode(tokenizer, text) == whole
    assert decode(tokenizer, whole) == text


def test_model_with_pieces_across_spaces_is_not_cut(monkeypatch):
    tokenizer = foreign_model(split_by_whitespace=False, vocab_size=360)
    monkeypatch.setattr(module, "LONG_TEXT", 7)
    assert tokenizer._cut_for_encoding(TEXT[0]) == [TEXT[0]]


def test_model_that_adds_a_space_reads_the_space_mark_as_a_space():
    """The one known loss, stated in the module's docstring: Llama 2's own behaviour is kept."""
    tokenizer = foreign_model()
    assert encode(tokenizer, "a\u2581b") == encode(tokenizer, "a b")


def test_training_twice_gives_the_same_bytes(tmp_path):
    first, second = (train_tokenizer(iter(TEXT), 320) for _ in range(2))
    assert first == second
    for text in HOSTILE:
        tokenizer = SentencePieceTokenizer(first, "trained")
        assert decode(tokenizer, encode(tokenizer, text)) == text


def test_command_trains_on_own_text(tmp_path, capsys):
    (tmp_path / "corpus").mkdir()
    for number, text in enumerate(TEXT):
        (tmp_path / "corpus" / f"{number}.txt").write_text(text)
    output = tmp_path / "own.model"
    arguments = [
        "--dataset",
        "text",
        "--dataset-path",
        str(tmp_path / "corpus"),
        "--vocab-size",
        "310",
    ]
    assert main(["--output", str(output), *arguments]) == 0
    tokenizer = load_tokenizer(output)
    assert tokenizer.vocab_size == 310
    assert tokenizer.fingerprint in capsys.readouterr().out
    assert output.read_bytes() == train_tokenizer(iter(TEXT), 310)


def test_text_longer_than_a_cut_is_not_dropped_by_the_trainer():
    text = "abcdefgh " * 20_000
    tokenizer = SentencePieceTokenizer(train_tokenizer(iter([text]), 280), "trained")
    assert len(encode(tokenizer, "abcdefgh abcdefgh")) < 17


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output", "{tmp}/missing/x.model"], "folder that exists"),
        (["--output", "{tmp}"], "must be a file name"),
        (["--output", "{tmp}/x", "--dataset", "text"], "training.dataset_path"),
        (
            ["--output", "{tmp}/x", "--dataset", "text", "--dataset-path", "{tmp}/nothing"],
            "does not exist",
        ),
        (["--output", "{tmp}/x", "--dataset", "text", "--dataset-path", "{tmp}/a.txt"], "too high"),
        (
            [
                "--output",
                "{tmp}/x",
                "--dataset",
                "text",
                "--dataset-path",
                "{tmp}/a.txt",
                "--vocab-size",
                "0",
            ],
            "small",
        ),
        (
            [
                "--output",
                "{tmp}/x",
                "--dataset",
                "text",
                "--dataset-path",
                "{tmp}/a.txt",
                "--vocab-size",
                "261",
            ],
            "261",
        ),
    ],
)
def test_command_names_the_fault_and_exits_with_2(tmp_path, capsys, arguments, message):
    (tmp_path / "a.txt").write_text("hello world " * 10)
    assert main([argument.format(tmp=tmp_path) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "x").exists()


def test_command_runs_as_a_module():
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "torchtrain.tools.train_tokenizer",
            "--output",
            "/nonexistent/folder/x",
        ],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: --output")


def test_folder_with_a_model_is_read(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(DEBUG_MODEL.read_bytes())
    assert load_tokenizer(tmp_path).fingerprint == load_tokenizer(DEBUG_MODEL).fingerprint


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"IQ== 0\nIg== 1\nIw== 2\n",
            r"tiktoken format .*Give the tokenizer\.json of the same model's",
        ),
        (b"IQ== 0\r\nIg== 1\r\n", "tiktoken format"),
        (b'{"version": "1.0", "model": {}}', "JSON, but not a tokenizer.json"),
        (b'\n  {"version": "1.0"}', "JSON, but not a tokenizer.json"),
        (b'{"version": ', "JSON, but not a tokenizer.json"),
        (
            b'{"version": "1.0", "added_tokens": [], "model": {"type": "BPE"}}',
            "JSON, but not a tokenizer.json",
        ),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"", "empty"),
        (b"\0" * 1000, "not a SentencePiece model"),
        (b"hello world\n", "not a SentencePiece model"),
        (DEBUG_MODEL.read_bytes()[:9999], "not a SentencePiece model"),
    ],
)
def test_other_formats_are_named(tmp_path, content, message):
    file = tmp_path / "tokenizer.model"
    file.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(file)
    assert str(file) in str(caught.value)


def test_missing_paths_are_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_tokenizer(tmp_path / "nothing.model")
    with pytest.raises(UserError, match=r"folder without tokenizer\.json or tokenizer\.model"):
        load_tokenizer(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        load_tokenizer(tmp_path / "pipe")


def test_model_without_eos_is_refused():
    for options in ({"eos_id": -1}, {"bos_id": -1, "eos_id": -1}):
        with pytest.raises(UserError, match="no EOS piece"):
            foreign_model(**options)


def test_documents_of_a_model_without_bos_end_with_eos():
    tokenizer = foreign_model(bos_id=-1, eos_id=1)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 1)
    documents = encode_documents(tokenizer, TEXT)
    assert [ids.tolist() for ids in documents] == [[*encode(tokenizer, text), 1] for text in TEXT]


# Other formats


def hugging_face(*special: str) -> tokenizers.Tokenizer:
    """A small byte-level BPE, made here."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=list(special), show_progress=False
    )
    made.train_from_iterator(TEXT, trainer)
    return made


def saved(folder: Path, *special: str, **beside: object) -> Path:
    """The same in a folder, with the JSON files that `beside` names."""
    folder.mkdir(parents=True, exist_ok=True)
    hugging_face(*special).save(str(folder / "tokenizer.json"))
    for name, content in beside.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    return load_tokenizer(
        saved(tmp_path_factory.mktemp("hf"), "<|begin_of_text|>", "<|end_of_text|>")
    )


@pytest.mark.parametrize(
    "text", [*HOSTILE, "<|begin_of_text|><|end_of_text|>"], ids=lambda text: ascii(text)[:30]
)
def test_tokenizer_json_gives_every_text_back_and_spells_no_special_token(byte_level, text):
    tokenizer = byte_level
    ids = encode(tokenizer, text)
    assert decode(tokenizer, [tokenizer.bos_id, *ids, tokenizer.eos_id]) == text
    assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids)
    assert all(0 <= id_ < tokenizer.vocab_size for id_ in ids)


def test_tokenizer_json_gives_the_same_ids_on_threads(byte_level):
    texts = [text for text in HOSTILE if len(text) < 6000] * 3
    one_by_one = [encode(byte_level, text) for text in texts]
    for threads in (1, 2):
        assert [
            ids.tolist() for ids in byte_level.encode_batch(texts, threads=threads)
        ] == one_by_one
    with pytest.raises(UserError, match="lone surrogate"):
        byte_level.encode_batch(["fine", "\ud800"], threads=2)


def test_hugging_face_ids_are_the_packages_own(byte_level):
    made = hugging_face("<|begin_of_text|>", "<|end_of_text|>")
    for text in TEXT:
        assert encode(byte_level, text) == made.encode(text, add_special_tokens=False).ids


def test_template_padding_and_truncation_of_a_tokenizer_json_are_left_out(tmp_path, byte_level):
    made = hugging_face("<|begin_of_text|>", "<|end_of_text|>")
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
    )
    made.enable_truncation(5)
    made.enable_padding(length=100)
    made.save(str(tmp_path / "tokenizer.json"))
    assert encode(load_tokenizer(tmp_path), TEXT[0]) == encode(byte_level, TEXT[0])


def test_bos_and_eos_are_those_of_the_files_beside_then_the_well_known(tmp_path):
    specials = ("<s>", "</s>", "<a>", "<b>")

    def pair(name, **beside):
        tokenizer = load_tokenizer(saved(tmp_path / name, *specials, **beside))
        return tokenizer.bos_id, tokenizer.eos_id, tokenizer.fingerprint

    known = pair("known", tokenizer_config={"model_max_length": 8})
    config = pair(
        "config",
        tokenizer_config={"bos_token": "<a>", "eos_token": {"content": "<b>", "lstrip": False}},
    )
    mapped = pair("mapped", special_tokens_map={"bos_token": "<b>", "eos_token": "<b>"})
    both = pair(
        "both",
        special_tokens_map={"bos_token": "<b>", "eos_token": "<s>"},
        tokenizer_config={"bos_token": "<a>"},
    )
    assert [entry[:2] for entry in (known, config, mapped, both)] == [
        (0, 1),
        (2, 3),
        (3, 3),
        (2, 0),
    ]
    assert len({entry[2] for entry in (known, config, mapped, both)}) == 4


@pytest.mark.parametrize(
    "beside",
    [
        {"tokenizer_config": {"bos_token": None, "eos_token": "<b>"}},
        {"tokenizer_config": {"eos_token": {"content": "<b>"}}},
        {"special_tokens_map": {"eos_token": "<b>", "pad_token": "<a>"}},
    ],
)
def test_a_tokenizer_json_may_have_no_bos_as_qwens(tmp_path, beside):
    tokenizer = load_tokenizer(saved(tmp_path / "without", "<a>", "<b>", **beside))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 1)
    (document,) = encode_documents(tokenizer, [TEXT[0]])
    assert document.tolist() == [*encode(tokenizer, TEXT[0]), 1]
    assert tokenizer.decode(document) == TEXT[0]
    named = {"tokenizer_config": {"bos_token": "<a>", "eos_token": "<b>"}}
    same_text = load_tokenizer(saved(tmp_path / "with", "<a>", "<b>", **named))
    assert same_text.fingerprint != tokenizer.fingerprint, "their caches differ"


@pytest.mark.parametrize(
    ("specials", "beside", "message"),
    [
        ((), {}, r"bos_token = None, eos_token = None is not in its .*tokenizer_config\.json"),
        (
            ("<b>",),
            {"tokenizer_config": {"bos_token": "<b>", "eos_token": None}},
            "separates documents: eos_token = None is not in its vocabulary",
        ),
        (
            ("<s>", "</s>"),
            {"tokenizer_config": {"bos_token": "<x>", "eos_token": "</s>"}},
            "bos_token = '<x>' is not in its vocabulary",
        ),
        (
            ("<s>", "</s>"),
            {"tokenizer_config": {"bos_token": {"x": 1}}},
            "tokenizer_config.json.* cannot be read",
        ),
        (("<s>", "</s>"), {"tokenizer_config": {"bos_token": ["<s>"]}}, "is not in its vocabulary"),
        (
            ("<s>", "</s>"),
            {"tokenizer_config": ["<s>"]},
            "tokenizer_config.json', which names BOS and EOS, cannot be",
        ),
    ],
)
def test_bos_and_eos_that_cannot_be_known_are_refused(tmp_path, specials, beside, message):
    with pytest.raises(UserError, match=message):
        load_tokenizer(saved(tmp_path, *specials, **beside))


def test_tokens_that_the_file_does_not_call_special_cannot_be_spelled_either(tmp_path):
    made = hugging_face()
    made.add_tokens(
        [tokenizers.AddedToken("<s>", special=False), tokenizers.AddedToken("</s>", special=False)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    ids = encode(tokenizer, "a<s>b</s>")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (300, 301, 302)
    assert not {300, 301} & set(ids)
    assert decode(tokenizer, [300, *ids, 301]) == "a<s>b</s>"


NAMES = ["<unk>", "<s>", "</s>", "<pad>"]
PIECES = [*"ab</sunk>pxd ", "a b", "</", "s>", "</s", "<p"]
MERGES = [("<", "/"), ("s", ">"), ("</", "s")]
SPELLING = ["</s>", "a</s>b", "a </s> b", "<s><s>a</s></s>", "<unk> x", "<pad>a", "</ s>", "ab"]


def small_model(kind, names):
    """A model with these special tokens, the unknown one first, and with PIECES."""
    pieces = [*names, *PIECES]
    vocabulary = {piece: id_ for id_, piece in enumerate(pieces)}
    models, unknown = tokenizers.models, {"unk_token": names[0]}
    if kind == "unigram":
        scores = [(piece, -2.0 - 0.01 * id_) for piece, id_ in vocabulary.items()]
        return tokenizers.Tokenizer(models.Unigram(scores, unk_id=0))
    makes_it = [("</", "s>")] if kind == "a merge" else []
    merges = [*makes_it, *MERGES]
    made = {
        "word level": lambda: models.WordLevel(vocabulary, **unknown),
        "word piece": lambda: models.WordPiece(vocabulary, **unknown),
        "ignore_merges": lambda: models.BPE(vocabulary, merges, ignore_merges=True, **unknown),
    }.get(kind, lambda: models.BPE(vocabulary, merges, **unknown))()
    tokenizer = tokenizers.Tokenizer(made)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return tokenizer


def small_tokenizer(folder, kind):
    """The same in a folder; that `<pad>` is special only the config says."""
    made = small_model(kind, NAMES)
    made.add_special_tokens(NAMES[:3])
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return load_tokenizer(folder)


KINDS = ["unigram", "word level", "word piece", "ignore_merges", "a merge", "bpe"]


@pytest.mark.parametrize("kind", KINDS)
def test_text_is_never_a_special_token(tmp_path, kind):
    """Its ids are those of a vocabulary whose special tokens have other names."""
    tokenizer = small_tokenizer(tmp_path, kind)
    other = small_model("bpe" if kind == "a merge" else kind, [f"other {name}" for name in NAMES])
    plain = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    plain.encode_special_tokens = True
    for text in SPELLING:
        for threads in (1, 2):
            (ids,) = tokenizer.encode_batch([text], threads)
            assert ids.tolist() == other.encode(text).ids, text
        assert not {1, 2, 3} & set(ids.tolist()), text
    spelled = {id_ for text in SPELLING for id_ in plain.encode(text).ids} & {1, 2, 3}
    assert bool(spelled) == (kind != "bpe"), "else this test shows nothing"


def test_fingerprint_changes_where_text_no_longer_spells_a_special_token(tmp_path):
    for kind in KINDS:
        tokenizer = small_tokenizer(tmp_path / kind, kind)
        content = (tmp_path / kind / "tokenizer.json").read_bytes()
        before = hashlib.sha256(content + b"\0<s>\0</s>").hexdigest()
        assert (tokenizer.fingerprint == before) == (kind == "bpe"), kind


BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
SPELLED_BYTES = ["<0x41>", "x<0x41>y", " <0x0A><0xFF> ", "<<0x41>>", "<0x4>", "<0xab>", "a < 0"]


def falling_back(kind, bytes_):
    """A model with these tokens of bytes, by which it falls back on them if they are BYTES."""
    pieces = ["<unk>", "<s>", "</s>", *bytes_, *"\u2581<>0123456789abcdefxyABCDEF", "\u2581<", "xy"]
    models, has_bytes = tokenizers.models, {"byte_fallback": True}
    if kind.startswith("unigram"):
        scores = [(piece, -2.0 - 0.001 * id_) for id_, piece in enumerate(pieces)]
        tokenizer = tokenizers.Tokenizer(models.Unigram(scores, unk_id=0, **has_bytes))
    else:
        vocabulary = {piece: id_ for id_, piece in enumerate(pieces)}
        merges = [("\u2581", "<"), ("x", "y")]
        if kind == "bpe with a merge" and bytes_ is BYTES:
            vocabulary |= {"<0x41": len(pieces), "<0x": len(pieces) + 1, "<0": len(pieces) + 2}
            vocabulary["<0x4"] = len(pieces) + 3
            merges += [("<", "0"), ("<0", "x"), ("<0x", "4"), ("<0x4", "1"), ("<0x41", ">")]
        ignores = {"ignore_merges": kind == "bpe with ignore_merges"}
        made = models.BPE(vocabulary, merges, unk_token="<unk>", **has_bytes, **ignores)
        tokenizer = tokenizers.Tokenizer(made)
    if kind == "unigram of words":
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme="never")
    else:
        tokenizer.normalizer = tokenizers.normalizers.Replace(" ", "\u2581")
    steps = ("Replace", "ByteFallback", "Fuse")
    arguments = {"Replace": ("\u2581", " ")}
    made = [getattr(tokenizers.decoders, name)(*arguments.get(name, ())) for name in steps]
    tokenizer.decoder = tokenizers.decoders.Sequence(made)
    if kind == "bpe with added tokens":
        tokenizer.add_tokens([tokenizers.AddedToken(byte, normalized=False) for byte in bytes_])
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


@pytest.mark.parametrize(
    "kind",
    [
        "unigram",
        "unigram of words",
        "bpe with ignore_merges",
        "bpe with a merge",
        "bpe with added tokens",
        "bpe",
    ],
)
def test_text_is_never_the_token_of_a_byte_by_its_spelling(tmp_path, kind):
    """Its ids are those of a vocabulary whose tokens of bytes have other names."""
    made = falling_back(kind, BYTES)
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    other = falling_back(kind.removesuffix(" with added tokens"), [f"other {b}" for b in BYTES])
    for text in SPELLED_BYTES:
        for threads in (1, 2):
            (ids,) = tokenizer.encode_batch([text], threads)
            if kind != "bpe with a merge":
                assert ids.tolist() == other.encode(text).ids, text
        assert not set(ids.tolist()) & set(range(3, 259)), text
        assert tokenizer.decode(ids.tolist()) == text
    is_spelled = {*range(3, 259)} & {id_ for text in SPELLED_BYTES for id_ in made.encode(text).ids}
    assert bool(is_spelled) == (kind != "bpe"), "else this test shows nothing"
    assert encode(tokenizer, "é") == [3 + byte for byte in "é".encode()], "what they are for"
    assert encode(tokenizer, "x y") == made.encode("x y").ids


def test_what_is_unknown_is_no_separator_where_one_token_is_both(tmp_path):
    for kind, unknown in (("unigram", "</s>"), ("word level", "</s>"), ("bpe", "<s>")):
        made = small_model(kind, [unknown, *[name for name in NAMES[1:] if name != unknown]])
        made.add_special_tokens(["<s>", "</s>"])
        (tmp_path / kind).mkdir()
        made.save(str(tmp_path / kind / "tokenizer.json"))
        tokenizer = load_tokenizer(tmp_path / kind)
        assert tokenizer.unknown_id in (tokenizer.bos_id, tokenizer.eos_id)
        assert tokenizer.unknown_id in made.encode("日 a 日").ids, "else this test shows nothing"
        for threads in (1, 2):
            (ids,) = tokenizer.encode_batch(["日 a 日"], threads)
            assert tokenizer.decode(ids.tolist()).strip() == "a"
            assert not {tokenizer.bos_id, tokenizer.eos_id} & set(ids.tolist())


@pytest.mark.parametrize("lacks", [0, 1])
def test_an_unknown_token_that_no_text_becomes_leaves_a_tokenizer_as_it_was(tmp_path, lacks):
    """GPT-2's names EOS as its unknown token, and has a token for every byte."""
    names = ["<|endoftext|>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())[lacks:]]
    numbered = {name: id_ for id_, name in enumerate(names)}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(numbered, [], unk_token="<|endoftext|>"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    made.save(str(tmp_path / "tokenizer.json"))
    content = (tmp_path / "tokenizer.json").read_bytes()
    beside = b"\0<|endoftext|>\0<|endoftext|>"
    before = hashlib.sha256(content + beside).hexdigest()
    assert (load_tokenizer(tmp_path).fingerprint == before) == (lacks == 0)


def test_what_pads_may_be_text(tmp_path):
    folder = saved(tmp_path, "<s>", "</s>", special_tokens_map={"pad_token": "x"})
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert decode(load_tokenizer(folder), encode(load_tokenizer(folder), "x = 1")) == "x = 1"


def test_a_piece_of_the_users_is_text_to_sentencepiece_and_no_separator():
    with pytest.raises(UserError, match="no EOS piece"):
        foreign_model(user_defined_symbols=["</s>"])
    tokenizer = foreign_model(user_defined_symbols=["<s>"])
    assert tokenizer.bos_id is None
    assert decode(tokenizer, encode(tokenizer, "a<s>b</s>")) == "a<s>b</s>"


def test_tokenizer_json_goes_before_tokenizer_model(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(DEBUG_MODEL.read_bytes())
    assert load_tokenizer(saved(tmp_path, "<s>", "</s>")).vocab_size == 300


SPELLED = [text for text in HOSTILE if text and len(text) < 6000]


def test_bytes_of_the_ids_are_those_of_the_text(tokenizer, tmp_path):
    for kind in (
        tokenizer,
        load_tokenizer(saved(tmp_path, "<|begin_of_text|>", "<|end_of_text|>")),
    ):
        sizes = kind.token_bytes()
        assert sizes.shape == (kind.vocab_size,)
        assert sizes[kind.bos_id] == sizes[kind.eos_id] == 0
        for text in SPELLED:
            assert sizes[encode(kind, text)].sum() == len(text.encode("utf-8")), ascii(text)


def test_bytes_with_a_space_put_before_the_text_and_without_bytes_to_fall_back_on():
    llama2 = foreign_model()
    for text in ("The quick brown fox", "\u00e9\u6f22", "a\n  b"):
        assert llama2.token_bytes()[encode(llama2, text)].sum() == 1 + len(text.encode("utf-8"))
    lossy = foreign_model(byte_fallback=False, vocab_size=60)
    assert lossy.token_bytes()[encode(lossy, "fox")].sum() == 4
    assert np.isnan(lossy.token_bytes()[encode(lossy, "\u6f22")].sum())


@pytest.mark.parametrize("decoder", ["fallback", "metaspace", "wordpiece", None])
def test_bytes_of_a_tokenizer_json_follow_its_decoder(tmp_path, decoder):
    vocabulary = {
        "<unk>": 0,
        "\u2581the": 1,
        "\u6f22": 2,
        "\u2581": 3,
        "<0xE9>": 4,
        "<s>": 5,
        "</s>": 6,
    }
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    made.add_special_tokens(["<s>", "</s>"])
    made.add_tokens(["\u00e9tat"])
    made.decoder = {
        "fallback": tokenizers.decoders.Sequence(
            [tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback()]
        ),
        "metaspace": tokenizers.decoders.Metaspace(),
        "wordpiece": tokenizers.decoders.WordPiece(),
        None: None,
    }[decoder]
    made.save(str(tmp_path / "tokenizer.json"))
    sizes = load_tokenizer(tmp_path).token_bytes()
    known = [4, 3, 1, 1] if decoder in ("fallback", "metaspace") else [np.nan] * 4
    np.testing.assert_array_equal(sizes, [np.nan, *known, 0, 0, 5])


def added(content, *, special=True):
    """A token as tokenizer_config.json lists it."""
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    return {"content": content, "special": special, **flags}


BESIDE = {
    "added_tokens_decoder": {"128001": added("<b>"), "128000": added("<a>"), "7": added("<s>")},
    "bos_token": "<a>",
    "eos_token": "<b>",
}


def test_tokens_that_only_the_config_knows_come_after_the_vocabulary(tmp_path):
    """As in torchtitan's own folder, whose ids for them are not those that they get."""
    plain = load_tokenizer(saved(tmp_path / "plain", "<s>", "</s>"))
    tokenizer = load_tokenizer(saved(tmp_path / "more", "<s>", "</s>", tokenizer_config=BESIDE))
    size = plain.vocab_size
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (size, size + 1, size + 2)
    for text in (*TEXT, "<a><b> <s>"):
        ids = encode(tokenizer, text)
        assert ids == encode(plain, text)
        assert tokenizer.decode([size, *ids, size + 1]) == text
    assert tokenizer.token_bytes()[[size, size + 1]].tolist() == [0, 0]


def test_fingerprint_changes_with_the_tokens_that_the_config_adds(tmp_path):
    known = {"added_tokens_decoder": {"0": added("<s>")}, "bos_token": "<s>", "eos_token": "</s>"}
    text = known | {"added_tokens_decoder": {"9": added("fox", special=False)}}
    special = known | {"added_tokens_decoder": {"9": added("fox")}}
    plain, same, *others = (
        load_tokenizer(saved(tmp_path / str(number), "<s>", "</s>", tokenizer_config=config))
        for number, config in enumerate([{}, known, text, special])
    )
    assert plain.fingerprint == same.fingerprint
    assert len({plain.fingerprint, *(each.fingerprint for each in others)}) == 3
    assert [plain.vocab_size in encode(each, "a fox") for each in others] == [True, False]


@pytest.mark.parametrize("tokens", [{"x": added("<a>")}, {"1": "<a>"}, ["<a>"]])
def test_added_tokens_that_are_none_are_refused(tmp_path, tokens):
    folder = saved(tmp_path, "<s>", "</s>", tokenizer_config={"added_tokens_decoder": tokens})
    with pytest.raises(UserError, match=r"tokenizer_config\.json.* cannot be read"):
        load_tokenizer(folder)
