"""A rank of `torchtrain.tools.parity`: it trains in many layouts, one after the other, so that one start serves all.

The tool starts it with torchrun, which hands it a JSON file of cases.
"""

import gc
import hashlib
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

import train
from torchtrain.config_manager import JobConfig
from torchtrain.datasets.loader import Microbatch
from torchtrain.metrics import Stopwatch
from torchtrain.optimizers.clipping import clip_grad_norm_
from torchtrain.ranks import end_with_launcher, join_process_group, set_timeout
from torchtrain.set_up import set_up
from torchtrain.utils import IGNORE_INDEX

DONE = "parity: done "  # goes before a case's name in rank 0's output


def work(cases_file: Path) -> None:
    """Run the file's cases in turn. Each leaves this rank's part of its results, or a fault that ends this rank."""
    end_with_launcher()
    orders = json.loads(cases_file.read_text())
    device = join_process_group(orders["timeout_seconds"])
    for case in orders["cases"]:
        try:
            torch.save(run_case(case, device), f"{case['results']}.{dist.get_rank()}")
        except BaseException as fault:
            # The others may wait in a collective that this rank will never make: it ends, and the launcher ends them.
            Path(f"{case['results']}.fault-{dist.get_rank()}").write_text(
                f"{type(fault).__name__}: {fault}"
            )
            os._exit(1)
        gc.collect()  # modules and hooks refer to each other in cycles
        torch._dynamo.reset()
        dist.barrier()
        if dist.get_rank() == 0:
            print(f"{DONE}{case['name']}", flush=True)
    dist.destroy_process_group()


def run_case(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Train as `train.train` does, and collect what is compared: this rank's part of it."""
    started = time.perf_counter()
    config = JobConfig().parse_args(case["options"])
    trainer = set_up(config, device)
    set_timeout(config.comm.init_timeout_seconds, trainer.mesh.all_groups())
    parameters = trainer.weights
    results: dict[str, Any] = {"losses": [], "norms": [], "initial": gather(parameters)[0]}
    stop = train.StopRequest()
    for step in range(1, config.training.steps + 1):
        stopwatch = Stopwatch()
        microbatches = trainer.loader.step_batches(step)
        if case["hide_labels"]:
            hide_labels(microbatches)
        loss, max_loss = train.forward_backward(trainer, microbatches)
        if step == 1:
            results["gradients"], _ = gather(
                {name: parameter.grad for name, parameter in parameters.items()}
            )
        norm = clip_grad_norm_(
            trainer.weights.values(), config.training.max_norm, trainer.mesh.group("pp")
        )
        summary, _ = train.combine_ranks(trainer, loss, max_loss, norm, stopwatch, stop)
        results["losses"] += [summary.loss, summary.max_loss]
        results["norms"].append(summary.grad_norm)
        train.optimizer_step(trainer)
    results["weights"], results["drifted"] = gather(parameters)
    return {**results, "seconds": time.perf_counter() - started}


def hide_labels(microbatches: list[Microbatch]) -> None:
    """Hide, in place, a number of labels that depends on the sample alone: some samples keep none, some all."""
    for microbatch in microbatches:
        for labels, sample in zip(
            microbatch.labels, microbatch.sample_ids, strict=True
        ):  # labels [S]
            labels[: sample * 13 % (len(labels) + 1)] = IGNORE_INDEX


def gather(tensors: Mapping[str, Tensor | None]) -> tuple[dict[str, Tensor], list[str]]:
    """Make each tensor whole, one at a time, and keep it on the first of the ranks that have one of its name.

    Returns:
        What this rank keeps, on the CPU; and the names of tensors that are not the same to the bit on all ranks that
        have them: each rank puts them together from the copies nearest to it, so it is seen where these have drifted.
    """
    rank, names = dist.get_rank(), all_gather(list(tensors))
    owners = {name: owner for owner in reversed(range(len(names))) for name in names[owner]}
    kept, digests = {}, {}
    for name, tensor in tensors.items():
        if tensor is None:
            raise RuntimeError(f"{name} has no gradient")
        whole = (
            (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)
            .detach()
            .cpu()
            .contiguous()
        )
        digests[name] = hashlib.sha256(
            whole.flatten().view(torch.uint8).numpy().tobytes()
        ).hexdigest()
        if owners[name] == rank:
            kept[name] = whole.clone()
    everyones = all_gather(digests)
    first = {name: everyones[owner][name] for name, owner in owners.items()}
    return kept, sorted(
        {name for theirs in everyones for name in theirs if theirs[name] != first[name]}
    )


def all_gather(mine: Any) -> list[Any]:
    """Every rank's, in rank order."""
    everyones: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    return everyones


if __name__ == "__main__":
    work(Path(sys.argv[1]))
