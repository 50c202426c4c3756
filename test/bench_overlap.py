"""Time DualPipeV with and without its overlap: `python test/bench_overlap.py [--wire-ms 2,4,6]`.

Not a test. On one machine an exchange costs no time on a wire, so some is made up: each all-to-all
is under way for so many milliseconds, in which its lane cannot go on and the other one can. Two
pipeline ranks with two ranks each that share experts; printed is the time of a step, and the ratio.
"""

import argparse
import sys
import tempfile
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from helpers.forking import on_ranks
from helpers.launching import options, write_corpus
from parallelisms.test_overlap import LAYOUT, MODES, OVERLAP, train_steps

from torchtrain.config_manager import JobConfig
from torchtrain.parallelisms.expert_parallel import collectives, find_sparse
from torchtrain.ranks import join_process_group
from torchtrain.set_up import Trainer, set_up

SIZES = {
    "model.dim": 64,
    "model.ffn_hidden_dim": 128,
    "model.n_layers": 8,
    "training.seq_len": 64,
    "training.global_batch_size": 12,
    "training.local_batch_size": 6,
}


def slow_down(trainer: Trainer, seconds: float) -> None:
    """Let each all-to-all be under way for so long."""
    for part in trainer.parts.values():
        exchange = find_sparse(part)[0].dispatch.exchange

        def run(rows, received, sent, exchange=exchange):
            coming = collectives.all_to_all_single(
                rows.contiguous(), received, sent, exchange.group
            )
            arrives = time.monotonic() + seconds
            exchange.between()
            time.sleep(max(0.0, arrives - time.monotonic()))
            return collectives.wait_tensor(coming)

        exchange.run = run


def measure(given: dict, wire_ms: list[float], steps: int) -> None:
    device = join_process_group(60)
    for name, mode in MODES.items():
        for milliseconds in wire_ms:
            seconds = {}
            for overlaps in (False, True):
                overrides = {**given, **mode, OVERLAP: overlaps}
                trainer = set_up(JobConfig().parse_args(options(overrides)), device)
                slow_down(trainer, milliseconds / 1000)
                train_steps(trainer, 2)
                dist.barrier()
                started = time.monotonic()
                train_steps(trainer, steps)
                seconds[overlaps] = (time.monotonic() - started) / steps
            if dist.get_rank() == 0:
                print(
                    f"recomputation {name}, {milliseconds:g} ms per exchange: "
                    f"{seconds[False]:.3f} s per step in turn, {seconds[True]:.3f} s overlapped, "
                    f"ratio {seconds[False] / seconds[True]:.2f}",
                    flush=True,
                )
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wire-ms", default="2,4,6", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=5, help="timed; default: %(default)s")
    asked = parser.parse_args()
    wire_ms = [float(text) for text in asked.wire_ms.split(",")]
    print(f"torch {torch.__version__}, four ranks on this machine")
    with tempfile.TemporaryDirectory() as folder:
        data = {
            "training.dataset": "text",
            "training.dataset_path": str(write_corpus(Path(folder) / "corpus")),
            "data.cache_folder": str(Path(folder) / "cache"),
        }
        given = {**data, **LAYOUT, **SIZES}
        print(on_ranks(4, measure, given, wire_ms, asked.steps, timeout_s=3600))


if __name__ == "__main__":
    main()
