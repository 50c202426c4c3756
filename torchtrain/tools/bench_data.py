"""Tokens per second of each kind of source, beside what bounds them, in one run:

    python -m torchtrain.tools.bench_data [--megabytes 64] [--seconds 2] [--seq-len 2048] [--batch 32]

`tokenizer` is the raw speed at which text becomes ids (one thread, all cores); `page cache` that at which a file's ids
are read from memory, in order, summed and nothing else. Between them stand the sources, each read as a run reads it: a
step's batch after the other, in the run's order. A stream is tokenised meanwhile, by one thread. `memory` is by how
much the process' own grows.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from torchtrain.config.layout import BatchPlan
from torchtrain.config.plans import DEBUG_TOKENIZER
from torchtrain.config.schema import Data, Training
from torchtrain.datasets.loader import DataLoader, build_dataset
from torchtrain.datasets.open import open_corpus
from torchtrain.datasets.tokenizer import Tokenizer, load_tokenizer
from torchtrain.utils import count_cores

COPIED = "python_stdlib"


def sources(folder: Path, megabytes: float) -> dict[str, tuple[dict, dict]]:
    """[training] and [data] of each kind, over files of about `megabytes` that are written into `folder`."""
    texts = [document.text for document in open_corpus(COPIED, None, "").documents()]
    (folder / "corpus").mkdir()
    written = copy = 0
    with open(folder / "lines.jsonl", "w", encoding="utf-8") as lines:
        while written < megabytes * 1e6:
            for number, text in enumerate(texts):
                text = f"# {copy}\n{text}"
                written += (folder / "corpus" / f"{copy}-{number}.txt").write_bytes(text.encode())
                lines.write(json.dumps({"text": text}) + "\n")
            copy += 1
    ids = np.random.default_rng(0).integers(0, 2048, int(megabytes * 1e6) // 2, dtype=np.uint16)
    ids.tofile(folder / "ids.bin")
    text, file = f"text {folder / 'corpus'}", f"tokens {folder / 'ids.bin'}"
    return {
        "cache": ({"dataset": "text", "dataset_path": str(folder / "corpus")}, {}),
        "token file": ({"dataset": "tokens", "dataset_path": str(folder / "ids.bin")}, {}),
        "stream": (
            {"dataset": "text", "dataset_path": str(folder / "corpus")},
            {"streaming": True},
        ),
        "stream, jsonl": (
            {"dataset": "jsonl", "dataset_path": str(folder / "lines.jsonl")},
            {"streaming": True},
        ),
        "mixture": ({}, {"mixture": [f"{text} = 0.7", f"{file} = 0.2", f"{COPIED} = 0.1"]}),
    }


def timed(work: Callable[[int], int], seconds: float) -> float:
    """Units a second of `work`, which is given its turn's number and returns its units."""
    units = turn = 0
    started = time.perf_counter()
    while (spent := time.perf_counter() - started) < seconds:
        units += work(turn)
        turn += 1
    return units / spent


def anonymous_mib() -> float:
    """Memory of this process that is no file's, where the kernel tells (Linux); else 0."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return sum(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024


def raw_speeds(tokenizer: Tokenizer, ids_file: Path, seconds: float) -> dict[str, float]:
    """What bounds every source: encoding on one thread and on all, reading a file from the page cache."""
    texts = [document.text for document in open_corpus(COPIED, None, "").documents()][:100]
    ids = np.memmap(ids_file, np.uint16, mode="r")
    size = 1 << 22

    def encode(threads: int) -> int:
        return sum(len(part) for part in tokenizer.encode_batch(texts, threads=threads))

    def read(turn: int) -> int:
        part = ids[turn * size % len(ids) :][:size]
        part.sum(dtype=np.uint64)
        return len(part)

    return {
        "tokenizer, 1 thread": timed(lambda _: encode(1), seconds),
        f"tokenizer, {count_cores()} threads": timed(lambda _: encode(count_cores()), seconds),
        "page cache": timed(read, seconds),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m torchtrain.tools.bench_data", allow_abbrev=False
    )
    parser.add_argument(
        "--megabytes", type=float, default=64, help="size of each source (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=2, help="time for each figure (default: %(default)s)"
    )
    parser.add_argument(
        "--seq-len", type=int, default=2048, help="tokens of a sequence (default: %(default)s)"
    )
    parser.add_argument(
        "--batch", type=int, default=32, help="sequences of a step (default: %(default)s)"
    )
    given = parser.parse_args()
    tokenizer = load_tokenizer(DEBUG_TOKENIZER)
    print(f"{'':22}{'tokens/s':>14}{'batch':>12}{'memory':>12}")
    with tempfile.TemporaryDirectory(prefix="torchtrain-bench-") as name:
        folder = Path(name)
        kinds = sources(folder, given.megabytes)
        for what, speed in raw_speeds(tokenizer, folder / "ids.bin", given.seconds).items():
            print(f"{what:22}{speed:14,.0f}", flush=True)
        for kind, (training, data) in kinds.items():
            section = Training(seq_len=given.seq_len, **training)
            cache = Data(cache_folder=str(folder / "cache"), **data)
            dataset = build_dataset(section, cache, tokenizer, 0)
            loader = DataLoader(dataset, BatchPlan(given.batch, given.batch, 1, 1), 0)
            loader.step_batches(1)
            before = anonymous_mib()
            per_batch = given.batch * given.seq_len
            speed = timed(
                lambda turn: loader.step_batches(turn + 2)[0].tokens.numel(), given.seconds
            )
            grown = anonymous_mib() - before
            print(
                f"{kind:22}{speed:14,.0f}{per_batch / speed * 1e3:9.2f} ms{grown:+8.1f} MiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
