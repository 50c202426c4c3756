"""The Llama against an independent one and the published sizes; what sharding relies on."""

import dataclasses
import math

import pytest
import torch
import torch.distributed as dist
from helpers.reference import assert_equals_transformers, distance, filled, tokens_of
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from torchtrain.catalog.models import FAMILIES, ModelShape
from torchtrain.loss import sequence_losses
from torchtrain.models.attention import Attention
from torchtrain.models.llama import Transformer
from torchtrain.models.rotary import compute_frequencies, rotate
from torchtrain.parallelisms.initial_weights import materialize

# An epsilon so large that a norm without it would show.
TINY = ModelShape(
    dim=48, n_layers=2, n_heads=4, n_kv_heads=4, ffn_hidden_dim=80, vocab_size=61, norm_eps=0.01
)
GROUPED = dataclasses.replace(TINY, n_kv_heads=2)
# A short original context: of the six frequencies some are kept, some interpolated, some divided.
SCALED = {"rope_theta": 500.0, "rope_scaling_factor": 8.0, "rope_original_seq_len": 32}


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,), mesh_dim_names=("dp_shard",))
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("scaling", [{}, SCALED], ids=["plain-rope", "scaled-rope"])
@pytest.mark.parametrize("shape", [TINY, GROUPED], ids=["multi-head", "grouped-query"])
def test_equals_transformers(shape, scaling, tied):
    shape = dataclasses.replace(shape, tied_embeddings=tied, **scaling)
    assert_equals_transformers(shape)


def test_the_scaling_bites_in_every_branch():
    plain, scaled = (
        compute_frequencies(shape, torch.device("cpu"))
        for shape in (
            dataclasses.replace(TINY, rope_theta=500.0),
            dataclasses.replace(TINY, **SCALED),
        )
    )
    ratio = scaled / plain
    assert (ratio == 1).any()
    assert torch.isclose(ratio, torch.tensor(1 / 8)).any()
    assert ((ratio > 0.13) & (ratio < 0.99)).any()


@pytest.mark.parametrize(
    ("family", "flavor", "published"),
    [
        ("llama2", "7B", 6_738_415_616),
        ("llama2", "13B", 13_015_864_320),
        ("llama2", "70B", 68_976_648_192),
        ("llama3", "8B", 8_030_261_248),
        ("llama3", "70B", 70_553_706_496),
        ("llama3", "405B", 405_853_388_800),
        ("mixtral", "8x7B", 46_702_792_704),
        ("mixtral", "8x22B", 140_620_634_112),
        ("qwen3", "0.6B", 596_049_920),
        ("qwen3", "1.7B", 1_720_574_976),
        ("qwen3", "4B", 4_022_468_096),
        ("qwen3", "8B", 8_190_735_360),
        ("qwen3", "14B", 14_768_307_200),
        ("qwen3", "32B", 32_762_123_264),
        ("qwen3", "30B-A3B", 30_532_122_624),
        ("qwen3", "235B-A22B", 235_093_634_560),
    ],
)
def test_parameter_counts_are_the_published(family, flavor, published):
    with torch.device("meta"):
        model = Transformer(FAMILIES[family].flavors[flavor])
    assert sum(parameter.numel() for parameter in model.parameters()) == published


def test_names_and_shapes_are_metas():
    model = Transformer(GROUPED)
    block = {
        "attention.wq": (48, 48),
        "attention.wk": (24, 48),
        "attention.wv": (24, 48),
        "attention.wo": (48, 48),
        "feed_forward.w1": (80, 48),
        "feed_forward.w2": (48, 80),
        "feed_forward.w3": (80, 48),
        "attention_norm": (48,),
        "ffn_norm": (48,),
    }
    expected = {"tok_embeddings.weight": (61, 48), "norm.weight": (48,), "output.weight": (61, 48)}
    expected |= {
        f"layers.{n}.{name}.weight": size for n in range(2) for name, size in block.items()
    }
    assert {
        name: tuple(parameter.shape) for name, parameter in model.named_parameters()
    } == expected
    assert {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()} == expected


def test_a_token_changes_nothing_before_it():
    model, tokens = filled(GROUPED), tokens_of(GROUPED)
    changed = tokens.clone()
    changed[:, 17] = (changed[:, 17] + 1) % GROUPED.vocab_size
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :17], after[:, :17])
    assert ((before[:, 17:] - after[:, 17:]).abs().amax(dim=-1) > 0).all()


def test_attention_sees_only_the_distance_between_positions():
    q, k = torch.randn(2, 1, 16, 3, 12, generator=torch.Generator().manual_seed(0)).unbind(0)
    rope = Transformer(TINY).rope
    here, there = rope.at(torch.arange(16)), rope.at(torch.arange(16) + 100)
    scores = [torch.einsum("bshc,bthc->bhst", rotate(q, at), rotate(k, at)) for at in (here, there)]
    assert distance(scores[1], scores[0]) <= 1e-5
    assert distance(rotate(q, there), rotate(q, here)) > 0.1
    assert torch.equal(here, rope(torch.zeros(5, 16, dtype=torch.int64)))


@pytest.mark.slow
def test_the_compiled_rotation_is_the_eager_one():
    x = torch.randn(2, 16, 4, 12, generator=torch.Generator().manual_seed(0))
    rotations = Transformer(TINY).rope.at(torch.arange(16) + 1000)
    runs = []
    for function in (rotate, torch.compile(rotate, fullgraph=True, backend="aot_eager")):
        inputs = x.clone().requires_grad_()
        turned = function(inputs, rotations)
        (turned * x.cos()).sum().backward()
        runs.append((turned.detach(), inputs.grad))
    assert distance(runs[1][0], runs[0][0]) <= 1e-6
    assert distance(runs[1][1], runs[0][1]) <= 1e-6


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_meta_construction_then_storage_is_the_same_model(tied):
    shape = dataclasses.replace(GROUPED, tied_embeddings=tied, **SCALED)
    reference = filled(shape)
    with torch.device("meta"):
        model = Transformer(shape)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not list(model.buffers())
    model.to(torch.bfloat16).to_empty(device="cpu").to(torch.float32)
    assert (model.output.weight is model.tok_embeddings.weight) == tied
    names = [name for name, _ in model.named_parameters()]
    assert ("output.weight" in names) != tied
    with torch.no_grad():
        for parameter, source in zip(model.parameters(), reference.parameters(), strict=True):
            parameter.copy_(source)
        assert torch.equal(model(tokens_of(shape)), reference(tokens_of(shape)))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_initial_loss_is_near_that_of_a_uniform_guess(tied):
    shape = dataclasses.replace(
        FAMILIES["llama2"].flavors["debugmodel"], vocab_size=1024, n_layers=3, tied_embeddings=tied
    )
    with torch.device("meta"):
        model = Transformer(shape)
    materialize(model, torch.device("cpu"), seed=0)
    tokens = tokens_of(shape, seq_len=129)
    with torch.no_grad():
        loss = sequence_losses(model(tokens[:, :-1]), tokens[:, 1:]).sum() / tokens[:, 1:].numel()
    assert math.log(1024) - 0.1 < loss.item() < math.log(1024) + 0.7


def test_initial_values_by_name():
    model = Transformer(dataclasses.replace(TINY, n_layers=8))
    values = {name: model.initial_std(name) for name, _ in model.named_parameters()}
    assert {name for name, value in values.items() if value is None} == {
        name for name, parameter in model.named_parameters() if parameter.ndim == 1
    }
    assert values["tok_embeddings.weight"] == 1.0
    assert values["output.weight"] == 48**-0.5
    for matrix in (
        "attention.wq",
        "attention.wk",
        "attention.wv",
        "feed_forward.w1",
        "feed_forward.w3",
    ):
        assert values[f"layers.7.{matrix}.weight"] == 0.02
    for matrix in ("attention.wo", "feed_forward.w2"):
        assert values[f"layers.0.{matrix}.weight"] == pytest.approx(0.02 / math.sqrt(2))
        assert values[f"layers.7.{matrix}.weight"] == pytest.approx(0.02 / 4)
    tied = Transformer(dataclasses.replace(TINY, tied_embeddings=True))
    assert tied.initial_std("tok_embeddings.weight") == 0.02


def test_norms_compute_in_fp32_and_return_the_input_type():
    norm = Transformer(TINY).norm.to(torch.bfloat16)
    x = (torch.randn(64, 48, generator=torch.Generator().manual_seed(0)) * 300).to(torch.bfloat16)
    assert norm(x).dtype == torch.bfloat16
    exact = x.double() * torch.rsqrt(x.double().square().mean(-1, keepdim=True) + TINY.norm_eps)
    # Half a unit in the last of bf16's eight digits: only the result was rounded.
    assert ((norm(x) - exact).abs() <= exact.abs() * 2**-8 * (1 + 1e-4)).all()


def test_rotations_reach_a_block_uncast_under_mixed_precision(one_rank):
    model = filled(GROUPED)
    seen = []
    for module in model.modules():
        if isinstance(module, Attention):
            module.register_forward_pre_hook(
                lambda module, args: seen.append((args[0].dtype, args[1]))
            )
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for block in model.layers.values():
        fully_shard(block, mesh=one_rank, mp_policy=policy)
    fully_shard(model, mesh=one_rank, mp_policy=policy)
    tokens = tokens_of(GROUPED)
    model(tokens).float().sum().backward()
    assert len(seen) == GROUPED.n_layers
    for dtype, rotations in seen:
        assert dtype == torch.bfloat16
        assert torch.equal(rotations, model.rope(tokens))
        assert rotations.dtype == torch.complex64


def test_tied_weights_stay_one_parameter_under_sharding(one_rank):
    with torch.device("meta"):
        model = Transformer(dataclasses.replace(TINY, tied_embeddings=True))
    for block in model.layers.values():
        fully_shard(block, mesh=one_rank)
    fully_shard(model, mesh=one_rank)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.1)
    model(tokens_of(TINY)).sum().backward()
    assert "output.weight" not in dict(model.named_parameters())
    assert model.output.weight is model.tok_embeddings.weight
    assert model.tok_embeddings.weight.grad is not None


def test_flops_are_six_per_weight_and_the_attention_square():
    # By hand: one layer of width 8, 2 heads of 4, 1 key/value head, feed-forward 16, vocabulary 10.
    shape = ModelShape(8, 1, 2, 1, 16, 10)
    weights = 8 * 8 + 2 * (4 * 8) + 8 * 8 + 3 * 8 * 16 + 10 * 8
    model = Transformer(shape)
    assert model.flops_per_token(32) == 6 * weights + 12 * 8 * 32
    tied = Transformer(dataclasses.replace(shape, tied_embeddings=True))
    assert tied.flops_per_token(32) == 6 * weights + 12 * 8 * 32
    # Per token 2 products of 2·S·D each forward, and twice that backward.
    assert model.flops_per_token(64) - model.flops_per_token(32) == 3 * 2 * 2 * 32 * 8
