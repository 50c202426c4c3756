"""Ranks of a pipeline: pipeline.py CASES.json. Evaluate, train, and evaluate again, under each schedule in turn.

A case is {"options": [...], "results": FILE}: rank 0 saves what it found.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

import train
from torchtrain.config_manager import JobConfig
from torchtrain.ranks import join_process_group


def summed(losses):
    """The last stage's, on all ranks."""
    losses = losses.double()
    dist.all_reduce(losses)
    return losses


def run(options, results, device):
    config = JobConfig().parse_args(options)
    trainer = train.set_up(config, device)
    batch = trainer.loader.step_batches(1)[0]
    valid = torch.ones((), dtype=torch.int64)
    found = {"evaluated": [], "trained": []}
    for _ in range(3):
        before = {name: weight.to_local().clone() for name, weight in trainer.weights.items()}
        found["evaluated"].append(summed(trainer.pipeline.evaluate(batch.tokens, batch.labels)))
        assert all(weight.grad is None for weight in trainer.weights.values()), "an evaluation left a gradient"
        found["trained"].append(summed(trainer.pipeline.forward_backward(batch.tokens, batch.labels, valid)))
        assert all(torch.equal(before[name], weight.to_local()) for name, weight in trainer.weights.items())
        gradients = {
            name: weight.grad.full_tensor() if isinstance(weight.grad, DTensor) else weight.grad
            for name, weight in trainer.weights.items()
        }
        found.setdefault("gradients", gradients)
        train.optimizer_step(trainer)
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, found["gradients"])
    found["gradients"] = {name: gradient for theirs in everyones for name, gradient in theirs.items()}
    if dist.get_rank() == 0:
        torch.save(found, results)


def main():
    device = join_process_group(60)
    for case in json.loads(Path(sys.argv[1]).read_text()):
        run(case["options"], case["results"], device)
    dist.destroy_process_group()


main()
