"""What a rank reads: against the order written out by hand, in shares that make a whole; states of
earlier versions lead on to the same samples; ranks that see different data do not train."""

import hashlib
import json
import re

import numpy as np
import pytest
import torch
from helpers.forking import train
from helpers.launching import data_loader, write_corpus

from torchtrain.config.plans import DEBUG_TOKENIZER
from torchtrain.config.schema import Data, Training
from torchtrain.datasets.data_state import upgrade
from torchtrain.datasets.loader import build_dataset
from torchtrain.datasets.packing import best_fit, find_segments
from torchtrain.datasets.samples import PackedDataset
from torchtrain.datasets.token_cache import Manifest, TokenCache
from torchtrain.datasets.tokenizer import load_tokenizer
from torchtrain.errors import UserError
from torchtrain.loss import count_valid

TOKENIZER = load_tokenizer(DEBUG_TOKENIZER)


def dataset_of(tokens: np.ndarray, seq_len: int, seed: int = 0, **options) -> PackedDataset:
    manifest = Manifest(
        source="made up",
        files=1,
        documents=1,
        bytes=None,
        tokens=len(tokens),
        dtype=tokens.dtype.name,
        corpus_fingerprint="c",
        tokenizer_fingerprint="t",
    )
    return PackedDataset(TokenCache(manifest, tokens), seq_len, seed, **options)


# Content and order


def by_hand(sample: int, n: int, seed: int) -> int:
    """The sequence that is sample `sample`, in Python's own integers."""
    epoch, value = divmod(sample, n)
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    text = f"torchtrain data order {seed} {epoch}"
    digest = hashlib.blake2b(text.encode(), digest_size=64).digest()
    keys = [int.from_bytes(digest[at : at + 8], "little") for at in range(0, 64, 8)]
    while True:
        left, right = divmod(value, 2**half)
        for key in keys:
            mixed = right ^ key
            mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9 % 2**64
            mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB % 2**64
            mixed = (mixed ^ mixed >> 31) % 2**half
            left, right = right, left ^ mixed
        value = left * 2**half + right
        if value < n:
            return value


@pytest.mark.parametrize(("n_tokens", "seq_len", "seed"), [(401, 4, 0), (1000, 7, 3), (90, 32, 9)])
def test_every_sample_is_the_stretch_of_tokens_that_its_number_says(n_tokens, seq_len, seed):
    tokens = np.random.default_rng(seed).integers(0, 50, n_tokens).astype(np.uint16)
    dataset = dataset_of(tokens, seq_len, seed)
    n = (n_tokens - 1) // seq_len
    loader = data_loader(dataset, 12, 0, 1, 4)
    for step in range(1, 3 + 2 * n // 12):
        for number, batch in enumerate(loader.step_batches(step)):
            first = 12 * (step - 1) + 4 * number
            assert batch.sample_ids == list(range(first, first + 4))
            for index, sample in enumerate(batch.sample_ids):
                start = by_hand(sample, n, seed) * seq_len
                assert batch.tokens[index].tolist() == tokens[start : start + seq_len].tolist()
                expected = tokens[start + 1 : start + seq_len + 1].tolist()
                assert batch.labels[index].tolist() == expected


@pytest.mark.parametrize("degree", [1, 2, 3, 4, 6, 8, 12, 24])
@pytest.mark.parametrize("streams", [None, 1, 5, 8])
def test_shares_of_the_ranks_are_disjoint_and_complete(tmp_path, degree, streams):
    training = {"dataset": "text", "dataset_path": str(write_corpus(tmp_path / "c", 8))}
    data = {"cache_folder": str(tmp_path)}
    if streams is not None:
        data |= {"streaming": True, "streams": streams}
    seen = []
    for rank in range(degree):
        dataset = build_dataset(Training(seq_len=8, **training), Data(**data), TOKENIZER, 0)
        loader = data_loader(dataset, 24, rank, degree, 1)
        for step in (1, 2):
            own = [sample for batch in loader.step_batches(step) for sample in batch.sample_ids]
            assert len(own) == 24 // degree
            assert all(24 * (step - 1) <= sample < 24 * step for sample in own)
            seen += own
    assert sorted(seen) == list(range(48))


def test_a_label_of_0_is_valid_and_the_padding_of_the_last_sequence_is_not():
    tokens = np.array([5, 0, 0, 7, 0, 9], dtype=np.uint16)
    dataset = dataset_of(tokens, 4, keep_rest=True)
    (batch,) = data_loader(dataset, 2, 0, 1, 2, (1, 2)).step_batches(1)
    rows = sorted(zip(batch.tokens.tolist(), batch.labels.tolist(), strict=True), reverse=True)
    assert rows == [([5, 0, 0, 7], [0, 0, 7, 0]), ([0, 9, 0, 0], [9, -100, -100, -100])]
    assert sorted(count_valid(batch.labels).tolist()) == [1, 4]


def test_under_masking_the_label_at_a_border_is_not_valid():
    # BOS 1, EOS 2: documents at 0, 4 and 7; the last label begins another one.
    tokens = np.array([1, 8, 9, 2, 1, 0, 2, 1, 2, 1], dtype=np.uint16)
    plain, masked = (
        data_loader(dataset_of(tokens, 9), 1, 0, 1, 1, separators).step_batches(1)[0]
        for separators in (None, (1, 2))
    )
    assert plain.labels.tolist() == [[8, 9, 2, 1, 0, 2, 1, 2, 1]]
    assert masked.labels.tolist() == [[8, 9, 2, -100, 0, 2, -100, 2, -100]]
    assert masked.documents.tolist() == [[0, 0, 0, 0, 4, 4, 4, 7, 7]]
    assert plain.documents is None
    assert torch.equal(plain.tokens, masked.tokens)


@pytest.mark.parametrize("seed", range(20))
def test_best_fit_keeps_its_rules(seed):
    """Replayed by looking at all sequences each time: the longest first, always where the least
    space is left that is enough, a new sequence only where no space is."""
    numbers = np.random.default_rng(seed)
    capacity = int(numbers.integers(2, 40))
    lengths = numbers.integers(1, capacity + 1, 60)
    chosen = best_fit(lengths, capacity)
    spaces: list[int] = []
    for segment in sorted(range(60), key=lambda index: -lengths[index]):  # stable, as ours is
        length, sequence = lengths[segment], chosen[segment]
        fitting = [space for space in spaces if space >= length]
        if not fitting:
            assert sequence == len(spaces)
            spaces.append(capacity)
        else:
            assert spaces[sequence] == min(fitting)
        spaces[sequence] -= length
    assert min(spaces) >= 0


def test_a_document_of_a_single_token_is_not_packed():
    """There is nothing to predict in it."""
    tokens = np.array([1, 1, 7, 2], dtype=np.uint16)
    (segments,) = find_segments(tokens, 8, bos=1, eos=2)
    assert segments.tolist() == [[1, 3]]


# The data state of earlier versions

CORPUS = "fbe5532cf2c7323260ea6004f33475017c5e7781248e1f5796e0fe7bf452e6a9"
IDS = "09e9562219e064dacdfabc5713d4c3955352774a5b186415772ebacd4df88c09"
COMMON = {
    "samples_consumed": 36,
    "origin": [0, 0],
    "global_batch_size": 12,
    "tokenizer": "b4f6daf1da2252ec248ec0910f03ec3406b9c1f9d80270881e6a7229a55aac1f",
    "seq_len": 16,
}
# Of each kind: the state after step 3 as the version before data_state.py wrote it, and of the
# samples that it read in step 4 their numbers, first tokens and last labels.
BEFORE = {
    "cache": (
        {"positions": {}, "source": "text /a", "corpus": CORPUS, "seed": 7, "n_samples": 179},
        [36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47],
        [1320, 1963, 373, 1969, 539, 1976, 1, 1959, 1963, 2014, 1986, 2014],
        [285, 1970, 1992, 1973, 1970, 2014, 2014, 269, 2014, 1959, 1192, 1992],
    ),
    "best fit": (
        {
            "positions": {},
            "source": "text /a",
            "corpus": CORPUS,
            "seed": 7,
            "n_samples": 180,
            "packing": "best_fit 1",
        },
        [36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47],
        [285, 1970, 1992, 1973, 539, 1976, 2014, 1959, 1964, 1963, 1192, 2014],
        [2014, 1971, 1975, 1986, 1970, 2014, 727, 269, 1963, 1986, 539, 1992],
    ),
    "mixture": (
        {
            "positions": {},
            "source": "mixture of text /a, tokens /ids.bin",
            "weight of source 1": "3/4",
            "corpus of source 1": CORPUS,
            "seed": 7,
            "n_samples of source 1": 179,
            "weight of source 2": "1/4",
            "corpus of source 2": IDS,
            "n_samples of source 2": 62,
        },
        [36, 37, 38, 39, 40, 41, 42, 43, 44, 45, 46, 47],
        [373, 368, 99, 1992, 1970, 1110, 195, 354, 1973, 1964, 979, 1986],
        [400, 2014, 115, 1964, 1971, 1063, 211, 1975, 1986, 1971, 995, 2014],
    ),
    "streams": (
        {
            "positions": {
                "stream 0": [12, 0, 0, 0, 0, 192],
                "stream 1": [12, 0, 1, 1, 0, 192],
                "stream 2": [12, 0, 2, 2, 0, 192],
            },
            "source": "text /a",
            "corpus": "9dc925ec46bc6fa43df2bffcae20df7b",
            "streams": 3,
        },
        [36, 39, 42, 45, 37, 40, 43, 46, 38, 41, 44, 47],
        [1992, 1976, 1975, 1986, 430, 1964, 1963, 1986, 539, 310, 263, 1971],
        [1976, 1975, 1986, 549, 1964, 1963, 1986, 430, 310, 263, 1971, 1963],
    ),
    "mixture of streams": (
        {
            "positions": {
                "stream 0 of source 1": [9, 0, 0, 0, 0, 144],
                "stream 1 of source 1": [9, 0, 1, 1, 0, 144],
                "stream 0 of source 3": [5, 0, 0, 0, 0, 80],
                "stream 1 of source 3": [4, 0, 1, 1, 0, 64],
            },
            "source": "mixture of text /a, tokens /ids.bin, text /b",
            "weight of source 1": "1/2",
            "corpus of source 1": "9dc925ec46bc6fa43df2bffcae20df7b",
            "streams of source 1": 2,
            "weight of source 2": "1/4",
            "corpus of source 2": IDS,
            "seed": 7,
            "n_samples of source 2": 62,
            "weight of source 3": "1/4",
            "corpus of source 3": "6af5d813971e2075cabb8ec62c815339",
            "streams of source 3": 2,
        },
        [37, 41, 45, 36, 40, 44, 39, 43, 47, 42, 38, 46],
        [99, 195, 979, 329, 1983, 1986, 1063, 1963, 1973, 305, 1971, 1965],
        [115, 211, 995, 1983, 1986, 1992, 1963, 1973, 430, 1973, 1965, 374],
    ),
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """[training] and [data] of the kinds, over the files that the states were made of."""
    folder = tmp_path_factory.mktemp("sources")
    a, b = (write_corpus(folder / name, 3 - seed, seed) for seed, name in enumerate("ab"))
    ids = folder / "ids.bin"
    np.arange(3, 1003, dtype=np.uint16).tofile(ids)
    text = {"dataset": "text", "dataset_path": str(a)}
    cache = {"cache_folder": str(folder / "cache")}
    mixed = [f"text {a} = 2", f"tokens {ids} = 1", f"text {b} = 1"]
    return {
        "cache": (text, cache),
        "best fit": (text, {**cache, "packing": "best_fit"}),
        "mixture": ({}, {**cache, "mixture": [f"text {a} = 3", f"tokens {ids} = 1"]}),
        "streams": (text, {"streaming": True, "streams": 3}),
        "mixture of streams": ({}, {**cache, "mixture": mixed, "streaming": True, "streams": 2}),
    }


def loader_of(sources, kind, degree=1, rank=0, global_batch=12):
    training, data = sources[kind]
    dataset = build_dataset(Training(seq_len=16, **training), Data(**data), TOKENIZER, 7)
    return data_loader(dataset, global_batch, rank, degree, global_batch // degree)


@pytest.mark.parametrize("degree", [1, 2])
@pytest.mark.parametrize("kind", BEFORE)
def test_a_state_of_the_earlier_format_leads_on_to_the_same_samples(sources, kind, degree):
    saved, ids, first_tokens, last_labels = BEFORE[kind]
    found_ids, found_tokens, found_labels = [], [], []
    for rank in range(degree):
        loader = loader_of(sources, kind, degree, rank)
        loader.resume({**COMMON, **saved}, 3)
        (batch,) = loader.step_batches(4)
        found_ids += batch.sample_ids
        found_tokens += batch.tokens[:, 0].tolist()
        found_labels += batch.labels[:, -1].tolist()
    assert (found_ids, found_tokens, found_labels) == (ids, first_tokens, last_labels)


@pytest.mark.parametrize("kind", BEFORE)
def test_a_state_of_the_earlier_format_is_todays_after_its_steps(sources, kind):
    loader = loader_of(sources, kind)
    for step in (1, 2, 3):
        loader.step_batches(step)
    today = json.loads(json.dumps(loader.state(3, [loader.positions()])))
    upgraded = upgrade({**COMMON, **BEFORE[kind][0]})
    assert {**upgraded, "name": None} == {**today, "name": None}
    assert upgrade(today) == today


def test_old_positions_are_in_the_order_of_their_numbers():
    positions = {f"stream {n} of source {s}": [n, s, 0, 0, 0, 0] for n in (10, 9) for s in (11, 2)}
    found = upgrade({**COMMON, "positions": positions})["positions"]
    assert [(position["epoch"], position["sample"]) for position in found] == [
        (2, 9), (2, 10), (11, 9), (11, 10),
    ]  # fmt: skip


def test_the_origin_of_an_old_state_is_kept(sources):
    """Of a run that resumed after step 2, at sample 40, with another global batch size."""
    loader = loader_of(sources, "cache")
    saved = {**COMMON, **BEFORE["cache"][0], "origin": [2, 40], "samples_consumed": 76}
    loader.resume(saved, 5)
    assert loader.step_batches(6)[0].sample_ids == list(range(76, 88))
    without = {key: value for key, value in saved.items() if key != "origin"}
    with pytest.raises(UserError, match="consumed so far are 76 in the checkpoint, 60 by its step"):
        loader_of(sources, "cache").resume(without, 5)


def test_an_old_state_of_another_mixture_is_refused_by_the_same_names(sources):
    saved = {**COMMON, **BEFORE["mixture"][0], "weight of source 2": "1/2"}
    with pytest.raises(
        UserError,
        match=r"weight of source 2 \(data\.mixture\): 1/2 in the checkpoint, 1/4 now",
    ):
        loader_of(sources, "mixture").resume(saved, 3)


# Ranks

DIFFERENT = """
import os
from torchtrain.catalog.datasets import register_corpus

@register_corpus("different")
def different(path):
    for number in range(100):
        yield f"document {number} of rank {os.environ.get('RANK')} " * 20
"""


@pytest.mark.slow
def test_ranks_that_see_different_corpora_do_not_train(tmp_path):
    file = tmp_path / "my_different.py"
    file.write_text(DIFFERENT)
    options = {
        "experimental.custom_import": file,
        "training.dataset": "different",
        "data.cache_folder": tmp_path / "cache",
        "job.dump_folder": tmp_path / "out",
    }
    output = train(2, options, expect=2)
    (error,) = re.findall("error: .*", output)
    assert re.match(
        r"error: the corpus, as each rank reads it, differs between ranks: corpus=(\w+) .* on "
        r"rank 0, corpus=(?!\1)\w+ .* on rank 1",
        error,
    )
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
