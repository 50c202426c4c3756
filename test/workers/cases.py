"""Many runs on the same ranks, so that only the first pays for the start: cases.py CASES.json

CASES.json holds a list of {"options": [...]}: a whole run each; or, with "first_step": FILE, only its first step,
whose initial weights, gradients, loss and gradient norm are saved whole; "mask": true hides labels unevenly.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import train
from torchtrain.config_manager import JobConfig
from torchtrain.logging_utils import init_logging
from torchtrain.optimizer import clip_grad_norm_
from torchtrain.ranks import join_process_group


def masked(microbatch):
    """Hide a number of labels that depends on the sample alone: some samples keep none, some all."""
    for row, sample in enumerate(microbatch.sample_ids):
        hidden = (sample * 13) % (microbatch.labels.shape[1] + 1)
        microbatch.labels[row, :hidden] = -100
    return microbatch


def first_step(config, device, out, mask):
    trainer = train.set_up(config, device)
    weights = {name: p.detach().full_tensor().clone() for name, p in trainer.weights.items()}
    batches = [masked(batch) if mask else batch for batch in trainer.loader.step_batches(1)]
    loss, _ = train.forward_backward(trainer, batches)
    dist.all_reduce(loss)
    gradients = {name: p.grad.full_tensor().clone() for name, p in trainer.weights.items()}
    norm = clip_grad_norm_(trainer.weights.values(), 1e9)
    if dist.get_rank() == 0:
        torch.save({"weights": weights, "gradients": gradients, "loss": loss, "norm": norm}, out)


def main():
    device = join_process_group(60)
    init_logging(dist.get_rank(), dist.get_world_size())
    for case in json.loads(Path(sys.argv[1]).read_text()):
        config = JobConfig().parse_args(case["options"])
        if "first_step" in case:
            first_step(config, device, case["first_step"], case.get("mask", False))
        else:
            train.run(config, device)
    dist.destroy_process_group()


main()
