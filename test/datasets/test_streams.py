"""Corpora that are read while a run learns: which sample is what, positions, prefetching, and
sources that fail."""

import json
import re
import threading
from functools import partial

import numpy as np
import pytest
from helpers.corpora import open_corpus
from helpers.forking import train
from helpers.launching import data_loader, metrics, write_corpus
from helpers.tokens import encode

from torchtrain.config.plans import DEBUG_TOKENIZER
from torchtrain.config.schema import Data, Training
from torchtrain.datasets import read_ahead, token_stream
from torchtrain.datasets.corpora import Corpus, Document
from torchtrain.datasets.loader import DataLoader, build_dataset
from torchtrain.datasets.open import read_custom
from torchtrain.datasets.read_ahead import STEPS_AHEAD
from torchtrain.datasets.streams import StreamDataset
from torchtrain.datasets.token_stream import Position
from torchtrain.datasets.tokenizer import load_tokenizer
from torchtrain.errors import UserError
from torchtrain.logging_utils import init_logging, logger

TOKENIZER = load_tokenizer(DEBUG_TOKENIZER)


@pytest.fixture(autouse=True)
def no_lines_after_the_test():
    """A reading thread may go on a little, and stdout is the test's own."""
    yield
    logger.handlers.clear()


def tokens_of(texts) -> list[int]:
    tokens = []
    for text in texts:
        tokens += [TOKENIZER.bos_id, *encode(TOKENIZER, text), TOKENIZER.eos_id]
    return tokens


def write_lines(file, texts) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        "".join(
            json.dumps(text if isinstance(text, dict) else {"text": text}) + "\n" for text in texts
        )
    )
    return str(file)


def stream(dataset: str, path: str | None, streams: int, seq_len: int = 8, **data) -> StreamDataset:
    section = Data(streaming=True, streams=streams, **data)
    training = Training(dataset=dataset, dataset_path=path, seq_len=seq_len)
    built = build_dataset(training, section, TOKENIZER, 0)
    assert isinstance(built, StreamDataset)
    return built


def made_up(rows, streams: int = 1, **facts) -> StreamDataset:
    """Of what the function `rows` yields."""
    return StreamDataset(Corpus("made up", [], [rows], **facts), TOKENIZER, 8, streams)


def documents(texts):
    return (Document(text, f"{number}") for number, text in enumerate(texts))


# Samples


def rows_of(tokens: list[int], seq_len: int) -> list[list[int]]:
    return [tokens[at : at + seq_len + 1] for at in range(0, len(tokens) - seq_len, seq_len)]


def read_rows(dataset, sample_ids) -> list[list[int]]:
    tokens, labels = dataset.read(np.array(sample_ids))
    assert tokens.dtype == labels.dtype == np.int64
    assert np.array_equal(tokens[:, 1:], labels[:, :-1])
    return [[*row, last[-1]] for row, last in zip(tokens.tolist(), labels.tolist(), strict=True)]


TEXTS = ["a", "bb " * 40, "", "ccc", "d e f g " * 9, "h", "iiii " * 3]


def test_sample_i_is_number_i_div_v_of_stream_i_mod_v_and_each_begins_its_next_epoch_by_itself(
    tmp_path,
):
    path = write_lines(tmp_path / "c.jsonl", TEXTS)
    dataset = stream("jsonl", path, 3)
    rows = read_rows(dataset, range(60))
    for v in range(3):
        assert rows[v::3] == rows_of(tokens_of(TEXTS[v::3] if v != 2 else TEXTS[5:6]) * 60, 8)[:20]


def test_files_of_a_folder_follow_each_other(tmp_path):
    for number in range(3):
        write_lines(tmp_path / "c" / f"{number}.jsonl", TEXTS[2 * number : 2 * number + 2])
    whole = write_lines(tmp_path / "whole.jsonl", TEXTS[:6])
    assert read_rows(stream("jsonl", str(tmp_path / "c"), 2), range(40)) == read_rows(
        stream("jsonl", whole, 2), range(40)
    )


@pytest.mark.parametrize(("streams", "files_each"), [(2, 2), (4, 1), (3, None), (8, None)])
def test_files_of_a_hub_are_dealt_out_if_they_come_out_even(tmp_path, streams, files_each):
    texts = [[f"file {file} document {row}" for row in range(3)] for file in range(4)]
    for file, rows in enumerate(texts):
        write_lines(tmp_path / "hub" / f"train-{file}.jsonl", rows)
    dataset = stream(f"{tmp_path}/hub", None, streams)
    one_after_the_other = [text for file in texts for text in file]
    for v in range(streams):
        own = (
            [text for file in texts[v::streams] for text in file]
            if files_each
            else one_after_the_other[v::streams]
        )
        assert (
            read_rows(dataset, range(v, 20 * streams, streams))
            == rows_of(tokens_of(own) * 30, 8)[:20]
        )
    said = dataset.describe(1)
    assert (
        f"each with {files_each} of its files"
        if files_each
        else f"each with 1 document in {streams}"
    ) in said


def test_a_dataset_saved_to_disk_streams(tmp_path):
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    rows = read_rows(stream(f"{tmp_path}/saved", None, 1), range(9))
    assert rows == rows_of(tokens_of([text for text in TEXTS if text]) * 9, 8)[:9]


def test_order_depends_on_nothing_but_corpus_tokenizer_length_and_streams(tmp_path, monkeypatch):
    folder = write_corpus(tmp_path / "a", documents=3)
    copy = write_corpus(tmp_path / "b" / "deep" / "er", documents=3)
    first = stream("text", str(folder), 2)
    monkeypatch.chdir(tmp_path / "b")
    for place in (f"{tmp_path}/b", f"{tmp_path}/b/", str(copy), ".", "deep/er"):
        assert first.fingerprint == stream("text", place, 2).fingerprint, "wherever the files lie"
    (copy / "000.txt").write_text("another size")
    lines = write_lines(tmp_path / "c" / "c.jsonl", TEXTS)
    others = [
        stream("text", str(copy), 2),
        stream("mixed", str(folder), 2),
        stream("text", str(folder), 3),
        stream("text", str(folder), 2, seq_len=9),
        stream("jsonl", lines, 2),
        stream("jsonl", lines, 2, text_key="body"),
        stream(f"{tmp_path}/c", None, 2),
    ]
    assert len({dataset.fingerprint for dataset in [first, *others]}) == 8


def test_files_of_a_custom_source_may_be_named_from_here(tmp_path, monkeypatch):
    def texts(path):
        yield from TEXTS

    monkeypatch.chdir(tmp_path)
    write_corpus(tmp_path / "logs", documents=1)
    StreamDataset(read_custom("mine", texts, "logs"), TOKENIZER, 8, 2)


def test_fingerprint_of_a_hub_is_its_name_and_revision():
    def identity(name, revision):
        corpus = Corpus(name, [], [lambda: documents(TEXTS)], revision=revision)
        return StreamDataset(corpus, TOKENIZER, 8, 1).identity()["corpus"]

    assert (
        len({identity("x", "1"), identity("x", "2"), identity("y", "1"), identity("x", None)}) == 4
    )


# Positions


def resumed(dataset: StreamDataset, fresh: StreamDataset, samples: int) -> StreamDataset:
    fresh.resume(dataset.identity(), positions(dataset), samples)
    return fresh


def positions(dataset: StreamDataset) -> list[Position]:
    return [stream.position() for stream in dataset.streams]


@pytest.mark.parametrize("samples", range(0, 40, 3))
def test_a_position_leads_to_the_next_sample_without_reading_what_came_before(tmp_path, samples):
    reads = []

    def part(number):
        for row, text in enumerate(TEXTS):
            reads.append(number)
            yield Document(f"{text} {number}", f"{number}:{row}")

    def build():
        corpus = Corpus("made up", [], [partial(part, number) for number in range(3)])
        return StreamDataset(corpus, TOKENIZER, 8, 2)

    expected = read_rows(build(), range(60))
    before = build()
    if samples:
        read_rows(before, range(samples))
    after = resumed(before, build(), samples)
    reads.clear()
    assert read_rows(after, range(samples, 60)) == expected[samples:]
    parts = [position.part for position in positions(before)]
    assert min(reads[:1]) in parts, "parts before are not even opened"


def test_a_changed_tokenizer_or_length_resumes_in_the_same_document_and_another_corpus_anew(
    tmp_path,
):
    path = write_lines(tmp_path / "c.jsonl", [f"{'word ' * 30}{number}" for number in range(9)])
    before = stream("jsonl", path, 2)
    before.read(np.arange(20))
    saved, stood = before.identity(), positions(before)
    longer = stream("jsonl", path, 2, seq_len=16)
    longer.resume(saved, stood, 20)
    assert positions(longer) == stood
    longer.resume({**saved, "tokenizer": "another"}, stood, 20)
    assert positions(longer) == [position._replace(token=0) for position in stood]
    other = stream("jsonl", path, 3)
    other.resume(saved, stood, 20)
    assert positions(other) == [Position(sample=number) for number in (7, 7, 6)]
    assert read_rows(other, range(20, 23))[1] == read_rows(stream("jsonl", path, 3), [0])[0]


def test_a_source_that_gives_other_documents_after_a_resume_is_refused():
    before = made_up(lambda: documents(TEXTS * 3))
    before.read(np.arange(12))
    for texts in (TEXTS[:1], ["x"] * 40):
        fresh = resumed(before, made_up(lambda texts=texts: documents(texts)), 12)
        with pytest.raises(
            UserError,
            match="made up, stream 0 of 1 does not give the documents that it gave before",
        ):
            fresh.read(np.arange(12, 13))


def test_the_state_takes_of_every_stream_the_rank_that_is_furthest():
    def build():
        return made_up(lambda: documents(TEXTS), streams=2)

    loaders = [data_loader(build(), 12, rank, 4, 1) for rank in range(4)]  # two ranks a stream
    for step in (1, 2):
        for loader in loaders:
            loader.step_batches(step)
    by_rank = [loader.positions() for loader in loaders]
    assert [list(moved) for moved in by_rank] == [[0], [0], [1], [1]]
    (alone,) = [data_loader(build(), 12, 0, 1, 12)]
    alone.step_batches(1)
    alone.step_batches(2)
    state = loaders[3].state(2, by_rank)
    assert state == alone.state(2, [alone.positions()])
    assert state["positions"][1]["sample"] == 12


# Reading ahead


def test_reading_ahead_is_bounded_and_changes_neither_order_nor_state():
    given = []

    def rows():
        for number in range(10_000):
            given.append(number)
            yield Document(f"document {number} " * 3, str(number))

    loader = data_loader(made_up(rows), 4, 0, 1, 4)
    plain = made_up(rows)

    def taken():
        return list(loader.positions().values())

    for step in range(1, 6):
        (batch,) = loader.step_batches(step)
        assert batch.tokens.tolist() == plain.read(np.arange(4 * step - 4, 4 * step))[0].tolist()
        assert taken() == positions(plain)
    loader._ahead.is_ready(6)
    loader._ahead._thread.shutdown()  # when all that was asked for is read
    assert taken() == positions(plain), "what is read ahead is not taken"
    tokens_read = 4 * (6 + STEPS_AHEAD) * 8
    assert max(given) < tokens_read / 8, "one document has more than eight tokens"


# Sources that fail


def take(loader: DataLoader, steps: range) -> None:
    for step in steps:
        loader.step_batches(step)


def test_a_stream_without_a_document_says_so():
    dataset = made_up(lambda: documents(["only one"]), streams=2)
    dataset.read(np.array([0, 2, 4]))
    with pytest.raises(
        UserError, match=r"made up, stream 1 of 2 has no document: make data\.streams smaller"
    ):
        dataset.read(np.array([1]))


def test_a_bad_row_stops_the_run_or_is_named(tmp_path, capsys):
    init_logging()
    path = write_lines(tmp_path / "c.jsonl", ["fine", {"body": "no text"}, {"text": 3}, "fine too"])
    with pytest.raises(UserError, match=r"c\.jsonl:2: .*data\.on_bad_row"):
        stream("jsonl", path, 1).read(np.arange(5))
    assert (
        read_rows(stream("jsonl", path, 1, on_bad_row="skip"), range(5))
        == rows_of(tokens_of(["fine", "fine too"] * 9), 8)[:5]
    )
    printed = capsys.readouterr().out
    assert f"jsonl {path} [text]: left out {path}:2 (no text field)" in printed
    assert f"jsonl {path} [text]: left out {path}:3 (not a string)" in printed
    assert "stream 0 of 1: epoch 2 begins" in printed


def test_a_fault_comes_at_its_step_and_no_earlier():
    def rows():
        yield from documents(["word " * 40])
        raise UserError("the disk is on fire")

    loader = data_loader(made_up(rows), 2, 0, 1, 2)
    take(loader, range(1, 3))
    with pytest.raises(UserError, match="the disk is on fire"):
        take(loader, range(3, 9))


@pytest.fixture
def clock(monkeypatch):
    """A clock of the test's own: clock.now is what the streams and their reader see."""

    class Clock:
        now = 1000.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(token_stream, "time", clock)
    monkeypatch.setattr(read_ahead, "time", clock)
    return clock


def test_a_source_that_stalls_is_named_after_the_time_allowed(clock):
    go_on = threading.Event()

    def rows():
        yield from documents(["word " * 40])
        threading.Timer(0.1, lambda: setattr(clock, "now", clock.now + 1)).start()
        go_on.wait(60)

    loader = data_loader(made_up(rows, streams=1), 2, 0, 1, 2, stall_timeout_seconds=1)
    try:
        with pytest.raises(
            UserError, match=r"made up, stream 0 of 1: no document has come for 1 s \(data\.stall"
        ):
            take(loader, range(1, 9))
    finally:
        go_on.set()


def test_a_slow_source_is_waited_for(clock):
    """Each document takes nearly the time allowed, and a step many documents."""
    given = 0

    def rows():
        nonlocal given
        for text in ["word " * 6] * 40:
            clock.now += 0.4
            loader._ahead._check_stall()
            given += 1
            yield Document(text, "here")

    loader = data_loader(made_up(rows), 16, 0, 1, 16, stall_timeout_seconds=0.5)
    for step in (1, 2):
        loader.step_batches(step)
    assert given * 0.4 > 10 * 0.5


def test_a_hub_without_the_field_is_refused_at_the_start(tmp_path):
    write_lines(tmp_path / "hub" / "train.jsonl", [{"body": "x"}])
    with pytest.raises(UserError, match="'text'"):
        open_corpus(f"{tmp_path}/hub", None, "text", streaming=True)


# Whole runs

FAULTY = """
import os, time
from torchtrain.catalog.datasets import register_corpus

@register_corpus("faulty")
def faulty(path):
    for number in range(100):
        yield f"document {number} " * 20
    if os.environ.get("RANK") == "1":
        if path == "stalls":
            time.sleep(600)
        for number in range(200 if path == "crawls" else 0):
            time.sleep(0.005)
            yield "x"
        raise OSError("the tape is torn")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raises", r"faulty, after document 100: \S*my_faulty\.py:15: OSError: the tape is torn"),
        ("crawls", r"faulty, after document 300: \S*my_faulty\.py:15: OSError: the tape is torn"),
        (
            "stalls",
            r"faulty stalls, stream [4-7] of 8: no document has come for 2 s \(data\.stall_timeout",
        ),
    ],
)
def test_what_is_wrong_with_one_rank_s_source_ends_all_ranks_with_that_error(
    tmp_path, how, message
):
    file = tmp_path / "my_faulty.py"
    file.write_text(FAULTY)
    output = train(
        2,
        {
            "experimental.custom_import": file,
            "training.dataset": "faulty",
            "training.dataset_path": how,
            "training.steps": 1000,
            "data.streaming": True,
            "data.stall_timeout_seconds": 2,
            "comm.train_timeout_seconds": 3,  # a step of the source that crawls takes longer
            "job.dump_folder": tmp_path / "out",
        },
        expect=2,
    )
    (error,) = re.findall(
        r"error: .*", output
    )  # the other rank, which knows it too, adds nothing to it
    assert re.match("error: " + message, error)
    assert "Traceback" not in output
    assert len(metrics(tmp_path / "out")) > 1
