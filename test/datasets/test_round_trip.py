"""What a tokenizer cannot represent is counted and said, and no run trains on what is lost."""

import math

import numpy as np
import pytest
import tokenizers
from helpers.launching import options
from helpers.tokens import encode
from tokenizers import decoders, models, normalizers, pre_tokenizers

from torchtrain.config.plans import DEBUG_TOKENIZER, plan_run
from torchtrain.config.schema import Data, Training
from torchtrain.config_manager import JobConfig
from torchtrain.datasets import round_trip, token_cache
from torchtrain.datasets.files import read_files
from torchtrain.datasets.loader import build_dataset
from torchtrain.datasets.round_trip import RoundTrip, lost_characters
from torchtrain.datasets.token_cache import open_token_cache
from torchtrain.datasets.tokenizer import load_tokenizer
from torchtrain.errors import UserError
from torchtrain.validation import ValidationSet

LETTERS = "abcdefghijklmnopqrstuvwxyz "
JAPANESE = "日本語の文章です。"


def numbered(*pieces):
    return {piece: id_ for id_, piece in enumerate(["<s>", "</s>", *pieces])}


def saved(folder, made):
    made.add_special_tokens(["<s>", "</s>"])
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    return load_tokenizer(folder)


@pytest.fixture
def dropping(tmp_path):
    """A BPE without an unknown token and without bytes."""
    made = tokenizers.Tokenizer(models.BPE(numbered(*LETTERS), []))
    made.decoder = decoders.Fuse()
    return saved(tmp_path / "dropping", made)


def unknowing(folder, kind):
    """A tokenizer with an unknown token, which the file calls special, and SentencePiece's way."""
    pieces = ["<unk>", *LETTERS.replace(" ", "\u2581")]
    if kind == "unigram":
        scores = [(piece, -2.0) for piece in numbered(*pieces)]
        made = tokenizers.Tokenizer(models.Unigram(scores, unk_id=2))
    else:
        made = tokenizers.Tokenizer(models.WordLevel(numbered(*pieces), unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="never"),
            pre_tokenizers.Split(tokenizers.Regex("."), "isolated"),
        ]
    )
    made.decoder = decoders.Metaspace(prepend_scheme="never")
    made.add_special_tokens(["<unk>"])
    return saved(folder, made)


def write(folder, *texts):
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(texts):
        (folder / f"{number:04}.txt").write_text(text, encoding="utf-8")
    return folder


def warnings_of(monkeypatch, module):
    said = []
    monkeypatch.setattr(module.logger, "warning", said.append)
    return said


def test_text_that_is_dropped_is_refused_and_nothing_is_kept(tmp_path, dropping):
    assert encode(dropping, JAPANESE) == []
    corpus = read_files("text", write(tmp_path / "corpus", *[JAPANESE * 9] * 30), "")
    message = r"cannot represent 2,430 of 2,430 characters of a sample \(100\.00%\), such as '日'"
    for _ in range(2):
        with pytest.raises(UserError, match=message):
            open_token_cache(corpus, dropping, tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("tokens.bin"))


def test_a_large_corpus_is_refused_before_it_is_tokenized(tmp_path, dropping, monkeypatch):
    monkeypatch.setattr(round_trip, "SURE_CHARACTERS", 100)
    texts = iter([JAPANESE * 20, "never read"])
    with pytest.raises(UserError, match="Most of the text would be lost"):
        list(RoundTrip("here", dropping).watch(texts))
    assert next(texts) == "never read"


def test_what_is_lost_is_counted_and_said_at_every_start(tmp_path, dropping, monkeypatch):
    texts = ["some words", "日本 and words, 日", "more"]
    corpus = read_files("text", write(tmp_path / "corpus", *texts), "")
    said = warnings_of(monkeypatch, token_cache)
    for _ in range(2):
        cache = open_token_cache(corpus, dropping, tmp_path / "cache")
        assert (cache.manifest.characters_sampled, cache.manifest.characters_lost) == (25, 4)
        assert cache.manifest.lost_examples[0] == "日"
        assert "16.00% of characters lost" in cache.manifest.describe()
    assert len(said) == 2
    assert all("cannot represent 4 of 25 characters" in text for text in said)


def test_of_a_large_corpus_a_part_is_sampled(dropping, monkeypatch):
    monkeypatch.setattr(round_trip, "WHOLE_CHARACTERS", 1000)
    tried = RoundTrip("here", dropping)
    assert list(tried.watch(["x" * 99 + "é"] * 6400)) == ["x" * 99 + "é"] * 6400
    assert tried.seen == 640_000
    assert 10_900 < tried.characters < 11_300
    assert tried.lost.total() > 100


@pytest.mark.parametrize("kind", ["unigram", "word level"])
def test_text_that_becomes_unknown_is_lost_too(tmp_path, kind):
    tokenizer = unknowing(tmp_path / "made", kind)
    assert lost_characters(tokenizer, "some words") == {}
    assert lost_characters(tokenizer, "日 <unk> 日a") == {"日": 2, "<": 1, ">": 1}
    assert math.isnan(tokenizer.token_bytes()[tokenizer.unknown_id])


def test_what_a_tokenizer_changes_on_purpose_is_not_lost(tmp_path):
    made = tokenizers.Tokenizer(models.BPE(numbered(*pre_tokenizers.ByteLevel.alphabet()), []))
    spaces = normalizers.Replace(tokenizers.Regex(" +"), " ")
    steps = [normalizers.NFKC(), normalizers.Lowercase(), spaces]
    made.normalizer = normalizers.Sequence(steps)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    made.decoder = decoders.ByteLevel()
    text = "Die STRAẞE  e\u0301 ﬁ ½ ㍿ 日本語 \u2581 हिन्दी İ"
    assert lost_characters(saved(tmp_path / "a", made), text) == {}
    assert lost_characters(load_tokenizer(DEBUG_TOKENIZER), text) == {}
    made.decoder = None
    made.save(str(tmp_path / "a" / "tokenizer.json"))
    without = load_tokenizer(tmp_path / "a")  # its decode gives the bytes' signs
    tried = RoundTrip("here", without)
    list(tried.watch([JAPANESE] * 9))
    assert tried.characters == 0


def test_a_tokenizer_without_any_token_for_a_text_says_so(tmp_path):
    made = tokenizers.Tokenizer(models.WordLevel(numbered("a"), unk_token="<unk>"))
    tokenizer = saved(tmp_path / "a", made)
    for threads in (1, 2):
        with pytest.raises(UserError, match=r"tokenizer cannot encode a text: .*Missing \[UNK\]"):
            tokenizer.encode_batch(["b"], threads)


def test_a_stream_that_is_dropped_is_refused(tmp_path, dropping, monkeypatch):
    def stream(*texts):
        folder = write(tmp_path / str(len(texts)), *texts)
        training = {"dataset": "text", "dataset_path": str(folder), "seq_len": 8}
        data = Data(streaming=True, streams=1, cache_folder=str(tmp_path / "cache"))
        return build_dataset(Training(**training), data, dropping, 0)

    with pytest.raises(UserError, match=r"stream 0 of 1: .* Most of the text would be lost"):
        stream(JAPANESE, JAPANESE).read(np.arange(3))
    said = warnings_of(monkeypatch, round_trip)
    stream("some words", "日 and more words", "more").read(np.arange(9))
    assert len(said) == 1, "once, not at every epoch"
    assert "cannot represent 1 of 26 characters" in said[0]


@pytest.mark.parametrize("kind", ["unigram", "word level", "dropping"])
def test_bits_per_byte_of_text_that_is_lost_are_not_known(tmp_path, dropping, kind):
    tokenizer = dropping if kind == "dropping" else unknowing(tmp_path / kind, kind)
    for text, is_known in (("some plain words", kind != "dropping"), ("some 日 words", False)):
        folder = write(tmp_path / f"{is_known}", text * 9)
        given = {
            "validation.enable": True,
            "validation.dataset": "text",
            "validation.dataset_path": folder,
            "data.cache_folder": tmp_path / "cache",
        }
        config = JobConfig().parse_args(options(given), world_size=1)
        plan = plan_run(config, 1, tokenizer_size=tokenizer.vocab_size).validation
        samples = ValidationSet(plan, config.data, tokenizer, None)
        (dataset,) = samples.datasets
        total = samples.token_bytes[dataset._tokens[1:]].sum()
        assert (total == len(text.encode()) * 9) == is_known
        assert math.isnan(total) == (not is_known)


def test_the_name_of_the_unknown_token_is_no_text_that_came_back(tmp_path):
    made = tokenizers.Tokenizer(models.WordLevel(numbered("<unk>", "a"), unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = saved(tmp_path / "a", made)
    assert tokenizer.decode(encode(tokenizer, "a < u")) == "a <unk> <unk>"
    assert lost_characters(tokenizer, "a < u") == {"<": 1, "u": 1}
