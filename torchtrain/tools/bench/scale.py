"""What a rank costs in runs of many ranks, without the ranks.

Rank 0 of a run of R ranks is set up, and takes steps, in a process of its own, with a process group
that hands each collective's own input back. Its numbers mean nothing; its time and its memory are
those of the Python and of the tensors that a rank has. Measured is a model so small that its
computation takes next to no time.
"""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from torchtrain.config.plans import plan_run
from torchtrain.config_manager import JobConfig
from torchtrain.errors import UserError
from torchtrain.optimizers.build import build_optimizer
from torchtrain.optimizers.clipping import clip_grad_norm_
from torchtrain.set_up import ParallelModel, set_up_model
from torchtrain.step_metrics import StepMetrics
from torchtrain.tools.bench.runs import Setting, list_options
from torchtrain.tools.bench.sizes import SIZES
from torchtrain.tools.bench_data import anonymous_mib

LAYOUTS = {"FSDP": 1, "HSDP of 8": 8}
"""By name, the ranks per replica; 1: one replica over all ranks."""
STEPS = 30
MOST_RANKS = 2**20


def measure_scale(asked: str) -> list[dict[str, Any]]:
    """Return the figures of each layout and number of ranks.

    Args:
        asked: numbers of ranks, separated by commas.

    Raises:
        UserError: not numbers of ranks; or the set-up failed.
    """
    numbers = asked.split(",")
    if not all(word.strip().isdigit() and 1 <= int(word) <= MOST_RANKS for word in numbers):
        raise UserError(f"--scale {asked!r}: must be numbers of ranks, separated by commas")
    return [
        _in_own_process(ranks, layout)
        for ranks in map(int, numbers)
        for layout, shards in LAYOUTS.items()
        if ranks % shards == 0
    ]


def as_scale_table(figures: list[dict[str, Any]]) -> str:
    """Return the figures as text."""
    lines = [f"{'ranks':>6}  {'layout':10}{'set-up, s':>11}{'memory, MiB':>13}{'step, ms':>10}"]
    for each in figures:
        lines.append(
            f"{each['ranks']:>6}  {each['layout']:10}{each['set_up_s']:>11.2f}"
            f"{each['memory_mib']:>13.1f}{1e3 * each['step_s']:>10.2f}"
        )
    return "\n".join(lines)


def _in_own_process(ranks: int, layout: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "torchtrain.tools.bench.scale", str(ranks), layout]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise UserError(f"{layout} over {ranks} ranks failed:\n{done.stderr[-3000:]}")
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def measure_rank(ranks: int, layout: str) -> dict[str, Any]:
    """Be rank 0 of so many, alone."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    shards = LAYOUTS[layout]
    setting = Setting(
        device="cpu",
        ranks=ranks,
        dtype="float32",
        compiled=False,
        options=(
            "--parallelism.data_parallel_shard_degree",
            str(ranks if shards == 1 else shards),
            "--parallelism.data_parallel_replicate_degree",
            str(1 if shards == 1 else ranks // shards),
        ),
    )
    size = SIZES["host"]
    config = JobConfig().parse_args(list_options(size, setting, Path("unused")), ranks)
    before = anonymous_mib()
    started = time.perf_counter()
    plan = plan_run(config, ranks, tokenizer_size=256)
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    model = set_up_model(config, plan, torch.device("cpu"))
    optimizer = build_optimizer(model.weights, config.optimizer)
    set_up_s = time.perf_counter() - started
    times = [take_step(model, optimizer, size.seq_len) for _ in range(STEPS)]
    return {
        "ranks": ranks,
        "layout": layout,
        "set_up_s": set_up_s,
        "memory_mib": anonymous_mib() - before,
        "step_s": statistics.median(times[STEPS // 3 :]),
    }


def take_step(model: ParallelModel, optimizer: torch.optim.Optimizer, length: int) -> float:
    """Do what a step does on a sequence of this length, but read data; return its seconds."""
    started = time.perf_counter()
    tokens = torch.zeros(1, length, dtype=torch.int64)
    losses = model.sequence_losses(model.parts[0](tokens, None), tokens)
    losses.sum().backward()
    norm = clip_grad_norm_(model.weights.values(), 1.0)
    metrics = StepMetrics()
    metrics.add("loss", losses.sum(), reduce="sum")
    metrics.add("grad_norm", norm, reduce="max")
    metrics.reduce(torch.device("cpu"))
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter() - started


if __name__ == "__main__":
    print(json.dumps(measure_rank(int(sys.argv[1]), sys.argv[2])))
