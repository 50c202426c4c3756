"""How a run is laid out over ranks: degrees, batch, pipeline stages, sequence shards."""

import math
from bisect import bisect
from dataclasses import dataclass

from torchtrain.catalog import schedules
from torchtrain.config.schema import Parallelism, Training
from torchtrain.errors import UserError

# The factors of the world size.
DEGREE_KEYS = (
    "parallelism.data_parallel_replicate_degree",
    "parallelism.data_parallel_shard_degree",
    "parallelism.tensor_parallel_degree",
    "parallelism.pipeline_parallel_degree",
    "parallelism.context_parallel_degree",
)


FLOAT8_MULTIPLE = 16
"""Rows, columns and tokens that kernels for float8 multiply are multiples of this."""

# How a pipeline is split and run.
PIPELINE_KEYS = (
    "parallelism.pipeline_parallel_schedule",
    "parallelism.pipeline_parallel_microbatch_size",
    "parallelism.pipeline_parallel_layers_per_stage",
    "parallelism.pipeline_parallel_first_stage_less_layers",
    "parallelism.pipeline_parallel_last_stage_less_layers",
    "parallelism.module_fqns_per_model_part",
)


@dataclass(frozen=True)
class Degrees:
    """Ranks along each dimension of the device mesh, the outermost first."""

    pp: int
    """Ranks that share the layers (pipeline): the outermost, since they communicate least."""
    dp_replicate: int
    """Replicas of the sharded model, their gradients all-reduced (HSDP)."""
    dp_shard: int
    """Ranks that shard parameters, gradients and optimizer states (FSDP)."""
    cp: int
    """Ranks that share each sequence; FSDP shards over them too."""
    tp: int
    """Ranks that share each matrix product: the innermost, since they communicate most."""
    ep: int = 1
    """Ranks that share the experts: neighbors among those along dp_shard, cp and tp."""

    @property
    def data_parallel(self) -> int:
        """Ranks that read different samples."""
        return self.dp_replicate * self.dp_shard

    @property
    def ranks_per_stage(self) -> int:
        """Ranks that share the work on one sample in one pipeline stage."""
        return self.cp * self.tp

    @property
    def ranks_per_sample(self) -> int:
        """Ranks that share the work on one sample: all of them read it."""
        return self.pp * self.ranks_per_stage

    @property
    def expert_shard(self) -> int:
        """Ranks that shard the same experts (FSDP): those along dp_shard, cp and tp, but for ep."""
        return self.dp_shard * self.cp * self.tp // self.ep

    def describe(self) -> str:
        """Return the layout in words, for the start-up line."""
        sharded = self.dp_shard * self.cp
        parts = {
            f"pipeline parallel: {self.pp} ranks share the layers": self.pp,
            f"{self.dp_replicate} replicas": self.dp_replicate,
            "FSDP: parameters, gradients and optimizer states sharded over "
            f"{sharded} ranks": sharded,
            f"context parallel: {self.cp} ranks share each sequence": self.cp,
            f"tensor parallel: {self.tp} ranks share each matrix product": self.tp,
            f"expert parallel: {self.ep} ranks share the experts of a layer": self.ep,
        }
        texts = [text for text, degree in parts.items() if degree > 1]
        return "; ".join(texts) or "one process"


@dataclass(frozen=True)
class BatchPlan:
    """How the sequences of one optimizer step are split."""

    global_batch_size: int
    """Sequences over all ranks."""
    microbatch_size: int
    """Sequences per forward and backward of one rank."""
    accumulation_steps: int
    """Microbatches per rank."""
    data_parallel_degree: int
    """Ranks that read different sequences."""

    def describe(self, seq_len: int) -> str:
        """Return the plan in words, for the start-up line."""
        return (
            f"{self.global_batch_size} sequences x {seq_len} tokens = "
            f"{self.global_batch_size * seq_len:,} tokens per step; microbatch "
            f"{self.microbatch_size}, accumulation {self.accumulation_steps}"
        )


def plan_degrees(parallelism: Parallelism, world_size: int) -> Degrees:
    """Return the degrees, with a shard degree of -1 resolved to the ranks that are left.

    Raises:
        UserError: the degrees do not multiply to the world size.
    """
    degrees = {key: getattr(parallelism, key.partition(".")[2]) for key in DEGREE_KEYS}
    factors = {key: degree for key, degree in degrees.items() if degree > 1}
    product = math.prod(factors.values())
    given = " x ".join(f"{key} = {degree}" for key, degree in factors.items())
    shard = parallelism.data_parallel_shard_degree
    if shard == -1:
        if world_size % product:
            result = f" gives {product} ranks, which" if len(factors) > 1 else ""
            allowed = ", ".join(str(divisor) for divisor in find_divisors(world_size))
            raise UserError(
                f"{given}{result} does not divide the world size {world_size}; allowed: {allowed}"
            )
        shard = world_size // product
    elif product != world_size:
        raise UserError(
            f"{given or 'parallelism.data_parallel_shard_degree = 1'} gives {product} ranks, but "
            f"the world size is {world_size}; a shard degree of -1 takes what is left"
        )
    resolved = Degrees(
        pp=parallelism.pipeline_parallel_degree,
        dp_replicate=parallelism.data_parallel_replicate_degree,
        dp_shard=shard,
        cp=parallelism.context_parallel_degree,
        tp=parallelism.tensor_parallel_degree,
        ep=parallelism.expert_parallel_degree,
    )
    check_expert_degree(resolved)
    return resolved


def check_expert_degree(degrees: Degrees) -> None:
    """Check that the ranks which share the experts can be taken out of the others.

    Raises:
        UserError: their number does not divide that of the ranks to take them out of.
    """
    ranks = degrees.dp_shard * degrees.cp * degrees.tp
    if ranks % degrees.ep:
        allowed = ", ".join(str(divisor) for divisor in find_divisors(ranks))
        raise UserError(
            f"parallelism.expert_parallel_degree = {degrees.ep} must divide the {ranks} ranks of "
            f"the data-shard, context and tensor degrees together; allowed: {allowed}"
        )


def plan_batch(
    training: Training, ranks: int, saved_global_batch_size: int | None = None
) -> BatchPlan:
    """Split the global batch over ranks, and a rank's share into the largest equal microbatches.

    Args:
        training: the section.
        ranks: the data-parallel degree, ranks that read different sequences.
        saved_global_batch_size: the resumed checkpoint's, which -1 stands for.

    Raises:
        UserError: the degree does not divide the global batch; names the nearest degrees, and
            batches, that do.
    """
    total = training.global_batch_size
    if total == -1:
        total = saved_global_batch_size or training.local_batch_size * ranks
    if total % ranks:
        divisors = find_divisors(total)
        above = bisect(divisors, ranks)
        degrees = divisors[above - 1 : above + 1]
        below = total - total % ranks
        batches = [size for size in (below, below + ranks) if size > 0]
        raise UserError(
            f"training.global_batch_size = {total} cannot be divided over {ranks} data-parallel "
            f"ranks; the nearest data-parallel degrees that divide it: {_joined(degrees)}; "
            f"the nearest global batches for {ranks} ranks: {_joined(batches)}"
        )
    per_rank = total // ranks
    fitting = [size for size in find_divisors(per_rank) if size <= training.local_batch_size]
    microbatch_size = max(fitting)
    return BatchPlan(
        global_batch_size=total,
        microbatch_size=microbatch_size,
        accumulation_steps=per_rank // microbatch_size,
        data_parallel_degree=ranks,
    )


def _joined(numbers: list[int]) -> str:
    return " and ".join(str(number) for number in numbers)


def find_divisors(number: int) -> list[int]:
    """Return all divisors of the number, in ascending order."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    large = [number // d for d in small]
    return sorted({*small, *large})


def plan_stages(parallelism: Parallelism, layer_names: list[str]) -> list[list[str]]:
    """Return the layer names of each pipeline stage of all ranks; one stage without a pipeline.

    Args:
        parallelism: the section.
        layer_names: the model's layers in forward order (`ModelShape.layer_names`).

    Raises:
        UserError: the model cannot be split this way, or the schedule does not support this many
            stages.
    """
    ranks = parallelism.pipeline_parallel_degree
    schedule = parallelism.pipeline_parallel_schedule
    if ranks == 1:
        return [layer_names]
    given = parallelism.module_fqns_per_model_part
    if given is not None:
        schedules.check_split(given, layer_names)
        schedules.check_stages(schedule, len(given), ranks)
        return given
    first = parallelism.pipeline_parallel_first_stage_less_layers
    last = parallelism.pipeline_parallel_last_stage_less_layers
    layers_per_stage = parallelism.pipeline_parallel_layers_per_stage
    if layers_per_stage is None:
        stages = schedules.default_stages(schedule, ranks)
    else:
        blocks = len(layer_names) - 3  # all but tok_embeddings, norm and output
        stages = math.ceil((blocks + first + last) / layers_per_stage)
    schedules.check_stages(schedule, stages, ranks)
    return schedules.split_evenly(layer_names, stages, first, last)


def check_batch(parallelism: Parallelism, batch_size: int, stages: int) -> None:
    """Check that a pipeline of so many stages can run `batch_size` sequences, a rank's microbatch.

    Raises:
        UserError: they cannot be split as the config says, or the schedule does not support this
            many microbatches.
    """
    size = parallelism.pipeline_parallel_microbatch_size
    schedule = parallelism.pipeline_parallel_schedule
    if batch_size % size:
        raise UserError(
            f"parallelism.pipeline_parallel_microbatch_size = {size} must divide the {batch_size} "
            "sequences that pass the pipeline together (the largest divisor of global batch / "
            "data-parallel degree up to training.local_batch_size)"
        )
    ranks = parallelism.pipeline_parallel_degree
    try:
        schedules.check_microbatches(schedule, batch_size // size, stages, ranks)
    except UserError as fault:
        raise UserError(
            f"parallelism.pipeline_parallel_schedule: {fault} (a rank's batch is {batch_size}, "
            f"pipeline_parallel_microbatch_size = {size}; training.local_batch_size allows more)"
        ) from None


def overlaps_exchanges(parallelism: Parallelism) -> bool:
    """Return whether a pipeline's forwards and backwards hide each other's exchanges of tokens."""
    return (
        parallelism.pipeline_parallel_degree > 1
        and parallelism.pipeline_parallel_schedule == "DualPipeV"
        and parallelism.expert_parallel_degree > 1
        and parallelism.pipeline_parallel_expert_parallel_overlap
    )


def count_sequence_shards(parallelism: Parallelism) -> int:
    """Return over how many tensor-parallel ranks a sequence is split between the products."""
    if parallelism.disable_sequence_parallel:
        return 1
    return parallelism.tensor_parallel_degree
