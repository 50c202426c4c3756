"""Save initial weights, and gradients, loss and gradient norm of step 1, all whole: OUT [--mask] -- trainer options."""

import sys

import torch
import torch.distributed as dist

import train
from torchtrain.config_manager import JobConfig
from torchtrain.optimizer import clip_grad_norm_
from torchtrain.ranks import join_process_group


def masked(microbatch):
    """Hide a number of labels that depends on the sample alone: some samples keep none, some all."""
    for row, sample in enumerate(microbatch.sample_ids):
        hidden = (int(sample) * 13) % (microbatch.labels.shape[1] + 1)
        microbatch.labels[row, :hidden] = -100
    return microbatch


def main() -> None:
    split = sys.argv.index("--")
    out, flags, arguments = sys.argv[1], sys.argv[2:split], sys.argv[split + 1 :]
    config = JobConfig().parse_args(arguments)
    device = join_process_group(60)
    trainer = train.set_up(config, device)
    weights = {name: p.detach().full_tensor().clone() for name, p in trainer.model.named_parameters()}
    batches = trainer.loader.step_batches(1)
    if "--mask" in flags:
        batches = [masked(batch) for batch in batches]
    loss, _ = train.forward_backward(trainer, batches)
    dist.all_reduce(loss)
    gradients = {name: p.grad.full_tensor().clone() for name, p in trainer.model.named_parameters()}
    norm = clip_grad_norm_(trainer.model.parameters(), 1e9)
    if dist.get_rank() == 0:
        torch.save({"weights": weights, "gradients": gradients, "loss": loss, "norm": norm}, out)
    dist.destroy_process_group()


main()
