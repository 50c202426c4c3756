"""The optimizer against its written-out update; the gradient norm against the whole gradient's."""

import math
from types import SimpleNamespace

import pytest
import torch
from helpers.forking import in_group
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from torchtrain.catalog.models import ModelShape
from torchtrain.catalog.optimizers import OPTIMIZERS
from torchtrain.config.schema import Optimizer
from torchtrain.errors import UserError
from torchtrain.models.llama import Transformer
from torchtrain.optimizers.build import build_optimizer
from torchtrain.optimizers.clipping import clip_grad_norm_, compute_norm


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(3, 4, generator=generator))
        self.scale = nn.Parameter(torch.ones(4))
        self.unused = nn.Parameter(torch.ones(2, 2))


def gradients_of_step(step):
    generator = torch.Generator().manual_seed(step)
    return {
        "matrix": torch.randn(3, 4, generator=generator),
        "scale": torch.randn(4, generator=generator),
    }


def run(config, steps=3):
    model = Small()
    optimizer = build_optimizer(dict(model.named_parameters()), config)
    for step in range(1, steps + 1):
        for name, gradient in gradients_of_step(step).items():
            model.get_parameter(name).grad = gradient
        optimizer.step()
    return model


def by_hand(config, steps=3):
    """Adam and AdamW as their papers state them, in double precision."""
    weights = {name: p.detach().double() for name, p in Small().named_parameters()}
    mean = {name: torch.zeros_like(w) for name, w in weights.items()}
    square = {name: torch.zeros_like(w) for name, w in weights.items()}
    for step in range(1, steps + 1):
        for name, gradient in gradients_of_step(step).items():
            decay = config.weight_decay if name == "matrix" else 0.0
            g = gradient.double()
            if config.name == "Adam":
                g = g + decay * weights[name]
            else:
                weights[name] = weights[name] * (1 - config.lr * decay)
            mean[name] = config.beta1 * mean[name] + (1 - config.beta1) * g
            square[name] = config.beta2 * square[name] + (1 - config.beta2) * g**2
            unbiased_mean = mean[name] / (1 - config.beta1**step)
            unbiased_square = square[name] / (1 - config.beta2**step)
            weights[name] = weights[name] - config.lr * unbiased_mean / (
                unbiased_square.sqrt() + config.eps
            )
    return weights


OPTIONS = [{}, {"lr": 0.02}, {"beta1": 0.5}, {"beta2": 0.5}, {"eps": 0.3}, {"weight_decay": 0.7}]


@pytest.mark.parametrize("implementation", ["for-loop", "foreach", "fused"])
@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_equals_the_written_out_update_and_every_option_matters(name, implementation):
    results = []
    for options in OPTIONS:
        config = Optimizer(name=name, implementation=implementation, **({"lr": 0.01} | options))
        model = run(config)
        for parameter, expected in by_hand(config).items():
            torch.testing.assert_close(
                model.get_parameter(parameter).double(), expected, rtol=1e-5, atol=1e-7
            )
        assert torch.equal(model.unused, torch.ones(2, 2)), (
            "a parameter without a gradient was touched"
        )
        results.append(model.matrix.detach())
    for changed in results[1:]:
        assert not torch.allclose(changed, results[0], rtol=1e-4)


def test_adam_and_adamw_differ():
    assert not torch.allclose(
        run(Optimizer(name="Adam")).matrix, run(Optimizer(name="AdamW")).matrix, rtol=1e-6
    )


@pytest.mark.parametrize("implementation", ["for-loop", "foreach", "fused"])
def test_the_implementation_asked_for_is_the_one_used(implementation):
    optimizer = build_optimizer(
        dict(Small().named_parameters()), Optimizer(implementation=implementation)
    )
    for group in optimizer.param_groups:
        assert group["fused"] == (implementation == "fused")
        assert group["foreach"] == (implementation == "foreach")


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_weight_decay_leaves_out_norms_and_only_them(tied):
    model = Transformer(ModelShape(16, 2, 2, 1, 32, 11, tied_embeddings=tied))
    groups = build_optimizer(
        dict(model.named_parameters()), Optimizer(weight_decay=0.3)
    ).param_groups
    decays = {
        id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]
    }
    assert (
        sum(len(group["params"]) for group in groups)
        == len(decays)
        == len(list(model.parameters()))
    )
    for name, parameter in model.named_parameters():
        assert decays[id(parameter)] == (0.0 if name.endswith("norm.weight") else 0.3), name


def test_a_users_optimizer_is_built_from_the_weights_by_name(tmp_path, monkeypatch):
    (tmp_path / "users_optimizer.py").write_text(
        "import torch\n"
        "def build(weights, config):\n"
        "    chosen = [weight for name, weight in weights.items() if name == 'matrix']\n"
        "    return torch.optim.SGD(chosen, lr=config.lr / 2)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(OPTIMIZERS, "mine", "users_optimizer:build")
    weights = dict(Small().named_parameters())
    config = SimpleNamespace(name="mine", lr=0.5, groups=[])
    optimizer = build_optimizer(weights, config)
    assert type(optimizer) is torch.optim.SGD
    (group,) = optimizer.param_groups
    assert group["lr"] == 0.25
    assert [id(weight) for weight in group["params"]] == [id(weights["matrix"])]
    for wrong in ("users_optimizer:absent", "no_such_module:build"):
        monkeypatch.setitem(OPTIMIZERS, "mine", wrong)
        with pytest.raises(UserError, match=rf"optimizer.name = 'mine' is registered as '{wrong}'"):
            build_optimizer(weights, config)


def with_gradients(*gradients):
    parameters = [nn.Parameter(torch.zeros_like(gradient)) for gradient in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    return parameters


def test_clipping_returns_the_norm_before_and_scales_to_the_limit():
    parameters = [
        *with_gradients(torch.tensor([[3.0, 0.0]]), torch.tensor([0.0, 4.0])),
        nn.Parameter(torch.ones(2)),
    ]
    norm = clip_grad_norm_(iter(parameters), 1.0)
    assert norm.shape == ()
    assert norm.dtype == torch.float32
    assert norm.item() == 5.0
    assert parameters[0].grad[0, 0].item() == pytest.approx(0.6, rel=1e-6)
    assert parameters[1].grad[1].item() == pytest.approx(0.8, rel=1e-6)
    assert parameters[2].grad is None


def test_a_small_gradient_is_left_alone():
    (parameter,) = with_gradients(torch.tensor([[0.3, 0.4]]))
    assert clip_grad_norm_([parameter], 1.0).item() == pytest.approx(0.5, rel=1e-7)
    assert torch.equal(parameter.grad, torch.tensor([[0.3, 0.4]]))


def test_what_is_not_a_number_shows_in_the_norm():
    assert math.isnan(clip_grad_norm_(with_gradients(torch.tensor([[1.0, math.nan]])), 1.0).item())
    assert math.isinf(clip_grad_norm_(with_gradients(torch.tensor([[1.0, math.inf]])), 1.0).item())
    assert clip_grad_norm_([nn.Parameter(torch.ones(2))], 1.0).item() == 0.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_norm_keeps_its_precision_over_millions_of_elements(dtype):
    gradient = torch.randn(2048, 1024, generator=torch.Generator().manual_seed(0)).to(dtype)
    exact = gradient.double().square().sum().sqrt()
    assert compute_norm([gradient]).item() == pytest.approx(exact.item(), rel=2e-7)


class Kernels(TorchDispatchMode):
    """Counts the operations that a device would have a kernel for."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def test_clipping_takes_one_kernel_for_each_gradient_and_a_few_more():
    counts = []
    for number in (1, 56):
        parameters = with_gradients(*[torch.ones(4, 3)] * number)
        with Kernels() as seen:
            clip_grad_norm_(parameters, 1.0)
        counts.append(seen.count)
    assert counts[1] - counts[0] == 55
    assert counts[0] <= 20


# Whole gradients, and how each lies on a 2 x 2 mesh: uneven rows, rows and columns, copies, an
# empty shard.
SIZES = [(7, 5), (6, 4), (3,), (1, 8), (5, 6)]
LAYOUTS = [
    (Shard(0), Shard(0)),
    (Shard(0), Shard(1)),
    (Replicate(), Replicate()),
    (Replicate(), Shard(0)),
    (Shard(1), Replicate()),
]


def whole_gradients():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(size, generator=generator) for size in SIZES]


def clip_sharded():
    square, line = (
        init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b")),
        init_device_mesh("cpu", (4,)),
    )
    layouts = [*((square, layout) for layout in LAYOUTS), (line, (Shard(0),)), (None, ())]
    wholes = [*whole_gradients(), torch.full((9, 2), 0.5), torch.full((2, 2), 0.25)]
    parameters = []
    for whole, (mesh, placements) in zip(wholes, layouts, strict=True):
        lay = (
            (lambda x: x)
            if mesh is None
            else lambda x, m=mesh, p=placements: distribute_tensor(x.clone(), m, p)
        )
        parameters.append(nn.Parameter(lay(torch.zeros_like(whole))))
        parameters[-1].grad = lay(whole.clone())
    exact = math.sqrt(sum(whole.double().square().sum().item() for whole in wholes))
    norm = clip_grad_norm_(parameters, exact / 2)
    assert type(norm) is torch.Tensor
    assert norm.item() == pytest.approx(exact, rel=2e-7)
    for parameter, whole in zip(parameters, wholes, strict=True):
        gradient = (
            parameter.grad.full_tensor()
            if hasattr(parameter.grad, "full_tensor")
            else parameter.grad
        )
        torch.testing.assert_close(gradient, whole / 2, rtol=1e-6, atol=0)


@pytest.mark.slow
def test_the_norm_counts_each_element_of_every_shard_once():
    in_group(4, clip_sharded)
