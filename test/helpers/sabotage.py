"""The ranks of torchtrain.tools.parity with faults built in: a case named as a fault has it."""

from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

import train
from torchtrain.models.moe import Router
from torchtrain.models.rotary import RotaryPositions
from torchtrain.parallelisms.expert_balance import ExpertBalance
from torchtrain.parallelisms.pipeline_parallel import TiedOutput
from torchtrain.tools import parity_ranks

forward_backward = train.forward_backward
optimizer_step = train.optimizer_step
positions_at = RotaryPositions.at
choose = Router._choose
collect = ExpertBalance.collect
run_case = parity_ranks.run_case


def scaled_by_microbatches(trainer, microbatches):
    result = forward_backward(trainer, microbatches)
    for parameter in trainer.weights.values():
        parameter.grad.mul_(len(microbatches))
    return result


def of_the_first_shard(rope, positions):
    return positions_at(rope, torch.arange(len(positions)))


def drifting(trainer):
    """Change the last bits of a copy on rank 1, after the last step."""
    optimizer_step(trainer)
    if trainer.step == trainer.config.training.steps and dist.get_rank() == 1:
        weight = trainer.weights["norm.weight"]
        weight.data.to_local().view(-1)[-1:].mul_(1 + 2**-20)


def chosen_anew(router, scores):
    """Choose others where the forward is run again, which is within a backward."""
    recomputes = torch._C._current_graph_task_id() != -1
    return choose(router, -scores if recomputes else scores)


def balanced_alone(balance, step):
    """Leave the other ranks out of the loads that the biases follow."""
    collect(balance, step)
    balance.sums.copy_(balance.totals)


def forgetting(tied):
    if tied.copy is not None:
        tied.copy.grad = None


def raising(trainer, microbatches):
    if dist.get_rank() == 1:
        raise RuntimeError("a fault of rank 1\nwith a second line")
    return forward_backward(trainer, microbatches)


FAULTS = {
    "scaled": patch.object(train, "forward_backward", scaled_by_microbatches),
    "positions": patch.object(RotaryPositions, "at", of_the_first_shard),
    "replica-drifts": patch.object(train, "optimizer_step", drifting),
    "chosen-anew": patch.object(Router, "_choose", chosen_anew),
    "bias-alone": patch.object(ExpertBalance, "collect", balanced_alone),
    "copy-forgotten": patch.object(TiedOutput, "hand_in_gradient", forgetting),
    "raises": patch.object(train, "forward_backward", raising),
}


def sabotaged(case, device):
    with FAULTS.get(case["name"], nullcontext()):
        return run_case(case, device)


def work(cases_file):
    """A rank, under the fault that its case is named after."""
    with patch.object(parity_ranks, "run_case", sabotaged):
        parity_ranks.work(Path(cases_file))
