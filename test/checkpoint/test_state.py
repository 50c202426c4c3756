"""The training state by name, whatever the optimizer, and what becomes of a state that differs."""

from pathlib import Path

import pytest
import torch
from helpers.checkpoints import (
    Tiny,
    assert_bitwise,
    build,
    build_model,
    everything,
    names,
    progress,
    saved_run,
    section,
    train,
    weights,
)
from helpers.forking import in_group
from torch import nn

from torchtrain.catalog.identity import describe_state_dtype
from torchtrain.checkpoint import Checkpointer
from torchtrain.checkpoint.state import has_states, make_states
from torchtrain.config.schema import Optimizer
from torchtrain.config_manager import JobConfig
from torchtrain.errors import UserError
from torchtrain.optimizers.build import build_optimizer

# Any optimizer


class Own(torch.optim.Optimizer):
    """A user's optimizer: numbers, a flag, a tensor of another shape, random noise, no sense.

    It decays the weights by a fixed amount, whatever the learning rate.
    """

    def __init__(self, parameters, lr: float = 0.01):
        super().__init__(parameters, {"lr": lr, "steps": 0})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["steps"] += 1
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state.update(step=0, beta=1.0, warm=False, unused=None)
                    state["average"] = torch.zeros_like(parameter, dtype=torch.float64)
                    state["ends"] = torch.ones(2, dtype=torch.bfloat16)
                state["step"] += 1
                state["beta"] *= 0.7
                state["warm"] = state["step"] > 1
                state["average"].lerp_(parameter.grad.double(), 1 - state["beta"])
                state["ends"].mul_(1.5)
                rate = group["lr"] * (2 if state["warm"] else 1) * torch.rand(()).item()
                parameter.mul_(0.999).sub_(state["average"].float() * rate)


OPTIMIZERS = {
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, fused=True),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1, foreach=True),
    "AdamW amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "AdamW of a tensor's rate": lambda p: torch.optim.AdamW(
        p, lr=torch.tensor(0.01), foreach=False
    ),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.1),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(
        p, lr=0.1, momentum=0.9, dampening=0.3, weight_decay=0.1
    ),
    "Muon": lambda p: torch.optim.Muon(p, lr=0.01, weight_decay=0.1),
    "a user's": Own,
}
STATES = {
    "AdamW fused": {"step", "exp_avg", "exp_avg_sq"},
    "AdamW amsgrad": {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
    "SGD": set(),
    "SGD with momentum": {"momentum_buffer"},
    "Muon": {"momentum_buffer"},
    "a user's": {"step", "beta", "warm", "average", "ends"},
}


def start(name: str, seed: int):
    """Build a model of matrices, for Muon takes no others, and the optimizer."""
    model = build_model(seed=seed, bias=False)
    with torch.no_grad():
        nn.init.constant_(model.norm, -0.0)  # adding 0 would change its bits
    return model, OPTIMIZERS[name](list(model.parameters()))


def interrupt_and_resume(run: Path, name: str) -> None:
    """Save after 2 steps, load into other weights, and take 2 more; compare with 4 steps."""
    model, optimizer = start(name, seed=0)
    initial = everything(model, optimizer)
    checkpointer = Checkpointer(section(), run)
    checkpointer.prepare(weights(model), optimizer)
    assert_bitwise(everything(model, optimizer), initial)
    torch.manual_seed(5)
    train(model, optimizer, range(2))
    checkpointer.save(weights(model), optimizer, progress(2))
    saved = everything(model, optimizer)
    train(model, optimizer, range(2, 4))
    expected = everything(model, optimizer)

    unprepared = start(name, seed=0)
    torch.manual_seed(5)
    train(*unprepared, range(4))
    assert_bitwise(everything(*unprepared), expected)

    model, optimizer = start(name, seed=1)
    checkpointer.load(checkpointer.find(), weights(model), optimizer)
    assert_bitwise(everything(model, optimizer), saved)
    if name in STATES:
        kept = {key.rpartition("/")[2] for key in saved if key.startswith("optimizer/")}
        assert kept == STATES[name]
    for here, there in zip(optimizer.state.values(), unprepared[1].state.values(), strict=True):
        assert {key: type(value) for key, value in here.items()} == {
            key: type(value) for key, value in there.items()
        }
    train(model, optimizer, range(2, 4))
    assert_bitwise(everything(model, optimizer), expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_equals_uninterrupted(tmp_path, alone, name):
    interrupt_and_resume(tmp_path, name)


SHARDED = ("AdamW fused", "SGD", "Muon", "a user's")
"""With and without states, of the parameter's shape and of another, tensors and numbers."""


def interrupt_and_resume_all(run: Path) -> None:
    for name in SHARDED:
        interrupt_and_resume(run / name, name)


@pytest.mark.slow
def test_resumed_equals_uninterrupted_on_two_ranks(tmp_path):
    in_group(2, interrupt_and_resume_all, tmp_path)


def test_making_the_states_puts_everything_else_back(alone):
    model, optimizer = start("a user's", seed=0)
    gradients = {}
    for name, parameter in weights(model).items():
        parameter.grad = torch.ones_like(parameter)
        gradients[name] = parameter.grad
    before = everything(model, optimizer)
    random = torch.get_rng_state()
    make_states(optimizer)
    made = everything(model, optimizer)
    assert has_states(optimizer)
    assert_bitwise({name: made[name] for name in before}, before)
    assert all(weights(model)[name].grad is gradient for name, gradient in gradients.items())
    assert [(group["lr"], group["steps"]) for group in optimizer.param_groups] == [(0.01, 0)]
    assert torch.equal(torch.get_rng_state(), random)


class History(torch.optim.SGD):
    """An optimizer that keeps what no tensor can hold."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                self.state[parameter]["history"] = [1, 2]


class Common(torch.optim.SGD):
    """An optimizer that keeps something for all parameters together."""

    def step(self, closure=None):
        self.state["all"]["steps"] = 1


@pytest.mark.parametrize(
    ("optimizer_class", "said"),
    [
        (History, "cannot hold optimizer/norm/history: History keeps a list"),
        (Common, "cannot hold what Common keeps for all parameters together"),
    ],
)
def test_a_state_that_cannot_be_saved_is_found_before_training(
    tmp_path, alone, optimizer_class, said
):
    model = build_model()
    optimizer = optimizer_class(model.parameters(), lr=0.1)
    with pytest.raises(UserError, match=said):
        Checkpointer(section(), tmp_path).prepare(weights(model), optimizer)


def test_a_parameter_without_a_gradient_so_far_keeps_no_state(tmp_path, alone):
    """As an expert that has seen no token yet."""

    def start_with_extra(seed):
        model = build_model(seed=seed)
        model.extra = nn.Parameter(torch.ones(2))
        return model, torch.optim.AdamW(model.parameters())

    model, optimizer = start_with_extra(0)
    checkpointer = Checkpointer(section(), tmp_path)
    train(model, optimizer, range(1))
    checkpointer.save(weights(model), optimizer, progress(1))
    saved = everything(model, optimizer)
    assert "optimizer/extra/exp_avg" not in saved
    model, optimizer = start_with_extra(1)
    checkpointer.load(checkpointer.find(), weights(model), optimizer)
    assert_bitwise(everything(model, optimizer), saved)


@pytest.mark.parametrize("fused", [False, True])
def test_settings_are_never_loaded(tmp_path, alone, fused):
    first = saved_run(tmp_path, (2,))
    model, optimizer = build(seed=1, lr=0.5, fused=fused)
    optimizer.param_groups[0]["weight_decay"] = 0.7
    checkpointer = Checkpointer(section(), tmp_path)
    checkpointer.load(checkpointer.find(), weights(model), optimizer)
    assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        (0.5, 0.7),
        (0.5, 0.0),
    ]
    assert_bitwise(everything(model, optimizer), first.states[2])
    assert model.output.weight is model.tok_embeddings.weight


# Another model, or another optimizer


@pytest.fixture
def load_into(tmp_path, alone):
    """load_into(model, optimizer) loads a checkpoint of the tiny model with AdamW's states."""
    saved_run(tmp_path, (1,))
    checkpointer = Checkpointer(section(), tmp_path)
    source = checkpointer.find()
    yield lambda model, optimizer: checkpointer.load(source, weights(model), optimizer)
    assert names(tmp_path) == ["step-1"]


def refused(load_into, model, optimizer) -> str:
    with pytest.raises(UserError, match="is not a checkpoint of this model") as fault:
        load_into(model, optimizer)
    return str(fault.value)


def test_another_shape_is_refused_by_name(load_into):
    said = refused(load_into, *build(width=9))
    assert "it has in another shape model/layers.0.bias [5] instead of [9]" in said
    assert "(a vocab_size of 0 is the tokenizer's)" in said


def test_a_tensor_too_few_or_too_many_is_refused_by_name(load_into):
    model, _ = build()
    model.extra = nn.Parameter(torch.zeros(2))
    said = refused(load_into, model, torch.optim.AdamW(model.parameters()))
    assert "it lacks model/extra." in said
    model, _ = build()
    model.norm = None
    assert "it has, unknown to this model, model/norm." in refused(load_into, model, None)


def test_another_optimizers_states_are_refused_by_name(load_into):
    model, _ = build()
    said = refused(load_into, model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    assert "it lacks optimizer/layers.0.bias/momentum_buffer" in said
    assert "unknown to this model, optimizer/layers.0.bias/exp_avg" in said
    assert "[optimizer]" in said
    said = refused(load_into, model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert "unknown to this model, optimizer/layers.0.bias/exp_avg" in said


def test_states_of_an_optimizer_that_kept_none_are_lacking(tmp_path, alone):
    model = build_model()
    checkpointer = Checkpointer(section(), tmp_path)
    checkpointer.save(weights(model), torch.optim.SGD(model.parameters(), lr=0.1), progress(1))
    with pytest.raises(UserError, match=r"it lacks optimizer/layers\.0\.bias/exp_avg, "):
        checkpointer.load(
            checkpointer.find(), weights(model), torch.optim.AdamW(model.parameters())
        )


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
@pytest.mark.parametrize("before", [None, "bfloat16"])
def test_another_precision_of_the_states_is_refused_by_the_name_of_its_key(
    tmp_path, alone, name, before
):
    """Also where Muon's count of steps, which bf16 alone needs, is lacking or too many."""

    def make(state_dtype, dtype=torch.float32):
        model = build_model(bias=False).to(dtype)
        named = {f"layers.0.{name}": weight for name, weight in model.named_parameters()}
        return weights(model), build_optimizer(named, Optimizer(name=name, state_dtype=state_dtype))

    checkpointer = Checkpointer(section(), tmp_path)
    checkpointer.prepare(*(saved := make(before)))
    make_states(saved[1])
    checkpointer.save(*saved, progress(1))
    now = "bfloat16" if before is None else None
    configs = [
        JobConfig(optimizer=Optimizer(name=name, state_dtype=each)).model_dump(mode="json")
        for each in (before, now)
    ]
    source = checkpointer.find()
    why = describe_state_dtype(source.path, *configs)
    with pytest.raises(UserError) as caught:
        checkpointer.load(source, *make(now), why)
    was, is_now = before or "float32", now or "float32"
    assert f'optimizer.state_dtype was {was}, is {is_now}; set it to "{was}"' in str(caught.value)
    assert f'checkpoint.initial_load_path = "{source.path}"' in str(caught.value)
    assert "exp_avg" not in str(caught.value)
    with pytest.raises(UserError, match=r"of this model: .* in another precision model"):
        checkpointer.load(source, *make(before, torch.bfloat16), why)
    checkpointer.load(source, *make(was), describe_state_dtype(source.path, configs[0], configs[0]))


def test_another_precision_is_refused_but_weights_alone_are_converted(load_into, log):
    torch.manual_seed(1)
    half = Tiny().bfloat16()
    said = refused(load_into, half, torch.optim.AdamW(half.parameters()))
    assert (
        "in another precision model/layers.0.bias torch.float32 instead of torch.bfloat16" in said
    )
    load_into(half, None)
    assert "weights are converted: model/layers.0.bias torch.float32" in log.text
    model, _ = build()
    load_into(model, None)
    assert torch.equal(half.norm, model.norm.full_tensor().bfloat16())
