"""Runs that start from weights of Hugging Face and of torchtitan, on any layout."""

import io
import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from helpers.forking import train as train_on_ranks
from helpers.forking import train_in_turn
from helpers.hf import SHAPES, build, save_checkpoint
from helpers.launching import metrics
from helpers.launching import options as command_line

from torchtrain.config_manager import JobConfig
from torchtrain.set_up import set_up
from torchtrain.tools import convert
from torchtrain.tools.hf_export import to_config

pytestmark = pytest.mark.slow

SEQ_LEN = 64


def options(data, folder, shape, **more):
    """The run of a model with this shape on one step of eight sequences."""
    sizes = {
        f"model.{key}": value
        for key, value in vars(shape).items()
        if key not in ("router_scores", "router_scale")
    }
    return {
        **data,
        "model.name": "qwen3" if shape.qk_norm else "llama3",
        "model.flavor": "debugmodel",
        **sizes,
        "training.seq_len": SEQ_LEN,
        "training.steps": 2,
        "optimizer.lr": 1e-3,
        "job.dump_folder": folder,
        "checkpoint.enable": True,
        **more,
    }


def losses(folder):
    return [line["loss"] for line in metrics(folder)]


@pytest.mark.parametrize("name", ["llama scaled", "qwen3 moe"])
def test_what_transformers_saved_trains_on_with_the_loss_it_computes(name, data, tmp_path, alone):
    """One file and several, on 1, 2 and 4 ranks, tensor parallel and in a pipeline."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = SHAPES[name]
    config = to_config(shape, SEQ_LEN, "float32")
    (tmp_path / "config.json").write_text(json.dumps(config))
    torch.manual_seed(3)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(parameter + torch.randn(parameter.shape) * 0.03)
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    layouts = {
        "whole": (1, {}),
        "parts": (1, {}),
        "fsdp2": (2, {}),
        "pp2": (2, {"parallelism.pipeline_parallel_degree": 2}),
        "fsdp2-tp2": (4, {"parallelism.tensor_parallel_degree": 2}),
    }
    if shape.n_experts:  # how they are cut; the rest is as in a dense model
        layouts = {layout: layouts[layout] for layout in ("whole", "fsdp2")}
    runs = {1: [], 2: [], 4: []}
    for layout, (ranks, more) in layouts.items():
        source = tmp_path / ("whole" if layout == "whole" else "parts")
        given = {"checkpoint.initial_load_path": source, "checkpoint.initial_load_in_hf": True}
        runs[ranks].append(options(data, tmp_path / layout, shape, **given, **more))
    for ranks, given in runs.items():
        if given:
            train_in_turn(ranks, given)
    for layout in layouts:
        assert losses(tmp_path / layout) == pytest.approx(losses(tmp_path / "whole"), rel=2e-6)
    assert losses(tmp_path / "whole")[0] == pytest.approx(loss_of(theirs, data, shape), rel=1e-5)


@torch.no_grad()
def loss_of(theirs, data, shape):
    """Return the loss that transformers computes of the first step's batch."""
    arguments = command_line(options(data, "unused", shape))
    trainer = set_up(JobConfig().parse_args(arguments, 1), torch.device("cpu"))
    total, valid = 0.0, 0
    for batch in trainer.loader.read(1):
        logits = theirs(batch.tokens).logits.flatten(0, 1)
        labels = batch.labels.flatten()
        total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        valid += int((labels >= 0).sum())
    return total / valid


def test_torchtitans_weights_are_taken_and_the_rest_is_named(data, tmp_path, alone):
    """A full checkpoint as torchtitan writes it: weights by our names, the rest beside them."""
    shape = SHAPES["llama"]
    model = build(shape)
    weights = dict(model.named_parameters())
    state = {
        **weights,
        "optimizer.state.norm.weight.exp_avg": torch.ones(4),
        "train_state": {"step": torch.tensor(3), "bytes": io.BytesIO(b"x")},
        "lr_scheduler": {"last_epoch": 3},
    }
    dcp.save(state, checkpoint_id=tmp_path / "titan")
    step = save_checkpoint(tmp_path, "llama", model)
    said = ""
    for name, source in (("ours", step), ("two", tmp_path / "titan"), ("one", tmp_path / "titan")):
        given = options(data, tmp_path / name, shape, **{"checkpoint.initial_load_path": source})
        given["checkpoint.accept_changed_model"] = name == "ours"
        said = train_on_ranks(2 if name == "two" else 1, given)
    assert losses(tmp_path / "one") == losses(tmp_path / "ours")
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "ours"), rel=2e-6)
    assert "weights of torchtitan's; left out: optimizer.state.norm.weight.exp_avg" in said
    assert "frequencies: check [model]" in said


def test_what_does_not_fit_is_refused_in_one_message(data, tmp_path, alone):
    shape = SHAPES["llama"]
    step = save_checkpoint(tmp_path, "llama", build(shape))
    convert.to_hf(str(step), tmp_path / "hf")
    in_hf = {
        "checkpoint.initial_load_path": tmp_path / "hf",
        "checkpoint.initial_load_in_hf": True,
    }
    dcp.save({"tok_embeddings.weight": torch.ones(2, 2)}, checkpoint_id=tmp_path / "titan")
    titan = {"checkpoint.initial_load_path": tmp_path / "titan"}
    cases = [
        ({**in_hf, "model.n_heads": 2}, "model.n_heads: 4 in the checkpoint, 2 now"),
        ({**in_hf, "checkpoint.initial_load_in_hf": False}, "set initial_load_in_hf = true"),
        (titan, "does not hold this run's model: it lacks layers.0.attention.wq.weight"),
        ({**titan, "checkpoint.initial_load_model_only": False}, "only the weights can be taken"),
        ({**titan, "checkpoint.initial_load_in_hf": True}, "has no config.json"),
    ]
    for number, (more, message) in enumerate(cases):
        folder = tmp_path / f"refused{number}"
        said = train_on_ranks(1, options(data, folder, shape, **more), expect=2)
        assert message in " ".join(said.split()), said
        assert "Traceback" not in said
        assert not (folder / "metrics.jsonl").exists()
