"""DualPipeV's overlap: turns, faults and threads of the lanes; training is that of the schedule."""

import os
import random
import threading
import time

import pytest
import torch
import torch.distributed as dist
from helpers.configs import report
from helpers.forking import Ranks, in_group, on_ranks
from helpers.launching import options
from torch import Tensor

import train as trainer_module
from torchtrain.config.plans import plan_run
from torchtrain.config_manager import JobConfig
from torchtrain.parallelisms.expert_parallel import Exchange, find_sparse
from torchtrain.parallelisms.overlap import LaneAborted, Lanes
from torchtrain.ranks import join_process_group, set_timeout
from torchtrain.set_up import Trainer, set_up


def run_lanes(lanes: Lanes, forward: int, backward: int, generator: random.Random) -> list[str]:
    """Return the order in which two lanes of so many exchanges issue them."""
    issued = []

    def lane(name: str, exchanges: int) -> str:
        for number in range(exchanges):
            time.sleep(generator.random() * 1e-3)
            issued.append(f"{name}{number}")
            lanes.hand_over()
        return name

    assert lanes.run(lambda: lane("f", forward), lambda: lane("b", backward)) == "f"
    return issued


def test_the_order_follows_from_the_programs_alone() -> None:
    lanes = Lanes(torch.device("cpu"))
    generator = random.Random(0)
    for _ in range(20):
        order = run_lanes(lanes, 3, 5, generator)
        assert order == ["f0", "b0", "f1", "b1", "f2", "b2", "b3", "b4"]
        assert run_lanes(lanes, 2, 0, generator) == ["f0", "f1"]
        assert run_lanes(lanes, 0, 2, generator) == ["b0", "b1"]


def test_a_lane_alone_is_not_held_up() -> None:
    lanes = Lanes(torch.device("cpu"))
    lanes.hand_over()
    assert lanes.run(lambda: 1, lambda: None) == 1
    lanes.hand_over()


@pytest.mark.parametrize("failing", ["forward", "backward"])
def test_a_fault_in_either_lane_ends_both_with_that_fault(failing: str) -> None:
    lanes = Lanes(torch.device("cpu"))
    ends: dict[str, type[BaseException] | None] = {}

    def lane(name: str) -> None:
        try:
            for number in range(3):
                if number == 1 and name == failing:
                    raise ValueError(f"of the {name} lane")
                lanes.hand_over()
        except BaseException as fault:
            ends[name] = type(fault)
            raise

    with pytest.raises(ValueError, match=f"of the {failing} lane"):
        lanes.run(lambda: lane("forward"), lambda: lane("backward"))
    assert ends.pop(failing) is ValueError
    assert list(ends.values()) == [LaneAborted], "the other lane must not go on by itself"
    assert lanes.run(lambda: 2, lambda: lanes.hand_over()) == 2, "they can be used again"


def test_the_thread_ends_with_its_lanes() -> None:
    before = set(threading.enumerate())
    lanes = Lanes(torch.device("cpu"))
    lanes.run(lambda: None, lambda: None)
    (worker,) = set(threading.enumerate()) - before
    del lanes
    worker.join(timeout=30)
    assert not worker.is_alive()


# Training: two pipeline ranks with two stages each, and in each of those two ranks share experts.
OVERLAP = "parallelism.pipeline_parallel_expert_parallel_overlap"
LAYOUT = {
    "model.n_layers": 4,
    "model.dim": 16,
    "model.ffn_hidden_dim": 16,
    "model.n_experts": 4,
    "training.seq_len": 8,
    "training.global_batch_size": 8,
    "training.local_batch_size": 4,
    "parallelism.pipeline_parallel_degree": 2,
    "parallelism.pipeline_parallel_first_stage_less_layers": 0,
    "parallelism.pipeline_parallel_last_stage_less_layers": 0,
    "parallelism.pipeline_parallel_schedule": "DualPipeV",
    "parallelism.expert_parallel_degree": 2,
}
RECOMPUTE = "activation_checkpoint.mode"
MODES = {
    "none": {},
    "full": {RECOMPUTE: "full"},
    "selective": {RECOMPUTE: "selective"},
    "op": {RECOMPUTE: "selective", "activation_checkpoint.selective_ac_option": "op"},
}
STEPS = 2
"""Of each mode; `stress_overlap.py` does many."""


def test_the_plan_overlaps_where_dualpipev_meets_shared_experts(data) -> None:
    def plan(**changes: object):
        given = {**data, **LAYOUT, **changes}
        return plan_run(JobConfig().parse_args(options(given), world_size=4), 4).pipeline

    assert plan().overlaps
    assert plan().describe().endswith(", forwards overlapped with backwards")
    assert plan(**MODES["full"]).whole_backward
    assert not plan(**{OVERLAP: False}).overlaps
    assert not plan(**{"parallelism.expert_parallel_degree": 1}).overlaps
    assert not plan(**{"parallelism.pipeline_parallel_schedule": "ZBVZeroBubble"}).overlaps


@pytest.mark.parametrize("other", ["tensor", "context"])
def test_other_exchanges_within_a_pair_are_refused(data, other, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)  # where the report's file is written
    given = {**data, **LAYOUT, f"parallelism.{other}_parallel_degree": 2}
    said = report("", *options(given), world_size=4)
    assert f"parallelism.{other}_parallel_degree = 2 exchanges within what DualPipeV over" in said
    assert "set parallelism.pipeline_parallel_expert_parallel_overlap = false" in said
    given[OVERLAP] = False
    JobConfig().parse_args(options(given), world_size=4)


class Recorded:
    """What a rank exchanges while it trains, its lanes held up at random."""

    def __init__(self, trainer: Trainer, seed: int) -> None:
        self.order: list[str] = []
        self.generator = random.Random(seed)
        self.lanes = trainer.pipeline.lanes
        for stage, part in trainer.parts.items():
            exchange = find_sparse(part)[0].dispatch.exchange
            self.watch(exchange, stage)

    def watch(self, exchange: Exchange, stage: int) -> None:
        run, between = exchange.run, exchange.between

        def recorded(rows: Tensor, received: list[int], sent: list[int]) -> Tensor:
            lane = self.lanes._turn if len(self.lanes._running) == 2 else "alone"
            self.order.append(f"{lane} {stage} {rows.dtype}")
            return run(rows, received, sent)

        def held_up() -> None:
            time.sleep(self.generator.random() * 2e-3)
            between()

        exchange.run, exchange.between = recorded, held_up


def train_steps(trainer: Trainer, steps: int) -> list[Tensor]:
    """Return this rank's part of every gradient of every step."""
    gradients = []
    for step in range(1, steps + 1):
        microbatches = trainer.loader.read(step)
        trainer_module.forward_backward(trainer, microbatches)
        of_step = [weight.grad.to_local().flatten() for weight in trainer.weights.values()]
        gradients.append(torch.cat(of_step).clone())
        trainer_module.optimizer_step(trainer)
    return gradients


def compare_with_serial(given: dict, steps: int) -> None:
    device = join_process_group(60)
    for mode in (MODES["none"], MODES["op"]):  # "full" is in the parity tool's table
        serial = set_up(JobConfig().parse_args(options({**given, **mode, OVERLAP: False})), device)
        expected = train_steps(serial, steps)
        overlapped = set_up(JobConfig().parse_args(options({**given, **mode})), device)
        recorded = Recorded(overlapped, seed=dist.get_rank())
        found = train_steps(overlapped, steps)
        differing = [step for step in range(steps) if not torch.equal(found[step], expected[step])]
        assert differing == [], mode
        peers = [None] * 4
        dist.all_gather_object(peers, recorded.order)
        # Ranks 0 and 1 are one pipeline rank, 2 and 3 the other: each pair shares its experts.
        assert peers[0] == peers[1], mode
        assert peers[2] == peers[3], mode
        assert {line.split()[0] for line in recorded.order} == {"forward", "backward", "alone"}
    dist.destroy_process_group()


@pytest.mark.slow
def test_overlapped_is_serial_to_the_bit_in_one_order_whatever_the_timing(data) -> None:
    on_ranks(4, compare_with_serial, {**data, **LAYOUT}, STEPS)


class WithoutTurns(Lanes):
    """The naive way: both lanes run at once."""

    def _wait_for_turn(self, lane: str) -> None:
        pass


def train_without_turns(given: dict) -> None:
    device = join_process_group(60)
    serial = set_up(JobConfig().parse_args(options({**given, OVERLAP: False})), device)
    expected = train_steps(serial, 3)
    naive = set_up(JobConfig().parse_args(options(given)), device)
    naive.pipeline.lanes.__class__ = WithoutTurns
    Recorded(naive, seed=dist.get_rank())
    set_timeout(5)
    found = train_steps(naive, 3)
    same = all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    os._exit(0 if same else 3)


@pytest.mark.slow
def test_without_turns_the_run_dies_or_is_wrong(data) -> None:
    ranks = Ranks(4, train_without_turns, {**data, **LAYOUT, **MODES["full"]})
    assert any(status != 0 for status in ranks.finish(60))


def fail_in_a_lane(given: dict, lane: str) -> None:
    trainer = set_up(JobConfig().parse_args(options(given)), torch.device("cpu"))
    lanes = trainer.pipeline.lanes
    hand_over = lanes.hand_over

    def failing() -> None:
        if dist.get_rank() == 0 and len(lanes._running) == 2 and lanes._turn == lane:
            raise ValueError(f"the {lane} lane")
        hand_over()

    for part in trainer.parts.values():
        find_sparse(part)[0].dispatch.exchange.between = failing
    with pytest.raises((ValueError, RuntimeError)) as fault:
        trainer_module.forward_backward(trainer, trainer.loader.read(1))
    causes = [fault.value]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    # The others fail in whatever they do when rank 0 has gone.
    assert isinstance(causes[-1], ValueError) == (dist.get_rank() == 0), causes
    os._exit(0)


@pytest.mark.slow
@pytest.mark.parametrize("lane", ["forward", "backward"])
def test_a_fault_in_a_lane_of_training_is_the_first_cause(data, lane: str) -> None:
    in_group(4, fail_in_a_lane, {**data, **LAYOUT}, lane)
