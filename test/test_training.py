"""One loss curve: the same losses and norms on any ranks, layout, accumulation."""

from functools import cache

import pytest
from helpers.forking import train_in_turn
from helpers.launching import metrics

LOSS, NORM = 1e-6, 1e-5  # relative, fp32: only the order of sums differs
STEPS = 8

pytestmark = pytest.mark.slow

MICROBATCH_1 = {"training.local_batch_size": 1}
MICROBATCH_2 = {"training.local_batch_size": 2}
REPLICATE_2 = {"parallelism.data_parallel_replicate_degree": 2}
BF16 = {"training.mixed_precision_param": "bfloat16"}

# Every other layout, and gradients and weights, are shown by the parity tool (test_parity); these
# are whole runs, with all that train.py does around a step. That a launched run is one of these to
# the bit is shown in test_launch.
# name: (ranks, overrides, the run it must equal)
CURVES = {
    "one": (1, {}, None),
    "one-accumulation-4": (1, MICROBATCH_2, "one"),
    "one-bf16": (1, BF16, None),
    "two": (2, {}, "one"),
    "two-bf16": (2, BF16, None),
    "four-hsdp": (4, REPLICATE_2 | MICROBATCH_1, "one"),
}


@pytest.fixture(scope="module")
def curve(tmp_path_factory, data):
    """curve(name): the logged lines of that run."""
    folder = tmp_path_factory.mktemp("curves")

    @cache
    def train_on(ranks):
        given = {
            name: overrides for name, (count, overrides, _) in CURVES.items() if count == ranks
        }
        common = {**data, "training.steps": STEPS}
        train_in_turn(
            ranks,
            [
                {**common, "job.dump_folder": folder / name, **overrides}
                for name, overrides in given.items()
            ],
        )

    def lines(name):
        train_on(CURVES[name][0])
        return metrics(folder / name)

    return lines


def relative(a, b):
    return abs(a - b) / abs(b)


@pytest.mark.parametrize("name", [name for name, (_, _, reference) in CURVES.items() if reference])
def test_the_curve_is_the_same(curve, name):
    reference = CURVES[name][2]
    lines, expected = curve(name), curve(reference)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for mine, theirs in zip(lines, expected, strict=True):
        assert mine["tokens_seen"] == theirs["tokens_seen"]
        assert mine["lr"] == theirs["lr"]
        assert relative(mine["loss"], theirs["loss"]) <= LOSS, mine["step"]
        assert relative(mine["max_loss"], theirs["max_loss"]) <= LOSS, mine["step"]
        assert relative(mine["grad_norm"], theirs["grad_norm"]) <= NORM, mine["step"]


def test_the_loss_falls(curve):
    lines = curve("one")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1


def test_bf16_stays_near_fp32_and_is_the_same_precision_on_two_ranks(curve):
    fp32, one, two = (curve(name) for name in ("one", "one-bf16", "two-bf16"))
    # 8 bits of mantissa round each product by up to 2^-8; over a model's depth the loss moves by
    # well under 1e-2, and two ranks differ from one only in the order of sums of bf16 gradients.
    assert all(relative(a["loss"], b["loss"]) < 1e-2 for a, b in zip(one, fp32, strict=True))
    assert all(relative(a["loss"], b["loss"]) < 1e-3 for a, b in zip(two, one, strict=True))
    assert any(a["loss"] != b["loss"] for a, b in zip(one, fp32, strict=True)), (
        "bf16 changed nothing"
    )
