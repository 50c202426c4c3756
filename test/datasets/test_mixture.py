"""Mixtures: every prefix holds each source's share, and each source is read as it is alone."""

import json
from fractions import Fraction

import numpy as np
import pytest
from helpers.launching import data_loader
from helpers.tokens import decode
from hypothesis import given, settings
from hypothesis import strategies as st

from torchtrain.config.schema import Data, Training
from torchtrain.config.sources import plan_sources
from torchtrain.config_manager import JobConfig
from torchtrain.datasets.loader import build_dataset
from torchtrain.datasets.mixture import Mixture, balanced_pattern
from torchtrain.datasets.samples import PackedDataset
from torchtrain.datasets.token_cache import Manifest, TokenCache
from torchtrain.datasets.tokenizer import load_tokenizer
from torchtrain.errors import UserError
from torchtrain.logging_utils import init_logging

SEQ_LEN = 4


def source(number: int, n_samples: int, seed: int = 0, corpus: str = "c") -> PackedDataset:
    """A dataset whose tokens say where they are, and of which source."""
    tokens = np.arange(n_samples * SEQ_LEN + 1, dtype=np.uint32) + 1_000_000 * number
    manifest = Manifest(
        source=f"source {number}",
        files=1,
        documents=1,
        bytes=9,
        tokens=len(tokens),
        dtype="uint32",
        corpus_fingerprint=f"{corpus}{number}",
        tokenizer_fingerprint="t",
    )
    return PackedDataset(TokenCache(manifest, tokens), SEQ_LEN, seed)


def mixture(weights: list[int], sizes: list[int], **given) -> Mixture:
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    return Mixture(
        [source(number, size, **given) for number, size in enumerate(sizes)], shares, SEQ_LEN
    )


weights = st.lists(st.integers(1, 60), min_size=1, max_size=7)


@settings(max_examples=150, deadline=None)
@given(weights)
def test_every_prefix_is_within_one_sample_of_the_weights(weights):
    shares = [Fraction(weight, sum(weights)) for weight in weights]
    pattern = balanced_pattern(shares)
    counts = np.cumsum(pattern[:, None] == np.arange(len(weights)), axis=0)  # [P, k]
    steps = np.arange(1, len(pattern) + 1)[:, None]
    off = np.abs(counts * sum(weights) - steps * np.array(weights))  # times the sum of the weights
    k = len(weights)
    assert (off * (2 * k - 2) <= sum(weights) * (2 * k - 3)).all() if k > 1 else (off == 0).all()
    assert counts[-1].tolist() == [share * len(pattern) for share in shares], "a period ends even"


def test_pattern_is_the_one_of_earlier_versions():
    """A resume under a later version must read on in the same order: these may never change."""
    pattern = balanced_pattern([Fraction(7, 10), Fraction(2, 10), Fraction(1, 10)])
    assert pattern.tolist() == PATTERN_7_2_1


PATTERN_7_2_1 = [0, 0, 1, 0, 0, 2, 0, 0, 1, 0]


@settings(max_examples=60, deadline=None)
@given(weights, st.integers(0, 10**9), st.data())
def test_source_and_number_follow_from_the_sample_alone(weights, start, data):
    mixed = mixture(weights, [5] * len(weights))
    ids = np.arange(start, start + 50)
    sources, numbers = mixed.locate(ids)
    for s in range(len(weights)):
        first = mixed.count(s, start)
        assert numbers[sources == s].tolist() == list(range(first, mixed.count(s, start + 50))), (
            "none lost or doubled"
        )
        assert abs(first - Fraction(weights[s], sum(weights)) * start) < 1
    some = data.draw(st.lists(st.integers(0, 49), max_size=5))
    assert [part.tolist() for part in mixed.locate(ids[some])] == [
        sources[some].tolist(),
        numbers[some].tolist(),
    ]


def test_each_source_is_read_as_it_is_alone():
    mixed = mixture([5, 3, 1], [7, 11, 3], seed=4)
    ids = np.arange(400)
    tokens, labels = mixed.read(ids)
    assert tokens.dtype == labels.dtype == np.int64
    assert (labels == tokens + 1).all()
    sources, _ = mixed.locate(ids)
    assert (tokens[:, 0] // 1_000_000 == sources).all()
    for number, size in enumerate([7, 11, 3]):
        of_source = tokens[sources == number]
        alone, _ = source(number, size, seed=4).read(np.arange(len(of_source)))
        assert (of_source == alone).all()


def test_epochs_are_told_before_and_during_the_run(capsys):
    mixed = mixture([3, 1], [6, 2])
    assert mixed.epochs(16) == {"source 0": 2.0, "source 1": 2.0}
    lines = data_loader(mixed, 8, 0, 1, 8).describe(steps=3).splitlines()
    assert lines[0] == "2 sources, in a pattern of 4 samples"
    assert "75.00% source 0" in lines[1]
    assert lines[1].endswith("the run takes 3.00 epochs")
    assert lines[2].endswith("the run takes 3.00 epochs")
    init_logging()
    loader = data_loader(
        mixed, 4, 0, 1, 4
    )  # three samples of the first source a step, one of the second
    for step in range(1, 6):
        loader.step_batches(step)
    printed = capsys.readouterr().out.splitlines()
    said = [line[line.index("step") :] for line in printed]
    assert said == [
        "step 3: epoch 2 of source 0 begins",
        "step 3: epoch 2 of source 1 begins",
        "step 5: epoch 3 of source 0 begins",
        "step 5: epoch 3 of source 1 begins",
    ]


def test_identity_holds_weights_and_every_source():
    plain = mixture([3, 1], [6, 2])
    others = [mixture([2, 1], [6, 2]), mixture([3, 1], [6, 3]), mixture([3, 1], [6, 2], seed=1)]
    others += [
        mixture([3, 1], [6, 2], corpus="d"),
        mixture([1, 3], [6, 2]),
        mixture([3, 1, 1], [6, 2, 2]),
    ]
    assert len({dataset.fingerprint for dataset in [plain, *others]}) == 7
    assert mixture([6, 2], [6, 2]).fingerprint == plain.fingerprint
    assert json.loads(json.dumps(plain.identity())) == plain.identity()
    saved = data_loader(plain, 4, 0, 1, 4).state(3)
    with pytest.raises(
        UserError, match=r"weight of source 1 \(data\.mixture\): 3/4 in the checkpoint, 2/3 now"
    ):
        data_loader(others[0], 4, 0, 1, 4).resume(saved, 3)
    with pytest.raises(
        UserError, match=r"corpus of source 3 \(data\.mixture\): none in the checkpoint, c2 now"
    ):
        data_loader(others[5], 4, 0, 1, 4).resume(saved, 3)


# The option


def planned(*entries: str):
    return plan_sources(Training(), Data(mixture=list(entries)))


def test_entries_are_read_exactly():
    first, second, third = planned(
        "jsonl /a b/=c:d.jsonl = 0.1", "python_stdlib=2/5", "text x = 00.5"
    )
    assert (first.dataset, first.path, first.share) == ("jsonl", "/a b/=c:d.jsonl", Fraction(1, 10))
    assert (second.dataset, second.path, second.share) == ("python_stdlib", None, Fraction(4, 10))
    assert (third.path, third.share) == ("x", Fraction(1, 2))
    assert [source.share for source in planned("a = 7", "b = 2", "c = 0.9")] == [
        Fraction(70, 99),
        Fraction(20, 99),
        Fraction(9, 99),
    ]


NO_WEIGHTS = ("0", "0.0", "0/3", "1/0", "-1", "nan", "inf", "1e3", "1e999999999", "one", "")
NO_ENTRIES = ["python_stdlib", "= 1", *(f"a = {weight}" for weight in NO_WEIGHTS)]


@pytest.mark.parametrize("entry", NO_ENTRIES)
def test_entries_that_are_none_are_refused(entry):
    with pytest.raises(UserError, match=r'must be "dataset = weight" or "dataset path = weight"'):
        planned(entry)


def test_weights_too_fine_are_refused_with_ones_that_do():
    with pytest.raises(UserError, match=r"Nearby weights that do not: (\d+), (\d+)") as caught:
        planned("a = 123456789", "b = 987654321")
    near = str(caught.value).rpartition(": ")[2].split(", ")
    shares = [
        source.share
        for source in planned(
            *(f"{name} = {weight}" for name, weight in zip("ab", near, strict=True))
        )
    ]
    assert abs(shares[0] - Fraction(123456789, 123456789 + 987654321)) < 1e-4


def refused(*options: str) -> str:
    with pytest.raises(UserError) as caught:
        JobConfig().parse_args([*options], world_size=1)
    return str(caught.value)


def test_config_names_every_fault_of_a_mixture(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "listed twice" in refused("--data.mixture", "text .=1,text . = 2")
    report = refused(
        "--data.mixture", "text nowhere=1,jsnl x=1,text=1", "--training.dataset_path", "x"
    )
    assert "3 faults" in report
    for part in ("'nowhere'", "jsnl", "needs a path (after its name)"):
        assert part in report
    config = JobConfig().parse_args(["--data.mixture", "text .=1,python_stdlib=3"], world_size=1)
    assert config.data.mixture == ["text .=1", "python_stdlib=3"]


def test_built_mixture_reads_each_source_by_its_weight(tmp_path):
    tokenizer = load_tokenizer(
        JobConfig().model.tokenizer_path or "torchtrain/datasets/debug_tokenizer.model"
    )
    for name in "ab":
        (tmp_path / name).write_text(f"{name}{name} " * 300)
    data = Data(
        cache_folder=str(tmp_path / "cache"),
        mixture=[f"text {tmp_path / 'a'} = 2", f"text {tmp_path / 'b'} = 1"],
    )
    dataset = build_dataset(Training(seq_len=8), data, tokenizer, seed=0)
    assert isinstance(dataset, Mixture)
    tokens, _ = dataset.read(np.arange(30))
    of_a = [decode(tokenizer, row.tolist()).count("a") > 2 for row in tokens]
    assert sum(of_a) == 20
