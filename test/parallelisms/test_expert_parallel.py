"""Expert parallelism against experts that are all at hand: results and every gradient.

The parity table shows whole layouts (test/tools/test_parity.py); here is what its even routing does
not meet: experts without a token, a rank with all of them, fewer tokens than experts.
"""

import copy
from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from helpers.forking import in_group
from torch.distributed.device_mesh import init_device_mesh

from torchtrain.catalog.models import ModelShape
from torchtrain.models.llama import Transformer
from torchtrain.parallelisms.expert_parallel import apply_expert_parallel, find_sparse

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
    mesh = init_device_mesh("cpu", (1, RANKS), mesh_dim_names=("expert_shard", "ep"))["ep"]
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
