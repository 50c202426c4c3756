"""The front door: what a source of the config gives, and under which name."""

import json
from fractions import Fraction

import pyarrow
import pyarrow.parquet
import pytest
from helpers.corpora import open_corpus
from helpers.launching import options

from torchtrain.config.plans import DEBUG_TOKENIZER, plan_run
from torchtrain.config.schema import Data
from torchtrain.config.sources import DataSource
from torchtrain.config_manager import JobConfig
from torchtrain.datasets import cache_folder
from torchtrain.datasets.loader import build_dataset
from torchtrain.datasets.open import open_source, open_tokens
from torchtrain.datasets.tokenizer import load_tokenizer
from torchtrain.errors import UserError
from torchtrain.tools import prepare
from torchtrain.validation import ValidationSet

TOKENIZER = load_tokenizer(DEBUG_TOKENIZER)


# A single text


LINES = "first\n" + "".join(f"line {number}: élan naïve 漢字\n" for number in range(100))


def text_sides(tmp_path, text, share):
    """What is kept and what is held out of a single text."""
    (tmp_path / "one.txt").write_text(text, encoding="utf-8", newline="")
    sides = []
    for side in ("training", "validation"):
        source = DataSource("text", str(tmp_path / "one.txt"), Fraction(1), share, side)
        sides.append([document.text for document in open_source(source, Data()).documents()])
    return sides


@pytest.mark.parametrize("share", [1e-9, 0.01, 0.1, 0.5, 0.999])
def test_of_a_single_text_the_last_lines_are_held_out(tmp_path, share):
    (kept,), (held_out,) = text_sides(tmp_path, LINES, share)
    assert kept + held_out == LINES
    assert kept.endswith("\n")
    size = len(LINES.encode())
    longest = max(len(line.encode()) for line in LINES.splitlines(keepends=True))
    if share < 0.999:
        assert share * size - 1 < len(held_out.encode()) <= share * size + longest
    else:  # there is no line so early
        assert kept == "first\n"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("a\nb", "a\n"),
        ("a\nb\n", "a\n"),
        ("\n\n", "\n"),
        ("a\r\nb\r\n", "a\r\n"),
        ("a" * 99 + "\nb", "a" * 99 + "\n"),
        ("a\n" + "b" * 99, "a\n"),
    ],
)
def test_a_text_of_two_lines_is_cut_between_them(tmp_path, text, kept):
    assert text_sides(tmp_path, text, 0.1) == [[kept], [text[len(kept) :]]]


@pytest.mark.parametrize("text", ["one line", "one line\n"])
def test_a_text_of_one_line_is_not_held_out(tmp_path, text):
    with pytest.raises(UserError, match=r"one\.txt has only one line, so its last part cannot"):
        text_sides(tmp_path, text, 0.1)


def test_a_run_on_a_single_text_says_what_it_holds_out(tmp_path):
    (tmp_path / "one.txt").write_text(LINES * 5, encoding="utf-8")
    given = {
        "validation.enable": True,
        "validation.held_out_share": 0.1,
        "training.dataset": "text",
        "training.dataset_path": tmp_path / "one.txt",
        "data.cache_folder": tmp_path / "cache",
    }
    config = JobConfig().parse_args(options(given))
    plan = plan_run(config, 1, tokenizer_size=TOKENIZER.vocab_size)
    dataset = build_dataset(config.training, config.data, TOKENIZER, 0, config.validation)
    validation_set = ValidationSet(plan.validation, config.data, TOKENIZER, None)
    name = f"text {tmp_path / 'one.txt'}"
    said = f"{name}, without the last 0.1 of its bytes held out: 1 document in 1 file, "
    assert said in dataset.describe(1)
    said = f"{name}, the last 0.1 of its bytes held out: 1 document in 1 file, "
    assert validation_set.describe().startswith(said)
    sizes = [each.manifest.bytes for each in (dataset, validation_set.datasets[0])]
    assert sum(sizes) == len((LINES * 5).encode())


# Names and counts


def test_cached_tokens_have_the_name_that_the_user_gave(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(cache_folder, "SETTLED_NS", 0)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in ("one", "two"))
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.jsonl").write_text(lines)
    (tmp_path / "third").mkdir()
    for number, text in enumerate(("one", "two")):
        (tmp_path / "third" / f"{number}.txt").write_text(text)
    data = Data(cache_folder=str(tmp_path / "cache"))
    for kind, name, files in (
        ("jsonl", "first", "1 file"),
        ("jsonl", "second", "1 file"),
        ("text", "third", "2 files"),
    ):
        source = DataSource(kind, str(tmp_path / name), Fraction(1))
        key = " [text]" if kind == "jsonl" else ""
        said = f"{kind} {tmp_path / name}{key}: 2 documents in {files}, 0.00 MB, "
        for _ in range(2):  # the second time nothing is read
            assert open_tokens(source, data, TOKENIZER).manifest.describe().startswith(said)
        given = {"training.dataset": kind, "training.dataset_path": tmp_path / name}
        arguments = options({**given, "data.cache_folder": tmp_path / "cache"})
        assert prepare.main(["--workers", "1", *arguments]) == 0
        assert f"ready: {said}" in capsys.readouterr().out
    assert len(list((tmp_path / "cache").glob("tokens/*/tokens.bin"))) == 1


@pytest.mark.parametrize("kind", [pyarrow.binary(), pyarrow.large_binary(), pyarrow.string()])
@pytest.mark.parametrize("through_hub", [False, True])
def test_a_column_of_bytes_that_hold_utf8_is_text(tmp_path, kind, through_hub):
    """As Spark writes strings."""
    values = pyarrow.array(["élan", "漢字\r\n", "\0"], pyarrow.string()).cast(kind)
    (tmp_path / "set").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": values}), tmp_path / "set" / "train.parquet")
    if through_hub:
        corpus = open_corpus(str(tmp_path / "set"), None, "text", streaming=True)
    else:
        corpus = open_corpus("parquet", str(tmp_path / "set"), "text")
    texts = [document.text for document in corpus.documents()]
    assert texts == ["élan", "漢字\r\n", "\0"]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (None, "null"),
        (True, "a boolean"),
        (1, "a number"),
        (0.5, "a number"),
        ([], "a list"),
        ({}, "an object"),
    ],
)
def test_a_value_that_is_not_text_is_named_in_the_files_terms(tmp_path, value, kind):
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": value}))
    with pytest.raises(UserError) as caught:
        list(open_corpus("jsonl", str(file), "text").documents())
    assert f"a.jsonl:1: 'text' is {kind}, but must be a string (data.on_bad" in str(caught.value)


@pytest.mark.parametrize(
    ("dataset", "path", "message"),
    [
        (
            "text",
            "empty",
            r"^validation\.dataset_path = .*empty' holds no file that counts",
        ),
        ("text", "gone", r"gone' \(validation\.dataset_path\) does not exist"),
        ("c4", "file", r"^validation\.dataset_path = .* must be a folder, a copy of allenai/c4"),
        ("tokens", "file", r"^validation\.dataset_path = .* is a token file, which has no text"),
    ],
)
def test_faults_name_the_option_that_was_given(tmp_path, dataset, path, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=message):
        open_corpus(dataset, str(tmp_path / path), "text", option="validation.dataset")
