"""Linear layers in float8, emulated: what a layer computes, what stays as it is, every layout."""

import logging
from types import SimpleNamespace

import pytest
import torch
from helpers.forking import train_in_turn
from helpers.launching import metrics, options
from torch import nn
from torch._inductor import config as compiler

import train
from torchtrain.catalog.models import ModelShape
from torchtrain.config.schema import (
    ActivationCheckpoint,
    Compile,
    Float8Linear,
    Parallelism,
    Training,
)
from torchtrain.config_manager import JobConfig
from torchtrain.kernel_checks import import_float8
from torchtrain.models.llama import Transformer
from torchtrain.parallelisms import apply
from torchtrain.parallelisms.apply import Techniques
from torchtrain.parallelisms.float8 import apply_float8, describe_float8, find_left_out
from torchtrain.set_up import set_up

FLOAT8 = {"model.converters": "quantize.linear.float8", "quantize.linear.float8.emulate": True}
SIZES = {
    "model.dim": 32,
    "model.n_layers": 2,
    "model.n_heads": 2,
    "model.n_kv_heads": 2,
    "model.ffn_hidden_dim": 64,
    "model.vocab_size": 2048,
    "training.seq_len": 32,
    "training.global_batch_size": 4,
    "training.local_batch_size": 2,
    "training.mixed_precision_param": "float32",
    "training.steps": 2,
}
RECIPE = "quantize.linear.float8.recipe_name"
SHAPE = ModelShape(32, 2, 2, 2, 64, 40)


def round_to(x, dtype):
    """Scale so that the largest number is the largest of the type, round, and scale back."""
    scale = torch.finfo(dtype).max / x.abs().max().double()
    return (x * scale.float()).to(dtype).float() / scale.float()


def test_a_product_is_that_of_numbers_rounded_by_a_scale_of_the_whole_tensor():
    torch.manual_seed(0)
    model = Transformer(SHAPE)
    weight = model.layers["0"].attention.wq.weight
    apply_float8(model, Float8Linear(emulate=True), 1)
    layer = model.layers["0"].attention.wq
    assert layer.weight is weight
    x = torch.randn(4, 16, 32, requires_grad=True)
    gradient = torch.randn(4, 16, 32)
    result = layer(x)
    result.backward(gradient)

    w = round_to(weight.detach(), torch.float8_e4m3fn)
    inputs = round_to(x.detach(), torch.float8_e4m3fn)
    outward = round_to(gradient, torch.float8_e5m2)
    for found, expected in (
        (result, inputs @ w.T),
        (x.grad, outward @ w),
        (weight.grad, outward.flatten(0, 1).T @ inputs.flatten(0, 1)),
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    exact = nn.functional.linear(x, weight)
    assert 0.01 < (result - exact).norm() / exact.norm() < 0.06  # four bits hold 3 % on average


def test_compiled_programs_round_as_eager_ones_with_scales_of_rows(monkeypatch):
    """They alone: the setting of the process stays, and other backends are not told."""
    given = []

    def compile_nothing(function, **arguments):
        given.append(arguments["options"])
        return function

    monkeypatch.setattr(torch, "compile", compile_nothing)
    techniques = {
        "training": Training(),
        "parallelism": Parallelism(),
        "activation_checkpoint": ActivationCheckpoint(mode="none"),
    }
    mesh = SimpleNamespace(has=lambda name: False, degrees=SimpleNamespace(tp=1))
    monkeypatch.setattr(apply, "needs_emulation", lambda *facts: False)
    monkeypatch.setattr(apply, "apply_expert_parallel", lambda *parts: None)
    mesh.device_type = "cpu"
    with torch.device("meta"):
        model = Transformer(SHAPE)
    before = compiler.emulate_precision_casts
    for recipe, backend, expected in (
        ("tensorwise", "inductor", None),
        ("rowwise", "inductor", {"emulate_precision_casts": True}),
        ("rowwise", "aot_eager", None),
        (None, "inductor", None),
    ):
        section = Compile(enable=True, backend=backend)
        float8 = Float8Linear(recipe_name=recipe, emulate=True) if recipe else None
        parts = Techniques(**techniques, compile=section, float8=float8, fsdp=False)
        apply.parallelize(model, mesh, parts)
        assert given == [expected] * 2
        given.clear()
    assert compiler.emulate_precision_casts == before


def test_torchaos_loggers_have_their_level_again():
    logger = logging.getLogger("torchao")
    level = logger.level
    logger.setLevel(logging.INFO)
    import_float8()
    assert logger.level == logging.INFO
    logger.setLevel(level)


def test_layers_whose_shares_no_kernel_multiplies_are_left_out_and_named():
    shape = ModelShape(48, 2, 2, 2, 64, 2048)
    with torch.device("meta"):
        model = Transformer(shape)
    assert find_left_out(model, [], 1) == {}
    filtered = find_left_out(model, ["output", "w2"], 1)
    assert set(filtered) == {"layers.0.feed_forward.w2", "layers.1.feed_forward.w2", "output"}
    assert set(filtered.values()) == {"filter_fqns"}
    shared = find_left_out(model, [], 2)
    assert shared["layers.0.attention.wq"] == "48 x 48 over 2 ranks: no multiples of 16"
    assert not {"layers.0.feed_forward.w2", "output"} & set(shared)
    assert describe_float8(model, Float8Linear(filter_fqns=["w2"], emulate=True), 2) == (
        "tensorwise, emulated: 5 linear layers; not "
        "layers.*.attention.wq (48 x 48 over 2 ranks: no multiples of 16), "
        "layers.*.attention.wk (48 x 48 over 2 ranks: no multiples of 16), "
        "layers.*.attention.wv (48 x 48 over 2 ranks: no multiples of 16), "
        "layers.*.attention.wo (48 x 48 over 2 ranks: no multiples of 16), "
        "layers.*.feed_forward.w2 (filter_fqns)"
    )
    sparse = ModelShape(32, 2, 2, 2, 64, 40, n_experts=16, experts_per_token=2, n_shared_experts=1)
    with torch.device("meta"):
        model = Transformer(sparse)
    kinds = {name: type(module) for name, module in model.named_modules()}
    apply_float8(model, Float8Linear(emulate=True), 1)
    converted = {name for name, module in model.named_modules() if type(module) is not kinds[name]}
    parts = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")
    assert {name.rpartition(".")[2] for name in converted} == set(parts)
    assert sum("shared_experts" in name for name in converted) == 6
    said = describe_float8(model, Float8Linear(recipe_name="rowwise"), 1)
    assert said.endswith("not output (40 x 32: no multiples of 16), experts and routers")


@pytest.mark.usefixtures("alone")
def test_names_and_initial_weights_stay_and_every_option_changes_the_gradient(data):
    def find(**given):
        config = JobConfig().parse_args(options({**data, **SIZES, **given}), world_size=1)
        trainer = set_up(config, torch.device("cpu"))
        weights = {name: w.detach().full_tensor().clone() for name, w in trainer.weights.items()}
        train.forward_backward(trainer, trainer.loader.step_batches(1))
        gradients = [weight.grad.full_tensor().flatten() for weight in trainer.weights.values()]
        return weights, torch.cat(gradients)

    weights, plain = find()
    seen = [plain]
    for given in (
        {},
        {RECIPE: "rowwise"},
        {RECIPE: "rowwise_with_gw_hp"},
        {"quantize.linear.float8.filter_fqns": "output"},
        {"model.tied_embeddings": True},
    ):
        converted, gradient = find(**FLOAT8, **given)
        if "model.tied_embeddings" in given:
            assert len(converted) == len(weights) - 1
            continue
        assert list(converted) == list(weights)
        for name, weight in weights.items():
            assert torch.equal(converted[name], weight), name
        # Float8's rounding is 3 % of each number; of sums it is less: 0.8 % and more here.
        assert 0.003 < (gradient - plain).norm() / plain.norm() < 0.2
        assert all(not torch.equal(gradient, other) for other in seen)
        seen.append(gradient)
    _, named = find(**FLOAT8, **{RECIPE: "tensorwise"})
    assert torch.equal(named, seen[1])


@pytest.mark.usefixtures("alone")
def test_a_checkpoint_goes_between_runs_with_and_without(data, tmp_path, capsys):
    run = {**data, **SIZES, "job.dump_folder": tmp_path / "run", "checkpoint.enable": True}
    run["lr_scheduler.total_steps"] = 3
    train.init_logging()
    for steps, given in ((1, FLOAT8), (2, {}), (3, FLOAT8)):
        arguments = options({**run, **given, "training.steps": steps})
        train.run(JobConfig().parse_args(arguments, world_size=1), torch.device("cpu"))
    printed = capsys.readouterr().out
    assert 'model.converters was ["quantize.linear.float8"], is []' in printed
    assert 'model.converters was [], is ["quantize.linear.float8"]' in printed
    assert printed.count("float8     tensorwise, emulated: 15 linear layers\n") == 2
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3]


TP, PP = "parallelism.tensor_parallel_degree", "parallelism.pipeline_parallel_degree"
PIPELINE = {
    PP: 2,
    "parallelism.pipeline_parallel_microbatch_size": 2,
    "training.local_batch_size": 4,
}
REPLICAS = {
    "parallelism.data_parallel_replicate_degree": 2,
    "parallelism.data_parallel_shard_degree": 1,
}
RECOMPUTING = {
    "activation_checkpoint.mode": "selective",
    "activation_checkpoint.selective_ac_option": "op",
}
# Recipe, ranks, layout. All multiply the same microbatches of two sequences.
LAYOUTS = {
    "tensorwise": ("tensorwise", 1, {}),
    "tensorwise-fsdp2": ("tensorwise", 2, {}),
    "tensorwise-tp2": ("tensorwise", 2, {TP: 2}),
    "tensorwise-pp2-recomputing": ("tensorwise", 2, PIPELINE | RECOMPUTING),
    "rowwise": ("rowwise", 1, {}),
    "rowwise-hsdp2": ("rowwise", 2, REPLICAS),
    "rowwise-tp2": ("rowwise", 2, {TP: 2}),
}


@pytest.mark.slow
def test_every_layout_scales_alike(data, tmp_path):
    for ranks in (1, 2):
        runs = [
            {
                **data,
                **SIZES,
                **FLOAT8,
                RECIPE: recipe,
                "job.dump_folder": tmp_path / name,
                **layout,
            }
            for name, (recipe, needed, layout) in LAYOUTS.items()
            if needed == ranks
        ]
        train_in_turn(ranks, runs)
    for name, (recipe, _, _) in LAYOUTS.items():
        for mine, theirs in zip(metrics(tmp_path / name), metrics(tmp_path / recipe), strict=True):
            # fp32's rounding. A number between two of float8 may go to the other: one of thousands.
            assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5), name
            assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4), name
    assert metrics(tmp_path / "rowwise")[0]["loss"] != metrics(tmp_path / "tensorwise")[0]["loss"]
