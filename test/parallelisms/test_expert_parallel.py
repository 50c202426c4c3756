"""Expert parallelism against experts that are all at hand: results and every gradient; checkpoints.

The parity table shows whole layouts (test/tools/test_parity.py); here is what its even routing does
not meet: experts without a token, a rank with all of them, fewer tokens than experts.
"""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from helpers.checkpoints import assert_bitwise
from helpers.forking import in_group, on_ranks, running, train
from helpers.launching import metrics, wait_for_step
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.testing._internal.distributed.fake_pg import FakeStore

from torchtrain.catalog.models import ModelShape
from torchtrain.catalog.optimizers import OPTIMIZERS
from torchtrain.config.layout import Degrees
from torchtrain.config.schema import Optimizer as OptimizerConfig
from torchtrain.config.schema import Training
from torchtrain.models.llama import Transformer
from torchtrain.optimizers.build import build_optimizer
from torchtrain.parallelisms.expert_parallel import apply_expert_parallel, find_sparse
from torchtrain.parallelisms.fsdp import apply_fsdp
from torchtrain.parallelisms.mesh import Mesh

RANKS = 4
E, D = 8, 16
SHAPE = ModelShape(D, 1, 2, 2, 24, 20, n_experts=E, experts_per_token=2, expert_hidden_dim=24)


@dataclass(frozen=True)
class Case:
    """What is routed how."""

    shape: ModelShape = SHAPE
    tokens: int = 12
    """Of each rank."""
    favorites: tuple[int, ...] = ()
    """Experts that the router of every rank prefers by far; empty: it is left alone."""
    dtype: torch.dtype = torch.float32


CASES = {
    "as they come": Case(),
    "all to one rank": Case(favorites=(2, 3)),
    "all to the last experts of two ranks": Case(favorites=(1, 7)),
    "more experts than tokens": Case(tokens=1),
    "one expert each": Case(replace(SHAPE, experts_per_token=1, router_renormalize=False)),
    "all experts": Case(replace(SHAPE, experts_per_token=E)),
    "a share of one": Case(replace(SHAPE, n_experts=RANKS)),
    "all to one rank, bf16": Case(favorites=(2, 3), dtype=torch.bfloat16),
}


def build(case):
    """The sparse feed-forward of a case, the same on all ranks, and its input on each."""
    torch.manual_seed(3)
    (module,) = find_sparse(Transformer(case.shape))
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    with torch.no_grad():
        for favorite in case.favorites:
            module.router.gate.weight[favorite] *= 0
            module.router.gate.weight[favorite, 0] = 30.0
    xs = torch.randn(RANKS, 1, case.tokens, D)
    xs[..., 0] = xs[..., 0].abs() + 1
    return module.to(case.dtype), xs.to(case.dtype)


def run(module, x):
    """The result and the gradients of the input and of all weights."""
    x = x.clone().requires_grad_()
    y = module(x)
    (y.float() * torch.arange(1, y.numel() + 1).view_as(y).cos()).sum().backward()
    gradients = {name: weight.grad for name, weight in module.named_parameters()}
    return {"y": y.detach(), "x": x.grad, **gradients}


def check_cases():
    degrees = Degrees(pp=1, dp_replicate=1, dp_shard=RANKS, cp=1, tp=1, ep=RANKS)
    mesh = Mesh(degrees, "cpu", has_experts=True)
    rank = dist.get_rank()
    for name, case in CASES.items():
        module, xs = build(case)
        alone = [run(copy.deepcopy(module), x) for x in xs]
        apply_expert_parallel(torch.nn.ModuleList([module]), mesh)
        found = run(module, xs[rank])
        share = case.shape.n_experts // RANKS
        limit = 1e-2 if case.dtype == torch.bfloat16 else 2e-6
        for key, value in found.items():
            if key.startswith("experts."):
                assert value.to_local().shape[0] == share
                expected = sum(each[key].double() for each in alone)
                expected = expected[rank * share : (rank + 1) * share]
                value = value.to_local()
            else:
                expected = alone[rank][key].double()
            assert (value.double() - expected).norm() <= limit * expected.norm(), (name, key)


@pytest.mark.slow
def test_rows_find_their_experts_however_they_are_routed():
    in_group(RANKS, check_cases)


def check_shards_of_many_ranks():
    """Fewer experts on a rank than ranks that shard them; and a user's optimizer, in one group."""
    shape = replace(SHAPE, expert_hidden_dim=6)  # four shards cut w1 [2, 6, 16] by its last only
    for rank in (0, 15):
        dist.init_process_group("fake", rank=rank, world_size=16, store=FakeStore())
        degrees = Degrees(pp=1, dp_replicate=1, dp_shard=16, cp=1, tp=1, ep=4)
        mesh = Mesh(degrees, "cpu", has_experts=True)
        with torch.device("meta"):
            model = Transformer(shape)
        apply_expert_parallel(model, mesh)
        apply_fsdp(model, mesh, Training(), "default")
        weights = dict(model.named_parameters())
        sizes = [list(weights[f"layers.0.moe.experts.w{n}"].to_local().shape) for n in (1, 2, 3)]
        assert sizes == [[2, 6, 4], [2, 4, 6], [2, 6, 4]], sizes
        OPTIMIZERS["whole"] = f"{__name__}:build_in_one_group"
        optimizer = build_optimizer(weights, OptimizerConfig(name="whole"))
        groups = [group["params"] for group in optimizer.param_groups]
        assert [len({weight.device_mesh for weight in group}) for group in groups] == [1, 1]
        assert {id(each) for group in groups for each in group} == set(map(id, weights.values()))
        assert all(group["lr"] == 0.5 for group in optimizer.param_groups)
        dist.destroy_process_group()


def build_in_one_group(weights, config):
    return torch.optim.SGD(weights.values(), lr=0.5, foreach=True)


@pytest.mark.slow
def test_every_rank_has_a_shard_and_an_update_takes_one_mesh():
    on_ranks(1, check_shards_of_many_ranks)


# Checkpoints go from any layout to any other, biases of the routers included.
STEPS = 5
EP = "parallelism.expert_parallel_degree"
SPARSE = {
    "model.n_experts": 4,
    "model.expert_hidden_dim": 32,
    "model.router_bias": True,
    "router.balance_loss_weight": 0.01,
    "lr_scheduler.total_steps": STEPS,
    "checkpoint.enable": True,
    "checkpoint.interval": 1,
}
PIPELINE = {
    "parallelism.pipeline_parallel_degree": 2,
    "parallelism.pipeline_parallel_schedule": "1F1B",
}
LEGS = ((1, {}, 3), (4, {EP: 2, **PIPELINE}, 4), (2, {"optimizer.implementation": "foreach"}, 5))


def saved(folder, step):
    """Every tensor of a checkpoint, whole; the random states aside, which are a rank's own."""
    dcp_to_torch_save(folder / "checkpoint" / f"step-{step}", folder / "whole.pt")
    found = torch.load(folder / "whole.pt", weights_only=True)
    return {name: tensor for name, tensor in found.items() if not name.startswith("rng/")}


@pytest.mark.slow
def test_a_run_goes_on_from_expert_ranks_to_any_layout(tmp_path, data):
    """Killed on four ranks; then one process, a pipeline, FSDP with another update."""
    given = {**data, **SPARSE, "training.steps": STEPS}
    train(1, {**given, "job.dump_folder": tmp_path / "whole"})
    folder = tmp_path / "run"
    with running(4, {**given, EP: 4, "job.dump_folder": folder}) as ranks:
        wait_for_step(ranks.alive, folder, 1)
        ranks.kill()
    reached = max(line["step"] for line in metrics(folder))
    for count, layout, steps in LEGS:
        if steps > reached:
            train(count, {**given, **layout, "training.steps": steps, "job.dump_folder": folder})
    for mine, theirs in zip(metrics(folder), metrics(tmp_path / "whole"), strict=True):
        assert mine["step"] == theirs["step"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-5)
        assert mine["router/load_max"] == theirs["router/load_max"]
    found, expected = saved(folder, STEPS), saved(tmp_path / "whole", STEPS)
    assert found.keys() == expected.keys()
    biases = [name for name in found if name.endswith("expert_bias")]
    assert len(biases) == 2
    for name in biases:
        assert torch.equal(found[name], expected[name])
        assert expected[name].count_nonzero() > 0


@pytest.mark.slow
def test_resumed_on_the_same_layout_equals_uninterrupted_to_the_bit(tmp_path, data):
    given = {**data, **SPARSE, EP: 2}
    train(2, {**given, "training.steps": STEPS, "job.dump_folder": tmp_path / "whole"})
    for steps in (2, STEPS):
        train(2, {**given, "training.steps": steps, "job.dump_folder": tmp_path / "run"})
    assert_bitwise(saved(tmp_path / "run", STEPS), saved(tmp_path / "whole", STEPS))
