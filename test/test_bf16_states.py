"""Running means in bf16: each step is PyTorch's on the widened means; then they are rounded."""

import pytest
import torch
from helpers.forking import in_group
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from torchtrain import bf16_states
from torchtrain.bf16_states import draw, round_mean, split_by_size
from torchtrain.config.schema import Optimizer
from torchtrain.optimizers.build import build_optimizer

SHAPES = {
    "layers.0.wq.weight": (24, 16),
    "layers.0.w1.weight": (40, 24),
    "layers.0.experts.w2": (4, 6, 5),
    "tok_embeddings.weight": (50, 24),
    "norm.weight": (24,),
}
MEANS = ("exp_avg", "exp_avg_sq")
ONE = torch.ones(())


def draw_each(seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def new_weights():
    return {name: nn.Parameter(value) for name, value in draw_each(0).items()}


def neighbors(wide):
    """The values of bf16 on both sides of each number, the same where it is one."""
    bits = wide.view(torch.int32)
    below = (bits & -65536).view(torch.float32)
    above = torch.where(below == wide, below, ((bits & -65536) + 65536).view(torch.float32))
    return below, above


@pytest.mark.parametrize("implementation", ["fused", "foreach", "for-loop"])
@pytest.mark.parametrize("name", ["AdamW", "Adam"])
def test_a_step_is_pytorchs_on_the_widened_means(name, implementation, monkeypatch):
    monkeypatch.setattr(bf16_states, "MOST_ELEMENTS", 1000)  # the weights come in three turns
    given = {"name": name, "implementation": implementation, "lr": 0.02, "beta2": 0.999}
    ours, theirs = new_weights(), new_weights()
    mine = build_optimizer(ours, Optimizer(**given, state_dtype="bfloat16"))
    reference = build_optimizer(theirs, Optimizer(**given))
    for step in range(1, 6):
        for parameter, gradient in draw_each(step).items():
            ours[parameter].grad = gradient.clone()
            theirs[parameter].grad = gradient.clone()
        mine.step()
        reference.step()
        for parameter, weight in ours.items():
            assert torch.equal(weight, theirs[parameter]), parameter
            kept, wide = mine.state[weight], reference.state[theirs[parameter]]
            assert kept["step"] == wide["step"] == step
            for key in MEANS:
                assert kept[key].dtype == torch.bfloat16
                below, above = neighbors(wide[key])
                rounded = kept[key].float()
                assert ((rounded == below) | (rounded == above)).all()
                wide[key].copy_(rounded)  # so that the next step begins from the same means
    assert [len(group["params"]) for group in mine.param_groups] == [4, 1]


def test_weights_in_bf16_have_pytorchs_own_update():
    results = []
    for state_dtype in (None, "bfloat16"):
        weights = {name: nn.Parameter(w.detach().bfloat16()) for name, w in new_weights().items()}
        optimizer = build_optimizer(weights, Optimizer(name="Muon", state_dtype=state_dtype))
        for step in (1, 2):
            for name, gradient in draw_each(step).items():
                weights[name].grad = gradient.bfloat16()
            optimizer.step()
        states = [v for state in optimizer.state.values() for v in state.values()]
        results.append([*weights.values(), *states])
    for mine, theirs in zip(*results, strict=True):
        assert torch.equal(mine, theirs)


def test_the_means_take_half_of_the_bytes():
    def count(**given):
        weights = new_weights()
        optimizer = build_optimizer(weights, Optimizer(**given))
        for weight in weights.values():
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        states = [item for state in optimizer.state.values() for item in state.items()]
        return sum(mean.nbytes for key, mean in states if key != "step")

    for name in ("AdamW", "Muon"):
        assert count(name=name, state_dtype="bfloat16") * 2 == count(name=name)
        assert count(name=name, state_dtype="float32") == count(name=name)


def test_rounding_goes_to_a_neighbor_and_is_right_on_average():
    low, step = 1.0, 2**-7
    for share in (0.0, 0.1, 0.5, 0.9):
        for sign in (1, -1):
            wide = torch.full((400, 500), sign * (low + share * step))
            rounded = round_mean(wide, draw(wide, "w", ONE)).float()
            assert set(rounded.unique().tolist()) <= {sign * low, sign * (low + step)}
            up = (rounded.abs() - low).mean().item() / step
            deviation = (share * (1 - share) / wide.numel()) ** 0.5
            assert abs(up - share) <= 4 * deviation + 1e-5
    for exact in (0.0, -0.0, 1.5, -3.0, float("inf")):
        wide = torch.full((64,), exact)
        assert torch.equal(round_mean(wide, draw(wide, "w", ONE)).float(), wide)


def test_what_is_drawn_depends_on_name_place_and_step_and_on_nothing_else():
    part = torch.empty(300, 200)
    drawn = draw(part, "w", ONE)
    assert torch.equal(drawn, draw(part.clone(), "w", ONE.clone()))
    others = [draw(part, "v", ONE), draw(part, "w", 2 * ONE), drawn.roll(1, 0), drawn.roll(1, 1)]
    # Each bit as often 0 as 1, and equal to another as often as not: of 60,000, five deviations are
    # 1 %.
    for bit in range(32):
        bits = (drawn >> bit) & 1
        assert abs(bits.float().mean() - 0.5) < 0.0103, bit
        for other in (*others, drawn >> 16 if bit < 16 else drawn << 16):
            assert abs((bits == (other >> bit) & 1).float().mean() - 0.5) < 0.0103, bit


def test_a_mean_that_changes_by_little_does_not_stand_still():
    weight = nn.Parameter(torch.zeros(100, 100))
    given = Optimizer(beta2=0.999, lr=1e-5, state_dtype="bfloat16")
    optimizer = build_optimizer({"w": weight}, given)
    expected = 0.0
    for step in range(1, 301):
        gradient = 1.0 if step <= 200 else 0.0
        weight.grad = torch.full((100, 100), gradient)
        optimizer.step()
        expected = 0.999 * expected + 0.001 * gradient
    mean = optimizer.state[weight]["exp_avg_sq"].float().mean().item()
    assert mean == pytest.approx(expected, rel=2e-3)
    still = torch.tensor(mean).bfloat16()
    assert (still.float() * 0.999).bfloat16() == still, "rounding to the nearest would do"


def test_the_weights_come_in_turns_of_a_size(monkeypatch):
    monkeypatch.setattr(bf16_states, "MOST_ELEMENTS", 10)
    sizes = [4, 4, 3, 20, 1, 9, 5]
    turns = split_by_size([nn.Parameter(torch.empty(size)) for size in sizes])
    assert [[len(weight) for weight in turn] for turn in turns] == [[4, 4], [3], [20], [1, 9], [5]]


# How each weight lies on a mesh of 2 x 2: uneven rows, FSDP's cut of a tensor-parallel one, copies.
LAID_OUT = {
    "layers.0.wq.weight": (Shard(0), Shard(1)),
    "layers.0.w1.weight": (_StridedShard(0, split_factor=2), Shard(0)),
    "layers.0.experts.w2": (Shard(1), Replicate()),
    "tok_embeddings.weight": (Shard(0), Shard(0)),
    "norm.weight": (Replicate(), Shard(0)),
}


def step_laid_out():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))

    def lay(name, whole):
        return distribute_tensor(whole.clone(), mesh, LAID_OUT[name])

    for given in ({"name": "AdamW"}, {"name": "Muon", "muon_ns_dtype": "float32"}):
        config = Optimizer(**given, lr=0.02, state_dtype="bfloat16")
        whole = new_weights()
        parts = {name: nn.Parameter(lay(name, weight.detach())) for name, weight in whole.items()}
        alone, shared = build_optimizer(whole, config), build_optimizer(parts, config)
        for step in (1, 2, 3):
            for name, gradient in draw_each(step).items():
                whole[name].grad, parts[name].grad = gradient, lay(name, gradient)
            shared.step()
            alone.step()
        for name, part in parts.items():
            assert torch.equal(part.full_tensor(), whole[name]), name
            for key, mean in alone.state[whole[name]].items():
                found = shared.state[part][key]
                assert torch.equal(found if key == "step" else found.full_tensor(), mean), name


@pytest.mark.slow
def test_every_layout_rounds_alike():
    in_group(4, step_laid_out)
