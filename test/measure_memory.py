"""Compare what preflight predicts with what the trainer's tensors take: the table of preflight.md.

PYTHONPATH=.:test python test/measure_memory.py [words of a case's name]
"""

import sys
import tempfile

from helpers.measured import compare

RECOMPUTED = "--activation_checkpoint.mode="
PP = "--parallelism.pipeline_parallel_degree="
SCHEDULE = "--parallelism.pipeline_parallel_schedule="
TP = "--parallelism.tensor_parallel_degree="
LARGER = ["--model.dim=512", "--model.n_layers=8", "--training.seq_len=256"]

CASES = {
    "debug_model, 1 rank": ("debug_model", 1, []),
    "debug_model, FSDP 2": ("debug_model", 2, []),
    "debug_model, FSDP 4": ("debug_model", 4, []),
    "debug_model, FSDP 2, accumulation 4": (
        "debug_model",
        2,
        ["--training.local_batch_size=3"],
    ),
    "debug_model, FSDP 2, selective of ops": (
        "debug_model",
        2,
        [f"{RECOMPUTED}selective", "--activation_checkpoint.selective_ac_option=op"],
    ),
    "debug_model, FSDP 2, selective of all ops": (
        "debug_model",
        2,
        [f"{RECOMPUTED}selective", "--activation_checkpoint.selective_ac_option=op_all"],
    ),
    "debug_model, FSDP 2, full": ("debug_model", 2, [f"{RECOMPUTED}full"]),
    "debug_model, HSDP 2 x 2": (
        "debug_model",
        4,
        ["--parallelism.data_parallel_replicate_degree=2"],
    ),
    "512 wide, 1 rank": ("debug_model", 1, LARGER),
    "512 wide, FSDP 2, bf16": (
        "debug_model",
        2,
        [*LARGER, "--training.mixed_precision_param=bfloat16"],
    ),
    "512 wide, FSDP 4, selective of 2": ("debug_model", 4, [*LARGER, f"{RECOMPUTED}selective"]),
    "512 wide, FSDP 2, full": ("debug_model", 2, [*LARGER, f"{RECOMPUTED}full"]),
    "512 wide, TP 2": ("debug_model", 2, [*LARGER, f"{TP}2"]),
    "debug_model, TP 2, full": ("debug_model", 2, [f"{TP}2", f"{RECOMPUTED}full"]),
    "debug_model, CP 2": ("debug_model", 2, ["--parallelism.context_parallel_degree=2"]),
    "512 wide, PP 2, 1F1B": ("debug_model", 2, [*LARGER, f"{PP}2", f"{SCHEDULE}1F1B"]),
    "512 wide, PP 2, GPipe, full": (
        "debug_model",
        2,
        [*LARGER, f"{PP}2", f"{SCHEDULE}GPipe", f"{RECOMPUTED}full"],
    ),
    "512 wide, PP 2, Interleaved1F1B": (
        "debug_model",
        2,
        [*LARGER, f"{PP}2", f"{SCHEDULE}Interleaved1F1B"],
    ),
    "512 wide, PP 2, ZBVZeroBubble": (
        "debug_model",
        2,
        [*LARGER, f"{PP}2", f"{SCHEDULE}ZBVZeroBubble"],
    ),
    "debug_moe, FSDP 2": ("debug_moe", 2, []),
    "debug_moe, FSDP 2, full": ("debug_moe", 2, [f"{RECOMPUTED}full"]),
    "debug_moe, EP 2": ("debug_moe", 2, ["--parallelism.expert_parallel_degree=2"]),
}
MIB = 2**20


def main(words):
    """Print a line for each case."""
    print("| run | predicted | measured | difference | worst moment |")
    print("|---|---:|---:|---:|---|")
    for name, case in CASES.items():
        if all(word in name for word in words):
            with tempfile.TemporaryDirectory() as folder:
                predicted, measured = compare(*case, folder)
            difference = 100 * (predicted.total / measured - 1)
            print(
                f"| {name} | {predicted.total / MIB:.1f} | {measured / MIB:.1f} | "
                f"{difference:+.1f} % | {predicted.moment} |",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1:])
