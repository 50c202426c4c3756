"""The sparse feed-forward: against transformers' models, and against a loop over tokens."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from helpers.reference import assert_equals_transformers, distance, filled, tokens_of

from torchtrain.catalog.models import FAMILIES, ModelShape, resolve_shape
from torchtrain.models import moe
from torchtrain.models.llama import FeedForward, Transformer
from torchtrain.models.moe import Experts, SparseFeedForward
from torchtrain.parallelisms.emulated_bf16 import apply_emulated_bf16

# An epsilon so large that a norm without it would show.
DENSE = ModelShape(
    dim=48, n_layers=3, n_heads=4, n_kv_heads=2, ffn_hidden_dim=80, vocab_size=61, norm_eps=0.01
)
MIXTRAL = dataclasses.replace(DENSE, n_experts=4, experts_per_token=2)
QWEN = dataclasses.replace(DENSE, head_width=16, qk_norm=True)
QWEN_MOE = dataclasses.replace(QWEN, n_experts=6, experts_per_token=3, expert_hidden_dim=24)

REFERENCES = {
    "mixtral": MIXTRAL,
    "qwen3": QWEN,
    "qwen3, tied": dataclasses.replace(QWEN, tied_embeddings=True),
    "qwen3 moe": QWEN_MOE,
    "qwen3 moe, scores as they are": dataclasses.replace(QWEN_MOE, router_renormalize=False),
    "qwen3 moe, the first layer dense": dataclasses.replace(QWEN_MOE, n_dense_layers=1),
    "qwen3 moe, every other layer": dataclasses.replace(QWEN_MOE, sparse_every=2),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFERENCES)
def test_equals_transformers(name):
    assert_equals_transformers(REFERENCES[name])


DEEPSEEK = dataclasses.replace(
    DENSE,
    n_experts=8,
    experts_per_token=3,
    expert_hidden_dim=24,
    n_shared_experts=2,
    router_scores="sigmoid",
    router_scale=2.5,
    router_bias=True,
)


def sparse_layer(shape, seed=0):
    """A sparse feed-forward with random weights, and a bias that moves the choice."""
    layer = filled(shape, seed).layers["1"].moe
    if layer.expert_bias is not None:
        layer.expert_bias.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed))
    return layer


def inputs_of(shape, tokens=60, seed=1):
    x = torch.randn(2, tokens // 2, shape.dim, generator=torch.Generator().manual_seed(seed))
    return x.requires_grad_()


def gradients_of(layer, x, y):
    """Of x and of all parameters by name, from one fixed gradient of y."""
    tensors = {"x": x, **dict(layer.named_parameters())}
    wanted = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    found = torch.autograd.grad(y, list(tensors.values()), wanted.to(y), allow_unused=True)
    pairs = zip(tensors.items(), found, strict=True)
    return {
        name: torch.zeros_like(tensor) if gradient is None else gradient
        for (name, tensor), gradient in pairs
    }


def test_deepseek_s_router_and_shared_experts_equal_transformers():
    from transformers import DeepseekV3Config
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE

    layer, x = sparse_layer(DEEPSEEK), inputs_of(DEEPSEEK)
    config = DeepseekV3Config(
        hidden_size=48,
        moe_intermediate_size=24,
        n_routed_experts=8,
        num_experts_per_tok=3,
        n_shared_experts=2,
        n_group=1,
        topk_group=1,
        norm_topk_prob=True,
        routed_scaling_factor=2.5,
        experts_implementation="eager",
    )
    reference = DeepseekV3MoE(config)

    def theirs(named):
        named = dict(named)
        w1, w2, w3 = (named.pop(f"experts.{name}") for name in ("w1", "w2", "w3"))
        return {
            "gate.weight": named["router.gate.weight"],
            "experts.gate_up_proj": torch.cat([w1, w3], dim=1),
            "experts.down_proj": w2,
            "shared_experts.gate_proj.weight": named["shared_experts.w1.weight"],
            "shared_experts.down_proj.weight": named["shared_experts.w2.weight"],
            "shared_experts.up_proj.weight": named["shared_experts.w3.weight"],
        }

    weights = theirs({name: p.detach() for name, p in layer.named_parameters()})
    reference.load_state_dict(weights | {"gate.e_score_correction_bias": layer.expert_bias})
    y, expected = layer(x), reference(x)
    assert distance(y, expected) <= 1e-5
    ours = gradients_of(layer, x, y)
    wanted = gradients_of(reference, x, expected)
    assert distance(ours.pop("x"), wanted.pop("x")) <= 1e-5
    found = theirs(ours)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert distance(found[name], gradient) <= 1e-5, name
    plain = layer.router(x, None).experts
    assert not torch.equal(plain, layer.router(x, layer.expert_bias).experts), "the bias bites"


def swiglu(x, w1, w2, w3):
    return (F.silu(x @ w1.T) * (x @ w3.T)) @ w2.T


def by_hand(layer, x):
    """What each token's experts make of it, token by token, expert by expert."""
    shape, experts = layer.shape, layer.experts
    rows = []
    for token in x.flatten(0, 1):
        logits = layer.router.gate.weight @ token
        scores = logits.exp() / logits.exp().sum()
        if shape.router_scores == "sigmoid":
            scores = 1 / (1 + (-logits).exp())
        ranked = scores if layer.expert_bias is None else scores + layer.expert_bias
        chosen = sorted(range(shape.n_experts), key=lambda expert: -ranked[expert].item())
        chosen = chosen[: shape.experts_per_token]
        total = sum(scores[expert] for expert in chosen) if shape.router_renormalize else 1.0
        row = torch.zeros_like(token)
        for expert in chosen:
            weights = (experts.w1[expert], experts.w2[expert], experts.w3[expert])
            row = row + shape.router_scale * scores[expert] / total * swiglu(token, *weights)
        if layer.shared_experts is not None:
            shared = layer.shared_experts
            row = row + swiglu(token, shared.w1.weight, shared.w2.weight, shared.w3.weight)
        rows.append(row)
    return torch.stack(rows).view_as(x)


BY_HAND = {
    "softmax": (MIXTRAL, 40, {}),
    "softmax, scores as they are": (
        dataclasses.replace(MIXTRAL, experts_per_token=1, router_renormalize=False),
        40,
        {},
    ),
    "sigmoid, bias, scale, shared": (DEEPSEEK, 40, {}),
    "all tokens to one expert": (
        dataclasses.replace(DEEPSEEK, experts_per_token=1, router_renormalize=False),
        20,
        {2: 100},
    ),
    "an expert without a token": (DEEPSEEK, 20, {3: -100}),
    "more experts than tokens": (dataclasses.replace(DEEPSEEK, n_experts=32), 4, {}),
    "every expert for every token": (dataclasses.replace(MIXTRAL, experts_per_token=4), 20, {}),
    "one token": (MIXTRAL, 2, {}),
}


@pytest.mark.parametrize("name", BY_HAND)
def test_equals_a_loop_over_tokens(name):
    shape, tokens, biases = BY_HAND[name]
    layer, x = sparse_layer(shape), inputs_of(shape, tokens)
    for expert, bias in biases.items():
        layer.expert_bias[expert] = bias
    y, expected = layer(x), by_hand(layer, x)
    assert distance(y, expected) <= 2e-6
    ours, wanted = gradients_of(layer, x, y), gradients_of(layer, x, expected)
    for key, gradient in wanted.items():
        assert (ours[key] - gradient).norm() <= 1e-5 * max(gradient.norm(), 1e-3), key
    counts = layer.router(x, layer.expert_bias).counts.tolist()
    assert sum(counts) == tokens * shape.experts_per_token
    for expert, bias in biases.items():
        assert counts[expert] == (tokens if bias > 0 else 0)
    for expert, count in enumerate(counts):
        assert (ours["experts.w1"][expert] == 0).all() == (count == 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_one_expert_is_a_dense_layer_bit_for_bit(dtype):
    shape = dataclasses.replace(DENSE, n_experts=1, experts_per_token=1)
    sparse = sparse_layer(shape).to(dtype)
    dense = FeedForward(shape.dim, shape.ffn_hidden_dim).to(dtype)
    with torch.no_grad():
        for name in ("w1", "w2", "w3"):
            getattr(dense, name).weight.copy_(getattr(sparse.experts, name)[0])
    x = inputs_of(shape).detach().to(dtype).requires_grad_()
    y, expected = sparse(x), dense(x)
    assert torch.equal(y, expected)
    ours, wanted = gradients_of(sparse, x, y), gradients_of(dense, x, expected)
    for name in ("w1", "w2", "w3"):
        assert torch.equal(ours[f"experts.{name}"][0], wanted[f"{name}.weight"]), name
    assert torch.equal(ours["x"], wanted["x"])
    assert (ours["router.gate.weight"] == 0).all()


COUNTS = ([5, 0, 11, 1], [0, 0, 17, 0], [0, 0, 0, 0])


def experts_and_rows(counts, width=24):
    shape = dataclasses.replace(MIXTRAL, expert_hidden_dim=width)
    generator = torch.Generator().manual_seed(0)
    experts = Experts(shape)
    with torch.no_grad():
        for weight in experts.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator).bfloat16())
    rows = torch.randn(sum(counts), shape.dim, generator=generator).bfloat16()
    return experts, rows


def product_and_gradients(multiply, rows, weights, counts):
    rows, weights = rows.detach().requires_grad_(), weights.detach().requires_grad_()
    y = multiply(rows, weights, torch.tensor(counts))
    wanted = torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).bfloat16().to(y)
    return (y.detach(), *torch.autograd.grad(y, (rows, weights), wanted))


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("width", [24, 20], ids=["for the kernel", "of odd bytes"])
def test_bf16_products_are_those_of_fp32_rounded_once(counts, width):
    experts, rows = experts_and_rows(counts, width)
    exact = product_and_gradients(experts.multiply, rows.float(), experts.w1, counts)
    ours = product_and_gradients(experts.multiply, rows, experts.w1.bfloat16(), counts)
    for found, wanted in zip(ours, exact, strict=True):
        assert found.dtype == torch.bfloat16
        # Half a unit in the last of bf16's eight digits, and what fp32 sums leave near 0.
        assert ((found - wanted).abs() <= wanted.abs() * 2**-8 + 1e-5).all()


def test_emulated_bf16_gives_the_same_products():
    shape = dataclasses.replace(MIXTRAL, vocab_size=64)
    model = filled(shape).to(torch.bfloat16)
    tokens = tokens_of(shape)
    layer = model.layers["1"].moe
    x = inputs_of(shape).detach().bfloat16()
    plain, kernel = layer(x), layer.experts.multiply
    routing = layer.router(x, None)
    apply_emulated_bf16(model)
    assert layer.experts.multiply.__func__ is not kernel.__func__
    assert type(layer.router.gate) is moe.Gate, "it computes in fp32 as it is"
    assert torch.equal(layer.router(x, None).experts, routing.experts)
    assert distance(layer(x).float(), plain.float()) <= 2**-8
    rows, counts = x.flatten(0, 1), [30, 0, 20, 10]
    weights = layer.experts.w1
    ours = product_and_gradients(layer.experts.multiply, rows, weights, counts)
    for found, wanted in zip(
        ours, product_and_gradients(kernel, rows, weights, counts), strict=True
    ):
        assert found.dtype == torch.bfloat16
        assert ((found - wanted).abs() <= wanted.abs() * 2**-7 + 1e-5).all()
    assert model(tokens).dtype == torch.bfloat16


def test_an_idle_expert_s_gradient_is_0_whatever_the_kernel_leaves_there(monkeypatch):
    kernel = F.grouped_mm

    def leaves_garbage(rows, weights, offs):
        sizes = offs.diff(prepend=offs.new_zeros(1))
        garbage = torch.where(sizes == 0, torch.nan, 0.0).view(-1, 1, 1)
        weights.register_hook(lambda gradient: gradient + garbage.to(gradient))
        return kernel(rows, weights, offs=offs)

    experts, rows = experts_and_rows(COUNTS[0])
    weights = experts.w1.bfloat16()
    wanted = product_and_gradients(experts.multiply, rows, weights, COUNTS[0])
    monkeypatch.setattr(F, "grouped_mm", leaves_garbage)
    found = product_and_gradients(experts.multiply, rows, weights, COUNTS[0])
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours, theirs)


def test_the_router_decides_in_fp32_whatever_the_compute_precision():
    layer, x = sparse_layer(MIXTRAL).to(torch.bfloat16), inputs_of(MIXTRAL).bfloat16()
    routing = layer.router(x, None)
    exact = layer.float().router(x.float(), None)
    assert routing.weights.dtype == torch.float32
    assert torch.equal(routing.experts, exact.experts)
    assert torch.equal(routing.weights, exact.weights)


def test_keys_alone_make_a_dense_flavor_sparse():
    shape = resolve_shape(
        "llama3",
        "debugmodel",
        {"n_layers": 3, "vocab_size": 61, "n_experts": 4, "expert_hidden_dim": 64}
        | {"n_dense_layers": 1, "n_shared_experts": 2, "router_bias": True},
    )
    model = Transformer(shape)
    names = {
        "moe.router.gate.weight": (4, 256),
        "moe.experts.w1": (4, 64, 256),
        "moe.experts.w2": (4, 256, 64),
        "moe.experts.w3": (4, 64, 256),
        "moe.shared_experts.w1.weight": (128, 256),
        "moe.shared_experts.w2.weight": (256, 128),
        "moe.shared_experts.w3.weight": (128, 256),
        "moe.expert_bias": (4,),
    }
    found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for layer in (1, 2):
        assert {name: found[f"layers.{layer}.{name}"] for name in names} == names
        assert f"layers.{layer}.feed_forward.w1.weight" not in found
    assert found["layers.0.feed_forward.w1.weight"] == (768, 256)
    dense = Transformer(dataclasses.replace(shape, n_experts=0)).state_dict()
    kept = [name for name in dense if ".feed_forward." not in name]
    assert {name: found[name] for name in kept} == {name: tuple(dense[name].shape) for name in kept}


def test_flops_count_what_computes_a_token():
    # By hand: two layers of width 8, 2 heads of 6 (not 8 / 2), 1 key/value head, vocabulary 10;
    # one dense feed-forward of 16, one of 4 experts of 5: two chosen, one shared.
    shape = ModelShape(8, 2, 2, 1, 16, 10, head_width=6, n_experts=4, experts_per_token=2)
    shape = dataclasses.replace(
        shape, expert_hidden_dim=5, n_shared_experts=1, n_dense_layers=1, qk_norm=True
    )
    attention = 8 * 12 + 2 * (8 * 6) + 12 * 8
    dense, sparse = 3 * 8 * 16, 4 * 8 + (2 + 1) * 3 * 8 * 5
    weights = 2 * attention + dense + sparse + 10 * 8
    assert Transformer(shape).flops_per_token(32) == 6 * weights + 2 * 12 * 12 * 32


# https://mistral.ai/news/mixtral-of-experts, arXiv:2505.09388 (table 2): 12.9, 39, 3.3 and 22
# billion. To the last digit: those of all parameters less those of the experts that are idle.
ACTIVE = {
    ("mixtral", "8x7B"): 46_702_792_704 - 32 * 6 * 3 * 4096 * 14_336,
    ("mixtral", "8x22B"): 140_620_634_112 - 56 * 6 * 3 * 6144 * 16_384,
    ("qwen3", "30B-A3B"): 30_532_122_624 - 48 * 120 * 3 * 2048 * 768,
    ("qwen3", "235B-A22B"): 235_093_634_560 - 94 * 120 * 3 * 4096 * 1536,
}


@pytest.mark.parametrize(("family", "flavor"), ACTIVE)
def test_a_token_s_parameters_are_the_published(family, flavor):
    with torch.device("meta"):
        model = Transformer(FAMILIES[family].flavors[flavor])
    sparse = [module for module in model.modules() if isinstance(module, SparseFeedForward)]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters - sum(each.idle_parameters for each in sparse) == ACTIVE[family, flavor]


def test_head_norms_and_experts_have_their_initial_values():
    model = Transformer(dataclasses.replace(QWEN_MOE, n_shared_experts=1, n_layers=8))
    values = {name: model.initial_std(name) for name, _ in model.named_parameters()}
    assert values["layers.0.attention.q_norm.weight"] is None
    assert values["layers.7.moe.router.gate.weight"] == 0.02
    assert values["layers.7.moe.experts.w1"] == values["layers.7.moe.experts.w3"] == 0.02
    assert values["layers.7.moe.experts.w2"] == pytest.approx(0.02 / 4)
    assert values["layers.7.moe.shared_experts.w2.weight"] == pytest.approx(0.02 / 4)
