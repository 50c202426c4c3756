"""Sources of every kind give their documents; what cannot be read is named, or skipped and
counted."""

import errno
import gzip
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from helpers import quick
from helpers.corpora import open_corpus
from helpers.forking import be_launcher
from helpers.launching import ROOT, TINY, environment

from torchtrain.catalog import datasets as registry
from torchtrain.catalog.custom_import import import_custom
from torchtrain.catalog.datasets import DATASETS, find_dataset
from torchtrain.config_manager import JobConfig
from torchtrain.datasets import cache_folder, corpora, hub
from torchtrain.datasets.corpora import Corpus
from torchtrain.datasets.token_cache import open_token_cache
from torchtrain.datasets.tokenizer import load_tokenizer
from torchtrain.errors import ConfigError, UserError

DEBUG_MODEL = Path(corpora.__file__).with_name("debug_tokenizer.model")


@pytest.fixture(autouse=True)
def own_state(monkeypatch, tmp_path):
    """What a custom import leaves behind in this process, put back; the cache of the package
    datasets is the test's own."""
    monkeypatch.setattr(registry, "DATASETS", DATASETS)
    before, modules, path = dict(DATASETS), set(sys.modules), list(sys.path)
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    yield
    DATASETS.clear()
    DATASETS.update(before)
    sys.path[:] = path
    for name in [name for name in sys.modules if name not in modules and "custom" in name]:
        del sys.modules[name]


def texts(corpus: Corpus) -> list[str]:
    return [document.text for document in corpus.documents()]


def lines(*values: object) -> bytes:
    return b"".join(json.dumps({"text": value}).encode() + b"\n" for value in values)


def zstd(data: bytes) -> bytes:
    return pyarrow.compress(data, codec="zstd", asbytes=True)


def parquet(
    file: Path, values: list, column: str = "text", kind: pyarrow.DataType | None = None
) -> Path:
    table = pyarrow.table({"id": range(len(values)), column: pyarrow.array(values, type=kind)})
    pyarrow.parquet.write_table(table, file, row_group_size=2)
    return file


# Files


def test_compressed_lines_are_the_same_documents_at_the_same_places(tmp_path):
    content = b"\xef\xbb\xbf" + lines("a\r\n", "", "\u00e9") + b"\n" + lines("last")
    for name, data in {
        "x.jsonl": content,
        "x.jsonl.gz": gzip.compress(content),
        "x.jsonl.zst": zstd(content),
    }.items():
        file = tmp_path / name
        file.write_bytes(data)
        documents = list(open_corpus("jsonl", str(file), "text").documents())
        assert [document.text for document in documents] == ["a\r\n", "\u00e9", "last"]
        assert [document.location for document in documents] == [
            f"{file}:{number}" for number in (1, 3, 5)
        ]
    assert texts(open_corpus("jsonl", str(tmp_path), "text")) == ["a\r\n", "\u00e9", "last"] * 3


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("zst", zstd)])
def test_files_of_several_compressed_parts_are_read_whole(tmp_path, suffix, compress):
    file = tmp_path / f"x.jsonl.{suffix}"
    file.write_bytes(compress(lines("a")) + compress(lines("b")))
    assert texts(open_corpus("jsonl", str(file), "text")) == ["a", "b"]


def test_parquet_gives_each_row_with_its_place(tmp_path):
    file = parquet(tmp_path / "x.parquet", ["a", "", "b\r\n", "c", "d"], "body")
    documents = list(open_corpus("parquet", str(tmp_path), "body").documents())
    assert [(document.text, document.location) for document in documents] == [
        (text, f"{file}:{row}") for text, row in (("a", 1), ("b\r\n", 3), ("c", 4), ("d", 5))
    ]


def test_mixed_folder_reads_each_file_by_its_name(tmp_path):
    (tmp_path / "a.txt").write_text("a text")
    (tmp_path / "b.jsonl").write_bytes(lines("line one", "line two"))
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(lines("zipped")))
    parquet(tmp_path / "d.parquet", ["row"])
    (tmp_path / "e.md").write_text("# another")
    (tmp_path / ".f.txt").write_text("hidden")
    assert texts(open_corpus("mixed", str(tmp_path), "text")) == [
        "a text", "line one", "line two", "zipped", "row", "# another",
    ]  # fmt: skip


# Bad rows: file name, content, kind, location, what the message says; "fine" is the document
# before.

INVALID = pyarrow.Array.from_buffers(
    pyarrow.string(),
    2,
    [None, pyarrow.py_buffer(b"\0\0\0\0\4\0\0\0\6\0\0\0"), pyarrow.py_buffer(b"fine\xffx")],
)
PARQUET = "parquet made by the test"
FINE = lines("fine")
MANY = lines(*(f"{number} {os.urandom(50).hex()}" for number in range(3000)))
HOSTILE = {
    "broken json": ("x.jsonl", FINE + b'{"text": "a\n', "broken JSON", ":2", "not JSON"),
    "trailing json": ("x.jsonl", FINE + b'{"text": "a"} {}\n', "broken JSON", ":2", "not JSON"),
    "deep json": ("x.jsonl", FINE + b"[" * 100_000, "broken JSON", ":2", "not JSON"),
    "endless number": (
        "x.jsonl",
        FINE + b'{"text": ' + b"9" * 10_000 + b"}",
        "broken JSON",
        ":2",
        "not JSON",
    ),
    "binary": ("x.jsonl", FINE + b"\0\1\2\n", "broken JSON", ":2", "not JSON"),
    "utf-16": (
        "x.jsonl",
        FINE + '{"text": "a"}'.encode("utf-16"),
        "invalid UTF-8",
        ":2",
        "0xff in byte 1;",
    ),
    "latin-1": (
        "x.jsonl",
        FINE + b'{"text": "caf\xe9"}\n',
        "invalid UTF-8",
        ":2",
        "0xe9 in byte 14;",
    ),
    "half a character": (
        "x.jsonl",
        FINE + b'{"text": "\xc3',
        "invalid UTF-8",
        ":2",
        "0xc3 in byte 11;",
    ),
    "no key": (
        "x.jsonl",
        FINE + b'{"body": "a"}\n',
        "no text field",
        ":2",
        "no 'text', which data.text_key",
    ),
    "list": ("x.jsonl", FINE + b'["text"]\n', "not an object", ":2", "the line is a list"),
    "number": ("x.jsonl", FINE + b"3\n", "not an object", ":2", "the line is a number"),
    "null": ("x.jsonl", FINE + b'{"text": null}\n', "not a string", ":2", "'text' is null"),
    "nested": (
        "x.jsonl",
        FINE + b'{"text": {"text": "a"}}\n',
        "not a string",
        ":2",
        "'text' is an object",
    ),
    "surrogate": ("x.jsonl", FINE + b'{"text": "\\udc80"}\n', "lone surrogate", ":2", "\\udc80"),
    "broken in gzip": ("x.jsonl.gz", gzip.compress(FINE + b"{\n"), "broken JSON", ":2", "not JSON"),
    "cut gzip": (
        "x.jsonl.gz",
        gzip.compress(MANY)[:-20_000],
        "broken gzip",
        ":",
        "the gzip data is broken",
    ),
    "gzip checksum": (
        "x.jsonl.gz",
        gzip.compress(FINE)[:-8] + b"\0" * 8,
        "broken gzip",
        ":",
        "the gzip data is broken",
    ),
    "no gzip": ("x.jsonl.gz", b"hello", "broken gzip", ":1", "the rest is not read"),
    "cut zstd": (
        "x.jsonl.zst",
        zstd(MANY)[:-20_000],
        "broken zstd",
        ":",
        "the zstd data is broken",
    ),
    "no zstd": ("x.jsonl.zst", b"hello", "broken zstd", ":1", "the zstd data is broken"),
    "text in latin-1": ("x.txt", b"caf\xe9", "invalid UTF-8", "", "0xe9 in byte 4;"),
    "picture": ("x.png", b"\x89PNG\r\n\x1a\n", "invalid UTF-8", "", "or remove it"),
    "no parquet": ("x.parquet", b"hello", "broken parquet", ":1", "the parquet data is broken"),
    "empty parquet": ("x.parquet", b"", "broken parquet", ":1", "the parquet data is broken"),
    "parquet column": ("x.parquet", (["a"], "body"), "no text field", "", "no 'text'"),
    "parquet numbers": ("x.parquet", ([3], "text"), "not a string", ":1", "'text' is a number"),
    "parquet null": ("x.parquet", (["fine", None], "text"), "not a string", ":2", "'text' is null"),
    "parquet bytes": ("x.parquet", ([b"fine", b"\xc3"], "text"), "invalid UTF-8", ":2", "0xc3 in"),
    "parquet utf-8": ("x.parquet", (INVALID, "text"), "invalid UTF-8", ":2", "0xff in byte 1;"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_bad_row_is_named_or_skipped_and_counted(tmp_path, case):
    name, content, kind, place, message = HOSTILE[case]
    file = tmp_path / name
    if isinstance(content, tuple):
        parquet(file, *content)
    else:
        file.write_bytes(content)
    (tmp_path / "z.txt").write_text("after")
    with pytest.raises(UserError) as caught:
        texts(open_corpus("mixed", str(tmp_path), "text"))
    assert str(caught.value).startswith(f"{file}{place}")
    assert message in str(caught.value)
    assert 'data.on_bad_row = "skip"' in str(caught.value)
    corpus = open_corpus("mixed", str(tmp_path), "text", "skip")
    for _ in range(2):  # a second reading counts anew
        found = texts(corpus)
        assert found[-1] == "after"
        assert set(found) <= {
            "fine",
            "after",
            *(json.loads(line)["text"] for line in MANY.splitlines()),
        }
        assert corpus.skipped.counts == {kind: 1}
        assert corpus.skipped.locations[0].startswith(f"{file}{place}")


def test_rows_before_the_break_in_a_compressed_file_are_kept(tmp_path):
    expected = [json.loads(line)["text"] for line in MANY.splitlines()]
    for name, data in {"x.jsonl.gz": gzip.compress(MANY), "x.jsonl.zst": zstd(MANY)}.items():
        file = tmp_path / name
        file.write_bytes(data[: len(data) // 2])
        found = texts(open_corpus("jsonl", str(file), "text", "skip"))
        assert 0 < len(found) < len(expected)
        assert found == expected[: len(found)]


def test_damage_inside_a_parquet_file_is_named_with_its_row(tmp_path):
    values = [f"{number} {os.urandom(500).hex()}" for number in range(4000)]
    file = parquet(tmp_path / "x.parquet", values)
    data = bytearray(file.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 3000] = b"\xff" * 3000
    file.write_bytes(data)
    with pytest.raises(UserError) as caught:
        texts(open_corpus("parquet", str(file), "text"))
    assert str(caught.value).startswith(f"{file}:")


def test_file_that_cannot_be_opened_is_an_error_that_is_never_skipped(tmp_path):
    for name in ("x.jsonl", "x.jsonl.gz", "x.parquet", "x.txt"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        os.symlink(folder / "gone", folder / name)
        with pytest.raises(UserError, match=r"cannot read .*No such file"):
            texts(open_corpus("mixed", str(folder), "text", "skip"))


def test_skipped_rows_are_stated_and_in_the_manifest(tmp_path, logged):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_bytes(lines("one", None, "", 3, "two") + b"{\n" * 6)
    tokenizer = load_tokenizer(DEBUG_MODEL)
    with pytest.raises(UserError, match=r"a\.jsonl:2"):
        open_token_cache(
            open_corpus("jsonl", str(tmp_path / "corpus"), "text"), tokenizer, tmp_path
        )
    corpus = open_corpus("jsonl", str(tmp_path / "corpus"), "text", "skip")
    manifest = open_token_cache(corpus, tokenizer, tmp_path).manifest
    (line,) = [line for line in logged if "left out" in line]
    assert "left out 9 rows: 6 broken JSON, 1 empty, 2 not a string; the first: " in line
    assert "a.jsonl:2 (not a string)" in line
    assert (manifest.documents, manifest.left_out) == (
        2,
        {"broken JSON": 6, "empty": 1, "not a string": 2},
    )
    assert [place.rpartition("/")[2] for place in manifest.left_out_places[:2]] == [
        "a.jsonl:2 (not a string)",
        "a.jsonl:3 (empty)",
    ]


def test_skipping_does_not_hide_a_corpus_that_stops_a_run(tmp_path, monkeypatch):
    """What was read with skip is not taken for readable without."""
    monkeypatch.setattr(cache_folder, "SETTLED_NS", 0)
    (tmp_path / "a.jsonl").write_bytes(lines("one", None))
    tokenizer = load_tokenizer(DEBUG_MODEL)
    open_token_cache(
        open_corpus("jsonl", str(tmp_path / "a.jsonl"), "text", "skip"),
        tokenizer,
        tmp_path / "cache",
    )
    with pytest.raises(UserError, match=r"a\.jsonl:2"):
        open_token_cache(
            open_corpus("jsonl", str(tmp_path / "a.jsonl"), "text"), tokenizer, tmp_path / "cache"
        )


def test_corpus_of_nothing_but_bad_rows_says_why_it_is_empty(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"{\n{\n")
    corpus = open_corpus("jsonl", str(tmp_path / "a.jsonl"), "text", "skip")
    with pytest.raises(
        UserError, match=r"holds no text \(left out 2 rows: 2 broken JSON; the first: .*a\.jsonl:1 "
    ):
        open_token_cache(corpus, load_tokenizer(DEBUG_MODEL), tmp_path / "cache")


# The Hugging Face Hub, and what its package reads from a local folder


@pytest.fixture
def local(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_bytes(lines("one", "two"))
    (folder / "validation.jsonl").write_bytes(lines("held out"))
    return folder


def test_local_folder_is_read_by_the_package(local):
    def read(name, path=None):
        return texts(open_corpus(name, path, "text"))

    assert read(str(local)) == ["one", "two"]
    assert read(f"{local}::validation") == ["held out"]
    assert read("c4", str(local)) == ["one", "two"]
    assert read("c4_validation", str(local)) == ["held out"]


def test_local_folder_of_parquet_and_configs(tmp_path):
    for name in ("en", "de"):
        (tmp_path / name).mkdir()
        parquet(tmp_path / name / "train-00000.parquet", [name])
    configs = [{"config_name": name, "data_files": f"{name}/*.parquet"} for name in ("en", "de")]
    (tmp_path / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    assert texts(open_corpus(f"{tmp_path}:de", None, "text")) == ["de"]
    assert texts(open_corpus("allenai/c4", str(tmp_path), "text")) == ["en"]


def test_saved_dataset_is_read(tmp_path):
    import datasets

    one = datasets.Dataset.from_dict({"text": ["a", "b"]})
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(tmp_path / "two")
    assert texts(open_corpus(f"{tmp_path}/one", None, "text")) == ["a", "b"]
    assert texts(open_corpus(f"{tmp_path}/two::test", None, "text")) == ["b"]


@pytest.fixture
def closed_cache(monkeypatch):
    """The package's cache as one that may only be read; root, as tests run, could write in any."""
    import datasets

    load, said = datasets.load_dataset, []

    def load_unless_closed(*given, cache_dir=None, **named):
        if cache_dir is None:
            raise PermissionError(errno.EACCES, "Permission denied", "/shared/hf/a.lock")
        return load(*given, cache_dir=cache_dir, **named)

    monkeypatch.setattr(datasets, "load_dataset", load_unless_closed)
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", "/shared/hf")
    monkeypatch.setattr(hub.logger, "warning", said.append)
    yield load
    assert "cannot be written (Permission denied: /shared/hf/a.lock). So the" in said[0]


@pytest.mark.parametrize("streaming", [False, True])
def test_where_the_packages_cache_cannot_be_written_files_are_read_where_they_are(
    local, closed_cache, streaming
):
    corpus = open_corpus(str(local), None, "text", streaming=streaming)
    assert texts(corpus) == ["one", "two"]


def test_what_was_downloaded_is_used_from_a_cache_that_cannot_be_written(
    local, closed_cache, tmp_path, monkeypatch
):
    """Offline; a dataset of the hub is in the cache by its name."""
    cache = tmp_path / "cache"
    closed_cache(str(local), split="train", cache_dir=str(cache))
    (cache / "set").rename(cache / "someone___something")
    for arrow in (cache / "someone___something").rglob("set-*.arrow"):
        arrow.rename(arrow.with_name(arrow.name.replace("set-", "something-")))
    for info in (cache / "someone___something").rglob("dataset_info.json"):
        facts = json.loads(info.read_text()) | {"dataset_name": "something"}
        info.write_text(json.dumps(facts))
    before = {path: path.stat() for path in cache.rglob("*")}
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", cache)
    for _ in range(2):
        assert texts(open_corpus("someone/something", None, "text")) == ["one", "two"]
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*")} == {
        path: stat.st_mtime_ns for path, stat in before.items()
    }


def test_a_file_that_cannot_be_read_is_no_closed_cache(local, monkeypatch):
    closed = str(local / "train.jsonl")

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", closed)

    said = []
    monkeypatch.setattr(hub.logger, "warning", said.append)
    monkeypatch.setattr("datasets.load_dataset", refuse)
    with pytest.raises(UserError, match=r"cannot be read: .*Permission denied: '.*train\.jsonl'"):
        texts(open_corpus(str(local), None, "text"))
    assert not said


@pytest.mark.parametrize(("owner", "kept"), [("someone", "someone___a"), ("", "own")])
def test_of_the_packages_cache_only_the_datasets_of_one_owner_are_linked(tmp_path, owner, kept):
    for name in ("someone___a", "other___a", "own", "downloads"):
        (tmp_path / "cache" / name / "downloads").mkdir(parents=True)
        (tmp_path / "cache" / name / "downloads" / "table.arrow").write_text(name)
    (tmp_path / "links").mkdir()
    hub._link_files(tmp_path / "cache", tmp_path / "links", owner)
    assert [path.name for path in (tmp_path / "links").iterdir()] == [kept]
    assert (tmp_path / "links" / kept / "downloads" / "table.arrow").read_text() == kept


def test_changed_local_folder_gives_its_new_documents(local):
    assert texts(open_corpus(str(local), None, "text")) == ["one", "two"]
    (local / "train.jsonl").write_bytes(lines("three"))
    os.utime(local / "train.jsonl", ns=(10**18, 10**18))
    assert texts(open_corpus(str(local), None, "text")) == ["three"]


def test_null_in_a_hubs_dataset_is_a_bad_row(local):
    (local / "train.jsonl").write_bytes(lines("one", None, "two"))
    with pytest.raises(UserError, match="train:2: 'text' is null, but must be a string"):
        texts(open_corpus(str(local), None, "text"))
    corpus = open_corpus(str(local), None, "text", "skip")
    assert texts(corpus) == ["one", "two"]
    assert corpus.skipped.counts == {"not a string": 1}


@pytest.mark.parametrize(
    ("name", "key", "message"),
    [
        ("{local}", "body", "no 'body', which data.text_key asks for; fields here: 'text'"),
        ("{local}::test", "text", "cannot be read: .*test"),
        ("{local}:fr", "text", None),
        ("{local}/gone", "text", "neither a folder that exists"),
        ("a/b/c", "text", "neither a folder that exists"),
        ("owner/", "text", "neither a folder that exists"),
        ("owner/name:a:b:c", "text", "neither a folder that exists"),
    ],
)
def test_faulty_hub_names_are_one_message(local, name, key, message):
    if message is None:  # a config that a local copy does not have is its only one
        assert texts(open_corpus(name.format(local=local), None, key)) == ["one", "two"]
        return
    with pytest.raises(UserError, match=message):
        texts(open_corpus(name.format(local=local), None, key))


def test_broken_file_in_a_local_folder_is_one_message(local):
    (local / "train.jsonl").write_bytes(b'{"text": "a"}\n{"text": \n')
    with pytest.raises(UserError, match="cannot be read: ") as caught:
        texts(open_corpus(str(local), None, "text"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["allenai/c4", "c4", "someone/something:config", "HuggingFaceFW/fineweb-edu"]
)
def test_hub_without_network_is_one_message(monkeypatch, name):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(
        "huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9"
    )  # nobody listens there
    with pytest.raises(
        UserError, match=r"of the Hugging Face Hub cannot be reached .*training\.dataset_path"
    ) as caught:
        open_corpus(name, None, "text")
    assert "\n" not in str(caught.value)


def test_hub_is_asked_once_and_not_for_long(monkeypatch):
    asked = []

    def silent(self, repository, *, revision, timeout):
        asked.append((repository, revision, timeout))
        raise TimeoutError("timed out\nand more")

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", silent)
    pattern = r"cannot be reached \(TimeoutError: timed out\)\. Give the path of a local copy \(val"
    with pytest.raises(UserError, match=pattern):
        open_corpus("someone/something@v1", None, "text", option="validation.dataset")
    assert asked == [("someone/something", "v1", 10.0)]


def test_hub_that_does_not_know_the_name_suggests_one_that_it_knows(monkeypatch):
    from huggingface_hub.errors import RepositoryNotFoundError

    def not_found(*given, **named):
        raise RepositoryNotFoundError.__new__(RepositoryNotFoundError)

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", not_found)
    with pytest.raises(
        UserError, match=r"'allenai/c5' .*does not exist, or you have no access.*mean allenai/c4\?"
    ):
        open_corpus("allenai/c5", None, "text")


def test_hub_offline_uses_what_was_downloaded_and_says_so_if_nothing_was(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    corpus = open_corpus("someone/something", None, "text")
    assert corpus.revision is None
    with pytest.raises(UserError, match=r"someone/something default train .* cannot be read: "):
        texts(corpus)


def test_hub_is_asked_for_its_revision_which_stands_for_the_files(monkeypatch):
    monkeypatch.setattr(
        hub,
        "_find_revision",
        lambda source, option: f"commit of {source.repository} at {source.revision}",
    )
    rows = [{"text": "one"}, {"text": "two"}]
    asked = []

    class Remote(list):
        column_names = ("text",)

        def select_columns(self, names):
            return self

    monkeypatch.setattr(hub, "_load", lambda table: asked.append(table) or Remote(rows))
    corpus = open_corpus("someone/something@v1:config", None, "text")
    commit = "commit of someone/something at v1"
    assert (corpus.files, corpus.revision) == ([], f"someone/something@{commit}")
    assert texts(corpus) == ["one", "two"]
    (table,) = asked
    source = table.source
    expected = ("someone/something", commit, False)
    assert (source.repository, source.revision, table.streaming) == expected
    assert (table.source.config, table.source.split) == ("config", "train")


def test_revision_of_a_hub_keeps_an_unchanged_corpus_from_being_read_again(tmp_path):
    tokenizer, reads = load_tokenizer(DEBUG_MODEL), []

    def of(revision):
        def rows():
            reads.append(revision)
            yield corpora.Document("text", "here")

        return Corpus("hub", [], [rows], revision=revision)

    for revision, expected in (("a", 2), ("a", 0), ("b", 1), (None, 1), (None, 1)):
        reads.clear()
        open_token_cache(of(revision), tokenizer, tmp_path)
        assert len(reads) == expected, revision


# A source of the user's own

EXAMPLE = """
import gzip
from pathlib import Path

from torchtrain.catalog.datasets import register_corpus


@register_corpus("my-logs", "server logs, a document a day")
def my_logs(path):
    for file in sorted(Path(path).glob("*.log.gz")):
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            yield "".join(line for line in lines if "DEBUG" not in line)
"""


@pytest.fixture
def logs(tmp_path):
    (tmp_path / "logs").mkdir()
    for day in (1, 2):
        content = f"{day}: started\n{day}: DEBUG noise\n" + f"{day}: request served\n" * 300
        (tmp_path / "logs" / f"{day}.log.gz").write_bytes(gzip.compress(content.encode()))
    (tmp_path / "my_custom.py").write_text(EXAMPLE)
    return tmp_path


def test_the_example_is_the_documented_one():
    assert textwrap.indent(EXAMPLE.strip(), "    ") in (ROOT / "docs" / "data.md").read_text()


def test_a_dataset_of_the_users_own(logs):
    config = JobConfig().parse_args(
        [
            "--experimental.custom_import",
            str(logs / "my_custom.py"),
            "--training.dataset",
            "my-logs",
        ],
        world_size=1,
    )
    corpus = open_corpus(config.training.dataset, str(logs / "logs"), "text")
    assert (
        texts(corpus)
        == texts(corpus)
        == [f"{day}: started\n" + f"{day}: request served\n" * 300 for day in (1, 2)]
    )
    assert corpus.files == [
        logs / "my_custom.py",
        logs / "logs" / "1.log.gz",
        logs / "logs" / "2.log.gz",
    ]
    assert next(corpus.documents()).location == "my-logs:1"


def launch_in(folder, variables, arguments):
    """Be a launcher that is started in this folder."""
    os.chdir(folder)
    return be_launcher(variables, arguments)


@pytest.mark.slow
def test_a_run_trains_on_a_dataset_of_the_users_own(logs):
    """The module is found from where the user starts; test_streams names one by its file."""
    given = {
        **TINY,
        "experimental.custom_import": "my_custom",
        "training.dataset": "my-logs",
        "training.dataset_path": "logs",
        "data.cache_folder": "cache",
        "job.dump_folder": "out",
        "training.steps": 2,
    }
    options = [
        text
        for key, value in given.items()
        for text in (f"--{key}", str(value).lower() if value in (True, False) else str(value))
    ]
    launch = quick.Launch(launch_in, logs, environment(1), options)
    assert "my-logs logs: 2 documents" in launch.output()


def test_the_config_check_needs_no_torch_for_it(logs):
    code = (
        "import sys, torchtrain.config_manager as c; c.parse_or_exit(sys.argv[1:], 2); "
        "sys.exit('torch' in sys.modules)"
    )
    options = [
        "--experimental.custom_import=my_custom",
        "--training.dataset=my-logs",
        "--training.dataset_path=logs",
    ]
    command = [sys.executable, "-c", code, *options]
    ended = subprocess.run(
        command, cwd=logs, env=environment(2), capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0, ended.stderr


def test_a_class_and_a_source_without_a_path(tmp_path):
    (tmp_path / "custom.py").write_text(
        "from torchtrain.catalog.datasets import register_corpus\n"
        "@register_corpus('numbers')\n"
        "class Numbers:\n"
        "    def __init__(self, path):\n"
        "        self.path = path\n"
        "    def __iter__(self):\n"
        "        yield from ['one', 2, '', 'three']\n"
    )
    import_custom(str(tmp_path / "custom.py"))
    import_custom(str(tmp_path / "custom.py"))
    corpus = open_corpus("numbers", None, "text", "skip")
    assert texts(corpus) == ["one", "three"]
    assert corpus.skipped.locations == ["numbers:2 (not a string)", "numbers:3 (empty)"]
    with pytest.raises(
        UserError, match="numbers:2: what it yields is a number, but must be a string"
    ):
        texts(open_corpus("numbers", None, "text"))
    assert (corpus.files, corpus.revision) == ([], None), (
        "nothing tells when it changes: read at every start"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("x = 1\nx = [\n", r"custom\.py:2: SyntaxError"),
        (
            "x = 1\n\nimport no_such_package\n",
            r"custom\.py:3: ModuleNotFoundError: No module named 'no_such_package'",
        ),
        ("import json\njson.loads('{')\n", r"custom\.py:2: JSONDecodeError"),
        ("def f():\n    return 1 / 0\n\nf()\n", r"custom\.py:2: ZeroDivisionError"),
        ("import sys\nsys.exit(3)\n", r"custom\.py:2: SystemExit: 3"),
        ("from torchtrain.catalog.datasets import nothing\n", r"custom\.py:1: ImportError"),
        (
            "from torchtrain.catalog.datasets import register_corpus\n"
            "register_corpus('text')(print)\n",
            "this dataset exists already; choose another name",
        ),
        ("x = '\xe9'\n".encode("latin-1"), r"custom\.py.*SyntaxError"),
        ("x = 1\n", "'my-logs' is unknown"),
    ],
)
def test_fault_in_the_users_file_is_one_message_of_the_config(
    tmp_path, monkeypatch, content, message
):
    monkeypatch.chdir(tmp_path)
    Path("custom.py").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message) as caught:
        JobConfig().parse_args(
            ["--experimental.custom_import=custom.py", "--training.dataset=my-logs"], world_size=1
        )
    assert str(caught.value).startswith("The configuration has 1 fault:\n  command line: ")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("gone.py", "there is no such file"),
        (".", "there is no module|import"),
        ("no_such_module", "there is no module 'no_such_module'; give a dotted module name"),
        ("json.nothing", "there is no module 'json.nothing'"),
        ("no_such_package.module", "there is no module 'no_such_package'"),
        ("a b/c", "there is no module 'a b/c'"),
    ],
)
def test_custom_import_that_is_not_there_is_named(given, message):
    with pytest.raises(UserError, match=message) as caught:
        import_custom(given)
    assert str(caught.value).startswith(f"experimental.custom_import = {given!r}: ")


@pytest.mark.parametrize("name", ["json", "sys"])
def test_file_of_the_users_that_has_a_known_modules_name_is_refused(tmp_path, name):
    (tmp_path / f"{name}.py").write_text("raise KeyError\n")
    with pytest.raises(
        UserError, match=f"Python already has a module named '{name}'; rename the file"
    ):
        import_custom(str(tmp_path / f"{name}.py"))


def test_path_of_an_unknown_user_is_one_that_is_not_there():
    with pytest.raises(UserError, match="does not exist"):
        open_corpus("text", "~no-such-user/texts", "text")


@pytest.mark.parametrize("fault", ["KeyError('x')", "SystemExit('x')"])
def test_fault_while_the_users_source_is_read_is_one_message(tmp_path, fault):
    (tmp_path / "custom.py").write_text(
        "from torchtrain.catalog.datasets import register_corpus\n"
        "@register_corpus('faulty')\n"
        "def faulty(path):\n"
        "    yield 'one'\n"
        f"    raise {fault}\n"
    )
    import_custom(str(tmp_path / "custom.py"))
    with pytest.raises(
        UserError, match=r"faulty, after document 1: .*custom\.py:5: (KeyError: 'x'|SystemExit: x)"
    ):
        texts(open_corpus("faulty", None, "text"))


def test_unknown_names_and_paths_without_effect_are_named(tmp_path):
    with pytest.raises(UserError, match=r"'parket' is unknown, did you mean parquet\?"):
        find_dataset("parket", None)
    with pytest.raises(UserError, match="takes no path"):
        find_dataset("someone/something", str(tmp_path))
    with pytest.raises(UserError, match="does not exist"):
        find_dataset("c4", str(tmp_path / "gone"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="must be a folder, a copy of allenai/c4"):
        open_corpus("c4", str(tmp_path / "file"), "text")
