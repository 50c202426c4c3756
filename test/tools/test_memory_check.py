"""Before the ranks start: what surely does not fit is refused, and nothing else is."""

import json
import os
from dataclasses import asdict
from unittest.mock import patch

import pytest
from helpers.checkpoints import progress, record_of
from helpers.launching import ROOT, TIMEOUT_S, environment

from torchtrain.checkpoint.commit import FORMAT, INDEX, MARKER, STATE, Marker
from torchtrain.config_manager import JobConfig
from torchtrain.errors import UserError
from torchtrain.metrics import GIB
from torchtrain.tools import launch, memory_check
from torchtrain.tools.preflight.memory import estimate_memory

LLAMA_8B = ["--job.config_file", str(ROOT / "train_configs" / "llama3_8b.toml")]
LLAMA_8B += ["--training.dataset=c4"]
DEBUG = ["--job.config_file", str(ROOT / "train_configs" / "debug_model.toml")]
VOCABULARY = "--model.vocab_size=4096"
PIPELINE = "--parallelism.pipeline_parallel_degree=2"


def read(arguments, ranks):
    return JobConfig().parse_args(arguments, ranks)


@pytest.fixture
def start(monkeypatch, tmp_path):
    """Launch in this process up to the ranks' start, on two stand-ins of GPUs.

    Takes the answer of their driver, in MiB for each, and returns the exit status, whether the
    ranks would have started, and whether the driver was asked.
    """

    def start(arguments, answer, **variables):
        asked, driver = tmp_path / "asked", tmp_path / "nvidia-smi"
        asked.unlink(missing_ok=True)
        driver.write_text(f"#!/bin/sh\ntouch {asked}\necho '{answer}'\n")
        driver.chmod(0o755)
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        started = []
        monkeypatch.setattr(launch, "visible_gpus", lambda: 2)
        monkeypatch.setattr(launch, "NVIDIA", str(driver))
        monkeypatch.setattr(launch, "meet", lambda *_: started.append(True) or 0)
        monkeypatch.setattr(launch.Standbys, "start", lambda *_, **__: None)
        with patch.dict(os.environ, environment(2, PATH=path) | variables, clear=True):
            status = launch.main(arguments)
        return status, bool(started), asked.exists()

    return start


def never_predicts(*_):
    raise AssertionError("a prediction was made")


def test_states_that_do_not_fit_are_refused_in_one_line(start, monkeypatch, capfd):
    """8.03e9 parameters of 16 bytes on two ranks take 59.8 GiB; the larger card has 40."""
    monkeypatch.setattr(memory_check, "predict", never_predicts)
    assert start(LLAMA_8B, "24576\n40960") == (2, False, True)
    error = capfd.readouterr().err
    assert error.count("\n") == 1
    assert "optimizer states alone take 59.8 GiB on a rank, and a GPU here has 40.0 GiB" in error
    assert error.endswith("CHECK_MEMORY=0 starts it all the same, unchecked\n")
    assert start(LLAMA_8B, "40960", CHECK_MEMORY="0") == (0, True, False)
    assert start(LLAMA_8B, "40960", CHECK_MEMORY="no") == (2, False, False)
    assert "CHECK_MEMORY = 'no': must be 0 or 1" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "answer", "asks"),
    [
        (DEBUG, "1", False),
        ([*LLAMA_8B, "--training.enable_cpu_offload"], "24576", False),
        (LLAMA_8B, "81559\n[N/A]", True),
        (LLAMA_8B, "", True),
        (LLAMA_8B, "1000000", True),
    ],
    ids=["the debug model", "in host memory", "unknown", "no answer", "a small part"],
)
def test_what_is_small_or_not_known_starts_at_once(
    start, monkeypatch, capfd, arguments, answer, asks
):
    monkeypatch.setattr(memory_check, "predict", never_predicts)
    assert start(arguments, answer) == (0, True, asks)
    assert "GiB" not in capfd.readouterr().err


def test_a_machine_without_nvidias_tool_has_memory_that_is_not_known(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert memory_check.find_memory() is None


def test_a_users_own_class_is_not_counted(monkeypatch):
    config = read(LLAMA_8B, 2)
    assert memory_check.count_least(config, 2) is not None
    monkeypatch.setattr(memory_check, "count_parameters", lambda *_: None)
    assert memory_check.count_least(config, 2) is None


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (1, []),
        (3, []),
        (4, ["--parallelism.data_parallel_replicate_degree=2"]),
        (2, ["--optimizer.name=Adam"]),
        (2, ["--optimizer.name=Muon"]),
        (2, ["--optimizer.name=Muon", "--optimizer.state_dtype=bfloat16"]),
        (2, ["--training.dtype=bfloat16"]),
        (2, ["--model.tied_embeddings"]),
        (2, [PIPELINE]),
        (4, [PIPELINE, "--parallelism.pipeline_parallel_schedule=Interleaved1F1B"]),
        (2, [PIPELINE, "--parallelism.pipeline_parallel_schedule=ZBVZeroBubble"]),
    ],
)
def test_the_bound_is_what_parameters_gradients_and_states_take_and_no_more(ranks, options):
    config = read([*DEBUG, VOCABULARY, *options], ranks)
    least = memory_check.count_least(config, ranks)
    predicted = estimate_memory(config, ranks)
    taken = max(2 * rank.parameters + rank.optimizer_states for rank in predicted)
    assert 0.99 * taken < least <= taken


def a_rank(**gib):
    kinds = {"parameters": 0, "activations": 0, "logits_and_loss": 0, "cached": 0} | gib
    bytes_ = {kind: round(each * GIB) for kind, each in kinds.items()}
    return {**bytes_, "total": sum(bytes_.values()) - bytes_["cached"]}


LARGE = a_rank(parameters=20, activations=60, logits_and_loss=20)


@pytest.mark.parametrize(
    ("options", "rank", "verdict"),
    [
        ([], LARGE, "refused"),  # 0.85 of 100 GiB
        ([], a_rank(activations=94), "warned"),
        ([], a_rank(activations=70), "warned"),  # of 80 GiB, with what the allocator adds
        ([], a_rank(activations=60), "fits"),
        (["--compile.enable", "--compile.components=model"], LARGE, "warned"),
        (["--compile.enable", "--compile.components=loss"], LARGE, "warned"),
        (["--compile.enable"], a_rank(parameters=95, activations=60), "refused"),
        (["--activation_checkpoint.mode=memory_budget", "--compile.enable"], LARGE, "warned"),
        (["--parallelism.tensor_parallel_degree=2"], LARGE, "refused"),
        (["--parallelism.tensor_parallel_degree=2", "--compile.enable"], LARGE, "warned"),
    ],
)
def test_only_what_surely_does_not_fit_is_refused(options, rank, verdict):
    config = read([*DEBUG, *options], 2)
    small = a_rank(parameters=1)
    if verdict == "refused":
        with pytest.raises(UserError, match="this run does not fit: it takes about"):
            memory_check.judge(config, [small, rank], 80 * GIB)
        return
    warning = memory_check.judge(config, [small, rank], 80 * GIB) or ""
    assert warning.startswith("memory may not suffice") == (verdict == "warned")


def test_what_is_said_is_what_was_judged():
    """What the allocator caches is a part of it; the worst rank is that with the most of both."""
    ranks = [a_rank(parameters=60), a_rank(parameters=58, activations=1, cached=16)]
    warning = memory_check.judge(read([*DEBUG], 2), ranks, 80 * GIB)
    assert "about 75.0 GiB on a rank, of which its activations take 1.0" in warning


def test_a_prediction_that_fails_stops_no_run(start, monkeypatch, capfd):
    monkeypatch.setattr(memory_check, "PREDICTION_S", 0.0)
    assert start(LLAMA_8B, "81920") == (0, True, True)
    assert capfd.readouterr().err.count("gave no answer") == 1
    monkeypatch.setattr(memory_check, "predict", lambda *_: [LARGE])
    assert start(LLAMA_8B, "81920") == (0, True, True)  # it is compiled
    error = capfd.readouterr().err
    assert error.startswith("warning: memory may not suffice")
    assert error.count("\n") == 1
    monkeypatch.setattr(memory_check, "predict", lambda *_: [a_rank(parameters=95)])
    assert start(LLAMA_8B, "81920") == (2, False, True)


def save(folder, step):
    """Leave what a run that was saved after this step is known by."""
    state = json.dumps(progress(step).model_dump())
    contents = {STATE: state.encode(), INDEX: b"index"}
    files = {name: record_of(content) for name, content in contents.items()}
    marker = Marker(step=step, world_size=2, torch="2.11.0", files=files, format=FORMAT)
    contents[MARKER] = json.dumps(marker.model_dump()).encode()
    path = folder / "checkpoint" / f"step-{step}"
    path.mkdir(parents=True)
    for name, content in contents.items():
        (path / name).write_bytes(content)


def test_a_finished_run_needs_no_memory(start, monkeypatch, capfd, tmp_path):
    """Its ranks start, say that there is nothing to do and end, on whatever card."""
    run = [*LLAMA_8B, "--checkpoint.enable", f"--job.dump_folder={tmp_path}", "--training.steps=9"]
    for step, is_finished in (8, False), (9, True):
        save(tmp_path, step)
        for answer, gib in ("40960", 95), ("81920", 95), ("61440", 60):
            monkeypatch.setattr(memory_check, "predict", lambda *_, g=gib: [a_rank(parameters=g)])
            started = is_finished or gib == 60
            assert start(run, answer) == (0 if started else 2, started, True)
            complaint = "" if is_finished else "may not suffice" if started else "does not fit"
            error = capfd.readouterr().err
            assert complaint in error
            assert error.count("\n") == (not is_finished)


@pytest.mark.slow
def test_the_prediction_is_preflights_in_whatever_folder(monkeypatch, tmp_path):
    """Also in one that holds another torchtrain."""
    (tmp_path / "torchtrain").mkdir()
    (tmp_path / "torchtrain" / "__init__.py").write_text("raise SystemExit(1)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory_check, "PREDICTION_S", TIMEOUT_S)
    predicted = memory_check.predict(DEBUG, 2)
    expected = estimate_memory(read(DEBUG, 2), 2)
    assert predicted == [{**asdict(rank), "total": rank.total} for rank in expected]
