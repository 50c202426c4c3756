"""Readers give every document in a fixed order and the location of every fault; the cache is
complete or not there."""

import errno
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.corpora import open_corpus
from helpers.tokens import encode

from torchtrain.datasets import cache_folder, token_cache
from torchtrain.datasets.cache_folder import cache_root, find_facts
from torchtrain.datasets.corpora import Corpus, Document
from torchtrain.datasets.files import read_files, read_stdlib
from torchtrain.datasets.packing import open_packing
from torchtrain.datasets.token_cache import open_token_cache
from torchtrain.datasets.tokenizer import SentencePieceTokenizer, load_tokenizer
from torchtrain.errors import UserError

DEBUG_MODEL = Path(token_cache.__file__).with_name("debug_tokenizer.model")
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return load_tokenizer(DEBUG_MODEL)


@pytest.fixture
def settled(monkeypatch):
    """Files count as settled at once: the corpus' state is kept without waiting for two seconds."""
    monkeypatch.setattr(cache_folder, "SETTLED_NS", 0)


def texts(corpus: Corpus) -> list[str]:
    return [document.text for document in corpus.documents()]


def write(folder: Path, **files: str | bytes) -> Path:
    """`folder` with `files` in it; in their names `__` stands for `/`."""
    for name, content in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


# Readers


def test_text_keeps_every_byte(tmp_path):
    content = "\ufefffirst\r\nsecond\rthird\n\0\t".encode()
    (tmp_path / "a.txt").write_bytes(content)
    assert [text.encode() for text in texts(read_files("text", tmp_path / "a.txt", ""))] == [
        content
    ]


def test_text_folder_is_read_in_the_order_of_relative_paths(tmp_path):
    write(
        tmp_path,
        b="b",
        a__z="a/z",
        a__b__c="a/b/c",
        A="A",
        aa="aa",
        empty="",
        **{".hidden": "no", ".git__x": "no"},
    )
    os.symlink(tmp_path / "a", tmp_path / "loop")
    os.symlink(tmp_path, tmp_path / "a" / "back")
    os.mkfifo(tmp_path / "pipe")
    corpus = read_files("text", tmp_path, "")
    assert texts(corpus)[:5] == ["A", "a/b/c", "a/z", "aa", "b"]
    assert sorted(texts(corpus)) == sorted({"A", "a/b/c", "a/z", "aa", "b"}), (
        "a linked folder is read once"
    )
    assert texts(corpus) == texts(read_files("text", tmp_path, ""))


def test_linked_folder_is_followed(tmp_path):
    write(tmp_path / "elsewhere", x="linked")
    write(tmp_path / "corpus", a="own")
    os.symlink(tmp_path / "elsewhere", tmp_path / "corpus" / "link")
    assert texts(read_files("text", tmp_path / "corpus", "")) == ["own", "linked"]


def test_text_that_is_not_utf8_is_named_with_its_offset(tmp_path):
    write(tmp_path, a="fine", b=b"caf\xe9")
    with pytest.raises(UserError, match="b: not UTF-8: 0xe9 in byte 4;"):
        texts(read_files("text", tmp_path, ""))


def test_dangling_link_is_named(tmp_path):
    os.symlink(tmp_path / "gone", tmp_path / "link")
    with pytest.raises(UserError, match=r"link.*No such file"):
        texts(read_files("text", tmp_path, ""))


def test_jsonl_gives_each_line_with_its_place(tmp_path):
    first = b'\xef\xbb\xbf{"text": "one\\r\\n", "n": 1}\r\n'
    lines = first + b'\n  \n{"text": ""}\n{"text": "\\ud83d\\ude00"}'
    write(
        tmp_path,
        **{"b.jsonl": lines, "a.jsonl": '{"text": "first"}\n', "c.txt": "no", ".d.jsonl": "no"},
    )
    documents = list(read_files("jsonl", tmp_path, "text").documents())
    assert [document.text for document in documents] == ["first", "one\r\n", "\U0001f600"]
    assert [document.location for document in documents] == [
        f"{tmp_path}/a.jsonl:1",
        f"{tmp_path}/b.jsonl:1",
        f"{tmp_path}/b.jsonl:5",
    ]


def test_jsonl_reads_another_key_and_a_file_of_any_name(tmp_path):
    write(tmp_path, **{"data.json": '{"body": "x"}\n'})
    assert texts(read_files("jsonl", tmp_path / "data.json", "body")) == ["x"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "a"', "not JSON"),
        (b'{"text": "a"} {"text": "b"}', "not JSON"),
        (b'{"text": "\xff"}', "not UTF-8: 0xff in byte 11;"),
        (
            b'{"body": "a", "id": 1}',
            "no 'text', which data.text_key asks for; fields here: 'body', 'id'",
        ),
        (b"{}", "no 'text', .* fields here: none"),
        (b'{"text": null}', "'text' is null, but must be a string"),
        (b'{"text": ["a"]}', "'text' is a list, but must be a string"),
        (b'["text"]', "the line is a list, but must be an object with 'text'"),
        (b'"text"', "the line is a string, but must be an object"),
        (b"3", "the line is a number"),
        (b'{"text": "\\ud800"}', r"lone surrogate, \\ud800"),
        (b"[" * 100_000, "not JSON"),
        (b"\x00", "not JSON"),
    ],
)
def test_bad_line_is_named_by_file_and_number(tmp_path, line, message):
    write(tmp_path, **{"x.jsonl": b'{"text": "fine"}\n' + line + b"\n"})
    with pytest.raises(UserError, match=message) as caught:
        texts(read_files("jsonl", tmp_path, "text"))
    assert str(caught.value).startswith(f"{tmp_path}/x.jsonl:2: ")


def test_library_leaves_out_duplicates_tests_and_other_encodings(tmp_path):
    write(
        tmp_path,
        **{
            "a.py": "x = 1\n",
            "b.py": "x = 1\n",
            "pkg__c.py": "y = 2\n",
            "e.py": "",
            "notes.txt": "no",
        },
    )
    write(tmp_path, **{"test__t.py": "no", "pkg__tests__t.py": "no", "site-packages__s.py": "no"})
    write(tmp_path, **{"latin.py": b"# -*- coding: latin-1 -*-\n# caf\xe9\n"})
    assert texts(read_stdlib(tmp_path)) == ["x = 1\n", "y = 2\n"]


def test_this_interpreters_library_is_there():
    corpus = read_stdlib()
    names = [file.name for file in corpus.files]
    assert "argparse.py" in names
    assert names.count("argparse.py") == 1
    assert not {"test", "site-packages"} & {
        part for file in corpus.files for part in file.parent.parts[-2:]
    }


@pytest.mark.parametrize("dataset", ["text", "jsonl", "parquet", "mixed"])
def test_missing_empty_and_wrong_paths_are_named(tmp_path, dataset):
    with pytest.raises(UserError, match=r"training\.dataset_path"):
        open_corpus(dataset, None, "text")
    with pytest.raises(UserError, match="does not exist"):
        open_corpus(dataset, str(tmp_path / "nothing"), "text")
    with pytest.raises(UserError, match="holds no"):
        open_corpus(dataset, str(tmp_path), "text")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="neither a file nor a folder"):
        open_corpus(dataset, str(tmp_path / "pipe"), "text")


def test_token_file_is_no_corpus(tmp_path):
    write(tmp_path, **{"a.bin": b"\0\0"})
    with pytest.raises(UserError, match="is a token file, which has no text"):
        open_corpus("tokens", str(tmp_path / "a.bin"), "text")


def test_unknown_dataset_is_named_with_the_nearest():
    with pytest.raises(
        UserError, match=r"'jsnl' is unknown, did you mean jsonl.; allowed: python_stdlib, text"
    ):
        open_corpus("jsnl", None, "text")


# The cache


def test_cache_holds_each_document_between_bos_and_eos(tmp_path, tokenizer):
    write(tmp_path / "corpus", a="def f():\r\n\treturn 1\n", b="\u2581 \U0001f600")
    cache = open_token_cache(
        read_files("text", tmp_path / "corpus", ""), tokenizer, tmp_path / "cache"
    )
    expected = []
    for text in ("def f():\r\n\treturn 1\n", "\u2581 \U0001f600"):
        expected += [tokenizer.bos_id, *encode(tokenizer, text), tokenizer.eos_id]
    assert cache.tokens.tolist() == expected
    assert cache.tokens.dtype == np.uint16
    assert not cache.tokens.flags.writeable
    manifest = cache.manifest
    assert (manifest.files, manifest.documents, manifest.bytes, manifest.tokens) == (
        2,
        2,
        28,
        len(expected),
    )


def test_large_vocabulary_takes_four_bytes(tmp_path, tokenizer):
    write(tmp_path / "corpus", a="text")
    large = load_tokenizer(DEBUG_MODEL)
    large.vocab_size = (1 << 16) + 1
    large.fingerprint = "another"
    assert (
        open_token_cache(
            read_files("text", tmp_path / "corpus", ""), large, tmp_path / "cache"
        ).tokens.dtype
        == np.uint32
    )


@pytest.mark.parametrize(
    ("vocab_size", "dtype"), [(2, "uint16"), (65_536, "uint16"), (65_537, "uint32")]
)
def test_ids_have_two_bytes_while_all_fit(vocab_size, dtype):
    other = load_tokenizer(DEBUG_MODEL)
    other.vocab_size = vocab_size
    assert token_cache.dtype_for(other) == np.dtype(dtype)


def test_another_tokenizer_has_a_cache_of_its_own(tmp_path, tokenizer):
    corpus = read_files("text", write(tmp_path / "corpus", a="text"), "")
    other = load_tokenizer(DEBUG_MODEL)
    other.bos_id = 7
    other.fingerprint = "another"
    first, second = (
        open_token_cache(corpus, each, tmp_path / "cache").tokens.tolist()
        for each in (tokenizer, other)
    )
    assert (first[0], second[0]) == (tokenizer.bos_id, 7)
    assert first[1:] == second[1:]
    assert open_token_cache(corpus, tokenizer, tmp_path / "cache").tokens.tolist() == first


@pytest.fixture
def opened(tokenizer, logged):
    """opened(corpus): the fingerprint of its cache, opened as a new process would, and the first
    words of what was logged."""

    def open_it(corpus: Path) -> tuple[str, list[str]]:
        logged.clear()
        cache = open_token_cache(read_files("text", corpus, ""), tokenizer, corpus.parent / "cache")
        assert cache.manifest.corpus_fingerprint
        return cache.manifest.corpus_fingerprint, [line.split()[0] for line in logged]

    return open_it


BUILT = ["tokenizing", "tokenized"]


def test_unchanged_corpus_is_not_read_again(tmp_path, opened, settled, monkeypatch):
    corpus = write(tmp_path / "corpus", a="text")
    first, log = opened(corpus)
    assert log == BUILT
    monkeypatch.setattr(token_cache, "_read_through", None)
    assert opened(corpus) == (first, [])


def test_files_that_just_changed_are_read_again(tmp_path, opened, monkeypatch):
    """They might change once more within the same time stamp."""
    monkeypatch.setattr(cache_folder, "SETTLED_NS", 10**18)  # however slow this machine is
    corpus = write(tmp_path / "corpus", a="text")
    first, _ = opened(corpus)
    reads = []
    read_through = token_cache._read_through
    monkeypatch.setattr(
        token_cache, "_read_through", lambda *given: reads.append(1) or read_through(*given)
    )
    assert opened(corpus) == (first, [])
    assert reads == [1]


def rewrite_and_restore_times(corpus: Path) -> None:
    before = os.stat(corpus / "a")
    (corpus / "a").write_text("TEXT")
    os.utime(corpus / "a", ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [
        lambda corpus: (corpus / "a").write_text("longer text"),
        lambda corpus: (corpus / "a").write_text("TEXT"),
        rewrite_and_restore_times,
        lambda corpus: (corpus / "c").write_text("new"),
        lambda corpus: (corpus / "b").unlink(),
        lambda corpus: os.replace(corpus / "b", corpus / "0"),
    ],
    ids=["size", "time", "time set back", "added", "removed", "renamed"],
)
def test_changed_corpus_is_noticed(tmp_path, opened, settled, change):
    corpus = write(tmp_path / "corpus", a="text", b="more")
    first, _ = opened(corpus)
    time.sleep(0.02)  # longer than the kernel's clock tick, which time stamps are taken from
    change(corpus)
    second, log = opened(corpus)
    assert second != first
    assert log == BUILT


def test_same_text_elsewhere_or_touched_is_not_tokenized_again(tmp_path, opened, settled):
    first, _ = opened(write(tmp_path / "corpus", a="text", b="more"))
    os.utime(tmp_path / "corpus" / "a")
    assert opened(tmp_path / "corpus") == (first, [])
    assert opened(write(tmp_path / "copy", x="text", y="more")) == (first, [])


def test_border_between_documents_is_part_of_the_fingerprint(tmp_path, opened):
    first, _ = opened(write(tmp_path / "corpus", a="ab", b="c"))
    second, _ = opened(write(tmp_path / "other", a="a", b="bc"))
    assert first != second


def damage_size(folder: Path) -> None:
    with open(folder / "tokens.bin", "ab") as file:
        file.write(b"xx")


@pytest.mark.parametrize(
    "damage",
    [
        damage_size,
        lambda folder: (folder / "tokens.bin").unlink(),
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text("{}"),
        lambda folder: (folder / "manifest.json").write_text('{"tokens'),
        lambda folder: (folder / "manifest.json").write_bytes(b"\xff"),
    ],
    ids=["size", "no tokens", "no manifest", "empty manifest", "half a manifest", "not text"],
)
def test_damaged_cache_is_built_again_with_a_warning(tmp_path, opened, settled, damage):
    corpus = write(tmp_path / "corpus", a="text")
    first, _ = opened(corpus)
    (folder,) = (path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir())
    damage(folder)
    assert opened(corpus) == (first, ["warning:", *BUILT])
    assert opened(corpus) == (first, [])


def test_corpus_that_changes_while_it_is_read_is_refused(tmp_path, tokenizer):
    file = write(tmp_path / "corpus", a="text") / "a"
    corpus = read_files("text", tmp_path / "corpus", "")

    def documents():
        yield from corpus.documents()
        file.write_text("changed")

    changing = Corpus(corpus.name, corpus.files, [documents])
    with pytest.raises(UserError, match="changed while it was read"):
        open_token_cache(changing, tokenizer, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir()]


def test_corpus_that_changes_between_its_two_readings_is_refused(tmp_path, tokenizer):
    """It is read once for its contents, and again for its tokens."""
    readings = iter(["one", "two"])
    corpus = Corpus(
        "made up", [], [lambda: iter([Document(next(readings), "here")])], revision="unchanged"
    )
    with pytest.raises(UserError, match="made up changed while it was read"):
        open_token_cache(corpus, tokenizer, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("tokens/*/manifest.json"))


def test_empty_corpus_is_refused(tmp_path, tokenizer):
    with pytest.raises(UserError, match="holds no text"):
        open_token_cache(
            read_files("text", write(tmp_path / "corpus", a=""), ""), tokenizer, tmp_path / "cache"
        )


def test_folder_that_cannot_be_written_is_named_with_its_option(tmp_path, tokenizer):
    corpus = read_files("text", write(tmp_path / "corpus", a="text"), "")
    write(tmp_path, file="in the way")
    with pytest.raises(UserError, match=r"file/tokens'.*data\.cache_folder to a folder that can"):
        open_token_cache(corpus, tokenizer, tmp_path / "file")


def test_a_cache_that_cannot_be_written_is_used_as_far_as_it_is_complete(
    tmp_path, tokenizer, monkeypatch
):
    """By another user, from a copy at another path; root, as tests run, could write in any."""

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    def open_copy(name, text, tokenizer=tokenizer):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "a.txt").write_text(text)
        corpus = read_files("text", tmp_path / name, "")
        return open_token_cache(corpus, tokenizer, tmp_path / "cache")

    other = load_tokenizer(DEBUG_MODEL)
    other.fingerprint = "another"
    said = []
    monkeypatch.setattr(token_cache.logger, "warning", said.append)
    first = open_copy("first", "the same text, of some length")
    packing = open_packing(first, 4, tokenizer, tmp_path / "cache")
    files = {path: path.stat() for path in (tmp_path / "cache").rglob("*")}
    with monkeypatch.context() as patched:
        patched.setattr(cache_folder, "open", refuse, raising=False)
        for module in (cache_folder, token_cache):
            patched.setattr(module, "write_durably", refuse)
        again = open_copy("second", "the same text, of some length")
        assert again.tokens.tolist() == first.tokens.tolist()
        assert again.manifest.source == f"text {tmp_path / 'second'}"
        assert said[0].endswith("second is read through, to look for tokens of the same text")
        assert open_packing(again, 4, tokenizer, tmp_path / "cache") == packing
        with pytest.raises(UserError, match=r"^cannot write in .*tokens': Permission denied\. "):
            open_copy("third", "another text")
        patched.setattr(token_cache, "_read_through", pytest.fail)
        with pytest.raises(UserError, match=r"^cannot write in "):  # none is of this tokenizer
            open_copy("third", "another text", other)
        (tmp_path / "cache").rename(tmp_path / "away")
        with pytest.raises(UserError, match=r"^cannot write in "):
            open_copy("second", "the same text, of some length")
        (tmp_path / "cache" / "tokens").rmdir()
        (tmp_path / "cache").rmdir()
        (tmp_path / "away").rename(tmp_path / "cache")
    assert files.keys() == {*(tmp_path / "cache").rglob("*")}


def test_full_disk_is_named_and_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    corpus = read_files("text", write(tmp_path / "corpus", a="text"), "")

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(UserError, match=r"No space left on device.*data\.cache_folder"):
        open_token_cache(corpus, tokenizer, tmp_path / "cache")
    assert not [path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir()]


def test_cache_folder_is_the_option_then_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_root("~/mine") == tmp_path / "mine"
    assert cache_root(None) == tmp_path / "xdg" / "torchtrain"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cache_root(None) == tmp_path / ".cache" / "torchtrain"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_root(None) == tmp_path / ".cache" / "torchtrain"


BUILDER = """
    import sys, time
    from pathlib import Path
    from torchtrain.datasets import cache_folder, token_cache
    from torchtrain.datasets.files import read_files
    from torchtrain.logging_utils import init_logging
    from torchtrain.datasets.tokenizer import SentencePieceTokenizer, load_tokenizer

    def stall(*given, **named):
        print("stalled", flush=True)
        time.sleep(600)

    {patch}
    corpus = read_files("text", Path({corpus!r}), "")
    init_logging()
    # However late the corpus is read after it was written, it counts as changed just now.
    cache_folder.SETTLED_NS = 10**18
    cache = token_cache.open_token_cache(corpus, load_tokenizer({model!r}), Path({root!r}))
    print(cache.manifest.corpus_fingerprint, cache.manifest.tokens)
"""


def builder(corpus: Path, patch: str = "") -> subprocess.Popen:
    root, model = str(corpus.parent / "cache"), str(DEBUG_MODEL)
    script = textwrap.dedent(BUILDER).format(
        patch=patch, corpus=str(corpus), model=model, root=root
    )
    return subprocess.Popen(
        [sys.executable, "-c", script], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stalls_in", "complete"),
    [
        ("SentencePieceTokenizer.encode_batch", False),
        ("token_cache.write_durably", False),
        ("token_cache._publish", False),
        ("token_cache.fsync_folder", True),
    ],
)
def test_killed_builder_leaves_nothing_that_is_used(tmp_path, opened, stalls_in, complete):
    corpus = write(tmp_path / "corpus", a="text", b="more text")
    with builder(corpus, f"{stalls_in} = stall") as process:
        try:
            assert process.stdout.readline().startswith("tokenizing")
            assert process.stdout.readline() == "stalled\n"
        finally:
            os.kill(process.pid, signal.SIGKILL)
    folder = tmp_path / "cache" / "tokens"
    assert bool(list(folder.glob("*/manifest.json"))) == complete
    fingerprint, log = opened(corpus)
    assert log == ([] if complete else BUILT)
    left = [path.name for path in folder.iterdir() if ".building-" in path.name]
    assert not left, "the next builder clears up"
    (cache,) = folder.glob("*/manifest.json")
    assert json.loads(cache.read_text())["corpus_fingerprint"] == fingerprint


def test_what_a_process_that_was_killed_while_writing_left_is_removed(
    tmp_path, opened, monkeypatch
):
    corpus = write(tmp_path / "corpus", a="text")
    replace = os.replace

    def killed(source, target):
        if "manifest" in str(target):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        patched.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            opened(corpus)
    opened(corpus)
    (cache,) = (tmp_path / "cache" / "tokens").glob("*/manifest.json")
    assert sorted(path.name for path in cache.parent.iterdir()) == ["manifest.json", "tokens.bin"]
    (tmp_path / ".facts.json.a1b2_3c4").write_text("half")
    find_facts("a", tmp_path / "facts.json", lambda: ("state", 0), lambda: {"rows": 1})
    assert not (tmp_path / ".facts.json.a1b2_3c4").exists()


@pytest.mark.slow
def test_processes_at_once_build_once(tmp_path):
    corpus = write(
        tmp_path / "corpus", **{f"f{number}": f"text {number}\n" * 2000 for number in range(20)}
    )
    go = tmp_path / "go"
    held = textwrap.dedent(f"""
        encode = SentencePieceTokenizer.encode_batch

        def encode_when_told(*given, **named):
            while not Path({str(go)!r}).exists():
                time.sleep(0.01)
            return encode(*given, **named)

        SentencePieceTokenizer.encode_batch = encode_when_told
        cache_folder.PATIENCE_S = 0
    """)
    processes = [builder(corpus, held) for _ in range(3)]
    firsts = sorted(process.stdout.readline().split()[0] for process in processes)
    assert firsts == ["tokenizing", "waiting", "waiting"]
    go.touch()
    outputs = [process.communicate(timeout=60)[0].splitlines() for process in processes]
    assert all(process.returncode == 0 for process in processes)
    assert len({output[-1] for output in outputs}) == 1
    assert sum(line.startswith("tokenized") for output in outputs for line in output) == 1
