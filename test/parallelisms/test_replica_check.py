"""Silent corruption is seen whatever bit it is, and a clean run of no layout is taken for it."""

import re

import pytest
import torch
import torch.distributed as dist
from helpers.forking import in_group, on_ranks, run_trainer
from helpers.launching import metrics, options

import train
from torchtrain.config_manager import JobConfig
from torchtrain.errors import ReplicasDiffer
from torchtrain.parallelisms import replica_check
from torchtrain.parallelisms.replica_check import BitHash
from torchtrain.set_up import set_up
from torchtrain.shards import local
from torchtrain.tools.layouts import (
    CP_2,
    DUAL_PIPE,
    EP_2,
    EXPERTS,
    NO_SEQUENCE,
    OFFLOAD,
    REPLICATE_2,
    TP_2,
)

WO = "layers.1.attention.wo.weight"


# ---- the hash ----


def bits_of(tensor):
    """A tensor's memory, as bytes."""
    return tensor.view(-1).view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64])
def test_any_flipped_bit_changes_the_hash(dtype, monkeypatch):
    monkeypatch.setattr(replica_check, "CHUNK", 2)
    hash_bits = BitHash()
    tensor = torch.tensor([[0.0, 1.5, -2.0], [3.0, 0.0, 1e30]]).to(dtype)
    whole = hash_bits(tensor)
    assert whole.dtype == torch.int64
    assert whole.ndim == 0
    for position in range(tensor.nbytes):
        for bit in range(8):
            bits_of(tensor)[position] ^= 1 << bit
            assert hash_bits(tensor) != whole, (position, bit)
            bits_of(tensor)[position] ^= 1 << bit
    assert hash_bits(tensor) == whole


def test_the_hash_tells_zeros_nans_and_places_apart(monkeypatch):
    monkeypatch.setattr(replica_check, "CHUNK", 2)
    hash_bits = BitHash()

    def differ(*values):
        return len({hash_bits(torch.tensor(value)).item() for value in values}) == len(values)

    assert differ([0.0, 1.0], [-0.0, 1.0], [float("nan"), 1.0])
    assert differ([1.0, 2.0, 3.0, 4.0], [2.0, 1.0, 3.0, 4.0], [3.0, 4.0, 1.0, 2.0])
    assert differ(5.0, 6.0)
    signs = torch.tensor([1.0, 2.0], dtype=torch.float64)
    assert hash_bits(signs) != hash_bits(-signs), "two flips of the highest bit"
    assert hash_bits(torch.empty(0, 4)) == 0


def test_the_hash_is_that_of_the_values_however_they_lie():
    tensor = torch.randn(6, 4)
    assert BitHash()(tensor.t()) == BitHash()(tensor.t().contiguous())
    assert BitHash()(tensor.t()) != BitHash()(tensor)
    assert BitHash()(tensor[:, 1]) == BitHash()(tensor[:, 1].clone())


# ---- layouts ----

EVERYTHING = "."
NORMS = r"norm\.weight$"
BIASES = r"expert_bias$"
OF_SPARSE_LAYERS = rf"{NORMS}|{BIASES}|gate\.weight$|shared_experts"
SMALL = {"model.dim": 32, "model.ffn_hidden_dim": 32}

# Name: (options, a pattern of what ranks have in common; None: nothing).
ON_TWO = {
    "fsdp2": ({}, None),
    "hsdp2": (REPLICATE_2, EVERYTHING),
    "hsdp2-offload": (REPLICATE_2 | OFFLOAD, EVERYTHING),
    "hsdp2-bf16": (REPLICATE_2 | {"training.dtype": "bfloat16"}, EVERYTHING),
    "tp2-no-sequence": (TP_2 | NO_SEQUENCE, NORMS),
    "tp2-qk-norm": (TP_2 | {"model.qk_norm": True}, NORMS),
    "cp2": (CP_2, None),
    "dualpipev": (DUAL_PIPE | {"model.n_layers": 4}, None),
    "hsdp2-experts": (REPLICATE_2 | EXPERTS, EVERYTHING),
    "ep2": (EP_2 | EXPERTS, BIASES),
    "tp2-experts": (TP_2 | EXPERTS, OF_SPARSE_LAYERS),
}
ON_FOUR = {
    "hsdp2-tp2": (REPLICATE_2 | TP_2, EVERYTHING),
    "hsdp2-cp2": (REPLICATE_2 | CP_2, EVERYTHING),  # of which the shards are those of hsdp2-fsdp2
    "fsdp2-tp2": (TP_2, NORMS),
    "hsdp2-ep2-experts": (REPLICATE_2 | EP_2 | EXPERTS, EVERYTHING),
}


def shared_names(check):
    """The names of this rank's parameters and buffers that another rank has a part of too."""
    counts = check.counts_of_own_parts().tolist()
    parts = zip(check.parts, counts, strict=True)
    return {part.partition(" ")[0] for part, count in parts if count > 1}


def train_step(trainer):
    train.forward_backward(trainer, trainer.loader.step_batches(trainer.step + 1))
    train.clip_gradients(trainer)
    train.optimizer_step(trainer)


def check_clean(data, layouts):
    for name, (overrides, shared) in layouts.items():
        given = {**data, **SMALL, "debug.replica_check_freq": 1, **overrides}
        config = JobConfig().parse_args(options(given), world_size=dist.get_world_size())
        trainer = set_up(config, torch.device("cpu"))
        check = trainer.replica_check
        found = shared_names(check)
        expected = {each for each in trainer.model_state if shared and re.search(shared, each)}
        assert found == expected, name
        for step in range(1, 3):
            train_step(trainer)
            check.run(step)
        assert check.passed == 2


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_clean_run_of_no_layout_differs(ranks, data):
    in_group(ranks, check_clean, data, {2: ON_TWO, 4: ON_FOUR}[ranks], timeout_s=240)


# ---- flipped bits ----


def flipped(check, tensor, rank, position=-1, bit=0):
    """Flip one bit on one rank, check, flip it back, check again; return what was said."""

    def flip():
        if dist.get_rank() == rank:
            bits_of(local(tensor).detach())[position] ^= 1 << bit

    flip()
    with pytest.raises(ReplicasDiffer) as fault:
        check.run(7)
    flip()
    check.run(8)
    return str(fault.value)


def trained(data, overrides):
    given = {**data, **SMALL, "debug.replica_check_freq": 1, **overrides}
    config = JobConfig().parse_args(options(given), world_size=dist.get_world_size())
    trainer = set_up(config, torch.device("cpu"))
    train_step(trainer)
    return trainer


def flip_on_two(data):
    trainer = trained(data, REPLICATE_2)
    check = trainer.replica_check
    for tensor in (
        trainer.weights[WO],
        trainer.optimizer.state[trainer.weights[WO]]["exp_avg"],
        trainer.optimizer.state[trainer.weights[WO]]["exp_avg_sq"],
        trainer.optimizer.state[trainer.weights[WO]]["step"],
    ):
        check.passed = None
        said = flipped(check, tensor, rank=1)
        assert said.startswith(f"step 7: silent corruption: {WO}, or what the optimizer keeps for")
        assert "differs between rank 0 and rank 1; there was no earlier check" in said
        assert "the check after step 8 found no difference" in flipped(check, tensor, rank=0)

    trainer = trained(data, TP_2)
    check = trainer.replica_check
    said = flipped(check, trainer.weights["norm.weight"], rank=1)
    assert "norm.weight, or what" in said
    trainer.optimizer.state[trainer.weights[WO]]["decay"] = 1 + dist.get_rank() * 2**-52
    check.run(8)  # each rank has its own part of that weight
    trainer.optimizer.state[trainer.weights["norm.weight"]]["decay"] = 1 + dist.get_rank() * 2**-52
    with pytest.raises(ReplicasDiffer, match=r"corruption: norm\.weight, or what"):
        check.run(9)
    trainer.optimizer.state[trainer.weights["norm.weight"]]["decay"] = 1.0
    biased = trained(data, REPLICATE_2 | EXPERTS)
    bias = biased.model_state["layers.1.moe.expert_bias"]
    assert "layers.1.moe.expert_bias" in flipped(biased.replica_check, bias, rank=0)

    # What only one rank has may be anything.
    if dist.get_rank() == 1:
        local(trainer.weights[WO]).detach().add_(1)
    check.run(9)


def flip_on_four(data):
    trainer = trained(data, {"parallelism.data_parallel_replicate_degree": 4})
    assert "between ranks 0, 1, 3 and rank 2;" in flipped(
        trainer.replica_check, trainer.weights[WO], rank=2, position=5, bit=6
    )
    if dist.get_rank() == 3:
        for name in ("layers.0.attention.wq.weight", WO):
            local(trainer.weights[name]).detach().mul_(-1)
    with pytest.raises(ReplicasDiffer, match=r"layers\.0\.\S+ \(and 1 other parameter\), or"):
        trainer.replica_check.run(3)
    mixed = trained(data, REPLICATE_2 | TP_2)
    said = flipped(mixed.replica_check, mixed.weights[WO], rank=3)
    assert "between rank 1 and rank 3" in said, "the replicas of one share alone"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_a_flipped_bit_names_parameter_and_ranks(ranks, data):
    in_group(ranks, {2: flip_on_two, 4: flip_on_four}[ranks], data, timeout_s=120)


def run_with_a_flip(arguments):
    """Be a rank of a run in which a bit of rank 1's copy flips after step 3."""
    update = train.optimizer_step

    def flip(trainer, **given):
        update(trainer, **given)
        if trainer.step == 3 and dist.get_rank() == 1:
            bits_of(local(trainer.weights[WO]).detach())[17] ^= 1

    train.optimizer_step = flip
    return run_trainer(arguments)


@pytest.mark.slow
def test_a_flipped_bit_ends_the_run_and_is_named(data, tmp_path):
    given = {**data, **REPLICATE_2, "job.dump_folder": tmp_path, "training.steps": 6}
    given |= {"debug.replica_check_freq": 2, "checkpoint.enable": True, "checkpoint.interval": 4}
    printed = on_ranks(2, run_with_a_flip, options(given), expect=1)
    assert printed.count("step 4: silent corruption") == 1
    assert WO in printed
    assert "between rank 0 and rank 1; the check after step 2 found no difference." in printed
    assert "Traceback" not in printed
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3]
    assert not (tmp_path / "checkpoint" / "step-4").exists(), "a corrupt state was saved"


@pytest.mark.usefixtures("alone")
def test_a_check_without_anything_in_common_is_said(data, caplog, monkeypatch):
    monkeypatch.setattr(replica_check.logger, "propagate", True)
    given = {**data, "debug.replica_check_freq": 5}
    trainer = set_up(JobConfig().parse_args(options(given), world_size=1), torch.device("cpu"))
    assert "debug.replica_check_freq = 5 has no effect: no two ranks" in caplog.text
    assert [step for step in range(1, 12) if trainer.replica_check.is_due(step)] == [5, 10]
