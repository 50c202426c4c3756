"""Token files made elsewhere, used where they lie: nothing is copied, and nothing is added.

    .bin   ids one after the other, as nanoGPT and Megatron write them (whose .idx is not read)
    .npy   NumPy's own format or, as OLMo's, ids one after the other under that name

A file is read through once: its hash is part of the run's identity, and no id may be outside the
vocabulary. What was found is kept in the cache folder while the file's path, size and times stay
the same.
"""

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from torchtrain.datasets.cache_folder import (
    Progress,
    files_state,
    find_facts,
    load_facts,
    locked,
    short_hash,
)
from torchtrain.datasets.token_cache import Manifest, TokenCache, dtype_for
from torchtrain.datasets.tokenizer import Tokenizer
from torchtrain.errors import NotWritable, UserError
from torchtrain.utils import expand_user, user_errors

CHUNK = 1 << 24
"""Tokens that are checked at a time."""


def open_token_file(
    path: str | None, dtype: str | None, tokenizer: Tokenizer, root: Path
) -> TokenCache:
    """Memory-map the ids in `path`.

    Args:
        path: the `.bin` or `.npy` file.
        dtype: `data.token_dtype`, of ids whose file doesn't say.
        tokenizer: the one that made the ids, which no file says: its vocabulary must hold them.
        root: the cache folder.

    Raises:
        UserError: no such file, not what its name says, or an id outside the vocabulary.
    """
    file, tokens = map_token_file(path, dtype, tokenizer)
    folder = root / "tokens"
    key = short_hash(["token file", str(file.absolute()), tokens.dtype.str])
    seen = folder / f"{key}.seen.json"
    find_state = partial(files_state, [file])
    facts = load_facts(seen, find_state()[0])
    if not facts:  # else nothing is written, which this user may not be allowed to
        read = partial(_read_through, file, tokens)
        find = partial(find_facts, f"the token file {str(file)!r}", seen, find_state)
        try:
            with locked(folder, key) as progress:
                facts = find(partial(read, progress))
        except NotWritable:
            facts = find(partial(read, Progress()))
    lowest, highest = facts["lowest"], facts["highest"]
    if not 0 <= lowest <= highest < tokenizer.vocab_size:
        raise UserError(
            f"the token file {path!r} holds ids from {lowest:,} to {highest:,}, read as "
            f"{tokens.dtype}, but the tokenizer's are 0 to {tokenizer.vocab_size - 1:,}. Set "
            "model.tokenizer_path to the tokenizer that made it, and data.token_dtype to its type"
        )
    manifest = Manifest(
        source=f"tokens {path}",
        files=1,
        tokens=len(tokens),
        dtype=tokens.dtype.name,
        corpus_fingerprint=facts["fingerprint"],
        tokenizer_fingerprint=tokenizer.fingerprint,
    )
    return TokenCache(manifest, tokens)


def map_token_file(
    path: str | None, dtype: str | None, tokenizer: Tokenizer
) -> tuple[Path, np.ndarray]:
    """Return the file and its ids `[tokens]`, memory-mapped; the arguments are `open_token_file`'s.

    Raises:
        UserError: no such file, or not what its name says.
    """
    assert path is not None, "the config check asks for it"
    file = expand_user(path)
    with user_errors(f"cannot read the token file {path!r}", OSError):
        return file, _map(file, dtype, dtype_for(tokenizer))


def _map(file: Path, given: str | None, default: np.dtype) -> np.ndarray:
    """Map the ids `[tokens]`; their type is the file's own, else `given`, else `default`."""
    if file.suffix not in (".bin", ".npy") or not file.is_file():
        raise UserError(
            f"a token file must be one .bin or .npy file, but {str(file)!r} is not. Join several "
            "into one (`cat` does for .bin), or list them in data.mixture"
        )
    with open(file, "rb") as start:
        if start.read(6) == b"\x93NUMPY":
            return _map_npy(file)
    if given is None and file.suffix == ".bin" and file.with_suffix(".idx").exists():
        raise UserError(
            f"the token file {str(file)!r} has an .idx beside it, as Megatron's have, which alone "
            "knows the type of the ids and is not read. Set data.token_dtype: "
            '"uint16" if the vocabulary is below 65,500, else "uint32"'
        )
    dtype = np.dtype(given or default)
    size = file.stat().st_size
    if size % dtype.itemsize or size == 0:
        raise UserError(
            f"the token file {str(file)!r} has {size:,} bytes, which is not a positive multiple "
            f"of the {dtype.itemsize} bytes of {dtype} ids. Set data.token_dtype to the type it "
            "was written in, or get the file again"
        )
    return np.memmap(file, dtype, mode="r")


def _map_npy(file: Path) -> np.ndarray:
    with user_errors(f"the token file {str(file)!r} is a damaged .npy file", ValueError):
        tokens: np.ndarray = np.load(file, mmap_mode="r", allow_pickle=False)
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or len(tokens) == 0:
        raise UserError(
            f"the token file {str(file)!r} holds {tokens.dtype} of shape {list(tokens.shape)}, "
            "but must hold a one-dimensional array of integers"
        )
    return tokens


def _read_through(file: Path, tokens: np.ndarray, progress: Progress) -> dict[str, Any]:
    digest = hashlib.sha256(f"{tokens.dtype.str} {len(tokens)}".encode())
    lowest = highest = int(tokens[0])
    for start in range(0, len(tokens), CHUNK):
        chunk = tokens[start : start + CHUNK]
        digest.update(chunk.data)
        lowest = min(lowest, int(chunk.min()))
        highest = max(highest, int(chunk.max()))
        progress.show(f"checking {file}: {start / len(tokens):4.0%}")
    return {"fingerprint": digest.hexdigest(), "lowest": lowest, "highest": highest}
