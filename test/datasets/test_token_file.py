"""Token files are read where they lie, whole, as what they are; what cannot be one is said."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest
from helpers.launching import data_loader

from torchtrain.config.plans import DEBUG_TOKENIZER
from torchtrain.config_manager import JobConfig
from torchtrain.datasets import cache_folder, token_file
from torchtrain.datasets.loader import build_dataset
from torchtrain.datasets.samples import PackedDataset
from torchtrain.datasets.token_file import open_token_file
from torchtrain.datasets.tokenizer import load_tokenizer
from torchtrain.errors import UserError
from torchtrain.tools.bench_data import anonymous_mib

IDS = np.random.default_rng(0).integers(1, 2048, 1000)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEBUG_TOKENIZER)


@pytest.fixture
def opened(tmp_path, tokenizer):
    def open_file(name: str, dtype: str | None = None):
        return open_token_file(str(tmp_path / name), dtype, tokenizer, tmp_path / "cache")

    return open_file


@pytest.mark.parametrize(
    ("name", "dtype", "given"),
    [
        ("a.bin", "uint16", None),
        ("a.bin", "uint32", "uint32"),
        ("olmo.npy", "uint16", None),
        ("a.npy", "uint32", "uint32"),
    ],
)
def test_plain_ids_are_read_in_place(tmp_path, opened, name, dtype, given):
    (tmp_path / name).write_bytes(IDS.astype(dtype).tobytes())
    cache = opened(name, given)
    assert cache.tokens.tolist() == IDS.tolist()
    assert isinstance(cache.tokens, np.memmap)
    assert cache.tokens.filename == tmp_path / name
    assert (cache.manifest.tokens, cache.manifest.documents, cache.manifest.dtype) == (
        1000,
        None,
        dtype,
    )
    assert cache.manifest.describe() == f"tokens {tmp_path / name}: 1,000 tokens"


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64", ">u2"])
def test_numpys_own_header_says_the_type(tmp_path, opened, dtype):
    np.save(tmp_path / "a.npy", IDS.astype(dtype))
    assert opened("a.npy").tokens.tolist() == IDS.tolist()
    assert opened("a.npy", "uint16").tokens.tolist() == IDS.tolist(), (
        "the option is for files that don't say"
    )


HOSTILE = {
    "odd bytes": (
        "a.bin",
        lambda p: p.write_bytes(b"abc"),
        "3 bytes, which is not a positive multiple of the 2 bytes of uint16 ids",
    ),
    "empty": ("a.bin", lambda p: p.write_bytes(b""), "0 bytes"),
    "id beyond the vocabulary": (
        "a.bin",
        lambda p: p.write_bytes(np.array([1, 2048], np.uint16).tobytes()),
        "ids from 1 to 2,048, read as uint16, but the tokenizer's are 0 to 2,047",
    ),
    "negative id": ("a.npy", lambda p: np.save(p, np.array([5, -1])), "ids from -1 to 5"),
    "four bytes read as two": (
        "a.bin",
        lambda p: p.write_bytes(np.array([1, 2, 3000 << 16], np.uint32).tobytes()),
        "data.token_dtype",
    ),
    "table": (
        "a.npy",
        lambda p: np.save(p, np.zeros((2, 3), int)),
        r"int64 of shape \[2, 3\], but must hold a one-dimensional",
    ),
    "floats": ("a.npy", lambda p: np.save(p, np.zeros(3)), "holds float64"),
    "empty row": ("a.npy", lambda p: np.save(p, np.zeros(0, int)), r"shape \[0\]"),
    "objects": (
        "a.npy",
        lambda p: np.save(p, np.array([{}]), allow_pickle=True),
        r"damaged \.npy|[Oo]bject",
    ),
    "half a header": (
        "a.npy",
        lambda p: p.write_bytes(b"\x93NUMPY\x01\x00v\x00{'descr'"),
        r"damaged \.npy",
    ),
    "cut off": (
        "a.npy",
        lambda p: (np.save(p, np.arange(1000)), p.write_bytes(p.read_bytes()[:900])),
        r"damaged \.npy",
    ),
    "another name": ("a.txt", lambda p: p.write_text("text"), r"must be one \.bin or \.npy file"),
    "folder": ("a.bin", lambda p: p.mkdir(), r"must be one \.bin or \.npy file"),
    "no file": ("a.bin", lambda p: None, r"must be one \.bin or \.npy file"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_token_file_is_one_clear_error(tmp_path, opened, name):
    file, write, message = HOSTILE[name]
    write(tmp_path / file)
    with pytest.raises(UserError, match=message) as caught:
        opened(file)
    assert "\n" not in str(caught.value)


def test_megatrons_ids_are_read_once_their_type_is_given(tmp_path, opened):
    (tmp_path / "a.bin").write_bytes(IDS.astype(np.int32).tobytes())
    (tmp_path / "a.idx").write_bytes(b"MMIDIDX\0\0")
    with pytest.raises(UserError, match=r"has an \.idx beside it, .* Set data\.token_dtype"):
        opened("a.bin")
    assert opened("a.bin", "uint32").tokens.tolist() == IDS.tolist()


def test_what_another_user_has_found_is_used_where_nothing_can_be_written(
    tmp_path, opened, monkeypatch
):
    """A shared cache that this user may only read; root, as tests run, could write in any."""

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(cache_folder, "SETTLED_NS", 0)
    for name in ("a.bin", "b.bin"):
        (tmp_path / name).write_bytes(IDS.astype("<u2").tobytes())
    first = opened("a.bin").manifest
    monkeypatch.setattr(cache_folder, "open", refuse, raising=False)
    monkeypatch.setattr(cache_folder, "write_durably", refuse)
    said = []
    monkeypatch.setattr(cache_folder.logger, "warning", said.append)
    assert opened("a.bin").manifest == first
    assert not said
    for _ in range(2):
        assert opened("b.bin").manifest.corpus_fingerprint == first.corpus_fingerprint
    assert len(said) == 2
    assert "seen.json cannot be written: Permission denied. So the token file" in said[0]
    assert "b.bin' is read through at every start" in said[0]
    (tmp_path / "b.bin").write_bytes(np.array([1, 2048], np.uint16).tobytes())
    with pytest.raises(UserError, match="ids from 1 to 2,048"):
        opened("b.bin")


def test_a_file_is_read_through_once_and_again_when_it_has_changed(tmp_path, opened, monkeypatch):
    monkeypatch.setattr(cache_folder, "SETTLED_NS", 0)
    (tmp_path / "a.bin").write_bytes(IDS.astype("<u2").tobytes())
    first = opened("a.bin").manifest.corpus_fingerprint
    reads = []
    read_through = token_file._read_through
    monkeypatch.setattr(
        token_file, "_read_through", lambda *given: reads.append(1) or read_through(*given)
    )
    assert opened("a.bin").manifest.corpus_fingerprint == first
    assert not reads
    with open(tmp_path / "a.bin", "r+b") as file:
        file.write(b"\x07\x00")
    second = opened("a.bin").manifest.corpus_fingerprint
    assert second != first
    assert reads == [1]
    (seen,) = (tmp_path / "cache" / "tokens").glob("*.seen.json")
    seen.write_text(json.dumps({"state": 1}))
    assert opened("a.bin").manifest.corpus_fingerprint == second, (
        "what was remembered is not legible: read again"
    )
    assert reads == [1, 1]


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, opened, monkeypatch):
    (tmp_path / "a.bin").write_bytes(IDS.astype("<u2").tobytes())
    read_through = token_file._read_through

    def changing(file, *given):
        facts = read_through(file, *given)
        with open(file, "ab") as grown:
            grown.write(b"\x07\x00")
        return facts

    monkeypatch.setattr(token_file, "_read_through", changing)
    with pytest.raises(UserError, match=r"a\.bin' changed while it was read; start again when"):
        opened("a.bin")
    monkeypatch.undo()
    assert opened("a.bin").tokens.tolist() == [*IDS.tolist(), 7]


def test_the_type_of_plain_ids_is_an_option(tmp_path, tokenizer):
    (tmp_path / "a.bin").write_bytes(IDS.astype(np.uint32).tobytes())
    given = [
        "--training.dataset=tokens",
        f"--training.dataset_path={tmp_path / 'a.bin'}",
        "--training.seq_len=9",
    ]
    given.append(f"--data.cache_folder={tmp_path}")

    def first_ids(*more: str) -> set[int]:
        config = JobConfig().parse_args([*given, *more], world_size=1)
        dataset = build_dataset(config.training, config.data, tokenizer, 0)
        return set(dataset.read(np.arange(50))[0].ravel().tolist())

    assert 0 in first_ids(), "four bytes read as two are every other time 0"
    assert first_ids("--data.token_dtype=uint32") <= set(IDS.tolist())


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="the kernel doesn't tell memory by kind"
)
def test_a_loader_over_a_gigabyte_holds_none_of_it(tmp_path, opened):
    with open(tmp_path / "large.bin", "wb") as file:
        file.truncate(1 << 30)  # all holes: it takes no room on the disk
    before = anonymous_mib()
    loader = data_loader(PackedDataset(opened("large.bin"), 1024, seed=0), 64, 0, 1, 8)
    for step in range(1, 200):
        loader.step_batches(step)
    assert anonymous_mib() - before < 64, "one chunk of the first reading, and a few batches"


def test_same_ids_elsewhere_have_the_same_fingerprint(tmp_path, opened):
    for name in ("a.bin", "b.bin"):
        (tmp_path / name).write_bytes(IDS.astype("<u2").tobytes())
    assert (
        opened("a.bin").manifest.corpus_fingerprint == opened("b.bin").manifest.corpus_fingerprint
    )
