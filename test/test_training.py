"""One loss curve: the same losses, gradients and weights on any ranks, layout, accumulation."""

from functools import cache

import pytest
import torch
import torch.distributed as dist
from helpers.forking import on_ranks, train
from helpers.launching import launched, metrics, options

import train as trainer_module
from torchtrain.config_manager import JobConfig
from torchtrain.optimizers.clipping import clip_grad_norm_
from torchtrain.ranks import join_process_group
from torchtrain.set_up import set_up

LOSS, NORM, GRADIENT = 1e-6, 1e-5, 1e-5  # relative, fp32: only the order of sums differs

pytestmark = pytest.mark.slow

MICROBATCH_1 = {"training.local_batch_size": 1}
MICROBATCH_2 = {"training.local_batch_size": 2}
REPLICATE_2 = {"parallelism.data_parallel_replicate_degree": 2}
BF16 = {"training.mixed_precision_param": "bfloat16"}

# Every other layout is shown by the parity tool (test_parity); these are whole runs of more steps.
# name: (ranks, overrides, the run it must equal)
CURVES = {
    "one": (1, {}, None),
    "one-accumulation-4": (1, MICROBATCH_2, "one"),
    "one-bf16": (1, BF16, None),
    "two": (2, {}, "one"),
    "two-accumulation-2": (2, MICROBATCH_2, "one"),
    "two-bf16": (2, BF16, None),
    "four-hsdp": (4, REPLICATE_2 | MICROBATCH_1, "one"),
}

FIRST_STEPS = {
    "one": (1, {}),
    "two": (2, MICROBATCH_1),
    "four-hsdp": (4, REPLICATE_2 | MICROBATCH_1),
}


@pytest.fixture(scope="module")
def curve(tmp_path_factory, data):
    """curve(name): the logged lines of that run, which is made when first asked for."""
    folder = tmp_path_factory.mktemp("curves")

    @cache
    def lines(name):
        ranks, overrides, _ = CURVES[name]
        train(ranks, {**data, "job.dump_folder": folder / name, "training.steps": 20, **overrides})
        return metrics(folder / name)

    return lines


@pytest.fixture(scope="module")
def first_step(tmp_path_factory, data):
    """first_step(name, mask): what was whole after the first step of that run."""
    folder = tmp_path_factory.mktemp("first-steps")

    @cache
    def result(name, mask):
        ranks, overrides = FIRST_STEPS[name]
        on_ranks(
            ranks, step_once, options({**data, **overrides}), folder / f"{name}-{mask}.pt", mask
        )
        return torch.load(folder / f"{name}-{mask}.pt", weights_only=True)

    return result


def step_once(arguments, out, mask):
    """A rank's first step: whole weights, gradients, loss, norm; `mask` hides labels unevenly."""
    trainer = set_up(JobConfig().parse_args(arguments), join_process_group(60))
    weights = {name: p.detach().full_tensor().clone() for name, p in trainer.weights.items()}
    batches = [masked(batch) if mask else batch for batch in trainer.loader.step_batches(1)]
    loss, _ = trainer_module.forward_backward(trainer, batches)
    dist.all_reduce(loss)
    gradients = {name: p.grad.full_tensor().clone() for name, p in trainer.weights.items()}
    norm = clip_grad_norm_(trainer.weights.values(), 1e9)
    if dist.get_rank() == 0:
        torch.save({"weights": weights, "gradients": gradients, "loss": loss, "norm": norm}, out)
    dist.destroy_process_group()


def masked(microbatch):
    """Hide labels, as many as the sample's number says: some samples keep none, some all."""
    for row, sample in enumerate(microbatch.sample_ids):
        hidden = (sample * 13) % (microbatch.labels.shape[1] + 1)
        microbatch.labels[row, :hidden] = -100
    return microbatch


def relative(a, b):
    return abs(a - b) / abs(b)


@pytest.mark.parametrize("name", [name for name, (_, _, reference) in CURVES.items() if reference])
def test_the_curve_is_the_same(curve, name):
    reference = CURVES[name][2]
    lines, expected = curve(name), curve(reference)
    assert [line["step"] for line in lines] == list(range(1, 21))
    for mine, theirs in zip(lines, expected, strict=True):
        assert mine["tokens_seen"] == theirs["tokens_seen"]
        assert mine["lr"] == theirs["lr"]
        assert relative(mine["loss"], theirs["loss"]) <= LOSS, mine["step"]
        assert relative(mine["max_loss"], theirs["max_loss"]) <= LOSS, mine["step"]
        assert relative(mine["grad_norm"], theirs["grad_norm"]) <= NORM, mine["step"]


def test_the_loss_falls(curve):
    lines = curve("one")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1


@pytest.mark.parametrize(
    "mask", [False, True], ids=["all labels", "unequal numbers of valid labels"]
)
@pytest.mark.parametrize("name", [name for name in FIRST_STEPS if name != "one"])
def test_initial_weights_are_bitwise_equal_and_gradients_agree(first_step, name, mask):
    reference = first_step("one", mask)
    result = first_step(name, mask)
    assert result["weights"].keys() == reference["weights"].keys()
    assert relative(result["loss"].item(), reference["loss"].item()) <= LOSS
    assert relative(result["norm"].item(), reference["norm"].item()) <= NORM
    for parameter, weight in reference["weights"].items():
        assert torch.equal(result["weights"][parameter], weight), parameter
        mine, theirs = result["gradients"][parameter], reference["gradients"][parameter]
        assert (mine - theirs).norm() <= GRADIENT * theirs.norm(), parameter


def test_masking_labels_changes_the_loss(first_step):
    losses = [first_step("one", mask)["loss"].item() for mask in (False, True)]
    assert losses[0] != losses[1]


def test_bf16_stays_near_fp32_and_is_the_same_precision_on_two_ranks(curve):
    fp32, one, two = (curve(name) for name in ("one", "one-bf16", "two-bf16"))
    # 8 bits of mantissa round each product by up to 2^-8; over a model's depth the loss moves by
    # well under 1e-2, and two ranks differ from one only in the order of sums of bf16 gradients.
    assert all(relative(a["loss"], b["loss"]) < 1e-2 for a, b in zip(one, fp32, strict=True))
    assert all(relative(a["loss"], b["loss"]) < 1e-3 for a, b in zip(two, one, strict=True))
    assert any(a["loss"] != b["loss"] for a, b in zip(one, fp32, strict=True)), (
        "bf16 changed nothing"
    )


def test_the_launched_run_is_the_same_to_the_bit(tmp_path, data, curve):
    launched(2, {**data, "job.dump_folder": tmp_path / "launched", "training.steps": 20})
    keys = ("step", "loss", "max_loss", "grad_norm", "lr")
    lines, forked = metrics(tmp_path / "launched"), curve("two")
    assert [[line[key] for key in keys] for line in lines] == [
        [line[key] for key in keys] for line in forked
    ]
