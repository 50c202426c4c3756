"""Tensor parallelism against one process: initial bits, loss, gradients, norm, later weights.

All cases run one after the other on one set of four gloo ranks, and their references on one; each
saves what it found, whole, from rank 0.
"""

from dataclasses import dataclass, replace

import pytest
import torch
import torch.distributed as dist
from helpers.forking import in_group
from torch.distributed.tensor import DTensor

from torchtrain.catalog.models import ModelShape
from torchtrain.checkpoint import Checkpointer, Progress
from torchtrain.config.layout import Degrees
from torchtrain.config.schema import Checkpoint, Parallelism, Training
from torchtrain.config.schema import Optimizer as OptimizerConfig
from torchtrain.errors import UserError
from torchtrain.loss import count_valid, sequence_losses
from torchtrain.models.llama import Transformer
from torchtrain.optimizers.build import build_optimizer
from torchtrain.optimizers.clipping import clip_grad_norm_
from torchtrain.parallelisms.fsdp import apply_fsdp
from torchtrain.parallelisms.initial_weights import materialize
from torchtrain.parallelisms.mesh import Mesh
from torchtrain.parallelisms.tensor_parallel import apply_tensor_parallel, loss_context

LOSS, NORM, GRADIENT = 1e-6, 1e-5, 1e-5  # relative, fp32: only the order of sums differs
B, S, STEPS, SEED = 4, 16, 2, 5
# On four ranks: one key/value head each, with its two query heads.
SHAPE = ModelShape(32, 2, 8, 4, 48, 44)
# 45 rows over four ranks leave 9 for the last; 25 feed-forward columns per rank are then uneven
# over FSDP's two.
ODD_VOCABULARY = replace(SHAPE, vocab_size=45)
ODD_EVERYWHERE = replace(SHAPE, vocab_size=45, ffn_hidden_dim=50)

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Case:
    """A layout, and what is asked of it."""

    dp_shard: int = 1
    tp: int = 1
    sequence_parallel: bool = True
    loss_parallel: bool = True
    shape: ModelShape = SHAPE


WHOLE = {"sequence_parallel": False, "loss_parallel": False}
# What divides evenly is test_parity's to show, with every other technique.
CASES = {
    "tp4-odd-vocabulary-whole": Case(tp=4, **WHOLE, shape=ODD_VOCABULARY),
    "fsdp2-tp2-odd-everywhere": Case(dp_shard=2, tp=2, shape=ODD_EVERYWHERE),
}
RESUMED = ["fsdp2-tp2-odd-everywhere"]


def build(case):
    """Apply what apply.py applies, in its order, and give the model its initial weights."""
    mesh = Mesh(Degrees(pp=1, dp_replicate=1, dp_shard=case.dp_shard, cp=1, tp=case.tp), "cpu")
    with torch.device("meta"):
        model = Transformer(case.shape)
    if case.tp > 1:
        parallelism = Parallelism(
            disable_sequence_parallel=not case.sequence_parallel,
            disable_loss_parallel=not case.loss_parallel,
        )
        apply_tensor_parallel(model, mesh.get("tp"), parallelism)
    apply_fsdp(
        model,
        mesh,
        Training(mixed_precision_param="float32"),
        reshard_after_forward="default",
    )
    materialize(model, torch.device("cpu"), SEED)
    return model


def batch_of(step):
    """Tokens and labels [B, S] with very unequal numbers of valid labels: one sequence has none."""
    tokens, labels = torch.randint(
        SHAPE.vocab_size, (2, B, S), generator=torch.Generator().manual_seed(step)
    )
    for row, hidden in enumerate((S, 3, 0, S - 1)):
        labels[row, :hidden] = -100
    return tokens, labels


def whole(tensors):
    return {name: tensor.detach().full_tensor().clone() for name, tensor in tensors}


def train(case, model, optimizer, first=0):
    """Loss and norm of each step, the gradients of the first, and the weights after the last."""
    mine = slice(dist.get_rank() // case.tp, None, case.dp_shard)
    losses, norms, gradients = [], [], {}
    for step in range(first, first + STEPS):
        tokens, labels = batch_of(step)
        with loss_context(vocabulary_sharded=case.tp > 1 and case.loss_parallel):
            loss = (
                sequence_losses(model(tokens[mine]), labels[mine]).sum() / count_valid(labels).sum()
            )
            assert type(loss) is torch.Tensor
            loss.backward()
        gradients = gradients or whole((name, p.grad) for name, p in model.named_parameters())
        norms.append(clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        optimizer.zero_grad()
        total = loss.detach()
        dist.all_reduce(total)
        losses.append(total.item() / case.tp)
    weights = whole(model.named_parameters())
    return {"losses": losses, "norms": norms, "gradients": gradients, "weights": weights}


def largest_drift(model):
    """Between what two ranks hold of a parameter that both should hold."""
    drift = 0.0
    for parameter in model.parameters():
        assert isinstance(parameter, DTensor)
        for dim, placement in enumerate(parameter.placements):
            if placement.is_replicate():
                local = parameter.to_local().detach().contiguous()
                copies = [torch.empty_like(local) for _ in range(parameter.device_mesh.size(dim))]
                dist.all_gather(copies, local, group=parameter.device_mesh.get_group(dim))
                drift = max(drift, *((copy - local).abs().max().item() for copy in copies))
    return drift


def start(case):
    model = build(case)
    return model, build_optimizer(dict(model.named_parameters()), OptimizerConfig(lr=1e-3))


def checkpointer(scratch, name):
    return Checkpointer(Checkpoint(enable=True), scratch / "runs" / name)


def four_ranks(scratch):
    found = {}
    for name, case in CASES.items():
        model, optimizer = start(case)
        initial = whole(model.named_parameters())
        found[name] = {
            "initial": initial,
            **train(case, model, optimizer),
            "drift": largest_drift(model),
        }
        if name in RESUMED:
            saver = checkpointer(scratch, name)
            saver.save(
                dict(model.named_parameters()),
                optimizer,
                Progress(step=STEPS, tokens_seen=0, data={}, config={}),
            )
            found[f"{name}, continued"] = train(case, model, optimizer, first=STEPS)
            saver.finish()
    if dist.get_rank() == 0:
        torch.save(found, scratch / "four.pt")


def one_rank(scratch):
    """The references, by shape and precision; and what four ranks saved, continued."""
    found = {}
    for name, case in CASES.items():
        alone = reference(case)
        model, optimizer = start(alone)
        if name in RESUMED:
            saved = checkpointer(scratch, name)
            saved.load(saved.find(), dict(model.named_parameters()), optimizer)
            initial = whole(model.named_parameters())
            found[f"{name}, continued"] = {
                "initial": initial,
                **train(alone, model, optimizer, first=STEPS),
            }
            model, optimizer = start(alone)
        if alone not in found:
            found[alone] = {
                "initial": whole(model.named_parameters()),
                **train(alone, model, optimizer),
            }
    torch.save({str(key): result for key, result in found.items()}, scratch / "one.pt")


def reference(case):
    return Case(shape=case.shape)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What four ranks found, and what one did."""
    scratch = tmp_path_factory.mktemp("tensor-parallel")
    in_group(4, four_ranks, scratch)
    in_group(1, one_rank, scratch)
    return [torch.load(scratch / f"{ranks}.pt", weights_only=True) for ranks in ("four", "one")]


def relative(a, b):
    return abs(a - b) / abs(b)


def compare(mine, theirs):
    for a, b in zip(mine["losses"], theirs["losses"], strict=True):
        assert relative(a, b) <= LOSS
    for a, b in zip(mine["norms"], theirs["norms"], strict=True):
        assert relative(a, b) <= NORM
    for kind in ("gradients", "weights"):
        assert mine[kind].keys() == theirs[kind].keys()
        for name, expected in theirs[kind].items():
            assert (mine[kind][name] - expected).norm() <= GRADIENT * expected.norm(), (kind, name)


@pytest.mark.parametrize("name", CASES)
def test_equals_one_process(results, name):
    four, one = results
    compare(four[name], one[str(reference(CASES[name]))])


@pytest.mark.parametrize("name", CASES)
def test_starts_from_the_same_bits_and_copies_do_not_drift(results, name):
    four, one = results
    for parameter, expected in one[str(reference(CASES[name]))]["initial"].items():
        assert torch.equal(four[name]["initial"][parameter], expected), parameter
    assert four[name]["drift"] == 0.0


@pytest.mark.parametrize("name", RESUMED)
def test_a_checkpoint_resumes_on_one_process(results, name):
    four, one = results
    for parameter, expected in four[name]["weights"].items():
        assert torch.equal(one[f"{name}, continued"]["initial"][parameter], expected), parameter
    compare(one[f"{name}, continued"], four[f"{name}, continued"])


class RanksAlone:
    """As much of a mesh as a refusal looks at."""

    device_type = "cpu"

    def __init__(self, ranks):
        self.ranks = ranks

    def size(self):
        return self.ranks


def refused(shape, ranks, async_tp):
    with torch.device("meta"):
        model = Transformer(shape)
    with pytest.raises(UserError) as fault:
        apply_tensor_parallel(
            model, RanksAlone(ranks), Parallelism(enable_async_tensor_parallel=async_tp)
        )
    return str(fault.value)


def test_a_rank_without_any_vocabulary_is_refused():
    text = refused(replace(SHAPE, vocab_size=9), 4, async_tp=False)
    assert "tensor_parallel_degree = 4" in text
    assert "model.vocab_size = 12" in text


def test_async_is_refused_without_cuda():
    text = refused(SHAPE, 4, async_tp=True)
    assert "enable_async_tensor_parallel needs CUDA" in text
    assert "cpu" in text
