"""Parameter groups by name: rates and decay of what a pattern matches, and how they are logged."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from torchtrain.catalog.optimizers import OPTIMIZERS
from torchtrain.config.schema import LRScheduler, Optimizer, ParameterGroup
from torchtrain.errors import UserError
from torchtrain.lr_scheduling import get_lr_scheduler
from torchtrain.optimizers.build import LearningRates, build_optimizer
from torchtrain.step_metrics import StepMetrics

NAMES = ("tok_embeddings.weight", "layers.0.w1", "layers.0.norm.weight", "output.weight")


def weights():
    shapes = {name: (4,) if "norm" in name else (4, 4) for name in NAMES}
    return {name: nn.Parameter(torch.ones(shape)) for name, shape in shapes.items()}


def settings_by_name(optimizer, named):
    names = {id(weight): name for name, weight in named.items()}
    found = {}
    for group in optimizer.param_groups:
        for weight in group["params"]:
            assert names[id(weight)] not in found
            found[names[id(weight)]] = (group["lr"], group["weight_decay"])
    return found


GROUPS = [
    ParameterGroup(pattern="tok_*", weight_decay=0.0),
    ParameterGroup(pattern="*.norm.*", lr=0.3, weight_decay=0.7),
    ParameterGroup(pattern="output.weight", lr=0.4),
]


@pytest.mark.parametrize("name", ["AdamW", "Adam", "Muon"])
def test_a_group_sets_what_it_says_and_leaves_the_rest(name):
    named = weights()
    config = Optimizer(name=name, lr=0.1, weight_decay=0.2, groups=GROUPS)
    assert settings_by_name(build_optimizer(named, config), named) == {
        "tok_embeddings.weight": (0.1, 0.0),
        "layers.0.w1": (0.1, 0.2),
        "layers.0.norm.weight": (0.3, 0.7),
        "output.weight": (0.4, 0.2),
    }


def test_a_pattern_is_for_whole_names():
    named = weights()
    beginning = ParameterGroup(pattern="layers.0.w", lr=0.9)
    optimizer = build_optimizer(named, Optimizer(lr=0.1, groups=[beginning]))
    assert {lr for lr, _ in settings_by_name(optimizer, named).values()} == {0.1}


def test_a_group_counts_before_the_rate_of_adamw_beside_muon():
    named = weights()
    config = Optimizer(name="Muon", lr=0.1, muon_adamw_lr=0.5, groups=GROUPS)
    rates = {
        name: lr
        for name, (lr, _) in settings_by_name(build_optimizer(named, config), named).items()
    }
    assert rates == dict(zip(NAMES, (0.5, 0.1, 0.3, 0.4), strict=True))


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_the_first_group_has_the_main_rate_whatever_is_matched(name):
    """The rate that is logged as lr is the first group's."""
    config = Optimizer(name=name, lr=0.1, groups=[ParameterGroup(pattern="*", lr=0.3)])
    optimizer = build_optimizer(weights(), config)
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert optimizer.param_groups[0]["params"] == []
    optimizer.step()


def test_the_schedule_multiplies_each_rate_and_each_is_logged():
    config = Optimizer(name="Muon", lr=0.1, muon_adamw_lr=0.5, groups=GROUPS)
    optimizer = build_optimizer(weights(), config)
    schedule = LRScheduler(warmup_steps=4)
    get_lr_scheduler(
        optimizer, SimpleNamespace(lr_scheduler=schedule, training=SimpleNamespace(steps=9))
    )
    metrics = StepMetrics()
    metrics.collect([LearningRates(optimizer, config)])
    logged = {name: value.total.item() for name, value in metrics._values.items()}
    assert optimizer.param_groups[0]["lr"] == 0.025
    assert logged == {
        "optimizer/lr/*.norm.*": 0.075,
        "optimizer/lr/output.weight": 0.1,
        "optimizer/lr/adamw": 0.125,
    }


def test_a_rank_without_a_groups_weights_logs_its_name_too():
    config = Optimizer(groups=[ParameterGroup(pattern="output.weight", lr=0.4)])
    named = weights()
    del named["output.weight"]
    metrics = StepMetrics()
    metrics.collect([LearningRates(build_optimizer(named, config), config)])
    assert {name: value.total.item() for name, value in metrics._values.items()} == {
        "optimizer/lr/output.weight": 0.0
    }


def test_one_rate_has_no_metrics_of_its_own():
    same = [ParameterGroup(pattern="tok_*", lr=0.1), ParameterGroup(pattern="out*", weight_decay=0)]
    config = Optimizer(name="Muon", lr=0.1, muon_adamw_lr=0.1, groups=same)
    metrics = StepMetrics()
    metrics.collect([LearningRates(build_optimizer(weights(), config), config)])
    assert metrics._values == {}


def test_an_optimizer_that_has_not_what_a_group_sets_is_refused(tmp_path, monkeypatch):
    (tmp_path / "without_decay.py").write_text(
        "import torch\n"
        "def build(weights, config):\n"
        "    return torch.optim.Rprop(weights.values(), lr=config.lr)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(OPTIMIZERS, "mine", "without_decay:build")
    config = Optimizer(name="mine", groups=[ParameterGroup(pattern="tok_*", weight_decay=0.0)])
    said = r"optimizer\.groups sets weight_decay, but the optimizer's parameter groups have no"
    with pytest.raises(UserError, match=said):
        build_optimizer(weights(), config)
    other_stage = {"layers.0.w1": nn.Parameter(torch.ones(4, 4))}  # of a pipeline
    with pytest.raises(UserError, match=said):
        build_optimizer(other_stage, config)


class Two(torch.optim.Optimizer):
    """Hands its groups on to an optimizer inside it, as containers of optimizers do."""

    def __init__(self, parameters):
        self.inner = torch.optim.SGD(parameters, lr=0.1)
        super().__init__(self.inner.param_groups, {})

    def step(self, closure=None):
        self.inner.step()


def build_two(weights, config):
    return Two(list(weights.values()))


def test_an_optimizer_inside_another_hears_of_the_learning_rate(monkeypatch):
    monkeypatch.setitem(OPTIMIZERS, "Two", f"{__name__}:build_two")
    named = weights()
    optimizer = build_optimizer(named, Optimizer(name="Two"))
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for weight in named.values():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert all((weight == 1).all() for weight in named.values())
