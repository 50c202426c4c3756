"""Predicted time: what it counts against what a rank calls, and results against published runs."""

from dataclasses import replace
from functools import cache
from unittest.mock import patch

import pytest
import torch
from helpers.counted import count_step
from helpers.launching import ROOT
from helpers.published import RUNS, configure, read

from torchtrain.catalog.models import ModelShape
from torchtrain.config.layout import Degrees
from torchtrain.config.plans import plan_run
from torchtrain.config.schema import Config
from torchtrain.models.llama import Transformer
from torchtrain.parallelisms import float8_gather
from torchtrain.tools.preflight.block_work import Unit
from torchtrain.tools.preflight.devices import find_device
from torchtrain.tools.preflight.links import Exchange, Group, Links, list_groups
from torchtrain.tools.preflight.sharding import Sharding
from torchtrain.tools.preflight.step_time import TYPICAL, find_speeds, predict_step

H100 = find_device("h100")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


@cache
def predict(run):
    return predict_options(run.file, run.ranks, run.device, tuple(run.options.items()), run.float8)


def predict_options(file, ranks, device, options, float8=False):
    config = configure(file, ranks, dict(options))
    return predict_step(config, plan_run(config, ranks), find_device(device), float8=float8)


# Published runs


def compare(run):
    """Return the speed per device: published, predicted, and the ends of the range."""
    step = predict(run)
    published = run.tokens_per_second or 1e12 * run.tflops / step.flops_per_token
    times = (step.seconds, step.slowest_s, step.fastest_s)
    return published, *(step.tokens_per_second(seconds) / run.ranks for seconds in times)


@pytest.mark.parametrize("run", [run for run in RUNS if run.required], ids=lambda run: run.name)
def test_published_speeds_are_within_a_factor_of_1_3_and_in_the_range(run):
    published, predicted, slowest, fastest = compare(run)
    assert 1 / 1.3 < predicted / published < 1.3
    assert slowest < published < fastest


def test_other_published_speeds_are_nearly_all_in_the_range():
    compared = {run.name: compare(run) for run in RUNS if not run.required}
    outside = [
        name
        for name, (published, _, slowest, fastest) in compared.items()
        if not slowest < published < fastest
    ]
    assert all("262,144 tokens" in name for name in outside), outside
    assert all(0.7 < pred / published < 1.35 for published, pred, _, _ in compared.values())


# What is counted


DENSE = ModelShape(dim=64, n_layers=2, n_heads=8, n_kv_heads=4, ffn_hidden_dim=192, vocab_size=320)
SPARSE = replace(DENSE, n_experts=8, expert_hidden_dim=32, n_shared_experts=1, n_dense_layers=1)
S, B = 64, 2
ONE = Degrees(pp=1, dp_replicate=1, dp_shard=1, cp=1, tp=1)
SMALL = {
    "training.mixed_precision_param": "float32",
    "training.seq_len": S,
    "training.local_batch_size": B,
    **{f"model.{key}": value for key, value in vars(SPARSE).items() if key != "n_experts"},
}


def small(ranks, **options):
    """A config of the small shape for so many ranks, each with two sequences where it can."""
    parallelism = {f"parallelism.{key}": value for key, value in options.items()}
    experts = {"model.n_experts": 8 if "expert_parallel_degree" in options else 0}
    experts["debug.moe_force_load_balance"] = True  # the tokens are all the same
    shared = options.get("tensor_parallel_degree", 1) * options.get("context_parallel_degree", 1)
    whole = {"training.global_batch_size": B * ranks // shared}
    given = {**SMALL, **experts, **parallelism, **whole}
    return read(given, ranks)


def unit_of(config, ranks):
    plan = plan_run(config, ranks)
    return Unit.of(config, plan.shape, plan.degrees, plan.batch.microbatch_size)


@pytest.mark.parametrize("shape", [DENSE, SPARSE], ids=["dense", "experts"])
def test_products_and_attention_are_the_model_s_own_count(shape):
    unit = Unit.of(Config(training={"seq_len": S}), shape, ONE, B)
    blocks = [shape.is_sparse(layer) for layer in range(shape.n_layers)]
    products = [each for sparse in blocks for each in unit.list_products(sparse=sparse)]
    products.append(unit.output_product())
    forward = sum(product.flops for product in products)
    # The model counts the whole square of an attention, and its backward as two forwards.
    forward += 2 * len(blocks) * unit.attention_flops()
    with torch.device("meta"):
        model = Transformer(shape)
    assert 3 * forward == model.flops_per_token(S) * B * S


@pytest.mark.parametrize("shape", [DENSE, SPARSE], ids=["dense", "experts"])
def test_parameters_are_the_model_s_own(shape):
    unit = Unit.of(Config(), shape, ONE, B)
    counted = 2 * unit.matrix_parameters() + shape.dim
    counted += sum(sum(unit.count_parameters(sparse=shape.is_sparse(i))) for i in range(2))
    with torch.device("meta"):
        model = Transformer(shape)
    assert counted == sum(parameter.numel() for parameter in model.parameters())


def add_up(exchanges):
    total = {}
    for exchange in exchanges:
        total[exchange.kind] = total.get(exchange.kind, 0) + exchange.size
    return total


def of_others(counted):
    return {kind: size for (whose, kind), size in counted.items() if whose == "others'"}


@pytest.mark.parametrize("options", [{}, {"disable_sequence_parallel": True}], ids=str)
def test_tensor_parallel_bytes_are_what_a_rank_calls(options):
    config = small(4, tensor_parallel_degree=4, **options)
    unit = unit_of(config, 4)
    exchanges = []
    for _ in range(2):
        exchanges += [each for way in unit.tensor_exchanges(sparse=False) for each in way]
    exchanges += [each for way in unit.head_exchanges() for each in way]
    exchanges += [each for way in unit.embedding_exchanges() for each in way]
    # The loss reduces a number per token, which the prediction leaves out.
    counted = of_others(count_step(config, 4, smallest=unit.hidden_bytes / 2))
    assert counted == add_up(exchanges)


@pytest.mark.parametrize(
    "options",
    [{}, {"context_parallel_rotate_method": "alltoall"}, {"context_parallel_method": "ulysses"}],
    ids=str,
)
def test_context_parallel_bytes_are_what_a_rank_calls(options):
    config = small(4, context_parallel_degree=4, **options)
    unit = unit_of(config, 4)
    exchanges = [each for way in unit.context_exchanges() for each in way] * 2
    kinds = {"send": "all_to_all"}  # a rank's keys travel as an all-to-all with one receiver
    expected = {kinds.get(kind, kind): size for kind, size in add_up(exchanges).items()}
    assert of_others(count_step(config, 4)) == expected


def test_expert_parallel_bytes_are_what_a_rank_calls():
    config = small(4, expert_parallel_degree=4)
    unit = unit_of(config, 4)
    # One layer of the two has experts; the counts of rows that go first are left out.
    counted = of_others(count_step(config, 4, smallest=unit.row_bytes / 2))
    assert counted == add_up(unit.expert_exchanges() * 2)


def test_fsdp_bytes_are_what_a_rank_calls():
    config = small(2)
    unit = unit_of(config, 2)
    block, _ = unit.count_parameters(sparse=False)
    matrix = unit.matrix_parameters()
    counted = count_step(config, 2)
    # All but the last group, the output with its norm, are gathered again for the backward.
    assert counted["FSDP's", "all_gather"] == 4 * (2 * (2 * block + matrix) + matrix + DENSE.dim)
    assert counted["FSDP's", "reduce_scatter"] == 4 * (2 * block + 2 * matrix + DENSE.dim)


def test_what_is_gathered_in_float8_is_a_byte_a_number():
    """And each weight's scale is found by an all-reduce of its own, where they are not at once."""
    float8 = {
        "model.converters": "quantize.linear.float8",
        "quantize.linear.float8.emulate": True,
        "quantize.linear.float8.enable_fsdp_float8_all_gather": True,
        "quantize.linear.float8.filter_fqns": "layers.0.attention,layers.1.attention.wq",
    }
    config = read({**SMALL, "model.n_experts": 0, "training.global_batch_size": 2 * B, **float8}, 2)
    unit = unit_of(config, 2)
    block, _ = unit.count_parameters(sparse=False)
    matrix = unit.matrix_parameters()
    links = Links(H100, node_share=1.0, network_share=1.0)
    speeds = replace(find_speeds(config, H100, TYPICAL), links=links)
    sharding = Sharding.of(config, unit, speeds, list_groups(unit.degrees))
    share = sharding.share(sparse=False)
    attention = sum(p.inner * p.columns for p in unit.list_products(sparse=False)[:4])
    assert share.weights == 3 + 3 / 2
    assert share.numbers == block - 2 * DENSE.dim - attention + (attention - DENSE.dim**2) / 2
    with patch.object(float8_gather, "find_scales", wraps=float8_gather.find_scales) as finding:
        counted = count_step(config, 2)
    whole = 4 * (2 * (2 * block + matrix) + matrix + DENSE.dim)
    assert counted["FSDP's", "all_gather"] == whole - 3 * (2 * 2 * share.numbers + matrix)
    assert finding.call_count == 2 * 2 * share.weights + 1
    pair = Group(2, 1)
    scale = links.seconds(Exchange("all_reduce", 4), pair)
    size = 4 * block - 3 * share.numbers
    alone = links.seconds(Exchange("all_gather", size), pair)
    assert sharding.gather(sparse=False) == pytest.approx(alone + share.weights * scale)
    at_once = replace(sharding, scales_apart=False)
    assert at_once.gather(sparse=False) == pytest.approx(alone)
    assert at_once.gather_output < at_once.gather_embedding


# Links


def test_a_group_s_bandwidth_is_that_of_the_links_it_has():
    links = Links(H100, node_share=1.0, network_share=1.0)
    gather = Exchange("all_gather", 80e9)
    within = links.seconds(gather, Group(8, 1))
    assert within == pytest.approx(80e9 * 7 / 8 / H100.node_bandwidth, rel=1e-3)
    # Eight network cards per node carry a ring over nodes; where eight such groups share a node,
    # each has one of them.
    across = links.seconds(gather, Group(64, 1))
    strided = links.seconds(gather, Group(64, 8))
    sent = 80e9 * 63 / 64
    assert across == pytest.approx(sent / min(H100.node_bandwidth, 8 * 50e9), rel=1e-2)
    assert strided == pytest.approx(sent / 50e9, rel=1e-2)
    assert links.seconds(gather, Group(1, 1)) == 0.0
    assert Exchange("all_reduce", 8.0).bytes_sent(4) == 2 * Exchange("all_gather", 8.0).bytes_sent(
        4
    )


def test_groups_are_those_of_the_mesh():
    degrees = Degrees(pp=2, dp_replicate=3, dp_shard=5, cp=7, tp=11, ep=5)
    groups = list_groups(degrees)
    assert groups.tp == Group(11, 1)
    assert groups.cp == Group(7, 11)
    assert groups.fsdp == Group(35, 11)
    assert groups.ep == Group(5, 1)
    assert groups.fsdp_experts == Group(77, 5)
    assert groups.replicas == Group(3, 5 * 7 * 11)
    assert groups.pp == Group(2, 3 * 5 * 7 * 11)


# The step


def step_of(file="llama3_8b", ranks=8, device="h100", **options):
    keyed = {key.replace("__", "."): value for key, value in options.items()}
    return predict_options(file, ranks, device, tuple(keyed.items()))


def test_terms_add_up_and_the_range_is_around_them():
    step = step_of()
    assert sum(step.terms.values()) == pytest.approx(step.seconds)
    assert step.fastest_s < step.seconds < step.slowest_s
    assert all(seconds > 0 for seconds in step.terms.values())
    assert step.tokens == 1024 * 8192
    speed = step.tokens_per_second(step.seconds)
    assert step.mfu(step.seconds) == speed * step.flops_per_token / (8 * 989e12)
    assert 0.2 < step.mfu(step.slowest_s) < step.mfu(step.fastest_s) < 0.7


def test_more_ranks_are_faster_at_less_each_until_communication_dominates():
    ranks = [8, 16, 32, 64, 128, 256, 512, 1024]
    times = [step_of(ranks=each).seconds for each in ranks]
    assert times == sorted(times, reverse=True)
    work = [each * seconds for each, seconds in zip(ranks, times, strict=True)]
    assert work[-1] > work[0]
    slow = [
        predict_step(
            config := configure("llama3_8b", each, {}),
            plan_run(config, each),
            H100.with_network(1, None),
        ).terms
        for each in (8, 16, 1024)
    ]
    waits = [
        terms["FSDP: gathers and reductions not hidden"] / sum(terms.values()) for terms in slow
    ]
    assert waits[0] < 0.05 < 0.5 < waits[1] < waits[2]


def test_recomputation_costs_what_it_computes_again():
    selective = dict.fromkeys(["op_all", "op", "2"], "selective")
    modes = {"none": "none", **selective, "full": "full"}
    steps = {
        option: step_of(
            activation_checkpoint__mode=mode,
            activation_checkpoint__selective_ac_option=option if mode == "selective" else "2",
        )
        for option, mode in modes.items()
    }
    again = {option: step.terms.get("recomputation", 0.0) for option, step in steps.items()}
    assert again["none"] == 0 < again["op_all"] < again["op"] < again["2"] < again["full"]
    assert again["full"] == pytest.approx(2 * again["2"])
    terms = steps["none"].terms
    # A forward is a third of the products and two sevenths of attention, its backward 2.5 times it.
    forward = terms["matrix products"] / 3 + terms["attention"] * 2 / 7
    assert forward < again["full"] < 1.2 * forward


@pytest.mark.parametrize(
    ("key", "value", "term"),
    [
        ("parallelism__tensor_parallel_degree", 8, "tensor-parallel exchanges"),
        ("parallelism__context_parallel_degree", 8, "context-parallel exchanges and sums"),
        ("training__enable_cpu_offload", True, "copies to and from host memory"),
        ("training__mixed_precision_param", "float32", None),
        ("compile__enable", False, None),
    ],
)
def test_what_costs_time_and_under_which_name(key, value, term):
    plain = step_of(parallelism__context_parallel_method="ulysses")
    step = step_of(parallelism__context_parallel_method="ulysses", **{key: value})
    assert step.seconds > plain.seconds
    assert term is None or (term in step.terms and term not in plain.terms)


def test_experts_travel_and_their_time_is_that_of_those_that_compute():
    options = {"parallelism__expert_parallel_degree": 8, "training__global_batch_size": 64}
    alone = step_of("qwen3_30b_a3b", 8, **options | {"parallelism__expert_parallel_degree": 1})
    shared = step_of("qwen3_30b_a3b", 8, **options)
    assert "expert-parallel exchanges" not in alone.terms
    assert shared.terms["expert-parallel exchanges"] > 0
    dense = step_of("qwen3_8b", 8, training__global_batch_size=64, training__seq_len=4096)
    assert shared.flops_per_token < dense.flops_per_token


def test_replicas_reduce_once_more_and_small_models_wait_for_the_host():
    sharded = step_of(ranks=64, training__global_batch_size=64)
    replicated = step_of(
        ranks=64, training__global_batch_size=64, parallelism__data_parallel_replicate_degree=8
    )
    assert replicated.terms["optimizer and clipping"] > sharded.terms["optimizer and clipping"]
    small = step_of("debug_model", 1, training__global_batch_size=1, model__vocab_size=512)
    assert small.terms["host: waiting for launches"] > 0.3 * small.seconds


def describe(run):
    """Return the run's line in docs/preflight.md."""
    published, predicted, slowest, fastest = compare(run)
    shown = [f"{number:,.0f}" for number in (published, predicted, slowest, fastest)]
    ratio = f"{predicted / published:.2f}"
    return f"| {run.name} | {shown[0]} | {shown[1]} | {shown[2]} to {shown[3]} | {ratio} |"


def test_the_table_in_the_docs_is_what_is_predicted():
    text = (ROOT / "docs" / "preflight.md").read_text()
    missing = [line for line in map(describe, RUNS) if line not in text.splitlines()]
    assert not missing, "\n".join(missing)
