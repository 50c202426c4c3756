"""Validation: what is held out, what the numbers are, on every layout; training is undisturbed."""

import hashlib
import json
import math
from functools import cache, partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import forking
from helpers.launching import metrics, options, write_corpus
from helpers.tokens import encode
from hypothesis import given, settings
from hypothesis import strategies as st

import train
from torchtrain import ranks
from torchtrain.config.plans import DEBUG_TOKENIZER, plan_run
from torchtrain.config.sources import plan_validation_sources
from torchtrain.config_manager import JobConfig
from torchtrain.datasets.corpora import BadRow, Corpus, Document, split_corpus
from torchtrain.datasets.loader import DataLoader, build_dataset
from torchtrain.datasets.tokenizer import load_tokenizer
from torchtrain.errors import UserError
from torchtrain.logging_utils import init_logging
from torchtrain.metrics import Stopwatch
from torchtrain.models.llama import Transformer
from torchtrain.set_up import set_up
from torchtrain.tools import prepare
from torchtrain.validation import ValidationSet

ON = {"validation.enable": True, "validation.held_out_share": 0.1}


def open_data(config, tokenizer):
    """What `config` trains on, and what it validates on."""
    dataset = build_dataset(config.training, config.data, tokenizer, 0, config.validation)
    plan = plan_run(config, 1, tokenizer_size=tokenizer.vocab_size)
    return dataset, ValidationSet(plan.validation, config.data, tokenizer, None)


def digest(text):
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def corpus_of(*rows):
    return Corpus(
        "made up",
        [],
        [lambda: (Document(row, "here") if isinstance(row, str) else row for row in rows)],
    )


def sides(share, *rows):
    return [
        [document.text for document in split_corpus(corpus_of(*rows), share, side).documents()]
        for side in ("training", "validation")
    ]


# ---- what is held out ----


@pytest.mark.slow
@settings(deadline=None)
@given(st.lists(st.text(max_size=3), min_size=2, max_size=60), st.floats(1e-9, 1 - 1e-9))
def test_a_split_parts_the_documents_by_their_hash(texts, share):
    distinct = {text for text in texts if text}
    if len(distinct) < 2:
        with pytest.raises(UserError, match="fewer than two distinct documents"):
            sides(share, *texts)
        return
    kept, held_out = sides(share, *texts)
    assert sorted(kept + held_out) == sorted(filter(None, texts)), "none is lost, none is in both"
    assert not set(kept) & set(held_out), "identical ones are on one side"
    assert kept == [text for text in texts if text in set(kept)], "the order stays"
    assert held_out == [text for text in texts if text in set(held_out)]
    lowest, highest = min(distinct, key=digest), max(distinct, key=digest)
    assert lowest in held_out
    assert highest in kept
    for text in distinct - {lowest, highest}:
        assert (text in held_out) == (digest(text) < int(share * 2**64))


def test_a_document_stays_on_its_side_when_others_come():
    texts = [f"document {number}" for number in range(3000)]
    _, few = sides(0.01, *texts[:1500])
    _, all_of_them = sides(0.01, *texts)
    assert few == [text for text in all_of_them if text in texts[:1500]]
    assert 15 <= len(all_of_them) <= 50


def test_the_border_is_known_without_reading_all_of_a_large_corpus():
    read = 0

    def rows():
        nonlocal read
        for number in range(10_000):
            read += 1
            yield Document(str(number), "here")

    next(split_corpus(Corpus("large", [], [rows]), 0.1, "validation").documents())
    assert read < 500


def test_rows_that_are_no_documents_are_trainings():
    bad = BadRow("broken JSON", "file:3", "not JSON")
    assert [
        document.text
        for document in split_corpus(corpus_of("a", bad, "b"), 0.5, "validation").documents()
    ]
    with pytest.raises(UserError, match="file:3: not JSON"):
        list(split_corpus(corpus_of("a", bad, "b"), 0.5, "training").documents())


def test_held_out_documents_are_part_of_the_fingerprint_and_of_the_cache(data, tmp_path):
    def fingerprint(**overrides):
        config = JobConfig().parse_args(options({**data, **overrides}))
        dataset, validation_set = open_data(config, load_tokenizer(DEBUG_TOKENIZER))
        return dataset.identity()["corpus"], validation_set.fingerprint

    shares = [
        fingerprint(**{**ON, **extra}) for extra in ({}, {"validation.held_out_share": 0.3}, {})
    ]
    assert shares[0] == shares[2]
    assert (
        len({shares[0], shares[1], fingerprint(), fingerprint(**{**ON, "validation.seq_len": 16})})
        == 4
    )
    assert fingerprint()[1] == ""
    named = {"validation.enable": True, "validation.dataset": "text"}
    named["validation.dataset_path"] = data["training.dataset_path"]
    assert fingerprint(**named)[0] == fingerprint()[0], "nothing is held out for a named set"


def test_each_source_of_a_mixture_gives_a_part(tmp_path):
    folders = [write_corpus(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    mixture = ",".join(f"text {folder} = 1" for folder in folders)
    given = {**ON, "data.mixture": mixture, "data.cache_folder": tmp_path / "cache"}
    config = JobConfig().parse_args(options({**given, "training.dataset": None}))
    dataset, validation_set = open_data(config, load_tokenizer(DEBUG_TOKENIZER))
    left = [part.manifest.documents for part in dataset._datasets]
    held_out = [part.manifest.documents for part in validation_set.datasets]
    assert [a + b for a, b in zip(left, held_out, strict=True)] == [40, 40]
    assert min(held_out) >= 1
    half = validation_set.n_samples // 2
    order = np.concatenate(
        [validation_set.read(np.arange(at, at + 1)).tokens for at in range(half)]
    )
    first = {
        row.tobytes()
        for row in validation_set.datasets[0].read(np.arange(validation_set.datasets[0].n_samples))[
            0
        ]
    }
    from_first = sum(row.tobytes() in first for row in order)
    assert 0.25 * half < from_first < 0.75 * half, "the first sequences come from both"


@pytest.mark.slow
def test_preparation_makes_both_parts(data, tmp_path, capsys):
    arguments = options({**data, **ON, "data.cache_folder": tmp_path})
    assert prepare.main(["--workers", "1", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    ready = [line for line in lines if line.startswith("ready: ")]
    assert ["without 0.1 held out" in ready[0], "the 0.1 held out" in ready[1]] == [True, True]


# ---- what the numbers are ----


@pytest.fixture(scope="module")
def device():
    device = ranks.join_process_group(60)
    yield device
    dist.destroy_process_group()


def by_hand(trainer, texts, seq_len):
    """Loss and bits per byte of `texts` joined, by a plain model without an engine around it."""
    tokenizer = load_tokenizer(DEBUG_TOKENIZER)
    ids = []
    for text in texts:
        ids += [tokenizer.bos_id, *encode(tokenizer, text), tokenizer.eos_id]
    ids = torch.tensor(ids)
    model = Transformer(trainer.plan.shape)
    model.load_state_dict(
        {name: weight.full_tensor() for name, weight in trainer.weights.items()}, strict=False
    )
    losses = []
    for start in range(0, len(ids) - 1, seq_len):
        tokens, labels = ids[start : start + seq_len], ids[start + 1 : start + seq_len + 1]
        logits = model(tokens[: len(labels)].unsqueeze(0))[0]
        losses += F.cross_entropy(logits.double(), labels, reduction="none").tolist()
    return sum(losses) / len(losses), sum(losses) / math.log(2) / sum(
        len(text.encode()) for text in texts
    )


@pytest.fixture(scope="module")
def accented(tmp_path_factory):
    folder = write_corpus(tmp_path_factory.mktemp("accented") / "corpus", documents=3, seed=7)
    (folder / "accents.txt").write_text("élan naïve \u2581 漢字 \U0001f600", encoding="utf-8")
    return folder


@pytest.mark.parametrize("kind", ["held out", "named"])
@pytest.mark.parametrize(
    "length", [{}, {"validation.seq_len": 48, "validation.local_batch_size": 3}]
)
def test_numbers_equal_those_by_hand(data, device, accented, kind, length):
    named = {
        "validation.enable": True,
        "validation.dataset": "text",
        "validation.dataset_path": accented,
    }
    given = {**data, **(ON if kind == "held out" else named), **length}
    config = JobConfig().parse_args(options(given), world_size=1)
    trainer = set_up(config, device)
    files = sorted(
        (accented if kind == "named" else write_corpus(accented.parent / "again")).iterdir()
    )
    texts = [file.read_text(encoding="utf-8") for file in files]
    if kind == "held out":
        texts = [text for text in texts if digest(text) < 0.1 * 2**64]
    train.forward_backward(trainer, trainer.loader.step_batches(1))
    train.optimizer_step(trainer)
    with torch.no_grad():
        loss, bits = by_hand(trainer, texts, length.get("validation.seq_len", 32))
    found, _ = trainer.validator.run(partial(train.losses_of, trainer))
    assert found["val_loss"] == pytest.approx(loss, rel=1e-6)
    assert found["val_bits_per_byte"] == pytest.approx(bits, rel=1e-6)


def test_bits_of_a_token_file_are_not_known(data, device, tmp_path):
    np.arange(3, 500, dtype=np.uint16).tofile(tmp_path / "ids.bin")
    given = {
        "validation.enable": True,
        "validation.dataset": "tokens",
        "validation.dataset_path": tmp_path / "ids.bin",
    }
    trainer = set_up(JobConfig().parse_args(options({**data, **given}), world_size=1), device)
    found, _ = trainer.validator.run(partial(train.losses_of, trainer))
    assert found["val_bits_per_byte"] is None
    assert 7 < found["val_loss"] < 9


@pytest.mark.parametrize("batch_size", [8, 3])
@pytest.mark.parametrize(("steps", "sequences"), [(-1, 177), (1, 8), (2, 16), (1000, 177)])
def test_steps_are_batches_of_the_global_batch_size(data, device, steps, sequences, batch_size):
    """Also where the batches that are evaluated do not divide them."""
    given = {**ON, "validation.steps": steps, "validation.local_batch_size": batch_size}
    config = JobConfig().parse_args(options({**data, **given}), world_size=1)
    validator = set_up(config, device).validator
    counts = []
    validator.run(
        lambda batch: (
            counts.append((batch.labels != -100).any(dim=1).sum().item())
            or torch.zeros(len(batch.tokens))
        )
    )
    assert sum(counts) == validator.sequences == sequences


# ---- when, and what is left as it was ----


@pytest.fixture
def run(tmp_path, data, device, capsys):
    """run(name, **overrides): a whole run; returns its metrics and what it printed."""

    def run_once(name, **overrides):
        init_logging()
        given = {**data, "job.dump_folder": tmp_path / name, "training.steps": 5, **overrides}
        train.run(JobConfig().parse_args(options(given), world_size=1), device)
        return metrics(tmp_path / name), capsys.readouterr().out

    return run_once


def validated(lines):
    return {
        line["step"]: (line["val_loss"], line["val_bits_per_byte"])
        for line in lines
        if "val_loss" in line
    }


def test_validates_after_every_freq_steps_and_the_last(run):
    lines, printed = run("run", **ON, **{"validation.freq": 2, "metrics.log_freq": 3})
    assert list(validated(lines)) == [2, 4, 5]
    assert [line["step"] for line in lines] == [2, 3, 4, 5]
    assert all("loss" in line for line in lines)
    assert printed.count("val_loss") == printed.count("bits/byte") == 3
    assert "validation text" in printed
    facts = run("off", **{"validation.freq": 2})
    assert validated(facts[0]) == {}
    assert "validation" not in facts[1]


@pytest.mark.slow
def test_a_resumed_run_validates_at_the_same_steps_with_the_same_numbers(run):
    given = {**ON, "validation.freq": 2, "lr_scheduler.total_steps": 5, "checkpoint.enable": True}
    whole, _ = run("whole", **given)
    run("cut", **given, **{"training.steps": 3})
    cut, _ = run("cut", **given)
    assert validated(cut).keys() == {2, 3, 4, 5}
    assert {step: validated(cut)[step] for step in (2, 4, 5)} == validated(whole)
    with pytest.raises(UserError, match=r"corpus' contents .*\[validation\]"):
        run("cut", **{**given, "validation.held_out_share": 0.4, "training.steps": 6})


@pytest.mark.slow
def test_training_is_not_disturbed(run, accented):
    named = {
        "validation.enable": True,
        "validation.dataset": "text",
        "validation.dataset_path": accented,
    }
    state = torch.random.get_rng_state()
    quiet, _ = run("quiet")
    after = torch.random.get_rng_state()
    torch.random.set_rng_state(state)
    lines, _ = run("validated", **named, **{"validation.freq": 1, "validation.seq_len": 20})
    assert len(validated(lines)) == 5
    for key in ("loss", "max_loss", "grad_norm", "lr", "tokens_seen"):
        assert [line[key] for line in lines] == [line[key] for line in quiet], key
    assert torch.equal(torch.random.get_rng_state(), after)


@pytest.mark.slow
def test_scalars_go_to_tensorboard(run, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines, _ = run("run", **ON, **{"validation.freq": 2, "metrics.enable_tensorboard": True})
    events = EventAccumulator(str(tmp_path / "run" / "tb"))
    events.Reload()
    curve = {event.step: event.value for event in events.Scalars("validation/val_bits_per_byte")}
    assert curve == {step: pytest.approx(bits) for step, (_, bits) in validated(lines).items()}


def test_a_stop_does_not_wait_for_a_validation(run, monkeypatch):
    combine = train.combine_ranks
    monkeypatch.setattr(train, "combine_ranks", lambda *given: (combine(*given)[0], 15))
    monkeypatch.setattr(train, "losses_of", lambda *given: pytest.fail("validated"))
    with pytest.raises(train.Stopped):
        run("run", **ON, **{"validation.freq": 1})


def test_time_spent_validating_does_not_count(monkeypatch):
    now = 10.0
    monkeypatch.setattr("time.perf_counter", lambda: now)
    stopwatch = Stopwatch()
    now = 12.0
    with stopwatch.paused():
        now = 100.0
    now = 101.0
    assert stopwatch.elapsed() == 3.0


class Clock:
    """Stands for time.perf_counter: a millisecond passes between two looks, and what is said."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 0.001
        return self.now

    def slowed(self, function, seconds):
        """The function, but it takes so many seconds."""

        def slow(*given):
            self.now += seconds
            return function(*given)

        return slow


@pytest.mark.slow
def test_a_runs_step_times_are_those_of_training(run, monkeypatch):
    """A step that waits 60 s for data, and is validated for 1,000 s, took 60 s, all waiting."""
    clock = Clock()
    monkeypatch.setattr("time.perf_counter", clock)
    monkeypatch.setattr(train, "losses_of", clock.slowed(train.losses_of, 1000))
    monkeypatch.setattr(DataLoader, "step_batches", clock.slowed(DataLoader.step_batches, 60))
    lines, _ = run("run", **ON, **{"validation.freq": 1})
    for line in lines:
        assert line["step_time_s"] == pytest.approx(60, rel=0.01)
        assert line["data_time_pct"] == pytest.approx(100, rel=0.01)


# ---- every layout ----

LONGER = {
    "validation.enable": True,
    "validation.held_out_share": 0.03,
    "validation.seq_len": 64,
    "validation.local_batch_size": 3,
}
TP = {"parallelism.tensor_parallel_degree": 2}
CP = {"parallelism.context_parallel_degree": 2}
PP = {"parallelism.pipeline_parallel_degree": 2}
SCHEDULE = "parallelism.pipeline_parallel_schedule"

OFF = {"validation.enable": False}

MASKED = {**LONGER, "training.document_masking": True}

# Two pipelines that each read other sequences.
REPLICATED = {**PP, "parallelism.data_parallel_replicate_degree": 2}

# name: (ranks, validation, layout)
LAYOUTS = {
    "one": (1, LONGER, {}),
    "one-few": (1, {}, {}),
    "one-masked": (1, MASKED, {}),
    "fsdp2": (2, LONGER, {}),
    "tp2": (2, LONGER, TP),
    "pp2-masked": (2, {**MASKED, "validation.local_batch_size": 1}, PP),
    "pp2-replicate2-few": (4, {}, REPLICATED),
    "pp2-replicate2-quiet": (4, OFF, REPLICATED),
    "cp2-pp2-v": (4, LONGER, {**PP, **CP, SCHEDULE: "ZBVZeroBubble"}),
}

REFERENCES = ("one", "one-few", "one-masked")
COMPARED = [name for name in LAYOUTS if name not in REFERENCES and not name.endswith("quiet")]


@pytest.fixture(scope="module")
def run_of(tmp_path_factory, data):
    """run_of(layout): the lines of its run of three steps.

    The few are one sequence, so that of 2 data ranks one has none.
    """
    scratch = tmp_path_factory.mktemp("layouts")
    np.random.default_rng(0).integers(3, 2000, 30).astype(np.uint16).tofile(scratch / "few.bin")
    few = {
        "validation.enable": True,
        "validation.dataset": "tokens",
        "validation.dataset_path": scratch / "few.bin",
    }
    common = {**data, "training.steps": 3, "validation.freq": 2}

    @cache
    def train_on(ranks):
        runs = [
            {**common, "job.dump_folder": scratch / name, **(given or few), **layout}
            for name, (count, given, layout) in LAYOUTS.items()
            if count == ranks
        ]
        forking.train_in_turn(ranks, runs)

    def lines(name):
        train_on(LAYOUTS[name][0])
        return metrics(scratch / name)

    return lines


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPARED)
def test_the_numbers_are_the_same_on_every_layout(run_of, name):
    _, _, kind = name.rpartition("-")
    reference = f"one-{kind}" if kind in ("few", "masked") else "one"
    found, expected = run_of(name), run_of(reference)
    assert validated(found).keys() == {2, 3}
    for mine, theirs in zip(found, expected, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        for key in ("val_loss", "val_bits_per_byte"):
            if theirs.get(key) is None:
                assert mine.get(key) is None
            else:
                assert mine[key] == pytest.approx(theirs[key], rel=1e-6)


@pytest.mark.slow
def test_training_on_ranks_is_not_disturbed(run_of):
    quiet, validating = run_of("pp2-replicate2-quiet"), run_of("pp2-replicate2-few")
    for key in ("loss", "max_loss", "grad_norm"):
        assert [line[key] for line in validating] == [line[key] for line in quiet], key


# ---- what is refused ----

REFUSED = {
    "unknown set": (
        ["--validation.dataset=txet"],
        ["validation.dataset = 'txet' is unknown, did you mean text?"],
    ),
    "set without a path": (
        ["--validation.dataset=text"],
        ["validation.dataset = 'text' needs a path (validation.dataset_path)"],
    ),
    "path that is not there": (
        ["--validation.dataset=text", "--validation.dataset_path=nowhere"],
        ["'nowhere' (validation.dataset_path) does not exist"],
    ),
    "token file": (
        ["--training.dataset=tokens", f"--training.dataset_path={DEBUG_TOKENIZER}"],
        ["a token file", "no documents can be held out", "name others in validation.dataset"],
    ),
    "token file in a mixture": (
        [f"--data.mixture=python_stdlib = 1,tokens {DEBUG_TOKENIZER} = 1"],
        ["a token file", "name others in validation.dataset"],
    ),
    "no share": (
        ["--validation.held_out_share=0"],
        ["held_out_share = 0.0: must be a finite number > 0 and < 1"],
    ),
    "everything": (
        ["--validation.held_out_share=1"],
        ["held_out_share = 1.0: must be a finite number > 0 and < 1"],
    ),
    "no steps": (
        ["--validation.steps=0"],
        ["validation.steps = 0: must be -1, or a whole number >= 1"],
    ),
    "no freq": (["--validation.freq=0"], ["validation.freq = 0"]),
    "empty batch": (["--validation.local_batch_size=0"], ["validation.local_batch_size = 0"]),
    "length under cp": (
        ["--parallelism.context_parallel_degree=4", "--validation.seq_len=60"],
        [
            "validation.seq_len = 60 must be divisible by 8: "
            "parallelism.context_parallel_degree = 4 twice (headtail)"
        ],
    ),
    "length under tp": (
        ["--parallelism.tensor_parallel_degree=4", "--validation.seq_len=30"],
        ["validation.seq_len = 30 must be divisible by 4", "tensor_parallel_degree = 4"],
    ),
    "microbatch of a pipeline": (
        [
            "--parallelism.pipeline_parallel_degree=2",
            "--parallelism.pipeline_parallel_microbatch_size=2",
            "--validation.local_batch_size=3",
        ],
        ["pipeline_parallel_microbatch_size = 2 must divide validation.local_batch_size = 3"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_hostile_configs_are_refused(name):
    arguments, fragments = REFUSED[name]
    with pytest.raises(UserError) as raised:
        JobConfig().parse_args(["--validation.enable", *arguments], world_size=4)
    assert str(raised.value).startswith("The configuration has 1 fault:"), raised.value
    for fragment in fragments:
        assert fragment in str(raised.value)


def test_torchtitans_section_is_accepted_when_disabled():
    given = ["--validation.dataset=c4_validation", "--validation.freq=5", "--validation.steps=10"]
    config = JobConfig().parse_args(
        [*given, "--validation.local_batch_size=3", "--validation.seq_len=7"], world_size=8
    )
    assert plan_validation_sources(config) == []


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["one"], "fewer than two distinct documents, so none can be held out for validation: add"),
        (["same", "same", ""], "fewer than two distinct documents"),
        (["a", "b"], r"without 0\.1 held out has 3 tokens, but training\.seq_len = 32"),
    ],
)
def test_corpora_too_small_to_hold_out_are_refused(tmp_path, texts, message):
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    given = {
        **ON,
        "training.dataset": "jsonl",
        "training.dataset_path": file,
        "data.cache_folder": tmp_path / "cache",
    }
    with pytest.raises(UserError, match=message):
        open_data(JobConfig().parse_args(options(given)), load_tokenizer(DEBUG_TOKENIZER))


def test_a_faulty_named_set_is_called_validations(data, tmp_path):
    (tmp_path / "empty").mkdir()
    named = {
        "validation.enable": True,
        "validation.dataset": "text",
        "validation.dataset_path": tmp_path / "empty",
    }
    with pytest.raises(
        UserError, match=r"^validation: validation\.dataset_path = .* holds no file"
    ):
        open_data(
            JobConfig().parse_args(options({**data, **named})), load_tokenizer(DEBUG_TOKENIZER)
        )
