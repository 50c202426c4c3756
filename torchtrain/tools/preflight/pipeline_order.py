"""The order in which pipeline ranks compute, taken from PyTorch's schedules, and how long it takes.

A schedule's order follows from the number of its stages and microbatches alone; no process group is
needed to ask for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

from torch import nn
from torch.distributed.pipelining import schedules
from torch.distributed.pipelining.schedules import (
    BACKWARD_INPUT,
    BACKWARD_WEIGHT,
    FORWARD,
    FULL_BACKWARD,
    _Action,
)

from torchtrain.catalog.schedules import SCHEDULES, stages_of
from torchtrain.parallelisms.pipeline_parallel import merge_backwards

Orders = dict[int, list[_Action]]
"""What each rank of a pipeline computes, one after the other."""


@cache
def find_orders(
    schedule: str, ranks: int, stages: int, microbatches: int, *, whole_backward: bool
) -> Orders:
    """Return a schedule's order of forwards and backwards, by pipeline rank.

    Args:
        schedule: a key of `catalog.schedules.SCHEDULES`.
        ranks: of the pipeline.
        stages: over all ranks; the config check has found them, and the microbatches, accepted.
        microbatches: that pass the pipeline together.
        whole_backward: whether backwards are in one piece even where the schedule splits them.
    """
    one_stage = SCHEDULES[schedule].stages_per_rank == "one"
    orders: dict[int, list[_Action | None]] = {}
    if one_stage:
        orders = _order_single(schedule, ranks, microbatches)
    else:
        orders = _order_several(schedule, ranks, stages, microbatches)
    if whole_backward:
        orders = {rank: merge_backwards(order) for rank, order in orders.items()}
    return {
        rank: [action for action in order if action is not None] for rank, order in orders.items()
    }


def _order_single(schedule: str, ranks: int, microbatches: int) -> dict[int, list[_Action | None]]:
    """Return GPipe's order, or that of 1F1B: as many forwards first as there are stages from here.

    They are PyTorch's, which for these two runs loops that nothing can be asked of: what it says of
    1F1B's last rank (torch 2.13) numbers the forwards from 1.
    """
    orders: dict[int, list[_Action | None]] = {}
    for rank in range(ranks):
        ahead = microbatches if schedule == "GPipe" else min(microbatches, ranks - rank)
        forwards: list[_Action | None] = [_Action(rank, FORWARD, mb) for mb in range(microbatches)]
        order = forwards[:ahead]
        for mb in range(microbatches):
            order.append(_Action(rank, FULL_BACKWARD, mb))
            order += forwards[ahead + mb : ahead + mb + 1]
        orders[rank] = order
    return orders


def _order_several(
    schedule: str, ranks: int, stages: int, microbatches: int
) -> dict[int, list[_Action | None]]:
    """Return the order that a schedule of several stages per rank works out for itself."""
    schedule_class: Any = schedules.get_schedule_class(schedule)

    class WithoutExchanges(schedule_class):  # type: ignore[misc]
        """The schedule without what it would need to run."""

        def _prepare_schedule_with_comms(self, actions: object, *_: object) -> None:
            """Leave the exchanges out, which take longer to insert than all else."""

    own = [
        SimpleNamespace(
            stage_index=stage,
            num_stages=stages,
            group_size=ranks,
            group_rank=0,
            is_last=stage == stages - 1,
            submod=nn.Identity(),
        )
        for stage in stages_of(0, schedule, stages, ranks)
    ]
    orders: dict[int, list[_Action | None]] = WithoutExchanges(own, microbatches).pipeline_order
    return orders


def list_parts(action: _Action) -> tuple[_Action, ...]:
    """Return the forward and the backward of a pair that overlaps; of another action itself."""
    return action.sub_actions or (action,)


@dataclass(frozen=True)
class StageTime:
    """How long a stage takes for a microbatch, in seconds."""

    forward: float
    backward: float
    weights: float
    """The part of the backward that computes the gradients of weights alone."""
    hidden: float = 0.0
    """What a forward and a backward of this stage save where the schedule overlaps them."""

    def of(self, kind: object) -> float:
        """Return how long an action of this kind takes."""
        if kind == FORWARD:
            return self.forward
        if kind == BACKWARD_WEIGHT:
            return self.weights
        return self.backward - (self.weights if kind == BACKWARD_INPUT else 0.0)


@dataclass(frozen=True)
class PipelineTime:
    """How long a pipeline takes for its microbatches."""

    seconds: float
    """From the first forward to the end of the last backward."""
    busy: tuple[float, ...]
    """For how long of it each rank computes."""

    @property
    def bubble(self) -> float:
        """For how long the busiest rank waits."""
        return self.seconds - max(self.busy)

    def repeat(self, times: float) -> "PipelineTime":
        """Return the time for so many times the microbatches, which wait no longer."""
        busy = tuple(times * seconds for seconds in self.busy)
        return PipelineTime(self.bubble + max(busy), busy)


@dataclass(frozen=True)
class Part:
    """A forward, a backward or a half of one, as a rank comes to it."""

    done: int
    """What it makes: a number of the pass, the stage and the microbatch."""
    needed: int | None
    """The same of what it waits for; None: nothing, or what the rank has made before."""
    hand_over: float
    """Seconds for which that is on its way."""
    seconds: float
    hidden: float
    """What is saved where it is overlapped with another."""


def time_orders(orders: Orders, times: Sequence[StageTime], hand_over: float) -> PipelineTime:
    """Return how long the ranks take if each begins an action as soon as it has what it needs.

    A forward needs that of the stage before, a backward that of the stage behind, `hand_over`
    seconds after it where that is another rank's. `times` are by stage.
    """
    remaining = _list_parts(orders, times, hand_over)
    ends: dict[int, float] = {}
    clocks = dict.fromkeys(orders, 0.0)
    busy = dict.fromkeys(orders, 0.0)
    moved = True
    while moved:
        moved = False
        for rank, actions in remaining.items():
            while actions:
                parts = actions[-1]
                needed = [part.needed for part in parts if part.needed is not None]
                if any(each not in ends for each in needed):
                    break
                actions.pop()
                moved = True
                arrivals = [ends[part.needed] + part.hand_over for part in parts if part.needed]
                taken = sum(part.seconds for part in parts)
                if len(parts) > 1:
                    taken -= min(part.hidden for part in parts)
                clocks[rank] = max(clocks[rank], *arrivals, 0.0) + taken
                busy[rank] += taken
                ends.update((part.done, clocks[rank]) for part in parts)
    assert not any(remaining.values()), "a deadlock"
    return PipelineTime(max(clocks.values()), tuple(busy[rank] for rank in sorted(orders)))


def _list_parts(
    orders: Orders, times: Sequence[StageTime], hand_over: float
) -> dict[int, list[list[Part]]]:
    """Return what each rank does, the last first."""
    stages = len(times)
    rank_of = [0] * stages
    for rank, order in orders.items():
        for action in order:
            for part in list_parts(action):
                rank_of[part.stage_index] = rank

    def describe(action: _Action) -> Part:
        stage, microbatch = action.stage_index, action.microbatch_index
        assert microbatch is not None
        is_forward = action.computation_type == FORWARD
        makes_weights = action.computation_type == BACKWARD_WEIGHT
        kind = 0 if is_forward else 2 if makes_weights else 1
        source = stage - 1 if is_forward else stage + 1
        # The first stage's forward has its tokens, the last one's backward its loss; the weights'
        # half of a backward follows the other one on the same rank.
        waits = 0 <= source < stages and not makes_weights

        def number(kind: int, stage: int) -> int:
            return 1 + (microbatch * stages + stage) * 3 + kind

        return Part(
            done=number(kind, stage),
            needed=number(kind, source) if waits else None,
            hand_over=hand_over if waits and rank_of[source] != rank_of[stage] else 0.0,
            seconds=times[stage].of(action.computation_type),
            hidden=times[stage].hidden,
        )

    return {
        rank: [[describe(part) for part in list_parts(action)] for action in reversed(order)]
        for rank, order in orders.items()
    }
