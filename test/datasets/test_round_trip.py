"""What a tokenizer cannot represent is counted and said, and no run trains on what is lost."""

import json
import math
import threading
from contextlib import nullcontext

import numpy as np
import pytest
import tokenizers
import torch
from helpers.launching import options
from helpers.tokens import encode
from tokenizers import decoders, models, normalizers, pre_tokenizers

import train
from torchtrain.config.plans import DEBUG_TOKENIZER, plan_run
from torchtrain.config.schema import Data, Training
from torchtrain.config_manager import JobConfig
from torchtrain.datasets import round_trip, token_cache
from torchtrain.datasets.corpora import Corpus, Document
from torchtrain.datasets.files import read_files
from torchtrain.datasets.loader import build_dataset
from torchtrain.datasets.round_trip import (
    RoundTrip,
    lost_characters,
    try_beginning,
    try_first_documents,
)
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


def forget_what_was_lost(cache):
    """Make the manifests in a cache folder those of a version that did not try."""
    for path in cache.rglob("manifest.json"):
        manifest = json.loads(path.read_text())
        known = {k: v for k, v in manifest.items() if "sampled" not in k and "lost" not in k}
        path.write_text(json.dumps(known))


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


def test_a_short_run_on_streams_does_not_begin_on_what_is_lost(tmp_path, dropping, capfd):
    """It would read one step, far fewer characters than make a stream sure."""
    (tmp_path / "run" / "tb").mkdir(parents=True)
    (tmp_path / "run" / "metrics.jsonl").write_text("of an earlier run\n")
    given = {
        "training.dataset": "text",
        "training.dataset_path": write(tmp_path / "corpus", *[JAPANESE] * 20),
        "model.tokenizer_path": tmp_path / "dropping",
        "data.streaming": True,
        "data.streams": 1,
        "training.steps": 1,
        "training.seq_len": 32,
        "training.global_batch_size": 1,
        "job.dump_folder": tmp_path / "run",
    }
    assert train.main(JobConfig().parse_args(options(given), world_size=1)) == 2
    torch.distributed.destroy_process_group()
    (line,) = capfd.readouterr().err.splitlines()
    assert "cannot represent 180 of 180 characters of a sample (100.00%)" in line
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == "of an earlier run\n"


def made_up(texts, at_the_end):
    def rows():
        yield from (Document(text, "here") for text in texts)
        at_the_end()

    return Corpus("made up", [], [rows])


def raising(fault):
    def at_the_end():
        raise fault

    return at_the_end


def test_the_first_documents_of_streams_are_tried_whatever_becomes_of_the_rest(
    dropping, monkeypatch
):
    said = warnings_of(monkeypatch, round_trip)
    texts = iter(["words é"] * 587)
    try_first_documents(made_up(texts, pytest.fail), dropping)
    assert "cannot represent 586 of 3,516 characters" in said[0]
    assert len(list(texts)) == 1
    for at_the_end in (int, raising(UserError("a bad row")), raising(OSError("torn"))):
        try_first_documents(made_up(["words"], at_the_end), dropping)
        with pytest.raises(UserError, match="cannot represent 5,760 of 5,760 characters"):
            try_first_documents(made_up([JAPANESE * 80] * 8, at_the_end), dropping)
    assert len(said) == 1
    with pytest.raises(UserError, match="cannot represent 9 of 9 characters"):
        try_first_documents(made_up([JAPANESE], int), dropping)  # all there is
    try_first_documents(made_up([JAPANESE], raising(OSError("torn"))), dropping)
    assert "cannot represent 9 of 9 characters" in said[1], "too few to refuse a run by"


@pytest.mark.parametrize("short", [1, 40, 64, 100])
def test_short_documents_at_the_beginning_do_not_condemn_a_stream(dropping, monkeypatch, short):
    said = warnings_of(monkeypatch, round_trip)
    texts = iter(["日本語"] * short + ["plain words " * 40] * 20_000)
    try_first_documents(made_up(texts, pytest.fail), dropping)
    assert f"cannot represent {3 * short} of " in said[0]
    assert len(list(texts)) > 19_000, "few are read"


def test_a_source_of_streams_that_hangs_is_not_waited_for(dropping, monkeypatch):
    said = warnings_of(monkeypatch, round_trip)
    started = []

    class Reading(threading.Thread):
        def join(self, timeout=None):
            assert timeout == round_trip.FIRST_SECONDS
            started.append(self)
            assert hangs.wait(60)

    monkeypatch.setattr(round_trip, "Thread", Reading)
    for number, is_refused in ((1, False), (500, True)):
        hangs, goes_on = threading.Event(), threading.Event()
        later = iter(["more", "words"])

        def slow(number=number, hangs=hangs, goes_on=goes_on, later=later):
            yield from (Document(JAPANESE, "here") for _ in range(number))
            hangs.set()
            goes_on.wait(60)
            yield from (Document(text, "here") for text in later)

        monkeypatch.setattr(round_trip, "FIRST_DOCUMENTS", 1000)
        corpus = Corpus("slow", [], [slow])
        try:
            with pytest.raises(UserError) if is_refused else nullcontext():
                try_first_documents(corpus, dropping)
        finally:
            goes_on.set()
        threading.Thread.join(started[-1], 60)
        assert list(later) == ["words"], "it does not read on"
    assert len(said) == 1
    assert "cannot represent 9 of 9 characters" in said[0]


def test_of_a_mixture_each_source_that_is_streamed_is_tried(tmp_path, dropping):
    sources = [
        f"text {write(tmp_path / 'words', 'some words')} = 1",
        f"text {write(tmp_path / 'japanese', JAPANESE)} = 1",
    ]
    data = Data(streaming=True, streams=1, mixture=sources, cache_folder=str(tmp_path / "cache"))
    dataset = build_dataset(Training(seq_len=8), data, dropping, 0)
    with pytest.raises(UserError, match=r"japanese.* cannot represent 9 of 9"):
        dataset.try_tokenizer()


@pytest.mark.parametrize("is_writable", [True, False])
def test_a_cache_that_does_not_say_what_was_lost_is_tried_anew(
    tmp_path, dropping, monkeypatch, is_writable
):
    texts = ["some words", "日本 and words, 日", "more"]
    corpus = read_files("text", write(tmp_path / "corpus", *texts), "")
    before = open_token_cache(corpus, dropping, tmp_path / "cache")
    forget_what_was_lost(tmp_path / "cache")
    files = {path: path.stat() for path in (tmp_path / "cache").rglob("tokens.bin")}
    said = warnings_of(monkeypatch, token_cache)
    if not is_writable:

        def refuse(*_):
            raise PermissionError

        monkeypatch.setattr(token_cache, "write_durably", refuse)
    tries = []
    monkeypatch.setattr(token_cache.logger, "info", tries.append)
    for _ in range(2):
        cache = open_token_cache(corpus, dropping, tmp_path / "cache")
        assert cache.manifest == before.manifest
    assert len(said) == 2
    assert len(tries) == (1 if is_writable else 2)
    assert files == {path: path.stat() for path in (tmp_path / "cache").rglob("tokens.bin")}


def test_of_an_old_cache_no_more_is_read_than_is_enough_to_judge_by(dropping):
    texts = iter(["words and words "] * 10_000)
    tried = try_beginning(made_up(texts, pytest.fail), dropping)
    assert tried.seen == round_trip.SURE_CHARACTERS
    assert len(list(texts)) == 10_000 - tried.seen // 16


def test_an_old_cache_of_text_that_was_dropped_is_refused(tmp_path, dropping, monkeypatch):
    corpus = read_files("text", write(tmp_path / "corpus", JAPANESE), "")
    with monkeypatch.context() as patched:
        patched.setattr(RoundTrip, "require_most", lambda _: None)
        open_token_cache(corpus, dropping, tmp_path / "cache")
    forget_what_was_lost(tmp_path / "cache")
    for _ in range(2):
        with pytest.raises(UserError, match="Most of the text would be lost"):
            open_token_cache(corpus, dropping, tmp_path / "cache")


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
        for _ in ("a new cache", "one of an earlier version"):
            samples = ValidationSet(plan, config.data, tokenizer, None)
            (dataset,) = samples.datasets
            total = samples.token_bytes[dataset._tokens[1:]].sum()
            assert (total == len(text.encode()) * 9) == is_known
            assert math.isnan(total) == (not is_known)
            forget_what_was_lost(tmp_path / "cache")


def test_the_name_of_the_unknown_token_is_no_text_that_came_back(tmp_path):
    made = tokenizers.Tokenizer(models.WordLevel(numbered("<unk>", "a"), unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = saved(tmp_path / "a", made)
    assert tokenizer.decode(encode(tokenizer, "a < u")) == "a <unk> <unk>"
    assert lost_characters(tokenizer, "a < u") == {"<": 1, "u": 1}
