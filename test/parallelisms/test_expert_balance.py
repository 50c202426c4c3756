"""How experts are kept evenly loaded: values by hand, and the same numbers on every layout."""

from functools import cache
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from helpers.forking import in_group, train
from helpers.launching import metrics, options

import train as trainer_module
from torchtrain.catalog.models import ModelShape
from torchtrain.config_manager import JobConfig
from torchtrain.models import moe
from torchtrain.parallelisms.expert_balance import ExpertBalance
from torchtrain.ranks import join_process_group
from torchtrain.set_up import set_up
from torchtrain.step_metrics import StepMetrics
from torchtrain.tools import parity_ranks
from torchtrain.tools.parity_compare import relative
from torchtrain.tools.parity_processes import load_results

SPARSE = {
    "model.n_layers": 4,
    "model.n_dense_layers": 2,  # so that the first stage of two has no router
    "model.n_experts": 4,
    "model.experts_per_token": 2,
    "model.expert_hidden_dim": 32,
    "model.router_scores": "sigmoid",
    "model.router_bias": True,
    "router.bias_update_rate": 0.25,
}
WEIGHTED = {"router.balance_loss_weight": 0.5, "router.z_loss_weight": 0.125}

# By hand

SHAPE = ModelShape(4, 1, 2, 2, 8, 10, n_experts=4, experts_per_token=2, router_scores="sigmoid")


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_losses_and_their_gradients_are_those_of_the_formulas(compiled):
    """DeepSeek-V3, equations 17 to 20, and ST-MoE's z-loss, token by token."""
    torch.manual_seed(0)
    router = moe.Router(SHAPE)
    router.totals = torch.zeros(4 + 3, dtype=torch.float64)
    router.balance_weight, router.z_weight = 0.5, 0.125
    x = torch.randn(2, 3, 4)
    bias = torch.tensor([1.0, 0.0, 0.0, -1.0])
    factors = torch.randn(2, 3, 2)
    weight = router.gate.weight.detach().clone().requires_grad_()

    counts = [0] * 4
    entropy = balance = z_loss = chosen = torch.zeros(())
    for sequence in range(2):
        f, p = [0.0] * 4, [torch.zeros(()) for _ in range(4)]
        for token in range(3):
            logits = weight @ x[sequence, token]
            s = logits.sigmoid()
            z_loss = z_loss + logits.exp().sum().log() ** 2
            for expert in s.topk(2).indices.tolist():
                f[expert] += 4 / (2 * 3)
            for expert in range(4):
                share = s[expert] / s.sum()
                p[expert] = p[expert] + share / 3
                entropy = entropy - share * share.log()
            picked = (s + bias).topk(2).indices
            for place, expert in enumerate(picked.tolist()):
                counts[expert] += 1
                chosen = chosen + factors[sequence, token, place] * s[expert] / s[picked].sum()
        balance = balance + sum(f[expert] * p[expert] for expert in range(4))
    (chosen + 0.5 * balance + 0.125 * z_loss).backward()

    route = torch.compile(router, backend="aot_eager", fullgraph=True) if compiled else router
    routing = route(x, bias)
    (routing.weights * factors).sum().backward()
    assert routing.counts.tolist() == router.totals[:4].tolist() == counts
    expected = torch.stack([entropy, balance, z_loss]).double()
    torch.testing.assert_close(router.totals[4:], expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(router.gate.weight.grad, weight.grad, rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        route(x, bias)
    assert router.totals[:4].tolist() == counts, "a forward alone was counted"


@pytest.fixture
def alone():
    """The device of a process group of this process alone."""
    yield join_process_group(60)
    dist.destroy_process_group()


def test_metrics_and_biases_are_those_by_hand(data, alone):
    own = {**WEIGHTED, "router.log_layers_freq": 2, "training.dtype": "bfloat16"}
    trainer = set_up(JobConfig().parse_args(options({**data, **SPARSE, **own})), alone)
    balance = trainer.expert_balance
    assert balance in trainer.metric_sources
    routers = [trainer.parts[0].layers[layer].moe.router for layer in ("2", "3")]
    assert [(r.balance_weight, r.z_weight) for r in routers] == [(0.5 / 8, 0.125 / 8 / 32)] * 2
    tokens = 8 * 32
    steps = [
        [[3.0, 1, 0, 4], [2, 2, 2, 2]],
        [[0.0, 8, 0, 0], [1, 3, 2, 2]],
        [[2.0, 3, 2, 1], [0, 0, 4, 4]],
    ]
    for step, loads in enumerate(steps, start=1):
        # As two microbatches would; entropy, balance loss and z-loss of all tokens.
        for row, of_layer in enumerate(loads):
            balance.totals[row] += torch.tensor([*of_layer, 1.5 * tokens, 16, 3 * tokens]).double()
        balance.collect(step)
        assert balance.totals.count_nonzero() == 0
        added = StepMetrics()
        added.collect(trainer.metric_sources)
        values = added.reduce(alone)
        if step == 1:
            assert list(values.items()) == [
                ("router/load_max", 2.0),
                ("router/idle_experts", 1 / 8),
                ("router/entropy", 1.5),
                ("router/balance_loss", 0.5 * 2 * (16 / 8)),
                ("router/z_loss", 0.125 * 2 * 3),
            ]
        assert ("router/layer_3/load_max" in values) == (step == 2)
        if step == 2:
            assert (values["router/load_max"], values["router/layer_3/load_max"]) == (4, 1.5)
            assert values["router/layer_2/idle_experts"] == 0.75
        balance.update_biases()
    biases = {name: buffer.tolist() for name, buffer in trainer.buffers.items()}
    assert biases == {
        "layers.2.moe.expert_bias": [0.0, -0.25, 0.5, 0.25],
        "layers.3.moe.expert_bias": [0.5, 0.0, -0.25, -0.25],
    }
    assert {buffer.dtype for buffer in trainer.buffers.values()} == {torch.float32}


# On layouts

PP = {"parallelism.pipeline_parallel_degree": 2}
CP = {"parallelism.context_parallel_degree": 2}
SCHEDULE = "parallelism.pipeline_parallel_schedule"
FULL = {"activation_checkpoint.mode": "full"}
SELECTIVE = {"activation_checkpoint.mode": "selective"}
CASES = {
    1: {
        "plain": {},
        "accumulation": {"training.local_batch_size": 2},
        "full": FULL,
        "selective": SELECTIVE,
        "selective op": {**SELECTIVE, "activation_checkpoint.selective_ac_option": "op"},
        "forced": {"debug.moe_force_load_balance": True},
        "counted in the forward": FULL,
    },
    2: {
        "data": {},
        "replicas, full": {"parallelism.data_parallel_replicate_degree": 2, **FULL},
        "1F1B": PP,
        "ZBV": {**PP, SCHEDULE: "ZBVZeroBubble"},
        "ZBV, full": {**PP, SCHEDULE: "ZBVZeroBubble", **FULL},
        "context, full": {**CP, **FULL},
        "tensor, full": {"parallelism.tensor_parallel_degree": 2, **FULL},
        "experts": {"parallelism.expert_parallel_degree": 2},
        "not synchronized": {},
    },
}


class CountsInForward(torch.autograd.Function):
    """What AddLosses must not be: a recomputation counts again."""

    @staticmethod
    def forward(ctx, weights, losses, observed, totals):
        totals.add_(observed)
        return weights.view_as(weights)

    @staticmethod
    def backward(ctx, gradient):
        return gradient, torch.ones(()), None, None


collect = ExpertBalance.collect
combine_ranks = trainer_module.combine_ranks


def collect_alone(balance, step):
    """Leave out what the other ranks have routed."""
    with patch.object(dist, "all_reduce"):
        collect(balance, step)


def run_cases(data, cases, folder):
    """Train as the parity tool does, and keep what the routers and the trainer have counted too."""
    for name, layout in cases.items():
        sums, values = [], []
        used = collect_alone if name == "not synchronized" else collect

        def recording_sums(balance, step, sums=sums, used=used):
            used(balance, step)
            sums.append(balance.sums.clone())

        def recording_values(*arguments, values=values):
            summary, stopped_by = combine_ranks(*arguments)
            values.append(summary.added)
            return summary, stopped_by

        given = {"training.steps": 3, "router.log_layers_freq": 1, **WEIGHTED, **layout}
        case = {"options": options({**data, **SPARSE, **given}), "hide_labels": True}
        counter = CountsInForward if name == "counted in the forward" else moe.AddLosses
        with (
            patch.object(moe, "AddLosses", counter),
            patch.object(ExpertBalance, "collect", recording_sums),
            patch.object(trainer_module, "combine_ranks", recording_values),
        ):
            results = parity_ranks.run_case(case, torch.device("cpu"))
        torch.save(
            {**results, "sums": sums, "values": values}, folder / f"{name}.{dist.get_rank()}"
        )


@pytest.fixture(scope="module")
def found(data, tmp_path_factory):
    """found(name): what the ranks of that case have left."""
    folder = tmp_path_factory.mktemp("balance")

    @cache
    def on(ranks):
        in_group(ranks, run_cases, data, CASES[ranks], folder)

    @cache
    def results(name):
        on(1 if name in CASES[1] else 2)
        return load_results(folder, name)

    return results


@pytest.mark.slow
@pytest.mark.parametrize("name", [*list(CASES[1])[1:-2], *list(CASES[2])[:-1]])
def test_all_that_is_counted_is_the_same_on_every_layout(found, name):
    results, reference = found(name), found("plain")
    for mine, theirs in zip(results["sums"], reference["sums"], strict=True):
        assert torch.equal(mine[:, :4], theirs[:, :4])
        torch.testing.assert_close(mine[:, 4:], theirs[:, 4:], rtol=1e-6, atol=0)
        assert mine[:, :4].sum(dim=1).tolist() == [8 * 32 * 2] * 2
    for mine, theirs in zip(results["values"], reference["values"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-6)
        assert {"router/load_max", "router/layer_2/load_max"} <= mine.keys()
    for key, gradient in reference["gradients"].items():
        assert relative(results["gradients"][key], gradient) < 1e-6, key
    biases = [key for key in reference["weights"] if key.endswith("expert_bias")]
    assert biases == [f"layers.{layer}.moe.expert_bias" for layer in (2, 3)]
    for key in biases:
        assert torch.equal(results["weights"][key], reference["weights"][key])
        assert results["weights"][key].count_nonzero() > 0
    assert results["drifted"] == []


@pytest.mark.slow
def test_faults_would_be_seen(found):
    counted = found("counted in the forward")["sums"][0]
    assert torch.equal(counted[:, :4], 2 * found("plain")["sums"][0][:, :4])
    drifted = found("not synchronized")["drifted"]
    assert any(name.endswith("expert_bias") for name in drifted)


def saved_tensors(folder, step):
    """Every tensor of a checkpoint, by its name there."""
    checkpoint = folder / "checkpoint" / f"step-{step}"
    metadata = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
    }
    dcp.load(tensors, checkpoint_id=checkpoint, no_dist=True)
    return tensors


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_checkpoint_has_the_biases_and_any_layout_takes_them_up(tmp_path, data):
    common = {
        **data,
        **SPARSE,
        **WEIGHTED,
        "model.n_dense_layers": 1,  # so that both stages have biases
        "training.steps": 4,
        "lr_scheduler.total_steps": 4,
        "checkpoint.enable": True,
        "checkpoint.interval": 3,
    }
    runs = {name: tmp_path / name for name in ("whole", "resumed", "moved", "weights")}
    first = {"checkpoint.initial_load_path": runs["whole"] / "checkpoint" / "step-3"}
    everything = {**first, "checkpoint.initial_load_model_only": False}
    train(2, {**common, "job.dump_folder": runs["whole"]})
    train(2, {**common, **everything, "job.dump_folder": runs["resumed"]})
    train(2, {**common, **everything, **PP, "job.dump_folder": runs["moved"]})
    alone = {"training.steps": 1, "router.bias_update_rate": 0.0}
    train(1, {**common, **first, **alone, "job.dump_folder": runs["weights"]})

    biases = {f"model/layers.{layer}.moe.expert_bias" for layer in (1, 2, 3)}
    whole, half = saved_tensors(runs["whole"], 4), saved_tensors(runs["whole"], 3)
    assert {name for name in whole if "bias" in name} == biases
    assert all(whole[name].dtype == torch.float32 for name in biases)
    assert not any(torch.equal(whole[name], half[name]) for name in biases)
    resumed = saved_tensors(runs["resumed"], 4)
    assert resumed.keys() == whole.keys()
    assert [name for name in whole if not torch.equal(resumed[name], whole[name])] == []
    moved, taken = saved_tensors(runs["moved"], 4), saved_tensors(runs["weights"], 1)
    for name in biases:
        assert torch.equal(moved[name], whole[name])
        assert torch.equal(taken[name], half[name])
    last = {name: metrics(run)[-1] for name, run in runs.items()}
    for key in ("loss", "router/load_max", "router/entropy", "router/balance_loss"):
        assert last["resumed"][key] == last["whole"][key]
        assert last["moved"][key] == pytest.approx(last["whole"][key], rel=1e-6)


@pytest.mark.slow
def test_forced_balance_is_even(found):
    for values in found("forced")["values"]:
        assert (values["router/load_max"], values["router/idle_experts"]) == (1, 0)
