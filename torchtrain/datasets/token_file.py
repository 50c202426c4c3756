"""Token files made elsewhere, used where they lie: nothing is copied, and nothing is added between documents.

    .bin   ids one after the other, as nanoGPT and Megatron write them (whose .idx beside it is not read)
    .npy   NumPy's own format, or, as OLMo's, ids one after the other under that name

A file is read through once: its hash is part of the run's identity, and no id may be beyond the vocabulary. What was
found is remembered in the cache folder for as long as the file's path, size and times stay the same.
"""

import hashlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from torchtrain.datasets.token_cache import (
    Manifest,
    TokenCache,
    dtype_for,
    files_state,
    found_out,
    locked,
    short_hash,
)
from torchtrain.datasets.tokenizer import Tokenizer
from torchtrain.errors import UserError
from torchtrain.utils import expanded, reading

CHUNK = 1 << 24


def open_token_file(
    path: str | None,
    dtype: str | None,
    tokenizer: Tokenizer,
    root: Path,
    log: Callable[[str], None] = print,
) -> TokenCache:
    """The ids in `path`, memory-mapped.

    Args:
        path: The `.bin` or `.npy` file.
        dtype: `data.token_dtype`, of ids whose file doesn't say.
        tokenizer: The one that made the ids, which no file says: its vocabulary must hold them.
        root: The cache folder.
        log: Takes the lines that say what happens.

    Raises:
        UserError: no such file, not what its name says, an id beyond the vocabulary, or it can't be read.
    """
    assert path is not None, "the config check asks for it"
    file = expanded(path)
    with reading(f"the token file {path!r}"):
        tokens = _map(file, None if dtype is None else np.dtype(dtype), dtype_for(tokenizer))
    facts = _facts(file, tokens, root, log)
    if not 0 <= facts["lowest"] <= facts["highest"] < tokenizer.vocab_size:
        raise UserError(
            f"the token file {path!r} holds ids from {facts['lowest']:,} to {facts['highest']:,}, read as "
            f"{tokens.dtype}, but the tokenizer's are 0 to {tokenizer.vocab_size - 1:,}. Set model.tokenizer_path to "
            "the tokenizer that made the file, and data.token_dtype to the type it was written in"
        )
    fingerprints = facts["fingerprint"], tokenizer.fingerprint
    return TokenCache(
        Manifest(f"tokens {path}", 1, None, None, len(tokens), tokens.dtype.name, *fingerprints),
        tokens,
    )


def _map(file: Path, given: np.dtype | None, default: np.dtype) -> np.ndarray:
    """The ids `[tokens]`; their type is the file's own, `given`, or `default`."""
    if file.suffix not in (".bin", ".npy") or not file.is_file():
        raise UserError(
            f"a token file must be one .bin or .npy file, but {str(file)!r} is none. Of several make one (`cat` does "
            "for .bin), or list them in data.mixture"
        )
    with open(file, "rb") as start:
        if start.read(6) == b"\x93NUMPY":
            return _map_npy(file)
    if given is None and file.suffix == ".bin" and file.with_suffix(".idx").exists():
        raise UserError(
            f"the token file {str(file)!r} has an .idx beside it, as Megatron's have, which alone knows the ids' type "
            'and is not read. Set data.token_dtype: "uint16" if the vocabulary is below 65,500, else "uint32"'
        )
    dtype, size = given or default, file.stat().st_size
    if size % dtype.itemsize or size == 0:
        raise UserError(
            f"the token file {str(file)!r} has {size:,} bytes, which is no whole number of {dtype} ids. Set "
            "data.token_dtype to the type it was written in, or get the file again"
        )
    return np.memmap(file, dtype, mode="r")


def _map_npy(file: Path) -> np.ndarray:
    try:
        tokens = np.load(file, mmap_mode="r", allow_pickle=False)
    except ValueError as error:
        raise UserError(f"the token file {str(file)!r} is a damaged .npy file: {error}") from error
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or len(tokens) == 0:
        raise UserError(
            f"the token file {str(file)!r} holds {tokens.dtype} of shape {list(tokens.shape)}, but must hold a row of "
            "integers"
        )
    return tokens


def _facts(
    file: Path, tokens: np.ndarray, root: Path, log: Callable[[str], None]
) -> dict[str, Any]:
    """Hash, lowest and highest id: remembered, or found by reading all of it while other processes wait."""
    folder = root / "tokens"
    name = short_hash(["token file", str(file.absolute()), tokens.dtype.str])
    with locked(folder, name, log) as progress:
        state, read = (
            partial(files_state, [file]),
            partial(_read_through, file, tokens, progress.show),
        )
        return found_out(f"the token file {str(file)!r}", folder / f"{name}.seen.json", state, read)


def _read_through(file: Path, tokens: np.ndarray, show: Callable[[str], None]) -> dict[str, Any]:
    digest = hashlib.sha256(f"{tokens.dtype.str} {len(tokens)}".encode())
    lowest, highest = int(tokens[0]), int(tokens[0])
    for start in range(0, len(tokens), CHUNK):
        part = tokens[start : start + CHUNK]
        digest.update(np.ascontiguousarray(part).data)
        lowest, highest = min(lowest, int(part.min())), max(highest, int(part.max()))
        show(f"checking {file}: {start / len(tokens):4.0%}")
    return {"fingerprint": digest.hexdigest(), "lowest": lowest, "highest": highest}
