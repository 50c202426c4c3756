"""Proof of sameness for a refactor: twenty short runs, compared bit for bit between two commits.

    python test/golden.py make FOLDER [NAME ...]        run the layouts of this checkout into FOLDER
    python test/golden.py compare OLD NEW [NAME ...]    exit status 1 if any bit differs

To compare with another commit, run `make` in a checkout of it, with the same Python. Compared are
losses, norms, rates and validation results of every step, and every tensor of the last checkpoint.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from helpers.launching import ROOT, TINY, write_corpus
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

KEYS = (
    "step",
    "loss",
    "max_loss",
    "grad_norm",
    "lr",
    "tokens_seen",
    "val_loss",
    "val_bits_per_byte",
)
SHARED = {
    **TINY,
    "model.n_layers": 4,
    "training.local_batch_size": 4,
    "training.dataset": "text",
    "checkpoint.enable": True,
    "checkpoint.interval": 2,
}

DOCUMENTS = {"training.document_masking": True}
BF16 = {"training.mixed_precision_param": "bfloat16"}
TIED = {"model.tied_embeddings": True}
VALIDATION = {"validation.enable": True, "validation.freq": 2}
TENSOR = {"parallelism.tensor_parallel_degree": 2}
CONTEXT = {"parallelism.context_parallel_degree": 2}
PIPELINE = {"parallelism.pipeline_parallel_degree": 2}
SCHEDULE = "parallelism.pipeline_parallel_schedule"

# name: (ranks, overrides)
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "one": (1, {}),
    "accumulate": (1, {"training.local_batch_size": 2}),
    "bf16": (1, BF16),
    "compile-selective": (1, {"compile.enable": True, "activation_checkpoint.mode": "selective"}),
    "op-ac-documents": (
        1,
        {
            "activation_checkpoint.mode": "selective",
            "activation_checkpoint.selective_ac_option": "op",
            **DOCUMENTS,
        },
    ),
    "llama3-405b-rope": (
        1,
        {
            "model.name": "llama3",
            "model.rope_scaling_factor": 8.0,
            "lr_scheduler.decay_type": "cosine",
        },
    ),
    "fsdp2-validation": (2, VALIDATION),
    "fsdp2-bf16-adam-offload": (
        2,
        {
            **BF16,
            "optimizer.name": "Adam",
            "optimizer.implementation": "foreach",
            "training.enable_cpu_offload": True,
        },
    ),
    "fsdp2-best-fit-documents": (2, {"data.packing": "best_fit", **DOCUMENTS}),
    "fsdp2-streaming": (2, {"data.streaming": True, "data.streams": 3}),
    "fsdp2-mixture": (2, {"data.mixture": "text CORPUS = 3,python_stdlib = 1"}),
    "hsdp2x2": (
        4,
        {"parallelism.data_parallel_replicate_degree": 2, "training.local_batch_size": 1},
    ),
    "tp2": (2, TENSOR),
    "fsdp2-tp2-tied": (4, TENSOR | TIED),
    "cp2-ring": (2, CONTEXT),
    "cp2-alltoall": (2, CONTEXT | {"parallelism.context_parallel_rotate_method": "alltoall"}),
    "cp2-ulysses-documents": (
        2,
        {**CONTEXT, "parallelism.context_parallel_method": "ulysses", **DOCUMENTS},
    ),
    "pp2-1f1b": (2, PIPELINE | VALIDATION),
    "fsdp2-pp2-zbv-tied": (4, PIPELINE | TIED | {SCHEDULE: "ZBVZeroBubble"}),
    "pp2-interleaved-bf16": (
        2,
        {
            **PIPELINE,
            **BF16,
            SCHEDULE: "Interleaved1F1B",
            "parallelism.pipeline_parallel_first_stage_less_layers": 0,
            "parallelism.pipeline_parallel_last_stage_less_layers": 0,
        },
    ),
}


def make(folder: Path, names: list[str]) -> None:
    """Run the layouts, each into a folder of its own."""
    corpus = folder / "corpus"
    if not corpus.exists():
        write_corpus(corpus)
    for name in names:
        ranks, overrides = LAYOUTS[name]
        run = folder / name
        shutil.rmtree(run, ignore_errors=True)
        options = {
            **SHARED,
            "training.dataset_path": corpus,
            "data.cache_folder": folder / "cache",
            "job.dump_folder": run,
            **overrides,
        }
        if "data.mixture" in overrides:
            options["data.mixture"] = overrides["data.mixture"].replace("CORPUS", str(corpus))
            del options["training.dataset"], options["training.dataset_path"]
        arguments = [f"--{key}={_as_text(value)}" for key, value in options.items()]
        environment = {**os.environ, "NGPU": str(ranks), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "torchtrain.tools.launch", *arguments]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
        dcp_to_torch_save(run / "checkpoint" / "step-4", run / "tensors.pt")
        print(f"{name}: made", flush=True)


def _as_text(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def compare(old: Path, new: Path, names: list[str]) -> bool:
    """Print what differs, layout by layout; return whether nothing does."""
    all_same = True
    for name in names:
        differences = compare_layout(old / name, new / name)
        all_same = all_same and not differences
        print(f"{name}: {'; '.join(differences[:6]) or 'the same bits'}")
    return all_same


def compare_layout(old: Path, new: Path) -> list[str]:
    """The differences between two runs of one layout, in words."""
    differences = []
    for was, now in zip(logged(old), logged(new), strict=True):
        for key in KEYS:
            if was.get(key) != now.get(key):
                differences.append(f"step {was['step']}: {key} {was.get(key)}, {now.get(key)}")
    tensors_old, tensors_new = tensors(old), tensors(new)
    for name in sorted(tensors_old.keys() | tensors_new.keys()):
        if name not in tensors_old or name not in tensors_new:
            differences.append(f"{name} is in one alone")
        elif not torch.equal(tensors_old[name], tensors_new[name]):
            differences.append(f"{name} differs")
    return differences


def logged(run: Path) -> list[dict[str, Any]]:
    """The logged steps of a run."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """The tensors of a run's last checkpoint, by name."""
    return dict(_flatten(torch.load(run / "tensors.pt"), ""))


def _flatten(state: dict[str, Any], prefix: str) -> Any:
    for key, value in state.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def main() -> int:
    """The command line; exit status 1 if anything differs."""
    parser = argparse.ArgumentParser(description="Compare short runs of two commits bit for bit.")
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="run this checkout's layouts")
    making.add_argument("folder", type=Path)
    comparing = commands.add_parser("compare", help="compare two folders that `make` has filled")
    comparing.add_argument("old", type=Path)
    comparing.add_argument("new", type=Path)
    for command in (making, comparing):
        command.add_argument("names", nargs="*", metavar="NAME", help="layouts (default: all)")
    given = parser.parse_args()
    names = given.names or list(LAYOUTS)
    if given.command == "make":
        make(given.folder.absolute(), names)
        return 0
    return 0 if compare(given.old, given.new, names) else 1


if __name__ == "__main__":
    sys.exit(main())
