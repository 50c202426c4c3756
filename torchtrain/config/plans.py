"""What follows from the config and the world size, worked out once: the `RunPlan`.

The config check uses the same functions, one by one, to report all that is wrong.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torchtrain.catalog.models import ModelShape, resolve_shape
from torchtrain.catalog.parameters import count_parameters
from torchtrain.catalog.schedules import SCHEDULES
from torchtrain.config import layout
from torchtrain.config.rules import Length, Rate, plan_length, plan_rate
from torchtrain.config.schema import Config, LRScheduler, Model
from torchtrain.config.sources import DataSource, plan_sources, plan_validation_sources
from torchtrain.errors import UserError
from torchtrain.utils import expand_user, plural

DEBUG_TOKENIZER = Path(__file__).parents[1] / "datasets" / "debug_tokenizer.model"


@dataclass(frozen=True)
class PipelinePlan:
    """How the sequences that a rank computes at once pass through the pipeline."""

    schedule: str
    """Its name, a key of `catalog.schedules.SCHEDULES`."""
    stages: int
    """Stages over all ranks."""
    last_rank: int
    """Pipeline rank that has the last stage: 0 in a V."""
    microbatches: int
    """Microbatches into which the sequences are split."""
    microbatch_size: int
    """Sequences per microbatch."""
    seq_len: int
    """Tokens of a sequence that a rank is given."""
    activation_len: int
    """Tokens of a sequence in what a rank passes from stage to stage."""
    whole_backward: bool
    """Whether inputs' and weights' gradients come together even where the schedule splits them."""
    overlaps: bool
    """Whether a forward and a backward that the schedule pairs hide each other's exchanges."""

    def describe(self) -> str:
        """Return the plan in words, for the start-up line."""
        whole = ", backwards whole (recomputation or compile)" if self.whole_backward else ""
        overlap = ", forwards overlapped with backwards" if self.overlaps else ""
        return (
            f"pipeline schedule {self.schedule}: {self.stages} stages, "
            f"{plural(self.microbatches, 'microbatch')} of {self.microbatch_size}{whole}{overlap}"
        )


@dataclass(frozen=True)
class ValidationPlan:
    """What is validated on, and when."""

    sources: list[DataSource]
    """Empty without validation."""
    seq_len: int
    """Tokens per sequence."""
    batch_size: int
    """Sequences that a rank evaluates at once."""
    max_sequences: int | None
    """Most sequences per validation, over all ranks; None: all there are."""
    freq: int
    """Steps from one validation to the next."""
    last_step: int
    """The run's last step, after which it validates too."""
    pipeline: PipelinePlan | None
    """How a batch passes through the pipeline, where there is one."""


@dataclass(frozen=True)
class Schedule:
    """A learning-rate schedule; total_steps = warmup_steps + stable_steps + decay_steps."""

    total_steps: int
    """T, at least 1."""
    warmup_steps: int
    """W, 0 for none."""
    stable_steps: int
    """Steps at the largest rate between warm-up and decay."""
    decay_steps: int
    """D, 0 for none."""
    decay_type: Literal["linear", "sqrt", "cosine"]
    min_lr_factor: float
    """m, the last rate as a fraction of the largest."""


@dataclass(frozen=True)
class RunPlan:
    """Everything that follows from the config and the world size."""

    degrees: layout.Degrees
    shape: ModelShape
    stages: list[list[str]]
    """Layer names of each pipeline stage; one stage without a pipeline."""
    sequence_shards: int
    """Tensor-parallel ranks over which a sequence is split between the products; 1: not split."""
    batch: layout.BatchPlan
    pipeline: PipelinePlan | None
    """How a microbatch passes through the pipeline, where there is one."""
    sources: list[DataSource]
    validation: ValidationPlan
    length: Length
    schedule: Schedule
    rate: Rate

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return self.length.steps

    def describe_layout(self) -> str:
        """Return how the ranks share the model, in words."""
        if self.pipeline is None:
            return self.degrees.describe()
        return f"{self.degrees.describe()}; {self.pipeline.describe()}"


def plan_run(
    config: Config,
    world_size: int,
    *,
    tokenizer_size: int | None = None,
    global_batch_size: int | None = None,
) -> RunPlan:
    """Work out what follows from the config and the world size.

    Args:
        config: a checked config.
        world_size: number of ranks.
        tokenizer_size: number of the tokenizer's ids, once it is known. Until then a vocabulary
            size of 0, which means the tokenizer's, stays 0.
        global_batch_size: the resumed checkpoint's, for a config that leaves it at -1.

    Raises:
        UserError: an impossible combination. The config check has refused them all, except for
            what only the tokenizer or the checkpoint can tell.
    """
    parallelism = config.parallelism
    shape = plan_shape(config.model)
    if tokenizer_size is not None:
        shape = replace(shape, vocab_size=plan_vocabulary(config.model, shape, tokenizer_size))
    degrees = layout.plan_degrees(parallelism, world_size)
    stages = layout.plan_stages(parallelism, shape.layer_names)
    batch = layout.plan_batch(config.training, degrees.data_parallel, global_batch_size)
    if degrees.pp > 1:
        layout.check_batch(parallelism, batch.microbatch_size, len(stages))
    count = count_parameters(config.model.name, shape)
    length = plan_length(config.training, count, batch.global_batch_size)
    schedule = plan_schedule(config.lr_scheduler, length.steps)
    per_step = batch.global_batch_size * config.training.seq_len
    tokens = schedule.total_steps * per_step
    return RunPlan(
        degrees=degrees,
        shape=shape,
        stages=stages,
        sequence_shards=layout.count_sequence_shards(parallelism),
        batch=batch,
        pipeline=plan_pipeline(
            config,
            degrees,
            stages=len(stages),
            batch_size=batch.microbatch_size,
            seq_len=config.training.seq_len,
        ),
        sources=plan_sources(config.training, config.data, config.validation),
        validation=plan_validation(
            config, degrees, batch, stages=len(stages), last_step=length.steps
        ),
        length=length,
        schedule=schedule,
        rate=plan_rate(config.optimizer, count, tokens, per_step, schedule.min_lr_factor),
    )


def plan_pipeline(
    config: Config, degrees: layout.Degrees, *, stages: int, batch_size: int, seq_len: int
) -> PipelinePlan | None:
    """Return how `batch_size` sequences of `seq_len` tokens pass through a pipeline of `stages`.

    None: there is no pipeline.
    """
    if degrees.pp == 1:
        return None
    schedule = config.parallelism.pipeline_parallel_schedule
    microbatch_size = config.parallelism.pipeline_parallel_microbatch_size
    in_a_v = SCHEDULES[schedule].stages_per_rank == "two"
    compiled = config.compile.enable and "model" in config.compile.components
    recomputes = config.activation_checkpoint.mode != "none"
    return PipelinePlan(
        schedule=schedule,
        stages=stages,
        last_rank=0 if in_a_v else degrees.pp - 1,
        microbatches=batch_size // microbatch_size,
        microbatch_size=microbatch_size,
        seq_len=seq_len // degrees.cp,
        activation_len=seq_len // degrees.cp // layout.count_sequence_shards(config.parallelism),
        whole_backward=SCHEDULES[schedule].splits_backward and (compiled or recomputes),
        overlaps=layout.overlaps_exchanges(config.parallelism),
    )


def plan_validation(
    config: Config,
    degrees: layout.Degrees,
    batch: layout.BatchPlan,
    *,
    stages: int,
    last_step: int,
) -> ValidationPlan:
    """Return what to validate on, and when.

    Raises:
        UserError: as `plan_sources`.
    """
    section = config.validation
    seq_len = section.seq_len or config.training.seq_len
    batch_size = section.local_batch_size or batch.microbatch_size
    return ValidationPlan(
        sources=plan_validation_sources(config),
        seq_len=seq_len,
        batch_size=batch_size,
        max_sequences=None if section.steps == -1 else section.steps * batch.global_batch_size,
        freq=section.freq,
        last_step=last_step,
        pipeline=plan_pipeline(
            config, degrees, stages=stages, batch_size=batch_size, seq_len=seq_len
        ),
    )


def plan_schedule(section: LRScheduler, training_steps: int) -> Schedule:
    """Settle warm-up and decay: what does not fit into the run is cut, first the decay."""
    total = section.total_steps or training_steps
    warmup = section.warmup_steps
    if warmup is None:
        warmup = max(2, int(section.warmup_ratio * total))
    warmup = min(warmup, total)
    decay = total - warmup
    if section.decay_ratio is not None:
        decay = min(decay, round(section.decay_ratio * total))
    return Schedule(
        total_steps=total,
        warmup_steps=warmup,
        stable_steps=total - warmup - decay,
        decay_steps=decay,
        decay_type=section.decay_type,
        min_lr_factor=section.min_lr_factor,
    )


def plan_shape(model: Model) -> ModelShape:
    """Return the flavor's shape under the overrides given.

    Raises:
        UserError: unknown family or flavor.
    """
    return resolve_shape(model.name, model.flavor, model.model_dump())


def plan_vocabulary(model: Model, shape: ModelShape, tokenizer_size: int) -> int:
    """Return the rows of the embedding; 0 takes the tokenizer's size.

    Raises:
        UserError: the vocabulary is smaller than the tokenizer's.
    """
    if shape.vocab_size == 0:
        return tokenizer_size
    if shape.vocab_size < tokenizer_size:
        raise UserError(
            f"model.vocab_size = {shape.vocab_size} is smaller than the tokenizer's "
            f"{tokenizer_size} tokens ({find_tokenizer(model)}); give at least that, or 0 to take "
            "the tokenizer's"
        )
    return shape.vocab_size


def find_tokenizer(model: Model) -> str:
    """Return the tokenizer file or folder as given; loading it finds whether it exists."""
    return model.tokenizer_path or model.hf_assets_path or str(DEBUG_TOKENIZER)


def list_output_folders(config: Config) -> dict[str, Path]:
    """Return the folders that the run writes, by key: in `job.dump_folder` where relative."""
    return {
        "profiling.save_traces_folder": expand_user(config.profiling.save_traces_folder),
        "profiling.save_memory_snapshot_folder": expand_user(
            config.profiling.save_memory_snapshot_folder
        ),
        "metrics.save_tb_folder": expand_user(config.metrics.save_tb_folder),
        "checkpoint.folder": expand_user(config.checkpoint.folder),
    }
