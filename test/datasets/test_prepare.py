"""Preparing: the same bytes from any number of workers, and from a run itself; what is finished
survives any kill."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from helpers.launching import ROOT, options, write_corpus
from helpers.tokens import encode

from torchtrain.config.plans import DEBUG_TOKENIZER
from torchtrain.config_manager import JobConfig
from torchtrain.datasets import cache_folder, token_cache
from torchtrain.datasets.files import read_files
from torchtrain.datasets.loader import build_dataset
from torchtrain.datasets.token_cache import encode_here, open_token_cache
from torchtrain.datasets.tokenizer import load_tokenizer
from torchtrain.errors import UserError
from torchtrain.tools import prepare
from torchtrain.tools.prepare import encode_in_workers, main


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(DEBUG_TOKENIZER)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(token_cache, "SHARD_CHARACTERS", 4000)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("prepare") / "corpus", documents=30)


def build(corpus, tokenizer, root, encode=None):
    return open_token_cache(read_files("text", corpus, ""), tokenizer, root, encode)


def whole(corpus, tokenizer) -> list[int]:
    """The tokens, put together by hand."""
    ids = []
    for file in sorted(corpus.iterdir()):
        ids += [tokenizer.bos_id, *encode(tokenizer, file.read_text()), tokenizer.eos_id]
    return ids


@pytest.mark.slow
def test_a_stream_needs_no_preparing_but_its_validation_set_does(tmp_path, corpus, capsys):
    given = options(
        {"training.dataset": "text", "training.dataset_path": corpus, "data.streaming": True}
    )
    assert main(given) == 2
    assert "data.streaming = true" in capsys.readouterr().err
    named = {
        "validation.enable": "true",
        "validation.dataset": "text",
        "validation.dataset_path": corpus,
    }
    extra = {**named, "data.cache_folder": tmp_path}
    assert (
        main([*given, *(text for key, value in extra.items() for text in (f"--{key}", str(value)))])
        == 0
    )
    assert capsys.readouterr().out.count("ready: text ") == 1


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_makes_the_same_bytes(tmp_path, corpus, tokenizer, workers):
    alone = build(corpus, tokenizer, tmp_path / "alone")
    cache = build(
        corpus,
        tokenizer,
        tmp_path / "many",
        partial(encode_in_workers, workers, str(DEBUG_TOKENIZER)),
    )
    assert cache.tokens.tolist() == alone.tokens.tolist() == whole(corpus, tokenizer)
    assert cache.manifest == alone.manifest
    files = [
        sorted(path.rglob("tokens.bin"))[0] for path in (tmp_path / "alone", tmp_path / "many")
    ]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert files[0].parent.name == files[1].parent.name, (
        "one key: either finds what the other has made"
    )
    assert sorted(path.name for path in files[0].parent.iterdir()) == [
        "manifest.json",
        "tokens.bin",
    ]


class Killed(BaseException):
    """Stands for a kill: nothing in the way down handles it."""


@pytest.mark.parametrize("after", [0, 1, 4])
def test_an_interrupted_build_resumes_after_its_last_shard(tmp_path, corpus, tokenizer, after):
    def interrupted(shards):
        for number, result in enumerate(encode_here(tokenizer, shards)):
            if number == after:
                raise Killed
            yield result

    with pytest.raises(Killed):
        build(corpus, tokenizer, tmp_path, interrupted)
    building = list((tmp_path / "tokens").glob("*.building-*"))
    assert len(building) == (after > 0), "what has no finished shard leaves nothing"
    encoded = []

    def counting(shards):
        for texts in shards:
            encoded.extend(texts)
            yield token_cache.encode_shard(tokenizer, texts, 1)

    if building:  # a shard half written, as a kill leaves it
        with open(building[0] / "cache" / "tokens.bin", "ab") as file:
            file.write(b"half a shard")
        finished = json.loads((building[0] / "progress.json").read_text())["documents"]
    else:
        finished = 0
    cache = build(corpus, tokenizer, tmp_path, counting)
    assert cache.tokens.tolist() == whole(corpus, tokenizer)
    assert len(encoded) == 30 - finished
    assert finished >= after
    assert not list((tmp_path / "tokens").glob("*.building-*"))


@pytest.mark.parametrize("damage", ["", "{", "[1, 2]", '{"documents": 5, "tokens": 99999999}'])
def test_a_progress_that_cannot_be_is_not_believed(tmp_path, corpus, tokenizer, damage):
    def interrupted(shards):
        yield next(encode_here(tokenizer, shards))
        raise Killed

    with pytest.raises(Killed):
        build(corpus, tokenizer, tmp_path, interrupted)
    (building,) = (tmp_path / "tokens").glob("*.building-*")
    (building / "progress.json").write_text(damage)
    assert build(corpus, tokenizer, tmp_path).tokens.tolist() == whole(corpus, tokenizer)


def test_a_corpus_that_changed_meanwhile_starts_again(tmp_path, tokenizer):
    corpus = write_corpus(tmp_path / "corpus", documents=8)

    def interrupted(shards):
        yield next(encode_here(tokenizer, shards))
        raise Killed

    with pytest.raises(Killed):
        build(corpus, tokenizer, tmp_path / "cache", interrupted)
    (corpus / "000.txt").write_text("another beginning")
    assert build(corpus, tokenizer, tmp_path / "cache").tokens.tolist() == whole(corpus, tokenizer)
    assert not list((tmp_path / "cache" / "tokens").glob("*.building-*"))


def command(corpus: Path, cache: Path, *more: str) -> list[str]:
    given = [
        "--training.dataset",
        "text",
        "--training.dataset_path",
        str(corpus),
        "--data.cache_folder",
        str(cache),
    ]
    return [sys.executable, "-m", "torchtrain.datasets.prepare", *given, *more]


# The command with small shards, which stops of its own accord after the one of this number: so it
# cannot be done before the test's signal comes, however fast the machine is.
IN_SMALL_SHARDS = """
import sys, time
from torchtrain.datasets import token_cache
from torchtrain.tools import prepare

in_batches, last = token_cache.in_batches, int(sys.argv.pop(1))

def small_shards(texts, size):
    for number, shard in enumerate(in_batches(texts, 20_000)):
        yield shard
        if number == last:
            time.sleep(600)

token_cache.in_batches = small_shards
sys.exit(prepare.main(sys.argv[1:]))
"""
NEVER = 10**9


def in_small_shards(last: int, corpus: Path, cache: Path, *more: str) -> list[str]:
    arguments = command(corpus, cache, *more)[3:]
    return [sys.executable, "-c", IN_SMALL_SHARDS, str(last), *arguments]


@pytest.mark.slow
def test_killed_at_any_instant_it_resumes_and_its_workers_end(tmp_path, tokenizer):
    """Real kills, of real processes; the bytes at the end are those of one process."""
    corpus = write_corpus(tmp_path / "corpus", documents=600)
    kept = [0]
    for number in range(2):
        # Eight shards are read before the first is awaited: more than these are under way.
        arguments = in_small_shards(12 + number, corpus, tmp_path / "cache", "--workers", "2")
        with subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL) as process:
            wait_until(lambda: documents_done(tmp_path / "cache") > kept[-1])
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
            workers = [int(pid) for pid in children.read_text().split()]
            process.kill()
        kept.append(documents_done(tmp_path / "cache"))
        assert len(workers) >= 2
        wait_until(lambda: not any(alive(pid) for pid in workers))  # noqa: B023 (called at once)
    assert kept == sorted(set(kept)), "what was finished is kept"
    arguments = in_small_shards(NEVER, corpus, tmp_path / "cache", "--workers", "2")
    output = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert output.returncode == 0, output.stderr
    assert "ready: text" in output.stdout
    (tokens,) = (tmp_path / "cache" / "tokens").glob("*/tokens.bin")
    assert np.fromfile(tokens, np.uint16).tolist() == whole(corpus, tokenizer)


def documents_done(cache: Path) -> int:
    files = list(cache.glob("tokens/*/progress.json"))
    return json.loads(files[0].read_text())["documents"] if files else 0


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def wait_until(condition, timeout: float = 120) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_ctrl_c_ends_it_and_its_workers(tmp_path):
    corpus = write_corpus(tmp_path / "corpus", documents=200)
    arguments = in_small_shards(12, corpus, tmp_path / "cache", "--workers", "2")
    with subprocess.Popen(
        arguments, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    ) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        wait_until(lambda: documents_done(tmp_path / "cache") > 0)
        workers = [int(pid) for pid in children.read_text().split()]
        process.send_signal(signal.SIGINT)
        assert "the same command resumes from here" in process.communicate(timeout=60)[1]
        assert process.returncode == 130
    wait_until(lambda: not any(alive(pid) for pid in workers))


@pytest.mark.slow
def test_a_killed_worker_is_one_clear_error_and_loses_nothing_finished(tmp_path, tokenizer):
    corpus = write_corpus(tmp_path / "corpus", documents=150)  # more shards than are read ahead

    def killing(shards):
        for number, result in enumerate(encode_in_workers(2, str(DEBUG_TOKENIZER), shards)):
            yield result
            if number == 1:
                os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    with pytest.raises(UserError, match="tokenizing processes was killed"):
        build(corpus, tokenizer, tmp_path, killing)
    assert documents_done(tmp_path) > 0
    assert build(corpus, tokenizer, tmp_path).tokens.tolist() == whole(corpus, tokenizer)


def test_the_command_prepares_what_the_run_then_opens(
    tmp_path, corpus, tokenizer, capsys, monkeypatch, request
):
    given = options(
        {"data.cache_folder": tmp_path, "training.dataset": "text", "training.dataset_path": corpus}
    )
    monkeypatch.setattr(
        prepare, "encode_in_workers", lambda n, path, shards: encode_here(tokenizer, shards)
    )
    assert main(["--workers", "2", *given, "--parallelism.tensor_parallel_degree", "2"]) == 0
    assert f"ready: text {corpus}: 30 documents in 30 files" in capsys.readouterr().out
    monkeypatch.setattr(token_cache, "_Build", None)
    config = JobConfig().parse_args(given, world_size=1)
    logged = request.getfixturevalue("logged")
    build_dataset(config.training, config.data, tokenizer, 0)
    assert logged == []


def test_a_mixture_is_prepared_whole(tmp_path, corpus, capsys, monkeypatch, tokenizer):
    np.arange(100, dtype=np.uint16).tofile(tmp_path / "ids.bin")
    monkeypatch.setattr(
        prepare, "encode_in_workers", lambda n, path, shards: encode_here(tokenizer, shards)
    )
    mixture = f"text {corpus}=1,tokens {tmp_path / 'ids.bin'}=2"
    assert main(["--data.mixture", mixture, "--data.cache_folder", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert out.count("ready: ") == 2
    assert f"ready: tokens {tmp_path / 'ids.bin'}: 100 tokens" in out


def test_faults_are_one_message_and_status_2(tmp_path, capsys):
    assert main(["--training.dataset", "text"]) == 2
    assert "training.dataset_path" in capsys.readouterr().err
    assert main(["--training.steps", "0"]) == 2
    assert "training.steps" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["--workers", "0"])
    assert caught.value.code == 2


def test_long_preparations_are_told_in_a_log_file_too(
    tmp_path, corpus, tokenizer, monkeypatch, logged
):
    monkeypatch.setattr(cache_folder, "LOGGED_EVERY_S", -1.0)

    def slowly(shards):
        for result in encode_here(tokenizer, shards):
            time.sleep(0.25)
            yield result

    monkeypatch.setattr(token_cache, "SHARD_CHARACTERS", 10_000)
    build(corpus, tokenizer, tmp_path, slowly)
    told = [line for line in logged if "MB/s" in line]
    assert told
    assert "tokenizing text" in told[0]
    assert " left" in told[0]
    assert "[#" in told[-1]
