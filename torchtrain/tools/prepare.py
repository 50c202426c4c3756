"""The command that tokenizes what a run will read, by processes on all cores.

    python -m torchtrain.tools.prepare [--workers N] [the run's options, such as
        --job.config_file FILE]

A run does the same by itself when it starts, in one process, which is enough for a corpus of some
gigabytes. Both make the same bytes under the same key, so that either finds what the other has
made. Killed, the command resumes when it is given again. Reading and hashing is one process's
work: some 100 MB/s, which keeps about 20 cores busy.
"""

import argparse
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache, partial
from itertools import islice
from multiprocessing import get_context, parent_process

from torchtrain.config.plans import find_tokenizer
from torchtrain.config.sources import plan_sources, plan_validation_sources
from torchtrain.config_manager import JobConfig
from torchtrain.datasets.documents import say_where_documents_end
from torchtrain.datasets.open import check_sources, open_tokens
from torchtrain.datasets.token_cache import Shards, encode_shard
from torchtrain.datasets.tokenizer import load_tokenizer
from torchtrain.errors import UserError
from torchtrain.logging_utils import init_logging
from torchtrain.utils import count_cores

AHEAD = 4
"""Shards per worker that may be read before the oldest is done: one slow shard holds up no one, and
memory is bounded."""


def encode_in_workers(
    workers: int, tokenizer_file: str, shards: Shards
) -> Iterator[tuple[int, bytes]]:
    """Encode shards in processes, in the order of the shards (a `token_cache.Encode`).

    Raises:
        UserError: a worker was killed, or an error of its own.
    """
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_begin_work)
    work = (pool.submit(_work, tokenizer_file, texts) for texts in shards)
    ahead = deque(islice(work, AHEAD * workers))
    try:
        while ahead:
            yield ahead.popleft().result()
            ahead.extend(islice(work, 1))
    except BrokenProcessPool as error:
        raise UserError(
            f"one of {workers} tokenizing processes was killed, probably for lack of memory. "
            "Finished work is kept: start again, with fewer --workers if needed"
        ) from error
    finally:
        # First the shards in progress are finished: a worker that ends while it hands one over
        # leaves the pool waiting.
        pool.shutdown(cancel_futures=True)


def _begin_work() -> None:
    """Leave Ctrl-C to the process that has started this one, and end when it does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(tokenizer_file: str, texts: list[str]) -> tuple[int, bytes]:
    return encode_shard(_load_tokenizer(tokenizer_file), texts, threads=1)


_load_tokenizer = cache(load_tokenizer)  # once per worker


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; return 2 for a user error, 130 after Ctrl-C, else 0."""
    parser = argparse.ArgumentParser(
        prog="torchtrain prepare",
        description="Tokenize what a run will read. All other options are the run's own, see "
        "`train.py --help`.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=count_cores(),
        help="worker processes (default: %(default)s, the cores of this machine)",
    )
    own, of_run = parser.parse_known_args(arguments)
    if own.workers < 1:
        parser.error(f"--workers {own.workers}: must be at least 1")
    init_logging()
    try:
        prepare(JobConfig().parse_args(of_run, world_size=0), own.workers)
    except UserError as fault:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command resumes from here", file=sys.stderr)
        return 130
    return 0


def prepare(config: JobConfig, workers: int) -> None:
    """Tokenize every source of a run that the token cache is for.

    Raises:
        UserError: there is none, or whatever is wrong with one.
    """
    sources = plan_sources(config.training, config.data, config.validation)
    if config.data.streaming:
        sources = [source for source in sources if source.dataset == "tokens"]
    sources += plan_validation_sources(config)
    if not sources:
        raise UserError(
            "data.streaming = true: the run tokenizes while it reads; there is nothing to prepare"
        )
    tokenizer_file = find_tokenizer(config.model)
    tokenizer = load_tokenizer(tokenizer_file)
    say_where_documents_end(tokenizer)
    check_sources(sources, config.data, tokenizer)
    encode = partial(encode_in_workers, workers, tokenizer_file)
    for source in sources:
        tokens = open_tokens(source, config.data, tokenizer, encode)
        print(f"ready: {tokens.manifest.describe()}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
