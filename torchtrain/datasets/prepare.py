"""Tokens of every source of a run, made ready once; as a command before the run, by processes on all cores.

    python -m torchtrain.datasets.prepare [--workers N] [the trainer's options, such as --job.config_file FILE]

A run does the same by itself when it starts, in one process, which is enough for a corpus of some gigabytes. Both make
the same bytes under the same key, so that either finds what the other has made. Killed, the command goes on where it
was when it is given again. Reading and hashing is one process's work: some 100 MB/s, which keeps about 20 cores busy.
"""

import argparse
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache, partial
from itertools import islice
from multiprocessing import get_context
from multiprocessing.connection import Connection

from torchtrain.config.plans import find_tokenizer
from torchtrain.config.schema import Data
from torchtrain.config.sources import DataSource, plan_sources, plan_validation_sources
from torchtrain.config_manager import JobConfig
from torchtrain.datasets.corpora import Corpus, open_corpus, split_corpus
from torchtrain.datasets.token_cache import (
    Encode,
    Shards,
    TokenCache,
    cache_root,
    encode_shard,
    open_token_cache,
)
from torchtrain.datasets.token_file import open_token_file
from torchtrain.datasets.tokenizer import Tokenizer, load_tokenizer
from torchtrain.errors import UserError
from torchtrain.utils import cores

AHEAD = 4
"""Shards a worker that may be read before the oldest is done: one slow shard holds up no one, and memory is bounded."""


def open_source(source: DataSource, data: Data) -> Corpus:
    """The documents of one source, or the part of them that it means."""
    corpus = open_corpus(
        source.dataset, source.path, data.text_key, data.on_bad_row, data.streaming
    )
    return (
        split_corpus(corpus, source.held_out_share, source.side)
        if source.held_out_share > 0
        else corpus
    )


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
    return open_token_cache(open_source(source, data), tokenizer, root, log, encode)


def encode_in_workers(
    workers: int, tokenizer_file: str, shards: Shards
) -> Iterator[tuple[int, bytes]]:
    """An `Encode` (token_cache.py) by processes, in the order of the shards.

    Raises:
        UserError: a worker was killed, or its own.
    """
    context = get_context("spawn")
    watched, held = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(workers, context, initializer=_begin_work, initargs=(watched,))
    try:
        ahead = deque(
            pool.submit(_work, tokenizer_file, texts) for texts in islice(shards, AHEAD * workers)
        )
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(pool.submit(_work, tokenizer_file, texts) for texts in islice(shards, 1))
    except BrokenProcessPool as error:
        raise UserError(
            f"one of {workers} tokenising processes was killed, as happens when memory runs out. What is finished is "
            "kept: start again, with fewer --workers if need be"
        ) from error
    finally:
        # First the shards in hand are finished: a worker that ends while it hands one over leaves the pool waiting.
        pool.shutdown(cancel_futures=True)
        held.close()  # ends the workers, whatever they are at, just as the end of this process does


def _begin_work(watched: Connection) -> None:
    """Leave Ctrl-C to the process that has started this one, and end when it lets go of the pipe."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_after, args=(watched,), daemon=True).start()


def _end_after(watched: Connection) -> None:
    watched.poll(None)
    os._exit(1)


def _work(tokenizer_file: str, texts: list[str]) -> tuple[int, bytes]:
    return encode_shard(_tokenizer(tokenizer_file), texts, threads=1)


_tokenizer = cache(load_tokenizer)  # once a worker


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status is 2 for a fault of the user's, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m torchtrain.datasets.prepare",
        description="Tokenise what a run will read. All other options are the run's own, see `train.py --help`.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=cores(),
        help="processes (default: %(default)s, the cores here)",
    )
    own, of_the_run = parser.parse_known_args(arguments)
    if own.workers < 1:
        parser.error(f"--workers {own.workers}: must be at least 1")
    try:
        config = JobConfig().parse_args(of_the_run, world_size=0)
        path = find_tokenizer(config.model)
        tokenizer = load_tokenizer(path)
        encode = partial(encode_in_workers, own.workers, path)
        trained_on = plan_sources(config.training, config.data, config.validation)
        cached = [
            source
            for source in trained_on
            if source.dataset == "tokens" or not config.data.streaming
        ]
        if not (sources := [*cached, *plan_validation_sources(config)]):
            raise UserError(
                "data.streaming = true: the run tokenises documents as it reads them; none to prepare"
            )
        for source in sources:
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
