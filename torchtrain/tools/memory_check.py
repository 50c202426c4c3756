"""Before the ranks start: whether the run surely takes more memory than a GPU has.

What surely lives on some rank, parameters, gradients and optimizer states, is counted in no time.
Where that is a fair share of a card, preflight predicts the rest in a process of its own. Only what
does not fit even if the prediction is much too high is refused. Where something is not known, such
as the memory of a card or the shape of a user's own model, nothing is checked.
"""

import json
import math
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import torchtrain
from torchtrain.catalog.parameters import count_parameters, list_shapes
from torchtrain.catalog.schedules import stages_of
from torchtrain.config.plans import RunPlan, plan_run
from torchtrain.config.schema import Config
from torchtrain.config_manager import JobConfig
from torchtrain.dtypes import DTYPES
from torchtrain.errors import UserError
from torchtrain.metrics import GIB
from torchtrain.tools.preflight.verdict import ALLOCATOR_SHARE, Verdict

VARIABLE = "CHECK_MEMORY"
GO_ON = f"{VARIABLE}=0 starts it all the same, unchecked"

SMALL = GIB / 4
"""No GPU is asked for a run whose parameters, gradients and optimizer states take less: it starts
at once, as the debug model does."""
WORTH_PREDICTING = 0.1
"""Share of the memory from which on the rest is predicted: smaller runs start faster than that."""
PREDICTION_S = 60.0
"""How long a prediction may take; the run starts without it then."""
QUERY_S = 20.0
"""How long the driver may take to answer."""

SURE = 0.85
"""Of what is predicted, so much is sure: against counted tensors it was at most 8 % too high."""
KEPT_COMPILED = 0.5
"""Of a block's activations, what a compiled one keeps at least, and of logits and loss a compiled
loss. A Llama block that computes norms, rotations and SwiGLU again keeps about 11.5 of 20 times
what its input takes. An assumption: it has not been measured."""
NO_DEVICES = {"CUDA_VISIBLE_DEVICES": ""}
"""Fake tensors of a GPU would make a context on a real one, which takes memory."""

Rank = dict[str, int]
"""Bytes of a rank at its worst moment, by what they are for, and their "total"."""


def check_memory(config: JobConfig, trainer_args: list[str], world_size: int) -> None:
    """Check that the run may fit into NVIDIA's GPUs; other nodes' are taken to be like this one's.

    Raises:
        UserError: it surely does not, and has something left to do; or the environment's
            CHECK_MEMORY is neither 0 nor 1.
    """
    if not is_wanted():
        return
    try:
        warning = compare_with_cards(config, trainer_args, world_size)
    except UserError:
        if not is_finished(config):
            raise
        return
    if warning is not None and not is_finished(config):
        print(f"warning: {warning}", file=sys.stderr)


def is_finished(config: JobConfig) -> bool:
    """Return whether the run has all its steps, and will only say so."""
    from torchtrain.resuming import seems_finished  # two seconds, which other runs do not pay

    return seems_finished(config)


def compare_with_cards(config: Config, trainer_args: list[str], world_size: int) -> str | None:
    """Return a warning where the run may not fit, or where that is not known.

    Raises:
        UserError: it surely does not fit.
    """
    least = count_least(config, world_size)
    if least is None or least < SMALL:
        return None
    memory = find_memory()
    if memory is None:
        return None
    if least > memory:
        raise UserError(
            "this run does not fit: parameters, gradients and optimizer states alone take "
            f"{least / GIB:.1f} GiB on a rank, and a GPU here has {memory / GIB:.1f} GiB. Share "
            "them among more ranks, keep them in host memory (training.enable_cpu_offload) or in "
            f"fewer bits (optimizer.state_dtype, training.dtype). {GO_ON}"
        )
    if least > WORTH_PREDICTING * memory:
        ranks = predict(trainer_args, world_size)
        if ranks is not None:
            return judge(config, ranks, memory)
        return (
            "whether this run fits into memory is not known: "
            "torchtrain.tools.preflight gave no answer"
        )
    return None


def is_wanted() -> bool:
    """Return whether CHECK_MEMORY asks for the check, as it does unless it is set.

    Raises:
        UserError: it is neither 0 nor 1.
    """
    given = os.environ.get(VARIABLE) or "1"
    if given not in ("0", "1"):
        raise UserError(f"{VARIABLE} = {given!r}: must be 0 or 1")
    return given == "1"


def find_memory() -> int | None:
    """Return the bytes of this machine's largest NVIDIA GPU, also of one that is not visible.

    None: the driver does not say, as where a GPU shares the host's memory. No context is made on a
    GPU, which would take memory of it.
    """
    command = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=QUERY_S)
    except (OSError, subprocess.SubprocessError):
        return None
    sizes = answer.stdout.split()
    if answer.returncode or not sizes or not all(size.isdigit() for size in sizes):
        return None
    return max(map(int, sizes)) * 2**20


def count_least(config: Config, world_size: int) -> float | None:
    """Return the bytes of parameters, gradients and optimizer states that some rank has at least.

    Of the pipeline ranks that with the most; what its ranks share is divided evenly among them, and
    what each of them has is counted once. None: the model's shape is not known, or all is kept in
    host memory.
    """
    plan = plan_run(config, world_size)
    if config.training.enable_cpu_offload or not count_parameters(config.model.name, plan.shape):
        return None
    degrees = plan.degrees
    schedule = config.parallelism.pipeline_parallel_schedule
    layers = weigh_layers(config, plan)
    largest = 0
    for rank in range(degrees.pp):
        stages = [0]
        if degrees.pp > 1:
            stages = stages_of(rank, schedule, len(plan.stages), degrees.pp)
        names = [name for stage in stages for name in plan.stages[stage]]
        largest = max(largest, sum(layers[name] for name in names))
    return largest / (degrees.dp_shard * degrees.cp * degrees.tp)


def weigh_layers(config: Config, plan: RunPlan) -> dict[str, int]:
    """Return the bytes of each layer's parameters, gradients and optimizer states, by its name."""
    stored = DTYPES[config.training.dtype].itemsize
    mean = DTYPES[config.optimizer.state_dtype or config.training.dtype].itemsize
    layers: dict[str, int] = defaultdict(int)
    for name, shape in list_shapes(plan.shape).items():
        in_block = name.startswith("layers.")
        layer = ".".join(name.split(".")[: 2 if in_block else 1])
        is_matrix = in_block and len(shape) > 1
        means = {"AdamW": 2, "Adam": 2, "Muon": 1 if is_matrix else 2}.get(config.optimizer.name, 0)
        layers[layer] += math.prod(shape) * (2 * stored + means * mean)
    return layers


def predict(trainer_args: list[str], world_size: int) -> list[Rank] | None:
    """Return what preflight predicts, by pipeline rank; None: it cannot, or not in time."""
    package = Path(torchtrain.__file__).parent
    paths = [str(package.parent), os.environ.get("PYTHONPATH", "")]
    # Not by `-m`, which looks for torchtrain in the working directory first.
    program = [sys.executable, str(package / "tools" / "preflight" / "__main__.py")]
    try:
        answer = subprocess.run(
            [*program, *trainer_args, "--world-size", str(world_size), "--json"],
            env={
                **os.environ,
                **NO_DEVICES,
                "PYTHONPATH": os.pathsep.join(path for path in paths if path),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=PREDICTION_S,
        )
        ranks: list[Rank] = json.loads(answer.stdout)["ranks"]
    except (OSError, subprocess.SubprocessError, ValueError, KeyError):
        return None
    return ranks


def judge(config: Config, ranks: list[Rank], memory: int) -> str | None:
    """Refuse what surely does not fit, and return a warning where it is tight.

    Raises:
        UserError: some rank surely takes more than `memory` bytes.
    """
    worst = max(ranks, key=lambda rank: rank["total"] + rank["cached"])
    allocated = worst["total"] + worst["cached"]
    verdict = Verdict(reserved=allocated * (1 + ALLOCATOR_SHARE), memory=memory)
    amounts = (
        f"about {allocated / GIB:.1f} GiB on a rank, of which its activations take "
        f"{worst['activations'] / GIB:.1f}, and a GPU here has {memory / GIB:.1f} GiB"
    )
    if max(count_sure(config, rank) for rank in ranks) > memory:
        raise UserError(
            f"this run does not fit: it takes {amounts}. Take more ranks, a smaller "
            "training.local_batch_size (the curve stays where training.global_batch_size is set), "
            'or activation_checkpoint.mode = "full"; python -m torchtrain.tools.preflight shows '
            f"all parts, and with --suggest the fastest layouts that fit. {GO_ON}"
        )
    return None if verdict.word == "fits" else f"memory may not suffice: this run takes {amounts}"


def count_sure(config: Config, rank: Rank) -> float:
    """Return what a rank takes even if the prediction is as much too high as it can be.

    Left out is what it is known to count too high: the activations of memory_budget and of float8,
    and some of what compiled blocks and a compiled loss keep. All that is counted lives at one
    moment, so the peak is no less than what remains.
    """
    compiled = config.compile.components if config.compile.enable else []
    doubtful = 0.0
    if config.activation_checkpoint.mode == "memory_budget" or config.model.converters:
        doubtful += rank["activations"]
    elif "model" in compiled:
        doubtful += (1 - KEPT_COMPILED) * rank["activations"]
    if "loss" in compiled:
        doubtful += (1 - KEPT_COMPILED) * rank["logits_and_loss"]
    return SURE * (rank["total"] - doubtful)
