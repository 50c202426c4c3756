"""What is left when a run ends: the weights alone, in another type, in Hugging Face's form."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers import forking
from helpers.checkpoints import flip
from helpers.launching import metrics, options
from safetensors.torch import load_file

import train
from torchtrain import exporting, ranks
from torchtrain.checkpoint.storage import list_entries, read_index, read_tensors
from torchtrain.config.plans import DEBUG_TOKENIZER
from torchtrain.config_manager import JobConfig
from torchtrain.errors import CheckpointError, UserError
from torchtrain.logging_utils import init_logging
from torchtrain.tools import convert

SAVES = {"checkpoint.enable": True, "checkpoint.interval": 2}
ALONE = {**SAVES, "checkpoint.last_save_model_only": True}
IN_HF = {**SAVES, "checkpoint.last_save_in_hf": True}
SPARSE = {"model.n_experts": 4, "model.router_bias": True}


@pytest.fixture(scope="module")
def device():
    device = ranks.join_process_group(60)
    yield device
    dist.destroy_process_group()


@pytest.fixture
def run(tmp_path, data, device, capfd):
    """run(name, **overrides): a run of one rank in this process, of 4 steps; what it printed."""

    def run_(name, **overrides):
        init_logging(disable_color=True)
        given = {**data, "job.dump_folder": tmp_path / name, **overrides}
        train.run(JobConfig().parse_args(options(given), world_size=1), device)
        return capfd.readouterr().out

    return run_


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint but the random states."""
    metadata = read_index(checkpoint, [path.name for path in checkpoint.iterdir()])
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in list_entries(metadata).items()
        if not name.startswith("rng/")
    }
    read_tensors(checkpoint, metadata, tensors, dist.group.WORLD)
    return tensors


# ---- the weights alone ----


@pytest.mark.slow
def test_the_last_checkpoint_is_of_the_weights_alone(run, tmp_path):
    run("full", **SAVES, **SPARSE)
    run("alone", **ALONE, **SPARSE)
    run("small", **ALONE, **SPARSE, **{"checkpoint.export_dtype": "bfloat16"})
    full, alone, small = (
        tensors_of(tmp_path / name / "checkpoint" / "step-4") for name in ("full", "alone", "small")
    )
    weights = {name: tensor for name, tensor in full.items() if name.startswith("model/")}
    assert weights.keys() < full.keys()
    assert alone.keys() == small.keys() == weights.keys()
    for name, weight in weights.items():
        assert torch.equal(alone[name], weight), name
        is_buffer = name.endswith("bias")
        assert small[name].dtype == (torch.float32 if is_buffer else torch.bfloat16), name
        assert torch.equal(small[name], weight.to(small[name].dtype)), name
    assert any(name.endswith("bias") for name in small)
    between = tensors_of(tmp_path / "small" / "checkpoint" / "step-2")
    assert between.keys() == full.keys(), "a run that goes on needs all of it"
    assert {tensor.dtype for name, tensor in between.items()} == {torch.float32}


@pytest.mark.slow
def test_a_run_that_is_over_says_so_and_one_that_gets_longer_takes_an_older_checkpoint(
    run, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)  # which a run needs that has steps left
    longer = {"training.steps": 6, "lr_scheduler.total_steps": 6}
    run("untouched", **SAVES, **longer)
    run("run", **ALONE, **{"lr_scheduler.total_steps": 6})
    assert "nothing to do" in run("run", **ALONE, **{"metrics.enable_wandb": True})
    printed = run("run", **SAVES, **longer)
    assert "step-4 is passed over: it holds the weights alone" in printed
    assert "step-4 is now step-4.superseded" in printed
    found, expected = (
        tensors_of(tmp_path / name / "checkpoint" / "step-6") for name in ("run", "untouched")
    )
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    losses = [[line["loss"] for line in metrics(tmp_path / name)] for name in ("run", "untouched")]
    assert losses[0] == losses[1]
    flip(next((tmp_path / "untouched" / "checkpoint" / "step-6").glob("*.distcp")), 100)
    with pytest.raises(UserError, match="needs the package wandb"):  # it is not over after all
        run("untouched", **SAVES, **longer, **{"metrics.enable_wandb": True})


def test_without_an_older_checkpoint_a_longer_run_is_refused(run, tmp_path):
    run("run", **ALONE, **{"checkpoint.keep_latest_k": 1})
    longer = {**ALONE, "training.steps": 6}
    with pytest.raises(UserError, match="none of them is a complete checkpoint to go on from"):
        run("run", **longer)
    with pytest.raises(UserError, match=r"load_step = 4 cannot .*the weights alone"):
        run("run", **longer, **{"checkpoint.load_step": 4})
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoint").iterdir()) == ["step-4"]


def test_weights_alone_start_another_run(run, tmp_path):
    run("run", **ALONE)
    start = {**SAVES, "checkpoint.initial_load_path": tmp_path / "run" / "checkpoint" / "step-4"}
    run("other", **start, **{"training.steps": 1, "optimizer.lr": 1e-30})
    found = tensors_of(tmp_path / "other" / "checkpoint" / "step-1")
    for name, weight in tensors_of(start["checkpoint.initial_load_path"]).items():
        assert torch.equal(found[name], weight), name
    with pytest.raises(UserError, match=r"of the weights alone: set checkpoint.initial_load_model"):
        run("third", **start, **{"checkpoint.initial_load_model_only": False})


# ---- Hugging Face's form ----


def convert_in_a_fork(command, **given):
    """Do what the tool does in a process of its own, without its start."""
    assert command[:3] == [sys.executable, "-m", "torchtrain.tools.convert"]
    printed = forking.on_ranks(1, convert.main, command[3:])
    return subprocess.CompletedProcess(command, 0, printed, "")


@pytest.mark.slow
def test_the_last_checkpoint_is_in_hugging_faces_form_too(run, tmp_path, monkeypatch):
    """By the tool itself in test_ranks_export_their_weights_whole."""
    monkeypatch.setattr(exporting.subprocess, "run", convert_in_a_fork)
    given = {**IN_HF, "checkpoint.export_dtype": "float16"}
    printed = run("run", **given, **{"checkpoint.keep_latest_k": 1})
    step = tmp_path / "run" / "checkpoint" / "step-4"
    assert f"{step} is now {step / 'hf'}: 3 files and the tokenizer" in printed
    weights = tensors_of(step)
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}, "it stays whole"
    assert_same_weights(step, torch.float16)
    assert json.loads((step / "hf" / "config.json").read_text())["torch_dtype"] == "float16"
    assert (step / "hf" / "tokenizer.json").exists()


CONVERTER = """#!/bin/sh
echo "$@" >> "$(dirname "$0")/given"
mkdir "$5" && touch "$5/config.json"
"""


def test_a_run_that_was_killed_before_its_export_makes_up_for_it_once(run, tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text(CONVERTER)
    program.chmod(0o755)
    monkeypatch.setattr(exporting.sys, "executable", str(program))
    run("run", **IN_HF)
    first = (tmp_path / "given").read_text()
    step = tmp_path / "run" / "checkpoint" / "step-4"
    assert str(step) in first
    shutil.rmtree(step / "hf")
    printed = run("run", **IN_HF)
    assert "nothing to do" in printed
    assert (step / "hf" / "config.json").exists()
    assert (tmp_path / "given").read_text() == 2 * first
    assert str(step / "hf") not in run("run", **IN_HF)
    assert (tmp_path / "given").read_text() == 2 * first


def assert_same_weights(step, dtype):
    """Check that it is the checkpoint's weights, rounded to this type; test_convert loads such."""
    weights, found = tensors_of(step), load_file(step / "hf" / "model.safetensors")
    for theirs, ours in (
        ("lm_head.weight", "model/output.weight"),
        ("model.embed_tokens.weight", "model/tok_embeddings.weight"),
        ("model.layers.1.mlp.down_proj.weight", "model/layers.1.feed_forward.w2.weight"),
    ):
        assert torch.equal(found[theirs], weights[ours].to(dtype)), ours


def test_a_model_that_has_no_such_form_is_refused_before_it_is_trained(run, tmp_path):
    with pytest.raises(UserError, match=r"last_save_in_hf = true: .*does not compute.*router_bias"):
        run("run", **IN_HF, **SPARSE)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    run("other", **IN_HF, **SPARSE, **{"checkpoint.load_only": True})  # which saves nothing


@pytest.mark.parametrize(("status", "kind"), [(2, UserError), (1, CheckpointError)])
def test_a_conversion_that_fails_loses_nothing(run, tmp_path, monkeypatch, status, kind):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho 'error: the disk is full' >&2\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setattr(exporting.sys, "executable", str(program))
    with pytest.raises(kind, match=r"step-4 is complete, but .*the disk is full. When that is men"):
        run("run", **IN_HF)
    assert tensors_of(tmp_path / "run" / "checkpoint" / "step-4")


@pytest.mark.slow
def test_ranks_export_their_weights_whole(tmp_path, data, device):
    tokenizer = {"model.tokenizer_path": DEBUG_TOKENIZER}
    folder = tmp_path / "ranks"
    given = {**data, **ALONE, **IN_HF, **tokenizer, "job.dump_folder": folder}
    printed = forking.train(2, {**given, "parallelism.tensor_parallel_degree": 2})
    assert printed.count("3 files and the tokenizer") == 1
    step = folder / "checkpoint" / "step-4"
    assert all(name.startswith("model/") for name in tensors_of(step))
    assert_same_weights(step, torch.float32)
