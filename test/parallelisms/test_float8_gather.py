"""Weights that FSDP gathers in float8: the same numbers to the bit, in a byte each."""

import hashlib
from unittest.mock import Mock, patch

import pytest
import torch
from helpers.forking import in_group
from helpers.launching import metrics, options
from parallelisms.test_float8 import FLOAT8, PIPELINE, RECOMPUTING, SIZES, TP
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultAllGather

import train
from torchtrain.catalog.models import ModelShape
from torchtrain.config.schema import Float8Linear
from torchtrain.config_manager import JobConfig
from torchtrain.models.llama import Transformer
from torchtrain.parallelisms import float8_gather
from torchtrain.parallelisms.float8 import describe_float8
from torchtrain.parallelisms.float8_gather import Cast, Float8Shard, find_inner, kept_scales
from torchtrain.set_up import set_up
from torchtrain.shards import local

GATHER = {"quantize.linear.float8.enable_fsdp_float8_all_gather": True}
ONCE = {**GATHER, "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp": True}
BF16 = {"training.mixed_precision_param": "bfloat16"}


def take_steps(overrides, steps=2):
    """Return all losses, gradients and weights of a run, this rank's part, and its trainer.

    The scales of every second step are found at once, whatever the config asks for.
    """
    trainer = set_up(JobConfig().parse_args(options(overrides)), torch.device("cpu"))
    found = []
    for step in range(1, steps + 1):
        at_once = kept_scales(trainer.weights.values())
        with at_once if step % 2 == 0 else trainer.scale_context():
            loss = train.forward_backward(trainer, trainer.loader.step_batches(step))
        found += [loss.own, *(local(w.grad).clone() for w in trainer.weights.values())]
        train.clip_gradients(trainer)
        train.optimizer_step(trainer)
    found += [local(weight.detach()).clone() for weight in trainer.weights.values()]
    return found, trainer


def require_equal(found, expected, what):
    """Compare to the bit."""
    unequal = [
        number
        for number, pair in enumerate(zip(found, expected, strict=True))
        if not torch.equal(*pair)
    ]
    assert not unequal, f"{what}: {unequal} of {len(found)}"


def find_shards(trainer):
    """Return by their names the weights that are gathered in float8."""
    inner = {name: find_inner(weight) for name, weight in trainer.weights.items()}
    return {name: shard for name, shard in inner.items() if isinstance(shard, Float8Shard)}


def compare(runs):
    """Be a rank: each run has the same numbers whether float8 is gathered or not."""
    for name, overrides in runs.items():
        (expected, trainer), plain, _ = take_counted_steps(overrides)
        assert not find_shards(trainer)
        (found, trainer), sent, exchanges = take_counted_steps({**overrides, **GATHER})
        require_equal(found, expected, name)
        shards = find_shards(trainer)
        assert all(shard.scale is None for shard in shards.values())
        # Of one weight for each gather of the first step, and of all weights before the second.
        assert exchanges == [*[1] * (len(exchanges) - 1), len(shards)], name
        if name == "recomputing":
            require_bytes(trainer, shards, plain, sent)


def take_counted_steps(overrides):
    """Take steps; return what they give, the bytes of each gather and the weights of each exchange.

    The second step's one exchange, before it, comes last.
    """
    sent, exchanges = [], []
    gather, find_scales = DefaultAllGather.__call__, float8_gather.find_scales

    def count_bytes(self, output_tensor, input_tensor, *rest, **named):
        sent.append(input_tensor.nbytes)
        return gather(self, output_tensor, input_tensor, *rest, **named)

    def count_scales(shards):
        exchanges.append(len(shards))
        return find_scales(shards)

    with (
        patch.object(DefaultAllGather, "__call__", count_bytes),
        patch.object(float8_gather, "find_scales", count_scales),
    ):
        return take_steps(overrides), sent, exchanges


def require_bytes(trainer, shards, plain, sent):
    """Each group's gather, of bf16, moves a byte less for each number in float8."""
    assert len(shards) == 15
    expected = set()
    for group in ("tok_embeddings.", "layers.0.", "layers.1.", ("norm.", "output.")):
        weights = {n: w.numel() // 2 for n, w in trainer.weights.items() if n.startswith(group)}
        in_float8 = sum(weights[name] for name in weights if name in shards)
        numbers = sum(weights.values())
        expected.add((2 * numbers, 2 * numbers - in_float8))
    assert set(zip(plain, sent, strict=True)) == expected


@pytest.mark.slow
def test_numbers_stay_and_a_gather_moves_a_byte_a_number(data):
    base = {**data, **SIZES, **FLOAT8, **BF16}
    layouts = {
        "recomputing": RECOMPUTING,
        "tensor-parallel": {TP: 2, "model.n_layers": 1, "training.local_batch_size": 4},
        "pipeline": {**PIPELINE, "training.mixed_precision_param": "float32"},
    }
    in_group(2, compare, {name: {**base, **layout} for name, layout in layouts.items()})


@pytest.mark.slow
def test_numbers_stay_where_shards_are_uneven(data):
    """32 and 64 rows over three ranks."""
    run = {**data, **SIZES, **FLOAT8, "model.n_layers": 1, "training.global_batch_size": 6}
    in_group(3, compare, {"uneven": run})


@pytest.mark.usefixtures("alone")
def test_a_compiled_model_has_the_same_numbers(data):
    """One block is compiled; the output, whose weight is the embedding's, is not gathered so."""
    run = {**data, **SIZES, **FLOAT8, "model.tied_embeddings": True, "model.n_layers": 1}
    expected, _ = take_steps(run)
    compiled = {"compile.enable": True, "compile.backend": "aot_eager"}
    found, trainer = take_steps({**run, **ONCE, **compiled})
    require_equal(found, expected, "compiled")
    assert len(find_shards(trainer)) == 7


@pytest.mark.parametrize(("rows", "scale"), [(11, None), (3, 7.0), (0, None)])
def test_a_shard_is_filled_up_and_cast(rows, scale, monkeypatch):
    torch.manual_seed(0)
    part = torch.randn(rows, 16)
    given = None if scale is None else torch.tensor(scale)
    cast = Cast(torch.bfloat16, torch.float8_e4m3fn, None)
    asked = []
    monkeypatch.setattr(float8_gather.dist, "all_reduce", lambda _, *how: asked.append(how))
    mesh = Mock(device_type="cpu", **{"size.return_value": 3, "get_group.side_effect": int})
    shard = Float8Shard.of(part, cast, ((mesh, 0), (mesh, 1)), given)
    assert shard.data_ptr() == part.data_ptr()
    assert type(shard + 1) is torch.Tensor
    moved = shard.to("meta")
    assert (moved.cast, moved.sharding, moved.scale) == (cast, shard.sharding, given)
    (data,), (found,) = shard.fsdp_pre_all_gather(mesh, torch.Size([32, 16]), (16, 1), None, None)
    largest = torch.distributed.ReduceOp.MAX
    assert asked == ([(largest, 0), (largest, 1)] if scale is None else [])
    rounded = part.bfloat16().float()
    if scale is None:
        scale = 448 / max([1e-12, *rounded.abs().flatten().tolist()])
    assert found.item() == pytest.approx(scale, rel=1e-7)
    assert (data.dtype, data.shape) == (torch.uint8, (11, 16))
    expected = (rounded * found).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(data[:rows], expected.view(torch.uint8))
    assert not data[rows:].any()


@pytest.mark.usefixtures("alone")
def test_scales_are_those_of_the_weights_as_they_are_now(data):
    _, trainer = take_steps({**data, **SIZES, **FLOAT8, **ONCE}, steps=1)
    name = "layers.0.attention.wq.weight"
    shard = find_inner(trainer.weights[name])
    for factor in (1, 3):
        with torch.no_grad():
            trainer.weights[name].mul_(factor)
        with trainer.scale_context():
            largest = local(trainer.weights[name].detach()).abs().max().double()
            assert shard.scale == (448 / largest).float()
        assert shard.scale is None
    with pytest.raises(ValueError, match="broken off"), trainer.scale_context():
        raise ValueError("broken off")
    assert shard.scale is None


def test_what_is_gathered_is_named():
    section = Float8Linear(enable_fsdp_float8_all_gather=True, filter_fqns=["w2"])
    with torch.device("meta"):
        plain = Transformer(ModelShape(32, 2, 2, 2, 64, 64))
        tied = Transformer(ModelShape(32, 2, 2, 2, 64, 64, tied_embeddings=True))
    said = describe_float8(plain, section, 1)
    assert said == (
        "tensorwise: 13 linear layers, gathered in float8; not layers.*.feed_forward.w2 "
        "(filter_fqns)"
    )
    assert "gathered in float8 but for output (tied); not" in describe_float8(tied, section, 1)


@pytest.mark.usefixtures("alone")
def test_a_resumed_run_has_the_files_of_one_without(data, tmp_path):
    """The checkpoint's files are the same to the bit, and hold no class of torchao's."""
    run = {**data, **SIZES, **FLOAT8, "checkpoint.enable": True, "checkpoint.interval": 2}
    run |= {"validation.enable": True, "validation.freq": 1, "validation.steps": 1}
    run["lr_scheduler.total_steps"] = 3
    for name, launches in {"plain": [(3, {})], "changed": [(1, ONCE), (2, {}), (3, ONCE)]}.items():
        for steps, given in launches:
            folder = {"job.dump_folder": tmp_path / name, "training.steps": steps}
            arguments = options({**run, **given, **folder})
            train.run(JobConfig().parse_args(arguments, world_size=1), torch.device("cpu"))
    lines, files = read(tmp_path / "plain")
    assert len(lines) == 3
    assert all(None not in line for line in lines)
    assert files
    assert read(tmp_path / "changed") == (lines, files)


def read(folder):
    """Return what a run has logged of each step, and its last checkpoint's tensors by digest."""
    keys = ("step", "loss", "grad_norm", "val_loss")
    lines = [[line.get(key) for key in keys] for line in metrics(folder)]
    files = sorted((folder / "checkpoint" / "step-3").glob("*.distcp"))
    return lines, [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
