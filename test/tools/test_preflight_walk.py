"""Preflight's walk through a step, against sums by hand."""

from dataclasses import dataclass, field

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.pipelining.schedules import (
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    FULL_BACKWARD,
    _Action,
)
from torch.distributed.tensor import DTensor, Shard

from torchtrain.tools.preflight.activations import Trace
from torchtrain.tools.preflight.live_bytes import LiveBytes
from torchtrain.tools.preflight.specimen import fake_ranks, fake_tensors
from torchtrain.tools.preflight.states import NO_WEIGHTS, Weights
from torchtrain.tools.preflight.walk import Layer, Ledger, Resharding, Stage, Step, walk_pipeline

WEIGHTS = Weights(
    parameters=1,
    gathered=10,
    gradients=10,
    gather_buffer=10,
    reduce_buffer=20,
    reduced=2,
    accumulated=40,
)
OF_A_BLOCK = Trace(saved=100, forward=150, backward=300, gradient=50)
FIRST = Layer("block 0", OF_A_BLOCK, (WEIGHTS,))
SECOND = Layer("block 1", OF_A_BLOCK, (WEIGHTS,))
OUTPUT = Layer(
    "the output", Trace(saved=1000, forward=1100, backward=1500, gradient=50), (WEIGHTS,)
)


@dataclass
class Diary(Ledger):
    """Writes down each moment's sum."""

    sums: list = field(default_factory=list)

    def look(self, moment, **beside):
        self.sums.append(self.held.total() + sum(beside.values()))
        super().look(moment, **beside)


def walk(*, accumulates=False, reshards="default"):
    diary = Diary(0)
    stage = Stage((FIRST, SECOND, OUTPUT), shared=7, loss=3000)
    Step(stage, NO_WEIGHTS, Resharding.of(reshards), accumulates).walk(diary)
    return diary


def test_a_step_is_what_its_parts_add_up_to():
    diary = walk()
    assert diary.sums == [
        7 + 10,
        7 + 10 + 10 + 150,  # forward of a block: shared, its weights gathered and copied, working
        107 + 20,  # the next one's weights come, while the buffer of the last is still there
        107 + 10 + 10 + 150,
        207 + 20,
        207 + 10 + 10 + 1100,
        207 + 10 + 3000,  # the loss, with the logits; the output stays gathered
        1207 + 10 + 500 + 10,  # backward of the output; block 1's weights are on their way
        207 + 10 + 50 + 10 + 20 + 2,  # its gradients, that of its input, and their reduction
        208 + 10 + 200 + 20 + 10,  # block 1, while the output's gradients are reduced
        108 + 10 + 50 + 10 + 20 + 2,
        109 + 10 + 200 + 20,  # block 0: nothing comes after it
        9 + 10 + 50 + 20 + 2,
        10,
    ]
    assert (diary.worst.moment, diary.worst.total) == ("loss", 3217)
    assert diary.held.total() == 3, "the gradients"


def test_what_other_streams_held_stays_with_the_allocator():
    rank = walk().close()
    # At the loss no gradient lives and nothing is gathered. The stream of the reduce-scatter gets
    # two gradients and the output of a third reduction, that of the gathers held two buffers.
    assert (rank.moment, rank.total) == ("loss", 3217)
    assert rank.cached == 1 + 1 + 2 + 10 + 10
    assert rank.allocated == 3217 + 24


def test_gradients_of_earlier_microbatches_are_held_throughout():
    diary, alone = walk(accumulates=True), walk()
    assert [
        with_them - without for with_them, without in zip(diary.sums, alone.sums, strict=True)
    ] == [
        *[3] * 9,
        *[2] * 2,  # the output's are there in both
        *[1] * 2,
        0,
    ]


def test_weights_that_stay_gathered_are_not_gathered_twice():
    kept = walk(reshards="never")
    assert kept.sums[1:6:2] == [177, 287, 1347]
    assert kept.sums[6] == 3237
    assert kept.sums[7] == 1207 + 30 + 500, "nothing is on its way"


def pipe(*kinds, **sent):
    """Walk through a stage of one block: F, B, or the two halves of a backward, I and W."""
    meant = {"F": FORWARD, "B": FULL_BACKWARD, "I": BACKWARD_INPUT, "W": BACKWARD_WEIGHT}
    actions = [_Action(0, meant[kind[0]], int(kind[1])) for kind in kinds]
    diary = Diary(0)
    stage = Stage((FIRST,), shared=7, loss=0, **sent)
    walk_pipeline(diary, {0: stage}, actions, accumulates=False)
    assert diary.held.total() == 1, "the gradients"
    return diary.sums


def test_each_microbatch_under_way_keeps_its_activations():
    assert pipe("F0", "F1", "B0", "B1") == [
        10 + 10,  # gathered and its buffer
        10 + 7 + 150,  # the weights stay gathered
        10 + 107 + 7 + 150,
        10 + 107 + 107 + 200,
        10 + 40 + 107 + 200,  # whole gradients of the first
        10 + 40 + 20 + 2,
    ]


def test_half_a_backward_keeps_all_for_the_other():
    assert pipe("F0", "I0", "F1", "W0", "I1", "W1")[3] == 10 + 107 + 7 + 150


def test_what_is_sent_is_held_until_all_microbatches_have_passed():
    kinds = ["F0", "I0", "F1", "W0", "B1"]
    held = zip(pipe(*kinds, output_sent=3, gradient_sent=5), pipe(*kinds), strict=True)
    assert [with_sent - without for with_sent, without in held] == [
        *[0, 0],
        0,  # the backward of the first, of which the gradient is then sent
        5,
        5 + 3,  # its output is no longer kept for the other half
        2 * (5 + 3),
    ]


def test_of_a_sharded_tensor_only_the_ranks_own_part_counts():
    live = LiveBytes()
    with fake_ranks(0, 2):
        mesh = init_device_mesh("cpu", (2,))
        with fake_tensors(rows=1):
            part = DTensor.from_local(torch.empty(64, 8), mesh, [Shard(1)], run_check=False)
            with live:
                twice = part + part
            assert twice.shape == (64, 16)
            assert (live.now, live.peak) == (part.to_local().nbytes,) * 2
