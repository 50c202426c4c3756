"""What a run has trained is found and loaded from its folder, on any ranks, and only read."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from helpers.checkpoints import flip, record_of
from helpers.forking import in_group
from helpers.trained import write_run
from torch.distributed.tensor import DTensor

from torchtrain.checkpoint.commit import MARKER, STATE
from torchtrain.config.plans import DEBUG_TOKENIZER
from torchtrain.errors import UserError
from torchtrain.ranks import join_process_group
from torchtrain.tools import trained_model
from torchtrain.tools.trained_model import find_weights, load_trained

CPU = torch.device("cpu")
SPARSE = {
    "model.name": "mixtral",
    "model.flavor": "debugmodel",
    "model.n_experts": 4,
    "model.router_bias": True,
}


@pytest.fixture(scope="module", autouse=True)
def alone():
    """A process group of this process alone."""
    join_process_group(60)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def saved(tmp_path_factory, data):
    """A run's folder with two checkpoints, and the weights of the second."""
    folder = tmp_path_factory.mktemp("saved") / "run"
    weights = write_run(folder, data, steps=(9, 10))
    return folder, weights


@pytest.fixture
def run(saved, tmp_path):
    """A copy of that folder, to be damaged."""
    return shutil.copytree(saved[0], tmp_path / "run")


def everything(folder):
    return {path: path.stat().st_mtime_ns for path in [folder, *folder.rglob("*")]}


def refusal(folder, *given, **more):
    with pytest.raises(UserError) as raised:
        load_trained(str(folder), CPU, list(given), **more)
    return str(raised.value)


def test_the_newest_checkpoint_of_a_run_is_loaded_and_nothing_is_written(saved):
    folder, weights = saved
    before = everything(folder)
    loaded = load_trained(str(folder), CPU, [])
    assert loaded.trained.path == folder / "checkpoint" / "step-10"
    assert loaded.model.model_state.keys() == weights.keys()
    for name, weight in loaded.model.model_state.items():
        assert type(weight) is not DTensor, "one rank alone has no need of FSDP's copies"
        assert torch.equal(weight, weights[name]), name
    assert everything(folder) == before


def test_a_step_and_the_folder_of_steps_are_found_too(saved):
    folder = saved[0] / "checkpoint"
    assert find_weights(folder) == folder / "step-10"
    assert find_weights(folder / "step-9") == folder / "step-9"
    old = load_trained(str(folder / "step-9"), CPU, [])
    assert not torch.equal(old.model.weights["norm.weight"], saved[1]["norm.weight"])


def test_the_runs_own_checkpoint_folder_is_known_from_its_config(data, tmp_path):
    folder = tmp_path / "run"
    write_run(folder, {**data, "checkpoint.folder": "kept/here"})
    assert find_weights(folder) == folder / "kept" / "here" / "step-1"


def test_the_dtype_is_that_of_weights_and_computation(saved):
    folder, weights = saved
    model = load_trained(str(folder), CPU, [], dtype="bfloat16").model
    for name, weight in model.weights.items():
        assert torch.equal(weight, weights[name].bfloat16()), name
    with torch.no_grad():
        assert model.parts[0](torch.ones(1, 4, dtype=torch.int64)).dtype == torch.bfloat16


def test_float8_is_asked_for_anew_and_where_there_is_none_refused(saved, run, monkeypatch, caplog):
    asked = "--model.converters=quantize.linear.float8"
    assert "has no float8, which NVIDIA's cards have" in refusal(saved[0], asked)
    monkeypatch.setattr(trained_model.logger, "propagate", True)
    monkeypatch.setattr(trained_model.logger, "handlers", [])  # pytest's own, and of other tests
    path = run / "checkpoint" / "step-10"
    found = trained_model.find_trained(str(path))
    section = {**found.config["model"], "converters": ["quantize.linear.float8"]}
    in_float8 = replace(found, config={**found.config, "model": section})
    monkeypatch.setattr(trained_model, "find_trained", lambda folder: in_float8)
    for given in ([asked, "--quantize.linear.float8.emulate"], []):
        with caplog.at_level("INFO", logger=trained_model.logger.name):
            load_trained(str(path), CPU, given)
        said = (
            "the run computed linear layers in float8; here they compute in float32" in caplog.text
        )
        assert said == (not given)


def test_experts_and_their_biases_are_loaded(data, tmp_path):
    weights = write_run(tmp_path / "run", {**data, **SPARSE})
    state = load_trained(str(tmp_path / "run"), CPU, [], dtype="bfloat16").model.model_state
    biases = [name for name in state if name.endswith("expert_bias")]
    assert biases
    for name in biases:
        assert torch.equal(state[name], weights[name]), name


def test_the_shape_in_the_checkpoint_counts(run):
    """Not the flavor of today, nor the config's."""
    (run / "config.toml").write_text("[model]\ndim = 4096\n")
    step = run / "checkpoint" / "step-10"
    state = json.loads((step / STATE).read_text())
    state["config"]["model"] |= {"flavor": "renamed", "dim": 4096}
    rewrite(step, json.dumps(state))
    assert load_trained(str(run), CPU, []).model.plan.shape.dim == 32


def rewrite(step, text):
    """Replace train_state.json by another that the marker vouches for."""
    (step / STATE).write_text(text)
    marker = json.loads((step / MARKER).read_text())
    marker["files"][STATE] = record_of(text.encode())
    (step / MARKER).write_text(json.dumps(marker))


@pytest.mark.parametrize("from_run", [False, True])
def test_a_relative_tokenizer_is_looked_for_here_and_then_in_the_run(
    data, tmp_path, monkeypatch, from_run
):
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    shutil.copy(DEBUG_TOKENIZER, "own.model")
    write_run(tmp_path / "run", {**data, "model.tokenizer_path": "own.model"})
    if from_run:
        shutil.move("own.model", tmp_path / "run")
    found = load_trained(str(tmp_path / "run"), CPU, []).model.config.model.tokenizer_path
    assert found == (str(tmp_path / "run" / "own.model") if from_run else "own.model")


def test_a_tokenizer_that_is_gone_or_does_not_fit_is_refused(data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(DEBUG_TOKENIZER, "own.model")
    folder = tmp_path / "run"
    write_run(folder, {**data, "model.tokenizer_path": "own.model"})
    (tmp_path / "own.model").unlink()
    assert "'own.model', is neither in the current folder nor in" in refusal(folder)
    write_run(tmp_path / "small", {**data, "model.vocab_size": 2048})
    large = tmp_path / "tokenizer.json"
    vocabulary = {"<s>": 0, "</s>": 1, **{str(n): n for n in range(2, 2050)}}
    settings = {"model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<s>"}}
    large.write_text(json.dumps({"version": "1.0", "added_tokens": [], **settings}))
    said = refusal(tmp_path / "small", tokenizer=str(large))
    assert "has 2,050 tokens and the vocabulary of" in said
    assert "only 2,048: give the model's own by --tokenizer" in said


def test_another_tokenizer_than_the_runs_is_stated(saved, tmp_path, caplog):
    other = tmp_path / "tokenizer.json"
    settings = {"model": {"type": "WordLevel", "vocab": {"<s>": 0, "</s>": 1}, "unk_token": "<s>"}}
    other.write_text(json.dumps({"version": "1.0", "added_tokens": [], **settings}))
    load_trained(str(saved[0]), CPU, [], tokenizer=str(other))
    assert "was trained with another tokenizer than" in caplog.text


def test_a_damaged_newest_checkpoint_is_a_message_and_stays_where_it_is(run):
    flip(run / "checkpoint" / "step-10" / "__0_0.distcp", 5000)
    before = everything(run)
    said = refusal(run)
    assert "step-10 cannot be used: its file __0_0.distcp is damaged" in said
    assert everything(run) == before
    assert load_trained(str(run / "checkpoint" / "step-9"), CPU, [])


def test_folders_without_a_checkpoint_are_refused(run, tmp_path):
    assert "there is no folder" in refusal(tmp_path / "nowhere")
    assert "there is no folder" in refusal(run / "config.toml")
    (tmp_path / "empty").mkdir()
    assert "holds no checkpoint: give the folder of a run" in refusal(tmp_path / "empty")
    (run / "checkpoint" / "step-9").rename(run / "checkpoint" / "step-9.damaged")
    shutil.rmtree(run / "checkpoint" / "step-10")
    assert "has no complete checkpoint: it is saved every" in refusal(run)
    (run / "config.toml").write_text("[checkpoint")
    assert "config.toml cannot be read" in refusal(run)


def test_a_wrong_option_is_refused_by_name(saved):
    said = refusal(saved[0], "--parallelism.tensor_parallel_degree", "3")
    assert "command line" in said
    assert "parallelism.tensor_parallel_degree" in said
    assert "unknown" in refusal(saved[0], "--parallelism.tensor_degree", "3")


def test_a_model_of_the_users_own_is_imported_only_when_named(run):
    step = run / "checkpoint" / "step-10"
    state = json.loads((step / STATE).read_text())
    state["config"]["model"]["name"] = "mine"
    state["config"]["experimental"]["custom_import"] = "./mine.py"
    rewrite(step, json.dumps(state))
    assert "name it by --experimental.custom_import ./mine.py" in refusal(run)


def check_loaded(folder, given, expected):
    model = load_trained(str(folder), CPU, given).model
    weights = torch.load(expected, weights_only=True)
    assert model.weights.keys() == weights.keys()
    for name, weight in model.weights.items():
        assert isinstance(weight, DTensor), name
        if weight.ndim > 1:  # tensor parallelism has each norm whole on every rank
            assert weight.to_local().numel() == weights[name].numel() // 2, name
        assert torch.equal(weight.full_tensor(), weights[name]), name


@pytest.mark.slow
@pytest.mark.parametrize("given", [[], ["--parallelism.tensor_parallel_degree", "2"]])
def test_two_ranks_load_their_shards(saved, tmp_path, given):
    torch.save(saved[1], tmp_path / "weights.pt")
    in_group(2, check_loaded, saved[0], given, tmp_path / "weights.pt")
