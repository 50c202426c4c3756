"""A run interrupted anywhere and resumed on any ranks reads what the uninterrupted one would."""

import json
import random
import time
from functools import partial

import numpy as np
import pytest
import torch
from helpers.corpora import open_corpus
from helpers.forking import running, train
from helpers.launching import data_loader, metrics, write_corpus
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from torchtrain.config.layout import plan_batch
from torchtrain.config.plans import DEBUG_TOKENIZER
from torchtrain.config.schema import Data, Training
from torchtrain.datasets import read_ahead
from torchtrain.datasets.loader import DataLoader, build_dataset
from torchtrain.datasets.streams import StreamDataset
from torchtrain.datasets.tokenizer import load_tokenizer
from torchtrain.errors import UserError
from torchtrain.logging_utils import init_logging

SEQ_LEN = 8
KINDS = ("cache", "mixture", "token file", "stream", "stream in files", "mixture with streams")


@pytest.fixture(scope="module")
def datasets(tmp_path_factory):
    """datasets(kind, seed=0): a dataset as a run builds it, with epochs of some 100 samples."""
    folder = tmp_path_factory.mktemp("elastic")
    tokenizer = load_tokenizer(DEBUG_TOKENIZER)
    texts = [write_corpus(folder / name, documents=1, seed=seed) for seed, name in enumerate("ab")]
    np.random.default_rng(0).integers(0, 2048, 777).astype(np.uint16).tofile(folder / "ids.bin")
    several = write_corpus(folder / "c", documents=9)
    lines = folder / "hub" / "train-0.jsonl"
    lines.parent.mkdir()
    rng = random.Random(0)
    for number in range(
        6
    ):  # documents of a token or two to some hundreds, which end anywhere in a sequence
        rows = (
            "".join(rng.choices("abcdefgh ij", k=rng.choice([1, 20, 400])))
            for _ in range(17 + number)
        )
        lines.with_name(f"train-{number}.jsonl").write_text(
            "".join(json.dumps({"text": t}) + "\n" for t in rows)
        )
    mixed = [
        f"text {texts[0]} = 3",
        f"text {texts[1]} = 1/2",
        f"tokens {folder / 'ids.bin'} = 1.25",
    ]
    given = {
        "cache": ({"dataset": "text", "dataset_path": str(texts[0])}, {}),
        "mixture": ({}, {"mixture": mixed}),
        "token file": ({"dataset": "tokens", "dataset_path": str(folder / "ids.bin")}, {}),
        "stream": (
            {"dataset": "jsonl", "dataset_path": str(lines)},
            {"streaming": True, "streams": 5},
        ),
        "mixture with streams": (
            {},
            {
                "mixture": [
                    f"text {several} = 2",
                    f"jsonl {lines} = 1.5",
                    f"tokens {folder / 'ids.bin'} = 1/2",
                ],
                "streaming": True,
                "streams": 4,
            },
        ),
    }

    hub = open_corpus(f"{folder}/hub", None, "text", streaming=True)  # once, for that is slow

    def build(kind: str, seed: int = 0, seq_len: int = SEQ_LEN):
        if kind == "stream in files":
            return StreamDataset(hub, tokenizer, seq_len, 3)
        training, data = given[kind]
        data = Data(cache_folder=str(folder / "cache"), **data)
        return build_dataset(Training(seq_len=seq_len, **training), data, tokenizer, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            read_ahead, "STEPS_AHEAD", 1
        )  # what is read ahead at the end of a leg is read in vain
        yield build


def read(loaders: list[DataLoader], step: int) -> tuple[list[int], torch.Tensor]:
    """What all ranks read in `step`: sample ids, and tokens and labels side by side."""
    batches = [batch for each in loaders for batch in each.step_batches(step)]
    rows = torch.cat([torch.cat([batch.tokens, batch.labels], dim=1) for batch in batches])
    return [number for batch in batches for number in batch.sample_ids], rows


def ranks(build, global_batch: int, degree: int, local_batch: int) -> list[DataLoader]:
    """Each with a dataset of its own, which `build` makes."""
    plan = plan_batch(
        Training(global_batch_size=global_batch, local_batch_size=local_batch), degree
    )
    return [
        data_loader(build(), global_batch, rank, degree, plan.microbatch_size)
        for rank in range(degree)
    ]


GLOBAL_BATCH = 24  # sequences, of epochs of some 100
DEGREES = (1, 2, 3, 4, 6, 8)


@pytest.mark.slow
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 3),
    legs=st.lists(
        st.tuples(st.sampled_from(DEGREES), st.integers(1, 24), st.integers(1, 6)),
        min_size=1,
        max_size=4,
    ),
)
def test_interrupted_anywhere_and_resumed_on_any_ranks_reads_the_same(datasets, kind, seed, legs):
    dataset = datasets(kind, seed)
    ids, rows, step, saved = [], [], 0, None
    for degree, local_batch, steps in legs:
        loaders = ranks(partial(datasets, kind, seed), GLOBAL_BATCH, degree, local_batch)
        for each in loaders:
            if saved is not None:
                each.resume(json.loads(saved), step)
        for _ in range(steps):
            step += 1
            more_ids, more_rows = read(loaders, step)
            ids, rows = ids + more_ids, [*rows, more_rows]
        positions = [each.positions() for each in loaders]
        states = {json.dumps(each.state(step, positions)) for each in loaders}
        assert len(states) == 1, "the state is the same on every rank"
        (saved,) = states
    assert sorted(ids) == list(range(GLOBAL_BATCH * step)), "none lost or doubled"
    for before in range(0, len(ids), GLOBAL_BATCH):
        assert set(ids[before:][:GLOBAL_BATCH]) == set(range(before, before + GLOBAL_BATCH)), (
            "each in its step"
        )
    tokens, labels = dataset.read(np.arange(len(ids)))
    expected = torch.from_numpy(np.concatenate([tokens, labels], axis=1))
    assert torch.equal(torch.cat(rows), expected[ids])


@pytest.mark.slow
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    kind=st.sampled_from(KINDS),
    legs=st.lists(
        st.tuples(
            st.sampled_from([6, 12, 24, 60]), st.sampled_from([1, 2, 3, 6]), st.integers(1, 4)
        ),
        min_size=1,
        max_size=5,
    ),
)
def test_an_accepted_change_of_the_global_batch_loses_and_doubles_nothing(datasets, kind, legs):
    dataset = datasets(kind)
    ids, rows, step, saved = [], [torch.empty(0, 2 * SEQ_LEN, dtype=torch.int64)], 0, None
    for global_batch, degree, steps in legs:
        loaders = ranks(partial(datasets, kind), global_batch, degree, 4)
        for each in loaders:
            if saved is not None:
                each.resume(json.loads(saved), step, accept_changes=True)
        for _ in range(steps):
            step += 1
            more_ids, more_rows = read(loaders, step)
            ids, rows = ids + more_ids, [*rows, more_rows]
        saved = json.dumps(loaders[0].state(step, [each.positions() for each in loaders]))
    assert sorted(ids) == list(range(len(ids)))
    tokens, labels = dataset.read(np.arange(len(ids)))
    assert torch.equal(
        torch.cat(rows), torch.from_numpy(np.concatenate([tokens, labels], axis=1))[ids]
    )


def test_a_change_is_refused_with_every_difference_or_accepted_and_told(datasets, capsys):
    init_logging()
    before = ranks(partial(datasets, "cache"), 12, 1, 12)[0]
    saved = json.loads(json.dumps(before.state(5)))
    (now,) = ranks(partial(datasets, "mixture", 1, 4), 24, 1, 24)
    with pytest.raises(UserError) as caught:
        now.resume(saved, 5)
    assert "checkpoint.accept_changed_data = true" in str(caught.value)
    now.resume(saved, 5, accept_changes=True)
    printed = capsys.readouterr().out
    for text in (str(caught.value), printed):
        assert "training.seq_len: 8 in the checkpoint, 4 now" in text
        assert "debug.seed: 0 in the checkpoint, 1 now" in text
        assert "n_samples of source 2 (data.mixture): none in the checkpoint, " in text
        assert "training.global_batch_size: 12 in the checkpoint, 24 now" in text
        assert "the corpus' contents" in text
    assert "Step 6 reads on from global sample 60 of the new order (mixture of text " in printed
    assert now.step_batches(6)[0].sample_ids == list(range(60, 84))
    # From here on it is the run's own order: nothing to accept.
    again = ranks(partial(datasets, "mixture", 1, 4), 24, 2, 1)[1]
    again.resume(json.loads(json.dumps(now.state(8))), 8)
    assert [number for batch in again.step_batches(9) for number in batch.sample_ids] == list(
        range(144, 156)
    )
    with pytest.raises(
        UserError, match=r"training\.global_batch_size: 24 in the checkpoint, 12 now"
    ):
        ranks(partial(datasets, "mixture", 1, 4), 12, 1, 1)[0].resume(now.state(8), 8)


def test_a_state_of_another_step_is_refused_though_changes_are_accepted(datasets):
    loader = ranks(partial(datasets, "cache"), 12, 1, 12)[0]
    with pytest.raises(UserError, match="not of step 6"):
        loader.resume(loader.state(5), 6, accept_changes=True)


def test_a_state_from_before_there_was_an_origin_goes_on(datasets):
    loader = ranks(partial(datasets, "cache"), 12, 1, 12)[0]
    saved = {key: value for key, value in loader.state(5).items() if key != "origin"}
    loader.resume(saved, 5)
    assert loader.step_batches(6)[0].sample_ids == list(range(60, 72))


def test_ranks_that_do_not_divide_the_batch_are_refused_with_the_nearest_that_do():
    with pytest.raises(
        UserError, match="the nearest data-parallel degrees that divide it: 4 and 6"
    ):
        plan_batch(Training(global_batch_size=12, local_batch_size=1), 5)


# Whole runs


def saving(data: dict, folder, **overrides) -> dict:
    return {
        **data,
        "job.dump_folder": folder,
        "training.steps": 6,
        "lr_scheduler.total_steps": 6,
        "checkpoint.enable": True,
        "checkpoint.interval": 1,
        **overrides,
    }


def losses(folder) -> list[float]:
    return [line["loss"] for line in metrics(folder)]


@pytest.fixture(scope="module")
def kinds(tmp_path_factory, data):
    """Options that name a source of each kind."""
    folder = tmp_path_factory.mktemp("kinds")
    other = write_corpus(folder / "other", documents=20, seed=1)
    np.random.default_rng(0).integers(0, 2048, 40_000).astype(np.uint16).tofile(folder / "ids.bin")
    mixed = (
        f"text {data['training.dataset_path']} = 2,text {other} = 1,tokens {folder / 'ids.bin'} = 1"
    )
    mixture = {"training.dataset": None, "training.dataset_path": None, "data.mixture": mixed}
    return {"cache": data, "mixture": {**data, **mixture}}


@pytest.mark.slow
def test_killed_on_2_ranks_then_on_4_then_finished_on_1_is_the_uninterrupted_run(tmp_path, kinds):
    """Of a mixture of streams, of which 2 and 4 ranks share some, and of a token file."""
    streamed = {**kinds["mixture"], "data.streaming": True, "data.streams": 3}
    train(1, saving(streamed, tmp_path / "whole"))
    folder = tmp_path / "killed"
    for number, step in ((2, 2), (4, 4)):
        with running(number, saving(streamed, folder)) as run:
            wait_for_checkpoint(run, folder, step)
            run.kill()
    train(1, saving(streamed, folder))
    assert [line["step"] for line in metrics(folder)] == list(range(1, 7))
    assert losses(folder) == pytest.approx(losses(tmp_path / "whole"), rel=1e-6)


def wait_for_checkpoint(run, folder, step: int) -> None:
    deadline = time.monotonic() + 120
    while not (folder / "checkpoint" / f"step-{step}").exists():
        assert run.alive(), run.printed
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_changed_data_can_be_accepted(tmp_path, kinds):
    train(1, saving(kinds["cache"], tmp_path, **{"training.steps": 2}))
    changed = {"training.global_batch_size": 16, "training.local_batch_size": 4}
    refused = train(1, saving(kinds["mixture"], tmp_path, **changed), expect=2)
    accepted = train(
        2, saving(kinds["mixture"], tmp_path, **changed, **{"checkpoint.accept_changed_data": True})
    )
    for output in (refused, accepted):
        assert "training.global_batch_size: 8 in the checkpoint, 16 now" in output
        assert "the corpus' contents" in output
    assert "reads on from global sample 16 of the new order (mixture of text " in accepted
    assert len(metrics(tmp_path)) == 6
