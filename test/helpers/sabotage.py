"""The ranks of torchtrain.tools.parity with faults built in: a case named as a fault has it."""

import os
import signal
import sys
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist

import train
from torchtrain.models.rotary import RotaryPositions
from torchtrain.parallelisms.pipeline_parallel import AccumulatingStage, TiedOutput
from torchtrain.tools import parity_ranks

forward_backward, optimizer_step, at = (
    train.forward_backward,
    train.optimizer_step,
    RotaryPositions.at,
)
run_case, reduce_gradients = parity_ranks.run_case, AccumulatingStage.perform_reduce_grad


def scaled_by_microbatches(trainer, microbatches):
    result = forward_backward(trainer, microbatches)
    for parameter in trainer.weights.values():
        parameter.grad.mul_(len(microbatches))
    return result


def of_the_first_shard(rope, positions):
    return at(rope, torch.arange(len(positions)))


def drifting(name):
    def step(trainer):
        optimizer_step(trainer)
        if trainer.step == trainer.config.training.steps and dist.get_rank() == 1:
            weight = trainer.weights[name]
            weight.data.to_local().view(-1)[-1:].mul_(1 + 2**-20)

    return step


def scaling_stages(stage, factor):
    reduce_gradients(stage, len(stage.args_recv_info))


def forgetting(tied):
    if tied.copy is not None:
        tied.copy.grad = None


def raising(trainer, microbatches):
    if dist.get_rank() == 1:
        raise RuntimeError("a fault of rank 1\nwith a second line")
    return forward_backward(trainer, microbatches)


def killed(trainer, microbatches):
    if dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward_backward(trainer, microbatches)


FAULTS = {
    "scaled": patch.object(train, "forward_backward", scaled_by_microbatches),
    "positions": patch.object(RotaryPositions, "at", of_the_first_shard),
    "replica-drifts": patch.object(train, "optimizer_step", drifting("norm.weight")),
    "tensor-rank-drifts": patch.object(
        train, "optimizer_step", drifting("layers.1.ffn_norm.weight")
    ),
    "tied-drifts": patch.object(train, "optimizer_step", drifting("tok_embeddings.weight")),
    "stages-scaled": patch.object(AccumulatingStage, "perform_reduce_grad", scaling_stages),
    "copy-forgotten": patch.object(TiedOutput, "hand_in_gradient", forgetting),
    "raises": patch.object(train, "forward_backward", raising),
    "killed": patch.object(train, "forward_backward", killed),
}


def sabotaged(case, device):
    with FAULTS.get(case["name"], nullcontext()):
        return run_case(case, device)


parity_ranks.run_case = sabotaged
parity_ranks.work(Path(sys.argv[1]))
