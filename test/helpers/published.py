"""Published runs, as our options give them, with the speed that was measured.

torchtitan's: benchmarks/llama3_h100_202412_torchtitan.md (tables 1 to 6, H100 of 96 GB and 500 W),
asyncTP_llama3_h100_2025-06_torchtitan.md (its table as text is in commit 2887250),
llama3-8b_h200_202506_trainy-whitefiber.md, and docs/performance.md of 2024 (A100). The paper's:
arXiv:2407.21783, table 4. Where torchtitan recomputes every second product ("selective op" there),
ours recomputes every second block, which is as much.
"""

from dataclasses import dataclass, field

from helpers.launching import ROOT

from torchtrain.config_manager import JobConfig

SELECTIVE = {"activation_checkpoint.mode": "selective"}
EAGER = {"compile.enable": False}
NONE = {"activation_checkpoint.mode": "none"}
TP_1 = {"parallelism.tensor_parallel_degree": 1}
TP_8 = {"parallelism.tensor_parallel_degree": 8}
ASYNC = {"parallelism.enable_async_tensor_parallel": True}
TITAN_405B = TP_8 | ASYNC
IN_FLOAT8 = {
    "model.converters": "quantize.linear.float8",
    "quantize.linear.float8.enable_fsdp_float8_all_gather": True,
    "quantize.linear.float8.precompute_float8_dynamic_scale_for_fsdp": True,
}


def batch(whole, local):
    return {"training.global_batch_size": whole, "training.local_batch_size": local}


def pipeline(schedule, ranks, size):
    return {
        "parallelism.pipeline_parallel_degree": ranks,
        "parallelism.pipeline_parallel_schedule": schedule,
        "parallelism.pipeline_parallel_microbatch_size": size,
    }


def context(degree, seq_len):
    return {"parallelism.context_parallel_degree": degree, "training.seq_len": seq_len}


@dataclass(frozen=True, eq=False)
class Published:
    """A run: of a file of train_configs/ with other options, on so many devices."""

    name: str
    file: str
    ranks: int
    device: str
    options: dict = field(default_factory=dict)
    tokens_per_second: float | None = None
    """Of one device; None: `tflops` is given."""
    tflops: float | None = None
    """Of one device, by the model's operations."""
    float8: bool = False
    """Products in float8; whether weights were gathered so as well is not published."""
    required: bool = False
    """Whether issue 14 asks for it."""


# Sixteen stages, two per rank as the schedule needs at least; 1F1B's eight.
F1B = pipeline("1F1B", 8, 4)
INTERLEAVED = pipeline("Interleaved1F1B", 8, 4)
# One layer per stage and no recomputation: section 3.3.2 of the paper; its bubble of 5 % follows.
PAPER = {
    **TP_8,
    **NONE,
    **pipeline("Interleaved1F1B", 16, 1),
    "parallelism.pipeline_parallel_layers_per_stage": 1,
}
H100 = "h100-96"
RUNS = [
    Published(
        "8B, 8 x H100", "llama3_8b", 8, H100, SELECTIVE | EAGER | batch(16, 2), 5762, required=True
    ),
    Published(
        "8B, 8 x H100, compiled",
        "llama3_8b",
        8,
        H100,
        SELECTIVE | batch(16, 2),
        6667,
        required=True,
    ),
    Published(
        "8B, 8 x H100, compiled, float8",
        "llama3_8b",
        8,
        H100,
        SELECTIVE | batch(16, 2),
        8532,
        float8=True,
    ),
    Published(
        "8B, 128 x H100",
        "llama3_8b",
        128,
        H100,
        SELECTIVE | EAGER | batch(256, 2),
        5605,
        required=True,
    ),
    Published(
        "8B, 128 x H100, compiled",
        "llama3_8b",
        128,
        H100,
        SELECTIVE | batch(256, 2),
        6514,
        required=True,
    ),
    Published(
        "8B, 128 x H100, compiled, float8",
        "llama3_8b",
        128,
        H100,
        SELECTIVE | batch(256, 2),
        8380,
        float8=True,
    ),
    Published(
        "8B, 64 x H100, TP 8, compiled",
        "llama3_8b",
        64,
        H100,
        SELECTIVE | TP_8 | batch(96, 12),
        4378,
    ),
    Published(
        "8B, 64 x H100, TP 8, compiled, async",
        "llama3_8b",
        64,
        H100,
        SELECTIVE | TP_8 | ASYNC | batch(96, 12),
        4809.4,
    ),
    Published(
        "70B, 256 x H100, TP 8, compiled",
        "llama3_70b",
        256,
        H100,
        batch(512, 16),
        597.3,
        required=True,
    ),
    Published(
        "70B, 256 x H100, TP 8, compiled, async",
        "llama3_70b",
        256,
        H100,
        ASYNC | batch(512, 16),
        652.4,
        required=True,
    ),
    Published(
        "70B, 256 x H100, TP 8, compiled, float8",
        "llama3_70b",
        256,
        H100,
        batch(512, 16),
        829,
        float8=True,
        required=True,
    ),
    Published(
        "70B, 256 x H100, TP 8, compiled, async, float8",
        "llama3_70b",
        256,
        H100,
        ASYNC | batch(512, 16),
        876,
        float8=True,
        required=True,
    ),
    Published(
        "405B, 512 x H100, TP 8, PP 8 1F1B, compiled, async, float8",
        "llama3_405b",
        512,
        H100,
        TITAN_405B | F1B | batch(256, 32),
        100,
        float8=True,
        required=True,
    ),
    Published(
        "405B, 512 x H100, TP 8, PP 8 interleaved, compiled, async, float8",
        "llama3_405b",
        512,
        H100,
        TITAN_405B | INTERLEAVED | batch(256, 32),
        128,
        float8=True,
        required=True,
    ),
    *[
        Published(
            f"405B, 512 x H100, TP 8, PP 8 1F1B, CP {cp}, {seq_len:,} tokens, async, float8",
            "llama3_405b",
            512,
            H100,
            TITAN_405B | pipeline("1F1B", 8, 1) | context(cp, seq_len) | batch(64 // cp, 8),
            speed,
            float8=True,
        )
        for cp, seq_len, speed in ((1, 32768, 76), (2, 65536, 47), (4, 131072, 31), (8, 262144, 16))
    ],
    *[
        Published(
            f"8B, 8 x H100, CP {cp}, {seq_len:,} tokens, compiled, float8",
            "llama3_8b",
            8,
            H100,
            context(cp, seq_len) | batch(8 // cp, 1),
            speed,
            float8=True,
        )
        for cp, seq_len, speed in (
            (1, 32768, 3890),
            (2, 65536, 2540),
            (4, 131072, 1071),
            (8, 262144, 548),
        )
    ],
    Published(
        "405B, 8,192 x H100, TP 8, PP 16 (the paper)",
        "llama3_405b",
        8192,
        "h100",
        PAPER | batch(2048, 32),
        tflops=430,
    ),
    Published(
        "405B, 16,384 x H100, TP 8, PP 16 (the paper)",
        "llama3_405b",
        16384,
        "h100",
        PAPER | batch(2048, 16),
        tflops=400,
    ),
    Published(
        "405B, 16,384 x H100, TP 8, PP 16, CP 16, 131,072 tokens (the paper)",
        "llama3_405b",
        16384,
        "h100",
        PAPER | context(16, 131072) | batch(128, 16),
        tflops=380,
    ),
    Published(
        "8B, 32 x H200, compiled, float8",
        "llama3_8b",
        32,
        "h200",
        SELECTIVE | IN_FLOAT8 | batch(64, 2),
        10938,
    ),
    Published(
        "8B, 64 x H200, compiled, float8",
        "llama3_8b",
        64,
        "h200",
        SELECTIVE | IN_FLOAT8 | batch(128, 2),
        10753,
    ),
    Published("8B, 64 x A100", "llama3_8b", 64, "a100-80", EAGER | SELECTIVE | batch(64, 1), 2904),
    Published("70B, 64 x A100", "llama3_70b", 64, "a100-80", EAGER | TP_1 | batch(64, 1), 331),
    Published(
        "Llama 2 13B, 64 x A100, no recomputation",
        "llama2_13b",
        64,
        "a100-80",
        EAGER | NONE | batch(128, 2),
        2162,
    ),
    Published(
        "Llama 2 13B, 64 x A100",
        "llama2_13b",
        64,
        "a100-80",
        EAGER | SELECTIVE | batch(128, 2),
        1914,
    ),
    Published(
        "Llama 2 70B, 64 x A100", "llama2_70b", 64, "a100-80", EAGER | TP_1 | batch(128, 2), 353
    ),
]


def configure(file, ranks, options):
    """Read a file of train_configs/ with other options, by key."""
    return read({"job.config_file": ROOT / "train_configs" / f"{file}.toml"} | options, ranks)


def read(options, ranks):
    """Read options by key, on data that is at hand."""
    arguments = ["--training.dataset", "python_stdlib"]
    for key, value in options.items():
        arguments += [f"--{key}", str(value).lower() if isinstance(value, bool) else str(value)]
    return JobConfig().parse_args(arguments, ranks)
