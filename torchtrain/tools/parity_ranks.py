"""A rank of `torchtrain.tools.parity`, which trains in many layouts, one after the other.

The tool starts it with torchrun, which hands it a JSON file of cases: one start serves all.
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
from torchtrain.kernel_checks import check_kernels, find_device_facts
from torchtrain.metrics import Stopwatch
from torchtrain.optimizers.clipping import clip_grad_norm_
from torchtrain.orphans import end_with_launcher
from torchtrain.ranks import gathered, join_process_group
from torchtrain.set_up import set_up
from torchtrain.stopping import StopRequest
from torchtrain.utils import IGNORE_INDEX

DONE = "parity: done "  # goes before a case's name in rank 0's output


def work(cases_file: Path) -> None:
    """Run the file's cases in turn.

    Each leaves a file with this rank's results, or one with a fault, which ends this rank.
    """
    end_with_launcher()
    gc.freeze()  # the collection after each case need not walk what the imports made
    orders = json.loads(cases_file.read_text())
    device = join_process_group(orders["timeout_seconds"])
    for case in orders["cases"]:
        try:
            torch.save(run_case(case, device), f"{case['results']}.{dist.get_rank()}")
        except BaseException as fault:
            # The others may wait in a collective that this rank will never make: it ends, and the
            # launcher ends them.
            file = Path(f"{case['results']}.fault-{dist.get_rank()}")
            file.write_text(f"{type(fault).__name__}: {fault}")
            os._exit(1)
        gc.collect()  # modules and hooks refer to each other in cycles
        torch._dynamo.reset()
        dist.barrier()
        if dist.get_rank() == 0:
            print(f"{DONE}{case['name']}", flush=True)
    dist.destroy_process_group()


def run_case(case: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Train as `train.train` does, and collect what this rank has of what is compared."""
    started = time.perf_counter()
    config = JobConfig().parse_args(case["options"])
    check_kernels(config, find_device_facts(device))
    trainer = set_up(config, device)
    initial, _ = gather(trainer.model_state)
    results: dict[str, Any] = {"losses": [], "norms": [], "initial": initial}
    stop = StopRequest()
    for step in range(1, trainer.plan.steps + 1):
        stopwatch = Stopwatch()
        microbatches = trainer.loader.step_batches(step)
        if case["hide_labels"]:
            hide_labels(microbatches)
        loss = train.forward_backward(trainer, microbatches)
        if step == 1:
            results["gradients"], _ = gather(
                {name: weight.grad for name, weight in trainer.weights.items()}
            )
        norm = clip_grad_norm_(
            trainer.weights.values(), config.training.max_norm, trainer.mesh.group("pp")
        )
        summary, _ = train.combine_ranks(trainer, loss, norm, stopwatch, stop)
        results["losses"] += [summary.loss, summary.max_loss]
        results["norms"].append(summary.grad_norm)
        train.optimizer_step(trainer)
    results["weights"], results["drifted"] = gather(trainer.model_state)
    return {**results, "seconds": time.perf_counter() - started}


def hide_labels(microbatches: list[Microbatch]) -> None:
    """Hide, in place, a number of labels that depends on the sample alone.

    Some samples keep no label, some all.
    """
    for microbatch in microbatches:
        for labels, sample in zip(microbatch.labels, microbatch.sample_ids, strict=True):
            hidden = sample * 13 % (len(labels) + 1)
            labels[:hidden] = IGNORE_INDEX  # labels [S]


def gather(tensors: Mapping[str, Tensor | None]) -> tuple[dict[str, Tensor], list[str]]:
    """Make each tensor whole, one at a time; the first rank that has one of its name keeps it.

    Returns:
        What this rank keeps, on the CPU; and the names of tensors that are not the same to the bit
        on all ranks that have them. Each rank puts them together from the copies nearest to it, so
        it is seen where these have drifted.
    """
    names_by_rank = gathered(list(tensors))
    owners: dict[str, int] = {}
    for rank, names in enumerate(names_by_rank):
        for name in names:
            owners.setdefault(name, rank)
    kept = {}
    digests = {}
    for name, tensor in tensors.items():
        if tensor is None:
            raise RuntimeError(f"{name} has no gradient")
        whole = make_whole(tensor)
        content = whole.flatten().view(torch.uint8).numpy().tobytes()
        digests[name] = hashlib.sha256(content).hexdigest()
        if owners[name] == dist.get_rank():
            kept[name] = whole.clone()
    digests_by_rank = gathered(digests)
    drifted = set()
    for of_one_rank in digests_by_rank:
        for name, digest in of_one_rank.items():
            if digest != digests_by_rank[owners[name]][name]:
                drifted.add(name)
    return kept, sorted(drifted)


def make_whole(tensor: Tensor) -> Tensor:
    """Return the full tensor of a shard, on the CPU."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().cpu().contiguous()


if __name__ == "__main__":
    work(Path(sys.argv[1]))
