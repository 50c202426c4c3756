"""A checkpoint says which model it is: another function is refused, key by key, before anything."""

import gc
import json
import shutil
import signal

import pytest
import torch
from helpers.checkpoints import record_of
from helpers.forking import train as train_on_ranks
from helpers.launching import metrics, options

import train
from torchtrain.checkpoint.commit import MARKER, STATE
from torchtrain.config.plans import DEBUG_TOKENIZER
from torchtrain.config_manager import JobConfig
from torchtrain.errors import UserError

pytestmark = pytest.mark.slow

STEPS = 4
LLAMA3 = {"model.name": "llama3", "model.rope_scaling_factor": 1.0}


def saving(data, folder, **overrides):
    return {
        **data,
        "job.dump_folder": folder,
        "training.steps": STEPS,
        "checkpoint.enable": True,
        "checkpoint.interval": 2,
        **overrides,
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory, data):
    """Whole runs of llama2 and of an unscaled llama3, with their checkpoints of steps 2 and 4."""
    folders = {}
    for name, shape in (("llama2", {}), ("llama3", LLAMA3)):
        folders[name] = tmp_path_factory.mktemp("saved") / name
        train_on_ranks(1, saving(data, folders[name], **shape))
    return folders


@pytest.fixture
def run(alone, data, log):
    """run(folder, **overrides): a run in this process; returns its lines, or why it was refused."""
    handlers = {
        number: signal.getsignal(number)
        for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    }

    def run_once(folder, **overrides):
        config = JobConfig().parse_args(options(saving(data, folder, **overrides)), world_size=1)
        log.clear()
        try:
            train.run(config, torch.device("cpu"))
        except UserError as fault:
            return str(fault)
        finally:
            gc.collect()  # the run's folder is let go
        assert "done: " in log.text
        return log.text

    yield run_once
    for number, handler in handlers.items():
        signal.signal(number, handler)
    gc.unfreeze()
    gc.collect()  # what the runs have left
    gc.freeze()  # as conftest has: the next one's collections need not walk what was imported
    gc.enable()


def halfway(source, folder):
    """Copy a run as it was after step 2."""
    shutil.copytree(source, folder)
    shutil.rmtree(folder / "checkpoint" / f"step-{STEPS}")
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text("".join(lines[:2]))
    return folder


def contents(folder):
    """Return the files with their contents, but for the lock, which names a process."""
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder): path.read_bytes() for path in files}


def make_old(step):
    """Make a checkpoint what it was before it held its shape, for which the flavor stood."""
    state = json.loads((step / STATE).read_text())
    del state["shape"]
    del state["config"]["checkpoint"]["accept_changed_model"]
    state["config"]["model"]["rope_scaling_factor"] = None
    (step / STATE).write_text(json.dumps(state))
    marker = json.loads((step / MARKER).read_text())
    content = (step / STATE).read_bytes()
    record = record_of(content)
    marker["files"][STATE] = record
    (step / MARKER).write_text(json.dumps(marker))


def losses(folder):
    return [line["loss"] for line in metrics(folder)]


# Each leaves the shape of every tensor as it is. Of the checkpoint: 4 heads on 2.
OTHER_MODELS = {
    "n_heads": ({"model.n_heads": 8, "model.n_kv_heads": 4}, ("4", "8")),
    "rope_theta": ({"model.rope_theta": 500_000.0}, ("10000.0", "500000.0")),
    "rope_scaling_factor": ({"model.rope_scaling_factor": 8.0}, ("1.0", "8.0")),
    "norm_eps": ({"model.norm_eps": 1e-3}, ("1e-05", "0.001")),
}


@pytest.mark.parametrize("key", OTHER_MODELS)
def test_another_model_is_refused_and_nothing_written(tmp_path, saved, run, key):
    changed, (before, now) = OTHER_MODELS[key]
    folder = halfway(saved["llama2"], tmp_path / "run")
    source = {"checkpoint.initial_load_path": folder / "checkpoint" / "step-2"}
    everything = {"checkpoint.initial_load_model_only": False}
    there = contents(folder)
    for new_folder, more in (
        (folder, {}),
        (tmp_path / "weights", source),
        (tmp_path / "all", source | everything),
    ):
        said = run(new_folder, **changed, **more)
        assert f"model.{key}: {before} in the checkpoint, {now} now" in said
        assert f"model.{key} = {before}" in said
        assert "checkpoint.accept_changed_model = true" in said
        assert contents(folder) == there
    for name in ("weights", "all"):
        assert contents(tmp_path / name) == {}


def test_every_key_that_differs_is_named_and_the_status_is_2(tmp_path, data, saved):
    folder = halfway(saved["llama2"], tmp_path / "run")
    both = {"model.n_heads": 8, "model.n_kv_heads": 4, "model.norm_eps": 1e-3}
    printed = train_on_ranks(2, saving(data, folder, **both), expect=2)
    assert printed.count("model.n_heads: 4 in the checkpoint, 8 now") == 1
    assert "model.n_kv_heads: 2 in the checkpoint, 4 now" in printed
    assert "model.norm_eps: 1e-05 in the checkpoint, 0.001 now" in printed
    assert "Traceback" not in printed
    assert losses(folder) == losses(saved["llama2"])[:2]


def test_another_model_is_accepted_and_becomes_the_runs_own(tmp_path, saved, run):
    folder = halfway(saved["llama2"], tmp_path / "run")
    changed = {"model.rope_theta": 500_000.0}
    said = run(folder, **changed, **{"checkpoint.accept_changed_model": True})
    assert "model.rope_theta: 10000.0 in the checkpoint, 500000.0 now" in said
    assert "accept_changed_model allows it" in said
    assert losses(folder)[:2] == losses(saved["llama2"])[:2]
    assert losses(folder)[2] != losses(saved["llama2"])[2]
    later = {"training.steps": STEPS + 1, "lr_scheduler.total_steps": STEPS}
    assert "model.rope_theta: 500000.0 in the checkpoint, 10000.0 now" in run(folder, **later)
    assert "in the checkpoint" not in run(folder, **changed, **later)
    assert len(losses(folder)) == STEPS + 1


def test_an_old_checkpoint_is_what_its_flavor_was_then(tmp_path, saved, run):
    """llama3's flavors were unscaled; the same names are Llama 3.1's now, scaled by 8."""
    folder = halfway(saved["llama3"], tmp_path / "run")
    make_old(folder / "checkpoint" / "step-2")
    said = run(folder, **{"model.name": "llama3"})
    assert "model.rope_scaling_factor: 1.0 in the checkpoint, 8.0 now" in said
    assert "set model.rope_scaling_factor = 1.0." in said
    said = run(folder, **LLAMA3)
    assert "in the checkpoint" not in said
    assert losses(folder) == losses(saved["llama3"])


def test_what_was_changed_freely_is_stated_in_one_line(tmp_path, saved, run):
    folder = halfway(saved["llama2"], tmp_path / "run")
    said = run(folder, **{"optimizer.weight_decay": 0.3, "training.max_norm": 2.0})
    line = (
        "the config differs from the checkpoint's: optimizer.weight_decay was 0.1, is 0.3; "
        "training.max_norm was 1.0, is 2.0"
    )
    assert said.count(line) == 1
    assert said.count("differs from the checkpoint's") == 1
    folder = halfway(saved["llama2"], tmp_path / "unchanged")
    assert "differs from the checkpoint's" not in run(folder)
    assert losses(folder) == losses(saved["llama2"])


def test_weights_of_another_tokenizer_are_told(tmp_path, saved, run):
    source = {"checkpoint.initial_load_path": saved["llama2"] / "checkpoint" / "step-2"}
    assert "another tokenizer" not in run(tmp_path / "same", **source)
    unknown_field = b"\xc0\x3e\x01"  # of the file's format: another file, the same vocabulary
    other = tmp_path / "other.model"
    other.write_bytes(DEBUG_TOKENIZER.read_bytes() + unknown_field)
    said = run(tmp_path / "other", **source, **{"model.tokenizer_path": other})
    assert said.count("were trained with another tokenizer than model.tokenizer_path") == 1


def test_an_empty_data_state_is_one_message_and_weights_alone_can_be_taken(tmp_path, saved, run):
    step = tmp_path / "step-2"
    shutil.copytree(saved["llama2"] / "checkpoint" / "step-2", step)
    state = json.loads((step / STATE).read_text())
    state["data"] = {}
    (step / STATE).write_text(json.dumps(state))
    marker = json.loads((step / MARKER).read_text())
    content = (step / STATE).read_bytes()
    marker["files"][STATE] = record_of(content)
    (step / MARKER).write_text(json.dumps(marker))
    source = {"checkpoint.initial_load_path": step, "training.global_batch_size": -1}
    said = run(tmp_path / "all", **source, **{"checkpoint.initial_load_model_only": False})
    assert "data state in the checkpoint is not of step 2" in said
    run(tmp_path / "weights", **source)
    assert len(losses(tmp_path / "weights")) == STEPS
