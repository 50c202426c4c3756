"""JSON by what files are called and by what they hold, and compressed files as tools make them."""

import gzip
import json
import os
import random
import zlib

import pytest
import zstandard
from helpers.corpora import open_corpus

from torchtrain.config.schema import Data
from torchtrain.config.sources import DataSource
from torchtrain.datasets import compressed, json_files
from torchtrain.datasets.open import open_source
from torchtrain.errors import UserError


def lines(*values):
    return b"".join(json.dumps({"text": value}).encode() + b"\n" for value in values)


def array(*values, **options):
    return json.dumps([{"text": value} for value in values], **options).encode()


def zstd(content, window_log=20):
    parameters = zstandard.ZstdCompressionParameters(
        window_log=window_log, enable_ldm=window_log > 27, write_checksum=True
    )
    return zstandard.ZstdCompressor(compression_params=parameters).compress(content)


COMPRESS = {".gz": gzip.compress, ".zst": zstd}


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def read(path, kind="jsonl", on_bad_row="error"):
    return [each.text for each in open_corpus(kind, str(path), "text", on_bad_row).documents()]


def fault(path, kind="jsonl"):
    with pytest.raises(UserError) as caught:
        read(path, kind)
    return str(caught.value)


def skipped(path):
    """The texts that are left with skip, and the kinds and places of what is not."""
    corpus = open_corpus("jsonl", str(path), "text", "skip")
    texts = [document.text for document in corpus.documents()]
    return texts, corpus.skipped.locations


# Names

NAMES = {
    "a.jsonl": lines("a1", "a2"),
    "b.JSONL": lines("b"),
    "c.json.gz": gzip.compress(lines("c1", "c2")),
    "d.json": lines("d1", "d2"),
    "e.json": array("e1", "e2"),
    "f.JSON.ZST": zstd(array("f1", "f2", indent=2)),
    "g.ndjson": lines("g"),
    "h.NdJson.Gz": gzip.compress(lines("h")),
    "i.json": b'{\n  "text": "i",\n  "id": 3\n}\n',
    "j/k.json.zst": zstd(lines("k")),
    "l.jsonl.zst": zstd(lines("l")),
}
TEXTS = ["a1", "a2", "b", "c1", "c2", "d1", "d2", "e1", "e2", "f1", "f2", "g", "h", "i", "k", "l"]
OTHERS = {
    ".hidden.jsonl": lines("hidden"),
    ".git/config.json": lines("hidden"),
    "README.md": b"# what this is",
    "j/m.csv": b"text\na\n",
    "n.json.bz2": b"BZh9",
    "o.jsonl~": lines("old"),
}


def test_every_name_that_json_goes_by_is_read_and_every_other_file_is_named(tmp_path, logged):
    write(tmp_path, NAMES | OTHERS)
    data = Data()
    source = DataSource(option="training.dataset", dataset="jsonl", path=str(tmp_path))
    corpus = open_source(source, data)
    assert [document.text for document in corpus.documents()] == TEXTS
    assert logged == [
        f"warning: jsonl {tmp_path} [text]: 6 files not read: .git/, .hidden.jsonl, README.md, "
        "j/m.csv, n.json.bz2, o.jsonl~"
    ]


def test_a_mixed_folder_reads_json_as_json(tmp_path, logged):
    write(tmp_path, NAMES | {"README.md": b"a text", ".hidden": b""})
    assert read(tmp_path, "mixed") == ["a text", *TEXTS]


def test_many_files_that_are_not_read_are_counted(tmp_path, logged):
    write(tmp_path, {"a.jsonl": lines("a")} | {f"b{number:02}.csv": b"" for number in range(20)})
    (said,) = [open_corpus("jsonl", str(tmp_path), "text").describe_other_files()]
    assert said.startswith(f"jsonl {tmp_path} [text]: 20 files not read: b00.csv, b01.csv, ")
    assert said.endswith("b15.csv and 4 more")


def test_a_folder_in_which_nothing_counts_says_what_is_there(tmp_path):
    write(tmp_path, {"a.csv": b"", "b.parquet": b""})
    assert fault(tmp_path).endswith(
        "holds no file that counts as jsonl (*.jsonl, *.ndjson or *.json, also with .gz or .zst); "
        "there are a.csv, b.parquet"
    )


@pytest.mark.parametrize("name", NAMES)
def test_each_is_read_alone_too(tmp_path, name):
    write(tmp_path, {name: NAMES[name]})
    assert read(tmp_path) == read(tmp_path / name) == read(tmp_path, "mixed")


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstd])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.ndjson.zst", "a.log"])
@pytest.mark.parametrize("content", [lines("one", "two"), b"\xef\xbb\xbf \n" + array("one", "two")])
def test_what_is_compressed_is_seen_by_its_content(tmp_path, name, compress, content):
    """As where a download has decompressed a file, and left its name."""
    if b"[" in content:
        name = name.replace("jsonl", "json").replace("ndjson", "json").replace("log", "json")
    write(tmp_path, {name: compress(content)})
    documents = open_corpus("jsonl", str(tmp_path / name), "text").documents()
    assert [document.text for document in documents] == ["one", "two"]


def test_the_ending_of_parquet_in_any_case(tmp_path):
    write(tmp_path, {"x.PARQUET": b"no table"})
    assert "the parquet data is broken" in fault(tmp_path, "parquet")
    assert "the parquet data is broken" in fault(tmp_path, "mixed")


# What .json holds

WHOLE = {
    "[]": [],
    " [ ] \n": [],
    '\ufeff[{"text": "a"}]': ["a"],
    '\n\n[\n{"text": "a"}\n,{"text": "b"}]\n\n': ["a", "b"],
    '[{"text": "a, ]"}, {"text": "[\\""}]': ["a, ]", '["'],
    '{"text": "a"}': ["a"],
    '\n{"text": "a"}\n\n{"text": "b"}': ["a", "b"],
    "": [],
    "\n \n": [],
}


@pytest.mark.parametrize("content", WHOLE)
def test_json_is_lines_an_array_or_an_object(tmp_path, content):
    write(tmp_path, {"x.json": content.encode()})
    assert read(tmp_path / "x.json") == WHOLE[content]


BROKEN = {
    "cut": (array("a", "b")[:-4], ["a"], "broken JSON", 2),
    "no comma": (b'[{"text": "a"} {"text": "b"}]', ["a"], "broken JSON", 2),
    "two commas": (b'[{"text": "a"},, {"text": "b"}]', ["a"], "broken JSON", 2),
    "a last comma": (b'[{"text": "a"},]', ["a"], "broken JSON", 2),
    "more": (array("a") + b" {}", ["a"], "broken JSON", 2),
    "open": (b"[", [], "broken JSON", 1),
    "deep": (b'[{"text": "a"}, ' + b"[" * 100_000, ["a"], "broken JSON", 2),
    "a string": (b'["a", {"text": "b"}]', ["b"], "not an object", 1),
    "no text": (b'[{"text": "a"}, {"body": "b"}, {"text": "c"}]', ["a", "c"], "no text field", 2),
    "UTF-8": (b'[{"text": "caf\xe9"}, {"text": "b"}]', ["b"], "invalid UTF-8", 1),
    "half": (b'[{"text": "\\ud800"}, {"text": "b"}]', ["b"], "lone surrogate", 1),
    "line 1": (b'{"text": "a"\n{"text": "b"}\n', ["b"], "broken JSON", 1),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_costs_nothing_else(tmp_path, case):
    content, left, kind, place = BROKEN[case]
    file = tmp_path / "x.json"
    write(tmp_path, {"x.json": content})
    assert skipped(file) == (left, [f"{file}:{place} ({kind})"])
    assert fault(file).startswith(f"{file}:{place}: ")


# Compressed files

SOME = [f"{number} {random.Random(number).randbytes(40).hex()}" for number in range(400)]
CONTENT = lines(*SOME)


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("piece", [7, 1000, 1 << 14])
def test_pieces_of_any_size_give_the_same_lines(tmp_path, monkeypatch, ending, piece):
    monkeypatch.setattr(compressed, "PIECE", piece)
    monkeypatch.setattr(json_files, "PIECE", piece)
    parts = [CONTENT[:1001], CONTENT[1001:20_000], b"", CONTENT[20_000:]]
    name = f"x.jsonl{ending}"
    write(tmp_path, {name: b"".join(map(COMPRESS[ending], parts)), "plain.jsonl": CONTENT})
    assert read(tmp_path / name) == read(tmp_path / "plain.jsonl") == SOME


@pytest.mark.parametrize("window_log", [27, 28, 31])
def test_zstd_with_a_long_window(tmp_path, window_log):
    content = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(
            window_log=window_log, enable_ldm=True
        )
    ).compressobj()  # of unknown size: the frame asks for the whole window
    frame = content.compress(CONTENT) + content.flush()
    assert zstandard.get_frame_parameters(frame).window_size == 2**window_log
    write(tmp_path, {"x.jsonl.zst": frame})
    assert read(tmp_path) == SOME


def test_frames_of_zstd_that_say_nothing_are_skipped(tmp_path):
    comment = b"\x53\x2a\x4d\x18" + (5).to_bytes(4, "little") + b"hello"  # RFC 8878, 3.1.2
    halves = zstd(CONTENT[:3000]), zstd(CONTENT[3000:])
    write(tmp_path, {"x.jsonl.zst": comment + halves[0] + comment + halves[1] + comment})
    assert read(tmp_path) == SOME


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("zeros", [1, 512, 40_000])
def test_zeros_after_the_end_are_nothing(tmp_path, logged, ending, zeros):
    name = f"x.jsonl{ending}"
    write(tmp_path, {name: COMPRESS[ending](CONTENT) + b"\0" * zeros})
    assert read(tmp_path / name) == SOME
    assert logged == []


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("tail", [b"x", b"\n" * 100_000, b"\0\0\0PK\3\4"])
def test_what_else_follows_is_left_out_with_a_warning(tmp_path, logged, ending, tail):
    name = f"x.jsonl{ending}"
    write(tmp_path, {name: COMPRESS[ending](CONTENT) + tail})
    assert read(tmp_path / name) == SOME
    size = len(tail.lstrip(b"\0"))
    kind = compressed.FORMATS[ending][0]
    what = "1 byte" if size == 1 else f"{size:,} bytes"
    assert logged == [f"warning: {tmp_path / name}: {what} after its {kind} data are left out"]


def whole_lines(content):
    """The texts of the lines of a content that breaks off, the last if it is a whole object."""
    *complete, last = content.split(b"\n")
    texts = [json.loads(line)["text"] for line in complete]
    try:
        return [*texts, json.loads(last)["text"]]
    except ValueError:
        return texts


def test_a_gzip_that_is_cut_anywhere_keeps_all_that_gzip_can_read(tmp_path):
    file = tmp_path / "x.jsonl.gz"
    data = gzip.compress(CONTENT)
    for cut in [1, 9, 10, 200, len(data) // 3, len(data) // 2, len(data) - 9, len(data) - 1]:
        file.write_bytes(data[:cut])
        readable = zlib.decompressobj(wbits=31).decompress(data[:cut])
        texts, (place,) = skipped(file)
        assert texts == whole_lines(readable)
        assert place == f"{file}:{len(texts) + 1} (broken gzip)"


HEADER = {".gz": 10, ".zst": 9}
"""Bytes before the first block of a part."""


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_break_costs_nothing_before_it(tmp_path, ending):
    """Also where what is before it was read with the same piece."""
    file = tmp_path / f"x.jsonl{ending}"
    first, second = COMPRESS[ending](lines(*SOME[:300])), COMPRESS[ending](lines(*SOME[300:]))
    for place in [len(first), len(first) + 5, len(first) + len(second) // 2]:
        data = bytearray(first + second)
        beginning = 4 if place == len(first) else 0  # the next part can be recognized
        data[place + beginning : place + beginning + 40] = b"\xff" * 40
        file.write_bytes(data)
        texts, said = skipped(file)  # what decompresses to other bytes can be bad lines first
        assert texts[:300] == SOME[:300]
        if place == len(first) + HEADER[ending]:
            assert said == [f"{file}:301 (broken {compressed.FORMATS[ending][0]})"]


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_wrong_sum_costs_no_text(tmp_path, ending):
    file = tmp_path / f"x.jsonl{ending}"
    data = bytearray(COMPRESS[ending](CONTENT))
    data[-8 if ending == ".gz" else -1] ^= 1
    file.write_bytes(data)
    texts, (said,) = skipped(file)
    assert texts == SOME
    assert said == f"{file}:401 (broken {compressed.FORMATS[ending][0]})"


@pytest.mark.parametrize("ending", COMPRESS)
def test_a_part_whose_beginning_is_damaged_is_no_end(tmp_path, ending, logged):
    file = tmp_path / f"x.jsonl{ending}"
    parts = [COMPRESS[ending](lines(text)) for text in SOME[:100]]
    data = bytearray(b"".join(parts))
    data[len(parts[0])] ^= 4
    file.write_bytes(data)
    kind = compressed.FORMATS[ending][0]
    assert skipped(file) == (SOME[:1], [f"{file}:2 (broken {kind})"])
    assert "no part begins where one has ended" in fault(file)


@pytest.mark.parametrize("ending", COMPRESS)
@pytest.mark.parametrize("left", [1, 3, 5])
def test_a_part_that_is_cut_in_its_header_is_no_tail(tmp_path, ending, left):
    file = tmp_path / f"x.jsonl{ending}"
    file.write_bytes(COMPRESS[ending](CONTENT) + COMPRESS[ending](CONTENT)[:left])
    assert skipped(file) == (SOME, [f"{file}:401 (broken {compressed.FORMATS[ending][0]})"])


@pytest.mark.parametrize("name", ["x.json", "x.jsonl"])
def test_other_bad_rows_of_a_cut_file_are_just_that(tmp_path, name):
    """Also where it is read as a whole before its first row."""
    rows = [f'{{"text": "{number}"}}' for number in range(10)]
    rows[2] = '{"body": "2"}'
    texts = [str(number) for number in range(10) if number != 2]
    content = "[" + ", ".join(rows) + "]" if name == "x.json" else "\n".join(rows) + "\n"
    file = tmp_path / f"{name}.gz"
    file.write_bytes(gzip.compress(content.encode())[:-4])
    places = [f"{file}:3 (no text field)", f"{file}:11 (broken gzip)"]
    assert skipped(file) == (texts, places)
    rows[0] = "{broken"
    file.write_bytes(gzip.compress("\n".join(rows).encode())[:-4])
    places = [f"{file}:1 (broken JSON)", *places]
    assert skipped(file) == (texts[1:], places)


def test_an_array_that_is_cut_in_gzip_is_one_fault(tmp_path):
    file = tmp_path / "x.json.gz"
    file.write_bytes(gzip.compress(array(*SOME))[:-3000])
    texts, (said,) = skipped(file)
    assert 0 < len(texts) < 400
    assert texts == SOME[: len(texts)]
    assert said == f"{file}:{len(texts) + 1} (broken gzip)"


@pytest.mark.parametrize("ending", COMPRESS)
def test_an_empty_file_is_no_compressed_one(tmp_path, ending):
    file = tmp_path / f"x.jsonl{ending}"
    file.touch()
    assert fault(file).startswith(f"{file}:1: the {compressed.FORMATS[ending][0]} data is broken")


def test_a_long_line_is_put_together_once(tmp_path):
    """Not copied again with each of its pieces."""
    long = "a" * 30_000_000
    write(tmp_path, {"x.jsonl.gz": gzip.compress(lines(long, "b"), 1), "y.jsonl": lines(long)})
    assert read(tmp_path) == [long, "b", long]


def test_a_file_that_is_gone_is_named(tmp_path):
    for name in ("x.jsonl", "x.jsonl.gz", "x.json", "x.json.zst"):
        os.symlink(tmp_path / "gone", tmp_path / name)
        with pytest.raises(UserError, match=r"cannot read .*No such file"):
            list(json_files.read_json(tmp_path / name, "text"))
