"""Muon against PyTorch's own on one process, and sharded against itself on whole matrices."""

import shutil

import pytest
import torch
import torch.distributed as dist
from helpers.forking import in_group, train
from helpers.launching import metrics
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

from torchtrain.config.schema import Optimizer
from torchtrain.optimizers.build import build_optimizer
from torchtrain.optimizers.muon import orthogonalize
from torchtrain.optimizers.shared_work import Matrix, SharedWork, choose_owners, find_holdings

MATRICES = {
    "layers.0.attention.wq.weight": (24, 24),
    "layers.0.feed_forward.w1.weight": (40, 24),
    "layers.0.feed_forward.w2.weight": (24, 40),
    "layers.1.moe.router.gate.weight": (3, 24),
    "layers.1.odd.weight": (1, 7),
}
OTHERS = {
    "tok_embeddings.weight": (50, 24),
    "layers.0.attention_norm.weight": (24,),
    "norm.weight": (24,),
    "output.weight": (50, 24),
}


def draw(shapes, seed):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def after_steps(optimizers, weights, steps=4):
    """Step the optimizers on gradients that are the same for each name, and return the weights."""
    shapes = {name: weight.shape for name, weight in weights.items()}
    for step in range(1, steps + 1):
        for name, gradient in draw(shapes, seed=step).items():
            weights[name].grad = gradient
        for optimizer in optimizers:
            optimizer.step()
    return {name: weight.detach() for name, weight in weights.items()}


def new_weights(shapes):
    return {name: nn.Parameter(weight) for name, weight in draw(shapes, seed=0).items()}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"muon_nesterov": False},
        {"muon_momentum": 0.4},
        {"muon_ns_steps": 2},
        {"weight_decay": 0.0},
        {"muon_adamw_lr": 0.01},
    ],
    ids=str,
)
def test_one_process_equals_pytorchs_muon_and_adamw_to_the_bit(changes):
    config = Optimizer(name="Muon", lr=0.02, **changes)
    ours = new_weights(MATRICES | OTHERS)
    mine = after_steps([build_optimizer(ours, config)], ours)

    theirs = new_weights(MATRICES | OTHERS)
    muon = torch.optim.Muon(
        [theirs[name] for name in MATRICES],
        lr=config.lr,
        weight_decay=config.weight_decay,
        momentum=config.muon_momentum,
        nesterov=config.muon_nesterov,
        ns_steps=config.muon_ns_steps,
        adjust_lr_fn="match_rms_adamw",
    )
    decays = {name: config.weight_decay if len(shape) > 1 else 0 for name, shape in OTHERS.items()}
    adamw = torch.optim.AdamW(
        [{"params": [theirs[name]], "weight_decay": decay} for name, decay in decays.items()],
        lr=config.muon_adamw_lr or config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
    expected = after_steps([muon, adamw], theirs)
    for name in expected:
        assert torch.equal(mine[name], expected[name]), name


def test_a_stack_is_updated_matrix_by_matrix():
    stacked = new_weights({"layers.0.moe.experts.w1": (3, 10, 6)})
    alone = {
        f"layers.{expert}.w": nn.Parameter(weight.clone())
        for expert, weight in enumerate(stacked["layers.0.moe.experts.w1"].detach())
    }
    config = Optimizer(name="Muon", lr=0.02)
    for weights in (stacked, alone):
        optimizer = build_optimizer(weights, config)
        for step in (1, 2, 3):
            gradients = draw({"w": (3, 10, 6)}, seed=step)["w"]
            whole = [gradients] if weights is stacked else gradients
            for weight, gradient in zip(weights.values(), whole, strict=True):
                weight.grad = gradient.clone()
            optimizer.step()
    assert torch.equal(stacked["layers.0.moe.experts.w1"], torch.stack(list(alone.values())))


@pytest.mark.parametrize("shape", [(30, 50), (50, 30), (8, 8)])
def test_singular_values_end_near_one_and_vectors_stay(shape):
    matrix = draw({"m": shape}, seed=3)["m"]
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    result = orthogonalize(matrix, steps=5)
    inner = u.T @ result @ vh.T
    values = inner.diagonal()
    assert values.min() > 0.5
    assert values.max() < 1.3
    assert (inner - torch.diag(values)).abs().max() < 1e-4
    assert torch.equal(orthogonalize(torch.zeros(shape), steps=5), torch.zeros(shape))


def test_an_update_has_adamws_size():
    config = Optimizer(name="Muon", lr=0.5, weight_decay=0.0)
    weights = new_weights({"layers.0.w1": (200, 100)})
    before = weights["layers.0.w1"].detach().clone()
    after = after_steps([build_optimizer(weights, config)], weights, steps=1)["layers.0.w1"]
    rms = (after - before).square().mean().sqrt()
    assert 0.2 * 0.6 < rms / config.lr < 0.2 * 1.2


def test_a_weight_without_a_gradient_is_left_alone():
    weights = new_weights({"layers.0.a": (4, 4), "layers.0.b": (4, 4), "norm.weight": (4,)})
    optimizer = build_optimizer(weights, Optimizer(name="Muon"))
    before = weights["layers.0.b"].detach().clone()
    weights["layers.0.a"].grad = torch.ones(4, 4)
    optimizer.step()
    assert torch.equal(weights["layers.0.b"], before)
    assert list(optimizer.state) == [weights["layers.0.a"]]
    assert list(optimizer.state[weights["layers.0.a"]]) == ["momentum_buffer"]


# Shapes, and how each lies on a mesh of 2 x 2: rows and columns, uneven, with ranks that have
# none, copies on either dimension, FSDP's cut of a tensor-parallel one, stacks by each dimension.
LAID_OUT = [
    ((8, 6), (Shard(0), Shard(1))),
    ((7, 5), (Shard(0), Shard(0))),
    ((5, 9), (Shard(1), Shard(0))),
    ((1, 8), (Shard(0), Shard(1))),
    ((3, 4), (Replicate(), Shard(0))),
    ((6, 4), (Shard(0), Replicate())),
    ((4, 4), (Replicate(), Replicate())),
    ((12, 5), (_StridedShard(0, split_factor=2), Shard(0))),
    ((4, 6, 5), (Shard(0), Shard(0))),
    ((3, 6, 5), (Shard(0), Shard(1))),
    ((3, 4, 7), (Shard(2), Replicate())),
    ((1, 4, 8), (Shard(1), Shard(2))),
]


def laid_out():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("a", "b"))
    wholes = draw(dict(enumerate(shape for shape, _ in LAID_OUT)), seed=5)
    sharded = [
        distribute_tensor(wholes[n], mesh, placements) for n, (_, placements) in enumerate(LAID_OUT)
    ]
    return wholes, sharded


def share():
    wholes, sharded = laid_out()
    calls = []

    def work(matrix):
        calls.append(matrix.shape)
        return orthogonalize(matrix, steps=5)

    shared_work = SharedWork(sharded)
    results = shared_work.run([each.to_local() for each in sharded], work, torch.empty(0))
    for number, (result, weight) in enumerate(zip(results, sharded, strict=True)):
        whole = wholes[number]
        stack = whole if whole.ndim == 3 else [whole]
        expected = torch.stack([orthogonalize(matrix, steps=5) for matrix in stack])
        expected = distribute_tensor(
            expected.view_as(whole), weight.device_mesh, weight.placements
        ).to_local()
        assert torch.equal(result, expected), LAID_OUT[number]

    everyones = [None] * 4
    sent = sum(part.shape[0] * part.shape[1] for part in shared_work.there.sent)
    dist.all_gather_object(everyones, (len(calls), sent))
    matrices = sum(shape[0] if len(shape) == 3 else 1 for shape, _ in LAID_OUT)
    assert sum(calls for calls, _ in everyones) == matrices, "each is computed once"
    assert sum(sent for _, sent in everyones) == sum(whole.numel() for whole in wholes.values())


@pytest.mark.slow
def test_ranks_share_the_work_and_each_gets_its_part():
    in_group(4, share)


def choose():
    _, sharded = laid_out()
    shared_work = SharedWork(sharded)
    owners = choose_owners(shared_work.matrices, find_holdings(sharded, dist.get_rank()))
    everyones = [None] * 4
    dist.all_gather_object(everyones, owners)
    assert everyones == [owners] * 4
    loads = [0] * 4
    for owner, matrix in zip(owners, shared_work.matrices, strict=True):
        loads[owner] += matrix.cost
    assert max(loads) - min(loads) <= max(matrix.cost for matrix in shared_work.matrices)
    only_row = find_holdings(sharded, 0)[3]
    assert only_row.find_holders(Matrix(3, None, 1, 8)) == [0, 1]
    part_holders = find_holdings(sharded, 0)[8]  # four matrices, each whole on one rank
    assert [part_holders.find_holders(m) for m in shared_work.matrices if m.weight == 8] == [
        [0],
        [1],
        [2],
        [3],
    ]
    assert sorted(
        owner for owner, m in zip(owners, shared_work.matrices, strict=True) if m.weight == 8
    ) == [0, 1, 2, 3]


@pytest.mark.slow
def test_the_ranks_choose_the_same_owners_with_about_as_much_to_do():
    in_group(4, choose)


STEPS = 6
CURVE = ("step", "loss", "grad_norm", "lr", "optimizer/lr/adamw")


def saving(data, folder, **overrides):
    return {
        **data,
        "job.dump_folder": folder,
        "optimizer.name": "Muon",
        "optimizer.muon_adamw_lr": 1e-3,
        "optimizer.muon_ns_dtype": "float32",
        "training.steps": STEPS,
        "lr_scheduler.total_steps": STEPS,
        "checkpoint.enable": True,
        "checkpoint.interval": STEPS // 2,
        **overrides,
    }


def curve(folder):
    return [[line[key] for key in CURVE] for line in metrics(folder)]


def tensors(folder, scratch):
    dcp_to_torch_save(folder / "checkpoint" / f"step-{STEPS}", scratch)
    loaded = torch.load(scratch, weights_only=True)
    return {name: tensor for name, tensor in loaded.items() if not name.startswith("rng/")}


@pytest.mark.slow
def test_a_resumed_run_equals_an_uninterrupted_one_and_goes_on_elsewhere(tmp_path, data):
    whole, half, moved = (tmp_path / name for name in ("whole", "half", "moved"))
    train(2, saving(data, whole))
    train(2, saving(data, half, **{"training.steps": STEPS // 2}))
    shutil.copytree(half, moved)
    refused = train(1, saving(data, moved, **{"optimizer.name": "AdamW"}), expect=2)
    assert "is not a checkpoint of this model: it lacks optimizer/layers.0." in refused
    train(2, saving(data, half))
    train(2, saving(data, moved, **{"parallelism.tensor_parallel_degree": 2}))

    assert curve(half) == curve(whole)
    expected = tensors(whole, tmp_path / "whole.pt")
    resumed = tensors(half, tmp_path / "half.pt")
    elsewhere = tensors(moved, tmp_path / "moved.pt")
    assert resumed.keys() == elsewhere.keys() == expected.keys()
    assert any(name.endswith("wq.weight/momentum_buffer") for name in expected)
    assert any(name.endswith("tok_embeddings.weight/exp_avg_sq") for name in expected)
    for name in expected:
        assert torch.equal(resumed[name], expected[name]), name
    for mine, theirs in zip(curve(moved), curve(whole), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5)
