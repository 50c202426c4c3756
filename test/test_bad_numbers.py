"""Steps that are not finite, or lie far above the others: what ends, is skipped, stays."""

import json
import math
import re
import statistics
from collections import deque

import pytest
import torch
import torch.distributed as dist
from helpers.forking import in_group, on_ranks, run_trainer
from helpers.launching import options
from helpers.logged import summary
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import train
from torchtrain import ranks
from torchtrain.bad_numbers import StepGuard, describe_origin, find_spike
from torchtrain.checkpoint.commit import GuardState
from torchtrain.config.schema import Training
from torchtrain.config_manager import JobConfig
from torchtrain.errors import NonFinite
from torchtrain.lr_scheduling import lr_factor
from torchtrain.set_up import set_up
from torchtrain.shards import local

FINITE = torch.tensor(1.0)
WO = "layers.1.attention.wo.weight"


# ---- what counts as a spike ----


def recent(losses, window=8, norms=None):
    return deque(zip(losses, norms or [1.0, 1.5] * len(losses), strict=False), maxlen=window)


def test_a_spike_lies_so_many_deviations_above_the_mean():
    losses = [2.0, 2.5, 2.25, 2.75, 2.0]
    limit = statistics.mean(losses) + 3 * statistics.stdev(losses)
    assert find_spike((limit - 1e-9, 1.0), recent(losses), 3.0) is None
    said = find_spike((limit + 1e-9, 1.0), recent(losses), 3.0)
    assert said == (
        "the loss lies more than 3 standard deviations above the mean of the last 5 steps "
        "(2.3, deviation 0.33)"
    )
    assert find_spike((0.0, 0.0), recent(losses), 3.0) is None, "far below is good"
    assert find_spike((2.3, 9.0), recent(losses), 3.0).startswith("the gradient norm lies")


@pytest.mark.parametrize(("window", "least"), [(8, 4), (7, 3), (2, 2), (3, 2)])
def test_a_spike_is_seen_once_half_of_the_window_is_there(window, least):
    losses = [2.0 + 0.1 * (step % 2) for step in range(least)]
    assert find_spike((99.0, 1.0), recent(losses[:-1], window), 6.0) is None
    assert find_spike((99.0, 1.0), recent(losses, window), 6.0) is not None


# ---- what the guard makes of it ----


class Samples:
    """A loader of 8 samples per step."""

    def samples_before(self, step):
        return 8 * (step - 1)


def guard(**options):
    return StepGuard(Training(**options), Samples(), {})


def judged(guard, step, loss=2.0, norm=1.0):
    return guard.judge(summary(step, loss=loss, grad_norm=norm), torch.tensor(loss))


@pytest.fixture(scope="module")
def device():
    yield ranks.join_process_group(60)
    dist.destroy_process_group()


@pytest.mark.usefixtures("device")
def test_as_many_steps_in_a_row_are_skipped_as_may_be():
    skipping = guard(on_nonfinite="skip", max_skips=2)
    outcomes = [judged(skipping, step, loss) for step, loss in enumerate([2, math.nan] * 3, 1)]
    assert [outcome.skipped for outcome in outcomes] == [False, True] * 3
    assert [outcome.skipped_steps for outcome in outcomes] == [0, 1, 1, 2, 2, 3]
    assert judged(skipping, 7, norm=math.inf).skipped
    with pytest.raises(NonFinite) as fault:
        judged(skipping, 8, loss=-math.inf)
    said = str(fault.value)
    assert said.startswith("step 8: loss -inf, gradient norm 1, on global samples 56 to 63; the")
    assert "No more than training.max_skips = 2 steps in a row may be skipped" in said
    assert "The weights are still those of step 5." in said


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (2.0, math.nan), (math.inf, 1.0)])
def test_by_default_the_first_one_ends_the_run(loss, norm):
    stopping = guard()
    good = judged(stopping, 1)
    assert not good.skipped
    assert good.skipped_steps is None
    with pytest.raises(NonFinite, match=r"on global samples 8 to 15;.* still those of step 1\."):
        judged(stopping, 2, loss, norm)


@pytest.mark.usefixtures("device")
def test_spikes_are_skipped_alone_or_with_what_is_not_finite():
    skipping = guard(spike_deviations=6.0, spike_window=8, max_skips=3)
    losses = [2.0, 2.1, 1.9, 2.0, 50.0, 2.0]
    outcomes = [judged(skipping, step, loss) for step, loss in enumerate(losses, 1)]
    assert [outcome.skipped for outcome in outcomes] == [False] * 4 + [True, False]
    with pytest.raises(NonFinite, match="step 7: loss nan"):
        judged(skipping, 7, math.nan)
    assert len(skipping.recent) == 6, "what is not finite is no part of the past"


def test_a_lasting_shift_is_skipped_four_times_at_most():
    """What was skipped counts in the mean, so that no shift is skipped for ever."""
    skipping = guard(spike_deviations=6.0)
    for step in range(1, 129):
        judged(skipping, step, 2.0 + 0.01 * (step % 3))
    outcomes = [judged(skipping, step, 1e6 + step % 3) for step in range(129, 139)]
    assert [outcome.skipped for outcome in outcomes] == [True] * 4 + [False] * 6


def test_a_resumed_guard_knows_what_it_knew():
    whole = guard(spike_deviations=3.0, spike_window=6)
    losses = [2.0, 2.5, 2.2, 2.4, 9.0, 1 / 3]
    for step, loss in enumerate(losses, 1):
        judged(whole, step, loss)
    resumed = guard(spike_deviations=3.0, spike_window=6)
    resumed.resume(GuardState.model_validate_json(whole.state().model_dump_json()))
    assert (resumed.recent, resumed.skipped) == (whole.recent, 1)
    assert resumed.recent.maxlen == 6
    fresh = guard()
    fresh.resume(None)
    assert fresh.state() == GuardState(skipped=0, in_a_row=0, recent=[])


def parts_of(numbers):
    """Pipeline stages of two layers each, whose gradients are finite."""
    parts = {}
    for number in numbers:
        parts[number] = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        for parameter in parts[number].parameters():
            parameter.grad = torch.ones(2, 2)
    return parts


def name_the_first():
    """Rank 0 has the first and the last of four stages."""
    rank = dist.get_rank()
    parts = parts_of([3, 0] if rank == 0 else [1, 2])
    loss = torch.tensor(2.0)
    assert describe_origin(parts, loss) == (
        "every element of the gradient is finite, but not its norm"
    )
    if rank == 0:
        parts[3][0].weight.grad[0, 0] = math.nan
    assert describe_origin(parts, loss).endswith("is not finite is 0.weight, on rank 0")
    if rank == 1:
        parts[1][1].weight.grad[1, 1] = math.inf
        loss = loss * math.nan
    assert describe_origin(parts, loss) == (
        "the loss is not finite on rank 1; the first parameter whose gradient is not finite is "
        "1.weight, on rank 1"
    )


@pytest.mark.slow
def test_the_first_gradient_in_the_order_of_the_model_is_named_with_its_rank():
    in_group(2, name_the_first, timeout_s=60)


# ---- whole runs ----


def spoil(faults):
    """Let `train.forward_backward` spoil steps: {step: (rank or None for all, how)}."""
    plain = train.forward_backward

    def spoiled(trainer, microbatches):
        loss = plain(trainer, microbatches)
        rank, how = faults.get(trainer.step + 1, (-1, ""))
        if rank in (None, dist.get_rank()):
            if how == "spike":
                return loss._replace(own=loss.own * 1000)
            if how == "loss":
                return loss._replace(own=loss.own * math.nan)
            local(trainer.weights[how].grad).view(-1)[-1] = math.nan
        return loss

    return spoiled


def run_spoiled(arguments, faults):
    """Be a rank of a run with spoiled steps."""
    train.forward_backward = spoil(faults)
    return run_trainer(arguments)


def spoiled_run(world_size, overrides, faults, expect=0):
    return on_ranks(world_size, run_spoiled, options(overrides), faults, expect=expect)


def lines_of(folder):
    """The logged lines, read as strict JSON."""

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    text = (folder / "metrics.jsonl").read_text()
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def without(trainer, skipped, steps):
    """Train, and let no optimizer see the skipped steps; return the rates of all steps."""
    rates = []
    for step in range(1, steps + 1):
        for group in trainer.optimizer.param_groups:
            group["lr"] = trainer.config.optimizer.lr * lr_factor(step, trainer.plan.schedule)
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        if step not in skipped:
            train.forward_backward(trainer, trainer.loader.step_batches(step))
            train.clip_gradients(trainer)
            trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        trainer.step += 1
    return rates


def state_of(trainer):
    tensors = {name: local(weight.detach()).clone() for name, weight in trainer.weights.items()}
    for name, weight in trainer.weights.items():
        for key, value in trainer.optimizer.state[weight].items():
            tensors[f"{name} {key}"] = local(value).clone()
    return tensors


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


@pytest.mark.parametrize("first", [1, 2])
def test_a_skipped_step_changes_nothing_and_counts(first, data, device, tmp_path, monkeypatch):
    given = {**data, "training.steps": 5, "training.on_nonfinite": "skip", "metrics.log_freq": 5}
    given |= {"job.dump_folder": tmp_path, "metrics.enable_tensorboard": True}
    config = JobConfig().parse_args(options(given), world_size=1)
    reference = set_up(config, device)
    rates = without(reference, [first, 3], steps=5)
    trainer = set_up(config, device)
    monkeypatch.setattr(train, "set_up", lambda *_: trainer)
    monkeypatch.setattr(train, "forward_backward", spoil({first: (0, "loss"), 3: (0, WO)}))
    train.run(config, device)
    assert_equal(state_of(trainer), state_of(reference))
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [first, 3, 5], "a skipped step has a line"
    assert [line.get("skipped") for line in lines] == [True, True, None]
    assert [line["skipped_steps"] for line in lines] == [1, 2, 2]
    assert [line["loss"] is None for line in lines] == [True, False, False]
    assert [line["grad_norm"] is None for line in lines] == [False, True, False]
    assert [line["lr"] for line in lines] == [rates[step - 1] for step in (first, 3, 5)]
    assert [line["tokens_seen"] for line in lines] == [256 * step for step in (first, 3, 5)]


def test_a_skipped_step_leaves_the_balance_of_the_experts(data, device):
    experts = {"model.n_experts": 4, "model.experts_per_token": 2, "model.router_bias": True}
    trainer = set_up(JobConfig().parse_args(options({**data, **experts}), world_size=1), device)
    biases = [bias for name, bias in trainer.buffers.items() if "bias" in name]
    assert len(biases) == 2
    for skips in (True, False):
        train.forward_backward(trainer, trainer.loader.step_batches(trainer.step + 1))
        train.optimizer_step(trainer, skips=skips)
        assert all(bias.any() != skips for bias in biases)
    assert trainer.step == 2


def test_without_skipping_no_line_speaks_of_it(data, device, tmp_path):
    given = {**data, "training.steps": 1, "job.dump_folder": tmp_path}
    train.run(JobConfig().parse_args(options(given), world_size=1), device)
    assert not [key for key in lines_of(tmp_path)[0] if "skipped" in key]


# Two in a row on one rank alone, then a spike; the first checkpoint lies between.
FAULTS = {3: (1, WO), 4: (1, "loss"), 7: (None, "spike")}
SKIPPING = {
    "training.steps": 9,
    "lr_scheduler.total_steps": 9,
    "training.on_nonfinite": "skip",
    "training.max_skips": 2,
    "training.spike_deviations": 100,
    "training.spike_window": 4,
    "checkpoint.enable": True,
    "checkpoint.interval": 4,
}


def tensors(folder, step, scratch):
    dcp_to_torch_save(folder / "checkpoint" / f"step-{step}", scratch)
    return torch.load(scratch, weights_only=True)


def saved_guard(folder, step):
    return json.loads((folder / f"checkpoint/step-{step}/train_state.json").read_text())["guard"]


def assert_same_run(mine, theirs, step, tmp_path):
    keys = ("step", "loss", "grad_norm", "lr", "tokens_seen", "skipped", "skipped_steps")
    curves = [[[line.get(key) for key in keys] for line in lines_of(run)] for run in (mine, theirs)]
    assert curves[0] == curves[1]
    assert saved_guard(mine, step) == saved_guard(theirs, step)
    assert_equal(tensors(mine, step, tmp_path / "a.pt"), tensors(theirs, step, tmp_path / "b.pt"))


@pytest.mark.slow
def test_a_resumed_run_skips_as_one_that_was_never_stopped(data, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    given = {**data, **SKIPPING}
    printed = spoiled_run(2, {**given, "job.dump_folder": whole}, FAULTS)
    said = [line for line in printed.splitlines() if "is skipped" in line]
    assert len(said) == 3, "once for each step, not once for each rank"
    assert "step 3 is skipped (1 of at most 2 in a row, 1 in all): loss" in said[0]
    assert "on global samples 16 to 23; the first parameter whose" in said[0]
    assert said[0].endswith(f"is not finite is {WO}, on rank 1")
    assert "step 4 is skipped (2 of at most 2 in a row, 2 in all)" in said[1]
    assert "the loss is not finite on rank 1" in said[1]
    assert re.search(r"step 7 is skipped \(1 of .* more than 100 standard deviations", said[2])
    given["job.dump_folder"] = parts
    spoiled_run(2, {**given, "training.steps": 6}, FAULTS)
    spoiled_run(2, given, FAULTS)
    assert saved_guard(parts, 4)["in_a_row"] == 2
    assert saved_guard(parts, 9)["skipped"] == 3
    assert_same_run(parts, whole, 9, tmp_path)


@pytest.mark.slow
def test_skips_in_a_row_count_over_a_resume(data, tmp_path):
    faults = dict.fromkeys((3, 4, 5), (0, "loss"))
    given = {**data, **SKIPPING, "job.dump_folder": tmp_path}
    spoiled_run(1, {**given, "training.steps": 4}, faults)
    printed = spoiled_run(1, given, faults, expect=1)
    assert "step 5: loss nan" in printed
    assert "training.max_skips = 2" in printed
    assert "The weights are still those of step 2." in printed


@pytest.mark.slow
def test_a_run_whose_first_step_was_skipped_is_resumed(data, tmp_path):
    """Its optimizer has no state yet."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    given = {**data, **SKIPPING, "training.steps": 3, "checkpoint.interval": 1}
    spoiled_run(1, {**given, "job.dump_folder": whole}, {1: (0, WO)})
    given["job.dump_folder"] = parts
    spoiled_run(1, {**given, "training.steps": 1}, {1: (0, WO)})
    spoiled_run(1, given, {})
    assert_same_run(parts, whole, 3, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("left_out", ["optimizer", "train_state"])
def test_a_skip_right_after_a_part_was_left_out_leaves_a_checkpoint_that_loads(
    left_out, data, tmp_path
):
    """Whether the optimizer has a state does not follow from the counts."""
    given = {**data, **SKIPPING, "checkpoint.interval": 1}
    spoiled_run(1, {**given, "training.steps": 2, "job.dump_folder": tmp_path / "first"}, {})
    given |= {
        "checkpoint.initial_load_path": tmp_path / "first" / "checkpoint" / "step-2",
        "checkpoint.initial_load_model_only": False,
        "checkpoint.exclude_from_loading": left_out,
    }
    begin = 3 if left_out == "optimizer" else 1
    fault = {begin: (0, WO)}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    spoiled_run(1, {**given, "training.steps": 5, "job.dump_folder": whole}, fault)
    given["job.dump_folder"] = parts
    spoiled_run(1, {**given, "training.steps": begin}, fault)
    spoiled_run(1, {**given, "training.steps": 5}, {})
    assert_same_run(parts, whole, 5, tmp_path)


@pytest.mark.slow
def test_the_end_names_the_first_gradient_that_is_not_finite(data, tmp_path):
    printed = spoiled_run(2, {**data, "job.dump_folder": tmp_path}, {2: (1, WO)}, expect=1)
    assert printed.count("step 2: loss") == 1
    assert f"the first parameter whose gradient is not finite is {WO}, on rank 1." in printed
    assert "global samples 8 to 15" in printed
    assert "Traceback" not in printed
