"""What a run says of itself at its start: each number against one worked out by hand."""

import platform
import socket
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers.launching import options

import torchtrain
from torchtrain import ranks, run_facts
from torchtrain.config_manager import JobConfig
from torchtrain.logging_utils import init_logging
from torchtrain.set_up import set_up


@pytest.fixture(scope="module")
def device():
    yield ranks.join_process_group(60)
    dist.destroy_process_group()


GIVEN = {
    "job.description": "a trial",
    "training.local_batch_size": 2,
    "training.global_batch_size": 8,
    "model.vocab_size": 3000,
}
# By hand: two layers of width 32, 4 heads of 8 on 2 key/value heads, feed-forward 64.
LAYER = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64 + 2 * 32
PARAMETERS = 2 * 3000 * 32 + 2 * LAYER + 32


def test_the_facts_of_a_run(data, device):
    trainer = set_up(JobConfig().parse_args(options({**data, **GIVEN}), world_size=1), device)
    trainer.step = 41
    facts = asdict(run_facts.find_facts(trainer))
    assert facts["batch"] == {
        "global_batch_size": 8,
        "microbatch_size": 2,
        "accumulation_steps": 4,
        "data_parallel_degree": 1,
    }
    assert facts["degrees"] == {
        "pp": 1,
        "dp_replicate": 1,
        "dp_shard": 1,
        "cp": 1,
        "tp": 1,
        "ep": 1,
    }
    assert facts["parameters"] == facts["active_parameters"] == PARAMETERS
    assert facts["tokens_per_step"] == 8 * 32
    assert facts["first_step"] == 42
    assert facts["shape"]["vocab_size"] == 3000
    assert facts["shape"]["n_kv_heads"] == 2
    assert facts["description"] == "a trial"
    assert facts["torchtrain"] == torchtrain.__version__
    assert facts["torch"] == torch.__version__
    assert facts["python"] == platform.python_version()
    assert facts["host"] == socket.gethostname()
    assert (facts["device"], facts["world_size"]) == ("cpu", 1)
    assert facts["data_fingerprint"] == trainer.loader.dataset.fingerprint
    assert facts["validation_fingerprint"] == ""


def test_the_start_up_lines(data, device, capsys):
    init_logging()
    trainer = set_up(JobConfig().parse_args(options({**data, **GIVEN}), world_size=1), device)
    run_facts.describe(trainer)
    printed = capsys.readouterr().out
    for text in (
        f"{PARAMETERS:,} parameters: 2 layers 32 wide, 4 heads on 2 key/value heads",
        "layout     one process",
        "8 sequences x 32 tokens = 256 tokens per step; microbatch 2, accumulation 4",
        "parameters float32, compute float32, reductions float32",
    ):
        assert text in printed
    assert "validation" not in printed


def test_what_a_token_uses_of_experts_is_stated(data, device, capsys):
    experts = {"model.n_experts": 4, "model.n_dense_layers": 1, "model.expert_hidden_dim": 24}
    init_logging()
    given = options({**data, **GIVEN, **experts})
    facts = run_facts.describe(set_up(JobConfig().parse_args(given, world_size=1), device))
    expert = 3 * 32 * 24
    parameters = PARAMETERS - 3 * 32 * 64 + 4 * 32 + 4 * expert
    assert (facts.parameters, facts.active_parameters) == (parameters, parameters - 2 * expert)
    text = f"{parameters:,} parameters ({parameters - 2 * expert:,} active per token): 2 layers"
    assert text in capsys.readouterr().out


def test_the_peak_of_a_job_is_that_of_all_its_devices(monkeypatch):
    monkeypatch.setattr(run_facts, "find_peak_flops", lambda *given: 1e12)
    monkeypatch.setattr(run_facts, "asdict", vars)
    monkeypatch.setattr(run_facts, "MetricsLogger", lambda **given: given)
    part = SimpleNamespace(flops_per_token=lambda seq_len: 6.0 * seq_len)
    trainer = SimpleNamespace(config=JobConfig(), device=torch.device("cpu"), parts={3: part})
    facts = SimpleNamespace(world_size=8, steps=7, first_step=1, tokens_per_step=10)
    folder = SimpleNamespace(owner=True, path="here")
    given = run_facts.open_metrics(trainer, folder, facts)
    assert given["peak_flops"] == 8e12
    assert given["total_steps"] == 7
    assert given["flops_per_token"] == 6.0 * JobConfig().training.seq_len
    monkeypatch.setattr(run_facts, "find_peak_flops", lambda *given: None)
    assert run_facts.open_metrics(trainer, folder, facts)["peak_flops"] is None
    folder.owner = False
    assert run_facts.open_metrics(trainer, folder, facts) is None
