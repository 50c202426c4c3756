"""Preflight's model of PyTorch's allocator, against blocks placed by hand."""

import random
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.distributed.pipelining.schedules import (
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    FULL_BACKWARD,
    _Action,
)

from torchtrain.tools.preflight.activations import Trace, trace_layer
from torchtrain.tools.preflight.allocator import SMALL, Change, Segment
from torchtrain.tools.preflight.replay import Heap, replay_pipeline, replay_step
from torchtrain.tools.preflight.states import NO_WEIGHTS, Weights
from torchtrain.tools.preflight.walk import Layer, Resharding, Stage

UNIT = 4 * SMALL


def fill(*sizes):
    """Return a segment with blocks of so many units, and the blocks."""
    segment = Segment()
    return segment, [segment.take(size * UNIT) for size in sizes]


def test_the_smallest_free_block_that_is_large_enough_is_taken():
    segment, (three, _, two, _) = fill(3, 1, 2, 1)
    segment.free(three)
    segment.free(two)
    assert segment.take(UNIT).start == two.start
    assert segment.take(2 * UNIT).start == three.start
    assert segment.size == 7 * UNIT


def test_the_rest_of_a_block_stays_free():
    segment, (three, _) = fill(3, 1)
    segment.free(three)
    assert [segment.take(UNIT).start for _ in range(3)] == [0, UNIT, 2 * UNIT]
    assert segment.size == 4 * UNIT


@pytest.mark.parametrize("order", [(0, 1, 2), (0, 2, 1), (1, 0, 2), (2, 1, 0)])
def test_free_neighbors_join(order):
    segment, blocks = fill(1, 2, 3, 1)
    for index in order:
        segment.free(blocks[index])
    assert segment.take(6 * UNIT).start == 0
    assert segment.size == 7 * UNIT


def test_too_small_a_block_stays_free_beside_what_is_new():
    segment, (one, _) = fill(1, 1)
    segment.free(one)
    segment.take(2 * UNIT)
    assert segment.size == 4 * UNIT


def test_a_segment_grows_by_what_its_free_end_lacks():
    segment, (_, two) = fill(1, 2)
    segment.free(two)
    assert segment.take(3 * UNIT).start == UNIT
    assert segment.size == 4 * UNIT


def test_small_tensors_break_up_nothing():
    segment, (two, _) = fill(2, 1)
    segment.free(two)
    small = segment.take(SMALL)
    assert segment.take(2 * UNIT) == two
    segment.free(small)
    assert segment.size == 3 * UNIT


def test_blocks_never_overlap():
    numbers = random.Random(3)
    segment, live = Segment(), []
    for _ in range(2000):
        if live and numbers.random() < 0.5:
            segment.free(live.pop(numbers.randrange(len(live))))
        else:
            live.append(segment.take(numbers.randint(SMALL + 1, 9 * UNIT)))
        ordered = sorted(live)
        assert all(first.end <= second.start for first, second in pairwise(ordered))
        assert not live or ordered[-1].end <= segment.size


def test_a_trace_has_the_tensors_that_come_and_go():
    layer = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
    trace = trace_layer(layer, torch.randn(4, 8, requires_grad=True))

    def follow(changes, sizes):
        most = sum(sizes.values())
        for tensor, size in changes:
            if size:
                sizes[tensor] = size
            else:
                del sizes[tensor]
            most = max(most, sum(sizes.values()))
        return most

    sizes = {}
    assert follow(trace.forward_changes, sizes) == trace.forward
    assert sum(sizes.values()) == trace.saved
    assert follow(trace.backward_changes, sizes) == trace.backward
    gradients = [4 * 8, *(weight.numel() for weight in layer.parameters())]
    seed = 1  # the number that the backward begins with
    assert sorted(sizes.values()) == sorted(4 * number for number in [*gradients, seed])


def make_layer(name, forward, backward, **weights):
    """Return a layer whose tensors come and go so: {number: units}, 0 units where one goes."""
    changes = [
        tuple(Change(number, units * UNIT) for number, units in each)
        for each in (forward, backward)
    ]
    trace = Trace(0, 0, 0, 0, *changes)
    sizes = {key: units * UNIT for key, units in weights.items()}
    gathered = (sizes.get("gathered", 0),)
    return Layer(name, trace, (Weights(**sizes, each_gathered=gathered),))


def step(*layers, reshards="always", held=()):
    """Return the units that a step reserves."""
    heap = Heap(units * UNIT for units in held)
    stage = Stage(layers, shared=0, loss=0)
    replay_step(heap, stage, NO_WEIGHTS, Resharding.of(reshards))
    return heap.reserved / UNIT


LOGITS = make_layer(
    "the output",
    [(1, 2)],
    # As a loss in fp32: the logits are widened, used and freed, and their gradient comes, whole.
    [(2, 4), (3, 4), (1, 0), (2, 0), (4, 4), (5, 4), (4, 0), (3, 0)],
)


def test_a_hole_that_nothing_fits_is_reserved():
    # Where the logits were and the first wide tensor is, 6 are free: 4 of them are taken, 2 are
    # left, and what comes last finds no room. At most 12 live at a time.
    assert step(LOGITS) == 2 + 4 + 4 + 4


def test_a_block_saves_tensors_between_those_that_go():
    block = make_layer("a block", [(1, 1), (2, 1), (1, 0)], [(2, 0)])
    assert step(block) == 2
    # The second block begins in the hole that the first one left.
    assert step(block, block) == 3
    assert step(block, held=[5]) == 7


def test_whole_weights_come_before_a_layer_and_go_after_it():
    block = make_layer("a block", [(1, 1)], [(2, 1), (1, 0)], gathered=3)
    # All whole weights are in the same block, one after the other.
    assert step(block, block) == 3 + 1 + 1 + 1
    assert step(block, block, reshards="never") == 3 + 1 + 3 + 1 + 1


def test_what_a_reduction_sends_is_held_until_the_next():
    block = make_layer("a block", [(1, 1)], [(2, 1), (1, 0)], reduce_buffer=5)
    assert step(block) == 1 + 1 + 5
    assert step(block, block) == 2 + 1 + 5


BLOCK = make_layer("a block", [(1, 1)], [(2, 3), (1, 0)], accumulated=2)


def pipe(*kinds):
    """Return the units that a stage of one block reserves, for F, B, or the halves I and W."""
    meant = {"F": FORWARD, "B": FULL_BACKWARD, "I": BACKWARD_INPUT, "W": BACKWARD_WEIGHT}
    actions = [_Action(0, meant[kind[0]], int(kind[1:])) for kind in kinds]
    heap = Heap([])
    replay_pipeline(heap, {0: Stage((BLOCK,), shared=0, loss=0)}, actions)
    return heap.reserved / UNIT


def test_microbatches_under_way_and_summed_gradients_are_held():
    assert pipe("F0", "B0") == 1 + 3
    assert pipe("F0", "F1", "B0", "B1") == 2 + 3 + 2


def test_half_a_backward_keeps_what_was_saved():
    # The second forward finds no room where the first has saved something: 1 + 2 + 1 and 3.
    assert pipe("F0", "I0", "F1", "W0", "I1", "W1") == 7


def test_a_long_step_reserves_no_more_than_a_short_one():
    def one_forward_one_backward(microbatches):
        turns = [f"{kind}{i}" for i in range(2, microbatches) for kind in ("F", "B")]
        return pipe("F0", "F1", *turns)

    assert one_forward_one_backward(4) == one_forward_one_backward(40)
