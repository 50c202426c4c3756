"""Tokens of every source of a run, made ready once; as a command before the run, by processes on all cores.

    python -m torchtrain.datasets.prepare [--workers N] [the trainer's options, such as --job.config_file FILE]

A run does the same by itself when it starts, in one process, which is enough for a corpus of some gigabytes. Both make
the same bytes under the same key, so that either finds what the other has made. Killed, the command goes on where it
was when it is given again. Reading and hashing is one process's work: some 100 MB/s, which keeps about 20 cores busy.
"""

import argparse
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait

from torchtrain.config_manager import Data, DataSource, JobConfig, plan_sources, plan_validation, tokenizer_path
from torchtrain.datasets.corpora import open_corpus, split_corpus
from torchtrain.datasets.token_cache import (
    Encode,
    Shards,
    TokenCache,
    cache_root,
    cores,
    encode_shard,
    open_token_cache,
)
from torchtrain.datasets.token_file import open_token_file
from torchtrain.datasets.tokenizer import Tokenizer, load_tokenizer
from torchtrain.utils import UserError

AHEAD = 4
"""Shards a worker that may be read before the oldest is done: one slow shard holds up no one, and memory is bounded."""


def open_tokens(
    source: DataSource,
    data: Data,
    tokenizer: Tokenizer,
    log: Callable[[str], None] = print,
    encode: Encode | None = None,
) -> TokenCache:
    """The tokens of one source: a token file as it is, all else from the cache, built if need be (by `encode`).

    Raises:
        UserError: whatever is wrong with the source or the cache folder.
    """
    root = cache_root(data.cache_folder)
    if source.dataset == "tokens":
        return open_token_file(source.path, data.token_dtype, tokenizer, root, log)
    corpus = open_corpus(source.dataset, source.path, data.text_key, data.on_bad_row)
    if source.held_out_share > 0:
        corpus = split_corpus(corpus, source.held_out_share, source.side)
    return open_token_cache(corpus, tokenizer, root, log, encode)


def encode_in_workers(workers: int, tokenizer_file: str, shards: Shards) -> Iterator[tuple[int, bytes]]:
    """An `Encode` (token_cache.py) by processes, which hand their results on in the order of the shards.

    A worker has nothing but its end of a pipe, so that it ends by itself when this process is killed.

    Raises:
        UserError: a worker was killed, or its own.
    """
    context = get_context("spawn")
    idle: list[Connection] = []
    processes = []
    for _ in range(workers):
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, tokenizer_file), daemon=True)
        process.start()
        theirs.close()
        idle.append(ours)
        processes.append(process)
    busy: dict[Connection, int] = {}
    results: dict[int, tuple[int, bytes]] = {}
    tasks, due = enumerate(shards), 0
    try:
        while True:
            while idle and len(busy) + len(results) < AHEAD * workers and (task := next(tasks, None)):
                number, texts = task
                worker = idle.pop()
                worker.send(texts)
                busy[worker] = number
            if not busy:
                return
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                results[busy.pop(ready)] = _received(ready)
                idle.append(ready)
            while due in results:
                yield results.pop(due)
                due += 1
    except (EOFError, ConnectionError) as error:
        raise UserError(
            f"one of {workers} tokenising processes was killed, as happens when memory runs out. What is finished is "
            "kept: start again, with fewer --workers if need be"
        ) from error
    finally:
        for process in processes:
            process.terminate()
            process.join()


def _work(connection: Connection, tokenizer_file: str) -> None:
    """A worker: encodes what comes through its pipe until that is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that has started this one
    tokenizer = load_tokenizer(tokenizer_file)
    with suppress(EOFError, ConnectionError):
        while True:
            texts = connection.recv()
            try:
                result: tuple[int, bytes] | UserError = encode_shard(tokenizer, texts, threads=1)
            except UserError as fault:
                result = fault
            connection.send(result)


def _received(worker: Connection) -> tuple[int, bytes]:
    result = worker.recv()
    if isinstance(result, UserError):
        raise result
    return result


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status is 2 for a fault of the user's, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m torchtrain.datasets.prepare",
        description="Tokenise what a run will read. All other options are the run's own, see `train.py --help`.",
        allow_abbrev=False,
    )
    parser.add_argument("--workers", type=int, default=cores(), help="processes (default: %(default)s, the cores here)")
    own, of_the_run = parser.parse_known_args(arguments)
    if own.workers < 1:
        parser.error(f"--workers {own.workers}: must be at least 1")
    try:
        config = JobConfig().parse_args(of_the_run, world_size=0)
        path = tokenizer_path(config.model)
        tokenizer = load_tokenizer(path)
        encode = partial(encode_in_workers, own.workers, path)
        for source in [*plan_sources(config.training, config.data, config.validation), *plan_validation(config)]:
            tokens = open_tokens(source, config.data, tokenizer, encode=encode)
            print(f"ready: {tokens.manifest.describe()}", flush=True)
    except UserError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
