"""Measure the tokens per second of each kind of data source, beside what bounds them.

    python -m torchtrain.tools.bench_data [--megabytes 64] [--seconds 2] [--seq-len 2048]
                                          [--batch 32]

`tokenizer` is the raw speed at which text becomes ids (one thread, all cores); `page cache` that at
which a file's ids are read from memory, in order, summed and nothing else. Between them stand the
sources, each read as a run reads it: one step's batch after another, in the run's order. A stream
is tokenized meanwhile, by one thread. `memory` is by how much the process's own memory grows.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from torchtrain.config.layout import BatchPlan
from torchtrain.config.plans import DEBUG_TOKENIZER
from torchtrain.config.schema import Data, Training
from torchtrain.config.sources import DataSource
from torchtrain.datasets.loader import DataLoader, build_dataset
from torchtrain.datasets.open import open_source
from torchtrain.datasets.tokenizer import Tokenizer, load_tokenizer
from torchtrain.utils import count_cores

COPIED = "python_stdlib"
READ_AT_ONCE = 2**22
"""Ids per read of the page cache."""

Sections = tuple[dict[str, Any], dict[str, Any]]
"""Values of [training] and of [data]."""


def write_sources(folder: Path, megabytes: float) -> dict[str, Sections]:
    """Write files of about `megabytes` each into `folder`; return each kind's sections."""
    texts = _copied_texts()
    corpus = folder / "corpus"
    corpus.mkdir()
    written = 0
    copy = 0
    with open(folder / "lines.jsonl", "w", encoding="utf-8") as lines:
        while written < megabytes * 1e6:
            for number, text in enumerate(texts):
                text = f"# {copy}\n{text}"
                written += (corpus / f"{copy}-{number}.txt").write_bytes(text.encode())
                lines.write(json.dumps({"text": text}) + "\n")
            copy += 1
    ids = np.random.default_rng(0).integers(0, 2048, int(megabytes * 1e6) // 2, dtype=np.uint16)
    ids.tofile(folder / "ids.bin")

    text_files = {"dataset": "text", "dataset_path": str(corpus)}
    token_file = {"dataset": "tokens", "dataset_path": str(folder / "ids.bin")}
    json_lines = {"dataset": "jsonl", "dataset_path": str(folder / "lines.jsonl")}
    shares = [f"text {corpus} = 0.7", f"tokens {folder / 'ids.bin'} = 0.2", f"{COPIED} = 0.1"]
    return {
        "cache": (text_files, {}),
        "token file": (token_file, {}),
        "stream": (text_files, {"streaming": True}),
        "stream, jsonl": (json_lines, {"streaming": True}),
        "mixture": ({}, {"mixture": shares}),
    }


def _copied_texts() -> list[str]:
    corpus = open_source(DataSource(COPIED, None), Data())
    return [document.text for document in corpus.documents()]


def timed(work: Callable[[int], int], seconds: float) -> float:
    """Return the units per second of `work`, which takes its turn's number and returns units."""
    units = 0
    turn = 0
    started = time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds:
        units += work(turn)
        turn += 1
    return units / spent


def anonymous_mib() -> float:
    """Return this process's memory that belongs to no file; 0 where the kernel does not tell."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def raw_speeds(tokenizer: Tokenizer, ids_file: Path, seconds: float) -> dict[str, float]:
    """Measure what bounds every source: encoding and reading from the page cache."""
    texts = _copied_texts()[:100]
    ids = np.memmap(ids_file, np.uint16, mode="r")

    def encode(threads: int) -> int:
        return sum(len(encoded) for encoded in tokenizer.encode_batch(texts, threads=threads))

    def read(turn: int) -> int:
        block = ids[turn * READ_AT_ONCE % len(ids) :][:READ_AT_ONCE]
        block.sum(dtype=np.uint64)
        return len(block)

    return {
        "tokenizer, 1 thread": timed(lambda _: encode(1), seconds),
        f"tokenizer, {count_cores()} threads": timed(lambda _: encode(count_cores()), seconds),
        "page cache": timed(read, seconds),
    }


def measure_source(
    sections: Sections, tokenizer: Tokenizer, folder: Path, given: argparse.Namespace
) -> tuple[float, float]:
    """Return a source's tokens per second, and by how many MiB the process grew meanwhile."""
    training, data = sections
    dataset = build_dataset(
        Training(seq_len=given.seq_len, **training),
        Data(cache_folder=str(folder / "cache"), **data),
        tokenizer,
        0,
    )
    loader = DataLoader(dataset, BatchPlan(given.batch, given.batch, 1, 1), 0)
    loader.step_batches(1)
    before = anonymous_mib()
    speed = timed(lambda turn: loader.step_batches(turn + 2)[0].tokens.numel(), given.seconds)
    return speed, anonymous_mib() - before


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="torchtrain bench-data",
        description="Measure how fast each kind of data source yields tokens.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--megabytes", type=float, default=64, help="size of each source (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=2, help="time for each figure (default: %(default)s)"
    )
    parser.add_argument(
        "--seq-len", type=int, default=2048, help="tokens per sequence (default: %(default)s)"
    )
    parser.add_argument(
        "--batch", type=int, default=32, help="sequences per step (default: %(default)s)"
    )
    return parser.parse_args()


def main() -> None:
    """Print the table."""
    given = parse_arguments()
    tokenizer = load_tokenizer(DEBUG_TOKENIZER)
    tokens_per_batch = given.batch * given.seq_len
    print(f"{'':22}{'tokens/s':>14}{'batch':>12}{'memory':>12}")
    with tempfile.TemporaryDirectory(prefix="torchtrain-bench-") as name:
        folder = Path(name)
        kinds = write_sources(folder, given.megabytes)
        for what, speed in raw_speeds(tokenizer, folder / "ids.bin", given.seconds).items():
            print(f"{what:22}{speed:14,.0f}", flush=True)
        for kind, sections in kinds.items():
            speed, grown = measure_source(sections, tokenizer, folder, given)
            milliseconds = tokens_per_batch / speed * 1e3
            print(f"{kind:22}{speed:14,.0f}{milliseconds:9.2f} ms{grown:+8.1f} MiB", flush=True)


if __name__ == "__main__":
    main()
