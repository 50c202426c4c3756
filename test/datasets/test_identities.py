"""What a cache, a token file and a packing are known by: none stands in for another."""

from types import SimpleNamespace

import numpy as np
import pytest

from torchtrain.config.plans import DEBUG_TOKENIZER
from torchtrain.datasets.files import read_files
from torchtrain.datasets.packing import find_segments
from torchtrain.datasets.token_cache import open_token_cache
from torchtrain.datasets.token_file import open_token_file
from torchtrain.datasets.tokenizer import load_tokenizer

BOS, EOS = 1, 2


def shifting(shift):
    """A tokenizer whose ids are the text's bytes, shifted."""
    return SimpleNamespace(
        fingerprint=f"shifts by {shift}",
        vocab_size=512,
        bos_id=BOS,
        eos_id=EOS,
        decodes=False,
        encode_batch=lambda texts, threads=1: [
            np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32) + shift for text in texts
        ],
    )


def test_another_tokenizer_has_another_cache(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("ab")
    for shift in (10, 20, 10):
        corpus = read_files("text", tmp_path / "corpus", "")
        tokens = open_token_cache(corpus, shifting(shift), tmp_path / "cache").tokens
        assert tokens.tolist() == [BOS, ord("a") + shift, ord("b") + shift, EOS]


@pytest.mark.parametrize("changed", [0, 1, 500, 999])
def test_one_id_makes_another_token_file(tmp_path, changed):
    tokenizer = load_tokenizer(DEBUG_TOKENIZER)
    fingerprints = set()
    for value in (7, 8):
        ids = np.full(1000, 7, dtype=np.uint16)
        ids[changed] = value
        file = tmp_path / f"{value}.bin"
        ids.tofile(file)
        opened = open_token_file(str(file), None, tokenizer, tmp_path / "cache")
        fingerprints.add(opened.manifest.corpus_fingerprint)
    assert len(fingerprints) == 2


def test_a_single_token_is_no_sequence():
    """It predicts nothing; here a BOS stands alone before another."""
    tokens = np.array([BOS, BOS, 7, EOS], dtype=np.uint16)
    assert np.concatenate(list(find_segments(tokens, 8, BOS, EOS))).tolist() == [[1, 3]]
