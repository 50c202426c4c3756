"""Which microbatches a pipeline rank holds at once: the schedule's own order of actions."""

from functools import cache

import torch
from torch import nn
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.pipelining.schedules import FULL_BACKWARD, OVERLAP_F_B, _Action

from torchtrain.catalog.schedules import stages_of
from torchtrain.config.plans import PipelinePlan
from torchtrain.parallelisms.pipeline_parallel import merge_backwards
from torchtrain.tools.preflight.specimen import fake_ranks

Order = dict[int, list[_Action]]
"""By pipeline rank, its forwards and backwards in turn."""


@cache
def list_actions(plan: PipelinePlan, ranks: int) -> Order:
    """Return what each rank of the pipeline does, as PyTorch's schedule says it."""
    schedule_class = schedules.get_schedule_class(plan.schedule)
    takes_one = issubclass(schedule_class, schedules.PipelineScheduleSingle)
    with fake_ranks(0, ranks):
        passed_on = torch.empty(1, device="meta")
        stages = [
            PipelineStage(
                nn.Identity(),
                number,
                plan.stages,
                torch.device("cpu"),
                input_args=passed_on,
                output_args=passed_on,
            )
            for number in stages_of(0, plan.schedule, plan.stages, ranks)
        ]
        schedule = schedule_class(
            stages[0] if takes_one else stages, plan.microbatches, loss_fn=lambda *_: passed_on
        )
        order = schedule.pipeline_order
    assert order is not None
    return {rank: _flatten(plan, order[rank]) for rank in range(ranks)}


def _flatten(plan: PipelinePlan, actions: list[_Action | None]) -> list[_Action]:
    """Return the computations alone; of a pair that overlaps, the forward first."""
    if plan.whole_backward:
        actions = merge_backwards(actions)
    flat: list[_Action] = []
    for action in actions:
        if action is None:
            continue
        if action.computation_type == OVERLAP_F_B and action.sub_actions is not None:
            flat += action.sub_actions
        elif action.computation_type in (
            schedules.FORWARD,
            FULL_BACKWARD,
            schedules.BACKWARD_INPUT,
            schedules.BACKWARD_WEIGHT,
        ):
            flat.append(action)
    return flat
