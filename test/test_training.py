"""One loss curve: whatever the number of ranks, the accumulation or the layout, the same losses, gradients, weights."""

import pytest
import torch
from launching import metrics, run_cases, train

LOSS, NORM, GRADIENT = 1e-6, 1e-5, 1e-5  # relative, fp32: only the order of sums differs

pytestmark = pytest.mark.slow

MICROBATCH_1 = {"training.local_batch_size": 1}
MICROBATCH_2 = {"training.local_batch_size": 2}
REPLICATE_2 = {"parallelism.data_parallel_replicate_degree": 2}
BF16 = {"training.mixed_precision_param": "bfloat16"}

# Every other layout is the parity tool's to show (test_parity); these are whole runs, over more steps.
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

FIRST_STEPS = {"one": (1, {}), "two": (2, MICROBATCH_1), "four-hsdp": (4, REPLICATE_2 | MICROBATCH_1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, data):
    """All runs of this file, made on three sets of ranks."""
    scratch = tmp_path_factory.mktemp("training")
    for ranks in (1, 2, 4):
        cases = [
            {"overrides": {**data, "job.dump_folder": str(scratch / name), "training.steps": 20, **overrides}}
            for name, (wanted, overrides, _) in CURVES.items()
            if wanted == ranks
        ]
        for name, (wanted, overrides) in FIRST_STEPS.items():
            for mask in (False, True):
                if wanted == ranks:
                    out = str(scratch / f"{name}-{mask}.pt")
                    cases.append({"overrides": {**data, **overrides}, "first_step": out, "mask": mask})
        run_cases(scratch, ranks, cases)
    return scratch


def relative(a, b):
    return abs(a - b) / abs(b)


@pytest.mark.parametrize("name", [name for name, (_, _, reference) in CURVES.items() if reference])
def test_the_curve_is_the_same(folder, name):
    reference = CURVES[name][2]
    lines, expected = metrics(folder / name), metrics(folder / reference)
    assert [line["step"] for line in lines] == list(range(1, 21))
    for mine, theirs in zip(lines, expected, strict=True):
        assert mine["tokens_seen"] == theirs["tokens_seen"]
        assert mine["lr"] == theirs["lr"]
        assert relative(mine["loss"], theirs["loss"]) <= LOSS, mine["step"]
        assert relative(mine["max_loss"], theirs["max_loss"]) <= LOSS, mine["step"]
        assert relative(mine["grad_norm"], theirs["grad_norm"]) <= NORM, mine["step"]


def test_the_loss_falls(folder):
    lines = metrics(folder / "one")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1


@pytest.mark.parametrize("mask", [False, True], ids=["all labels", "unequal numbers of valid labels"])
@pytest.mark.parametrize("name", [name for name in FIRST_STEPS if name != "one"])
def test_initial_weights_are_bitwise_equal_and_gradients_agree(folder, name, mask):
    reference = torch.load(folder / f"one-{mask}.pt", weights_only=True)
    result = torch.load(folder / f"{name}-{mask}.pt", weights_only=True)
    assert result["weights"].keys() == reference["weights"].keys()
    assert relative(result["loss"].item(), reference["loss"].item()) <= LOSS
    assert relative(result["norm"].item(), reference["norm"].item()) <= NORM
    for parameter, weight in reference["weights"].items():
        assert torch.equal(result["weights"][parameter], weight), parameter
        mine, theirs = result["gradients"][parameter], reference["gradients"][parameter]
        assert (mine - theirs).norm() <= GRADIENT * theirs.norm(), parameter


def test_masking_labels_changes_the_loss(folder):
    losses = [torch.load(folder / f"one-{mask}.pt", weights_only=True)["loss"].item() for mask in (False, True)]
    assert losses[0] != losses[1]


def test_bf16_stays_near_fp32_and_is_the_same_precision_on_two_ranks(folder):
    fp32, one, two = (metrics(folder / name) for name in ("one", "one-bf16", "two-bf16"))
    # 8 bits of mantissa round each product by up to 2^-8; over a model's depth the loss moves by well under 1e-2, and
    # two ranks differ from one only in the order of sums of bf16 gradients.
    assert all(relative(a["loss"], b["loss"]) < 1e-2 for a, b in zip(one, fp32, strict=True))
    assert all(relative(a["loss"], b["loss"]) < 1e-3 for a, b in zip(two, one, strict=True))
    assert any(a["loss"] != b["loss"] for a, b in zip(one, fp32, strict=True)), "bf16 changed nothing"


def test_the_launched_run_is_the_same_to_the_bit(tmp_path, data, folder):
    train(2, {**data, "job.dump_folder": tmp_path / "launched", "training.steps": 20})
    keys = ("step", "loss", "max_loss", "grad_norm", "lr")
    launched, inside = metrics(tmp_path / "launched"), metrics(folder / "two")
    assert [[line[key] for key in keys] for line in launched] == [[line[key] for key in keys] for line in inside]
