"""Which samples a step reads, in which order, depends on (corpus, tokenizer, seq_len, seed, step)
alone."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.launching import data_loader
from helpers.tokens import encode
from hypothesis import given, settings
from hypothesis import strategies as st

from torchtrain.config.schema import Data, Training
from torchtrain.datasets import loader
from torchtrain.datasets.data_order import locate, permuted
from torchtrain.datasets.loader import build_dataset
from torchtrain.datasets.samples import PackedDataset
from torchtrain.datasets.token_cache import Manifest, TokenCache
from torchtrain.datasets.tokenizer import load_tokenizer
from torchtrain.errors import UserError

DEBUG_MODEL = Path(loader.__file__).with_name("debug_tokenizer.model")


def counting_dataset(
    n_tokens: int, seq_len: int, seed: int = 0, corpus: str = "c", tokenizer: str = "t"
):
    """A dataset whose token at position p is p: what was read says where it came from."""
    manifest = Manifest(
        source="counting",
        files=1,
        documents=1,
        bytes=n_tokens,
        tokens=n_tokens,
        dtype="uint32",
        corpus_fingerprint=corpus,
        tokenizer_fingerprint=tokenizer,
    )
    return PackedDataset(TokenCache(manifest, np.arange(n_tokens, dtype=np.uint32)), seq_len, seed)


# The permutation


@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_permutation_of_every_small_size_is_one(epoch):
    for n in range(1, 300):
        assert sorted(permuted(np.arange(n), n, seed=3, epoch=epoch)) == list(range(n)), n


@pytest.mark.parametrize("n", [65_535, 65_536, 65_537, 1_000_003])
def test_permutation_of_a_large_size_is_one(n):
    assert (np.bincount(permuted(np.arange(n), n, seed=1, epoch=2), minlength=n) == 1).all()


def test_permutation_of_a_huge_size_stays_inside_and_collides_nowhere():
    n = 2**40 + 12_345
    places = permuted(np.arange(n - 100_000, n), n, seed=0, epoch=0)
    assert len(set(places.tolist())) == 100_000
    assert places.min() >= 0
    assert places.max() < n
    assert abs(places.mean() / n - 0.5) < 0.01, "spread over the whole range"


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(1, 10**12),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 10**6),
    data=st.data(),
)
def test_permuting_a_batch_equals_permuting_each(n, seed, epoch, data):
    indices = data.draw(st.lists(st.integers(0, n - 1), min_size=1, max_size=8))
    together = permuted(np.array(indices), n, seed, epoch)
    assert together.tolist() == [
        permuted(np.array([index]), n, seed, epoch)[0] for index in indices
    ]


def test_permutation_depends_on_seed_and_epoch():
    keys = [(0, 0), (1, 0), (0, 1), (1, 1), (2**63 - 1, 0), (12, 3), (1, 23)]
    orders = {tuple(permuted(np.arange(100), 100, seed, epoch)) for seed, epoch in keys}
    assert len(orders) == len(keys)
    assert tuple(range(100)) not in orders


def test_every_order_of_four_is_reached():
    orders = {tuple(permuted(np.arange(4), 4, seed, 0)) for seed in range(1000)}
    assert len(orders) == 24


def test_order_is_the_one_of_earlier_versions():
    """A later version must resume in the same order: these numbers may never change."""
    assert permuted(np.arange(10), 10, seed=0, epoch=0).tolist() == [4, 5, 9, 0, 1, 8, 7, 6, 2, 3]
    assert permuted(np.arange(3), 10**9, seed=42, epoch=5).tolist() == [
        716249611,
        632626306,
        608599836,
    ]


def test_each_epoch_visits_every_sample_once_in_an_order_of_its_own():
    n = 37
    places = locate(np.arange(4 * n), n, seed=5).reshape(4, n)
    assert all(sorted(epoch) == list(range(n)) for epoch in places)
    assert len({tuple(epoch) for epoch in places}) == 4
    assert all(
        places[epoch].tolist() == permuted(np.arange(n), n, seed=5, epoch=epoch).tolist()
        for epoch in range(4)
    )


# Sequences


def test_sequences_cover_the_corpus_and_labels_are_the_next_tokens():
    dataset = counting_dataset(n_tokens=103, seq_len=10)
    assert dataset.n_samples == 10
    tokens, labels = dataset.read(np.arange(dataset.n_samples))
    assert tokens.dtype == labels.dtype == np.int64
    assert sorted(tokens.ravel()) == list(range(100))
    assert (labels == tokens + 1).all()
    assert "10 samples of 10 tokens (the last 2 tokens dropped)" in dataset.describe(1)


@pytest.mark.parametrize(("n_tokens", "n_samples"), [(11, 1), (20, 1), (21, 2), (22, 2)])
def test_a_sequence_needs_one_token_more_than_it_holds(n_tokens, n_samples):
    dataset = counting_dataset(n_tokens, seq_len=10)
    assert dataset.n_samples == n_samples
    dataset.read(np.arange(n_samples))


def test_corpus_shorter_than_a_sequence_is_refused():
    with pytest.raises(UserError, match=r"10 tokens, but training\.seq_len = 10 needs 11"):
        counting_dataset(10, seq_len=10)


# Steps, ranks and accumulation


def consumed(dataset: PackedDataset, global_batch: int, degree: int, microbatch: int, steps: range):
    """Sample ids, tokens and labels of `steps`, put together over microbatches and ranks."""
    ids, tokens, labels = [], [], []
    for step in steps:
        for rank in range(degree):
            for batch in data_loader(dataset, global_batch, rank, degree, microbatch).step_batches(
                step
            ):
                assert batch.tokens.shape == batch.labels.shape == (microbatch, dataset.seq_len)
                assert batch.tokens.is_contiguous()
                assert batch.labels.is_contiguous()
                ids += batch.sample_ids
                tokens.append(batch.tokens)
                labels.append(batch.labels)
    return ids, torch.cat(tokens), torch.cat(labels)


@pytest.mark.parametrize("degree", [1, 2, 3, 4])
@pytest.mark.parametrize("accumulation", [1, 2, 3, 6])
def test_ranks_and_accumulation_change_nothing(degree, accumulation):
    dataset = counting_dataset(n_tokens=1001, seq_len=20)
    steps = range(1, 6)  # 360 samples: over two borders of epochs of 50 samples
    ids, tokens, labels = consumed(dataset, 72, degree, 72 // degree // accumulation, steps)
    expected_ids, expected_tokens, expected_labels = consumed(dataset, 72, 1, 72, steps)
    assert ids == expected_ids == list(range(5 * 72))
    assert torch.equal(tokens, expected_tokens)
    assert torch.equal(labels, expected_labels)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    n_tokens=st.integers(9, 500),
    degrees=st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=1, max_size=4),
    data=st.data(),
)
def test_a_run_interrupted_anywhere_and_resumed_on_other_ranks_reads_the_same(
    n_tokens, degrees, data
):
    dataset = counting_dataset(n_tokens, seq_len=8, seed=n_tokens)
    ids, tokens, step = [], [], 1
    for degree in degrees:
        microbatch = data.draw(
            st.sampled_from([size for size in range(1, 13) if 12 // degree % size == 0])
        )
        stop = step + data.draw(st.integers(1, 3))
        more_ids, more_tokens, _ = consumed(dataset, 12, degree, microbatch, range(step, stop))
        ids, tokens, step = ids + more_ids, [*tokens, more_tokens], stop
    assert ids == list(range(12 * (step - 1)))
    assert torch.equal(torch.cat(tokens), torch.from_numpy(dataset.read(np.arange(len(ids)))[0]))


def test_global_batch_larger_than_the_corpus_runs_across_epochs():
    dataset = counting_dataset(n_tokens=31, seq_len=10)  # three samples
    _, tokens, _ = consumed(dataset, 12, 2, 3, range(1, 2))
    starts = tokens[:, 0].reshape(4, 3)
    assert all(sorted(epoch.tolist()) == [0, 10, 20] for epoch in starts)


# The data state


def test_state_is_json_and_the_same_on_every_rank_and_degree():
    dataset = counting_dataset(1001, seq_len=20)
    states = [
        data_loader(dataset, 12, rank, degree, 1).state(7)
        for degree in (1, 2, 3, 4)
        for rank in range(degree)
    ]
    assert all(state == states[0] for state in states)
    assert states[0]["samples_consumed"] == 84
    assert json.loads(json.dumps(states[0])) == states[0]


@pytest.mark.parametrize(
    ("other", "batch", "named"),
    [
        ({"corpus": "d"}, 12, "the corpus' contents"),
        (
            {"tokenizer": "u"},
            12,
            r"the tokenizer \(model\.tokenizer_path\): t in the checkpoint, u now",
        ),
        ({"seq_len": 10}, 12, r"training\.seq_len: 20 in the checkpoint, 10 now"),
        ({"seed": 1}, 12, r"debug\.seed: 0 in the checkpoint, 1 now"),
        ({"n_tokens": 981}, 12, "number of samples in an epoch: 50 in the checkpoint, 49 now"),
        ({}, 24, r"training\.global_batch_size: 12 in the checkpoint, 24 now"),
    ],
)
def test_resume_in_another_order_is_refused_by_name(other, batch, named):
    given = {"n_tokens": 1001, "seq_len": 20}
    saved = json.loads(json.dumps(data_loader(counting_dataset(**given), 12, 0, 1, 12).state(5)))
    data_loader(counting_dataset(**given), 12, 1, 2, 3).resume(saved, 5)
    with pytest.raises(UserError, match=named):
        data_loader(counting_dataset(**(given | other)), batch, 0, 1, batch).resume(saved, 5)


def test_resume_names_every_difference_and_a_wrong_position():
    saved = data_loader(counting_dataset(1001, 20), 12, 0, 1, 12).state(5)
    with pytest.raises(UserError) as caught:
        data_loader(counting_dataset(1001, 20, seed=1, tokenizer="u"), 12, 0, 1, 12).resume(
            saved, 5
        )
    assert "debug.seed" in str(caught.value)
    assert "model.tokenizer_path" in str(caught.value)
    with pytest.raises(
        UserError,
        match="not of step 6: the samples consumed so far are 60 in the checkpoint, 72 by",
    ):
        data_loader(counting_dataset(1001, 20), 12, 0, 1, 12).resume(saved, 6)
    with pytest.raises(UserError):
        data_loader(counting_dataset(1001, 20), 12, 0, 1, 12).resume({}, 5)


# From files to batches


def test_built_dataset_reads_the_documents_packed(tmp_path):
    tokenizer = load_tokenizer(DEBUG_MODEL)
    texts = ["def f(x):\r\n\treturn x\n" * 5, "\U0001f600 hello", "third " * 30]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    training = Training(dataset="jsonl", dataset_path=str(tmp_path / "c.jsonl"), seq_len=16)
    data = Data(cache_folder=str(tmp_path / "cache"), text_key="body")
    dataset = build_dataset(training, data, tokenizer, seed=0)
    stream = []
    for text in texts:
        stream += [tokenizer.bos_id, *encode(tokenizer, text), tokenizer.eos_id]
    assert dataset.n_samples == (len(stream) - 1) // 16
    tokens, labels = dataset.read(np.arange(dataset.n_samples))
    expected = {tuple(stream[at : at + 17]) for at in range(0, dataset.n_samples * 16, 16)}
    assert {
        (*row, last[-1]) for row, last in zip(tokens.tolist(), labels.tolist(), strict=True)
    } == expected
    places = locate(np.arange(dataset.n_samples), dataset.n_samples, 0).tolist()
    assert tokens.tolist() == [stream[16 * place : 16 * place + 16] for place in places]


def test_fingerprint_holds_all_that_fixes_the_order():
    given = {"n_tokens": 1001, "seq_len": 20}
    others = [{}, {"corpus": "d"}, {"tokenizer": "u"}, {"seed": 1}, {"seq_len": 10}]
    assert len({counting_dataset(**(given | other)).fingerprint for other in others}) == len(others)
    assert counting_dataset(**given).fingerprint == counting_dataset(**given).fingerprint
