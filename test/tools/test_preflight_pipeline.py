"""The orders of pipeline schedules, and the bubbles that follow from them."""

from collections import Counter

import pytest
from torch.distributed.pipelining import schedules
from torch.distributed.pipelining.schedules import (
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    FULL_BACKWARD,
)

from torchtrain.catalog.schedules import SCHEDULES, default_stages
from torchtrain.tools.preflight.pipeline_order import StageTime, find_orders, time_orders

RANKS, MICROBATCHES = 4, 8
FORWARD_S, BACKWARD_S = 1.0, 2.0


def list_orders(schedule, ranks=RANKS, microbatches=MICROBATCHES, per_rank=None, whole=False):
    stages = per_rank * ranks if per_rank else default_stages(schedule, ranks)
    return find_orders(schedule, ranks, stages, microbatches, whole_backward=whole), stages


def find_bubble(schedule, hand_over=0.0, weights=1.0, **how):
    orders, stages = list_orders(schedule, **how)
    share = RANKS / stages  # of a rank's layers in each of its stages
    time = StageTime(FORWARD_S * share, BACKWARD_S * share, weights * share)
    timed = time_orders(orders, [time] * stages, hand_over)
    assert timed.busy == pytest.approx([MICROBATCHES * (FORWARD_S + BACKWARD_S)] * RANKS)
    return timed.bubble


class RecordingStage:
    """A stage that says what a schedule has it do."""

    def __init__(self, rank, ranks):
        self.stage_index = self.group_rank = rank
        self.num_stages = self.group_size = ranks
        self.is_first, self.is_last = rank == 0, rank == ranks - 1
        self.done = []
        self.output_chunks = []

    def forward_one_chunk(self, microbatch, *_, **__):
        self.done.append((FORWARD, microbatch))

    def backward_one_chunk(self, microbatch, *_, **__):
        self.done.append((FULL_BACKWARD, microbatch))

    def __getattr__(self, name):
        return lambda *_, **__: []


@pytest.mark.parametrize("rank", range(RANKS))
@pytest.mark.parametrize("schedule", ["GPipe", "1F1B"])
def test_the_orders_of_one_stage_per_rank_are_what_pytorch_runs(schedule, rank):
    stage = RecordingStage(rank, RANKS)
    runs = schedules.get_schedule_class(schedule)(stage, MICROBATCHES, loss_fn=lambda *_: None)
    runs._maybe_compute_loss = runs._maybe_get_loss = lambda *_, **__: None
    runs._update_losses = runs._initialize_stage = lambda *_: None
    chunks = [()] * MICROBATCHES
    runs._step_microbatches(chunks, [{}] * MICROBATCHES, chunks)
    orders, _ = list_orders(schedule)
    ours = [(action.computation_type, action.microbatch_index) for action in orders[rank]]
    assert ours == stage.done


@pytest.mark.parametrize("whole", [False, True], ids=["split", "whole"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_each_stage_has_each_microbatch_once_each_way(schedule, whole):
    orders, stages = list_orders(schedule, whole=whole)
    counted = Counter()
    for order in orders.values():
        for action in order:
            for part in action.sub_actions or (action,):
                kind, stage = part.computation_type, part.stage_index
                counted[kind, stage, part.microbatch_index] += 1
    for stage in range(stages):
        for microbatch in range(MICROBATCHES):
            assert counted[FORWARD, stage, microbatch] == 1
            backward = counted[FULL_BACKWARD, stage, microbatch]
            halves = {
                counted[kind, stage, microbatch] for kind in (BACKWARD_INPUT, BACKWARD_WEIGHT)
            }
            assert halves == {1 - backward}
            assert backward == 1 or (not whole and SCHEDULES[schedule].splits_backward)


# As Narayanan et al. 2021 (arXiv:2104.04473, section 2.2) count them: of R ranks with v stages
# each, (R - 1) / v times a microbatch's forward and backward.
@pytest.mark.parametrize(
    ("schedule", "per_rank"),
    [("GPipe", 1), ("1F1B", 1), ("Interleaved1F1B", 2), ("Interleaved1F1B", 4)],
)
def test_bubbles_are_those_of_the_literature(schedule, per_rank):
    expected = (RANKS - 1) * (FORWARD_S + BACKWARD_S) / per_rank
    assert find_bubble(schedule, per_rank=per_rank) == pytest.approx(expected)


def test_zero_bubbles_are_smaller_and_whole_backwards_make_them_larger_again():
    plain = find_bubble("Interleaved1F1B")
    assert find_bubble("InterleavedZeroBubble") < plain
    # Where forward and the halves of the backward are equal, a V has none but at its ends.
    v_shaped = find_bubble("ZBVZeroBubble")
    assert v_shaped < plain / 2
    assert find_bubble("DualPipeV") < plain
    assert find_bubble("ZBVZeroBubble", whole=True) > v_shaped


def test_handing_over_takes_time_and_overlap_saves_some():
    assert find_bubble("1F1B", hand_over=0.1) > find_bubble("1F1B")
    orders, stages = list_orders("DualPipeV")
    times = [StageTime(1.0, 2.0, 1.0, hidden) for hidden in (0.0, 0.5)]
    plain, hidden = (time_orders(orders, [time] * stages, 0.0) for time in times)
    assert hidden.seconds < plain.seconds
    pairs = sum(len(action.sub_actions or ()) == 2 for action in orders[0])
    assert plain.busy[0] - hidden.busy[0] == pytest.approx(0.5 * pairs)


def test_a_pipeline_by_hand():
    # F and B of two microbatches on two ranks: the second rank waits for one forward, the first
    # for the backward of the second stage.
    orders, _ = list_orders("1F1B", ranks=2, microbatches=2)
    timed = time_orders(orders, [StageTime(1, 2, 1), StageTime(3, 4, 2)], 0.5)
    # Rank 1: forward from 1.5 to 4.5, backward to 8.5, forward to 11.5, backward to 15.5; rank 0
    # then from 16 to 18.
    assert timed.seconds == 18
    assert timed.busy == (6, 14)
    assert timed.bubble == 4


def test_an_order_that_waits_for_itself_is_seen():
    orders, stages = list_orders("1F1B", ranks=2, microbatches=2)
    backwards = {rank: order[::-1] for rank, order in orders.items()}
    with pytest.raises(AssertionError, match="deadlock"):
        time_orders(backwards, [StageTime(1, 2, 1)] * stages, 0.0)
