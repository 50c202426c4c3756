"""Every layout that a run could have: what `--suggest` chooses from, with bounds that cost little.

A candidate is a set of options over the run's own. Its bounds, of time and of memory, are worked
out from times of blocks that many candidates have in common; whether the config check allows it is
asked when its turn comes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torchtrain.catalog.schedules import SCHEDULES, default_stages
from torchtrain.config.layout import Degrees, find_divisors
from torchtrain.config.plans import RunPlan, plan_run, plan_shape
from torchtrain.config.schema import Config
from torchtrain.errors import UserError

Options = dict[str, Any]
"""Values by key, such as "training.local_batch_size"."""

RECOMPUTATIONS: dict[str, Options] = {
    "none": {"activation_checkpoint.mode": "none"},
    "op_all": {
        "activation_checkpoint.mode": "selective",
        "activation_checkpoint.selective_ac_option": "op_all",
    },
    "op": {
        "activation_checkpoint.mode": "selective",
        "activation_checkpoint.selective_ac_option": "op",
    },
    "2": {
        "activation_checkpoint.mode": "selective",
        "activation_checkpoint.selective_ac_option": "2",
    },
    "full": {"activation_checkpoint.mode": "full"},
}
"""The modes that are tried, the one that keeps most first. What the compiler makes of a memory
budget is not known before it has compiled."""

MOST_SEQUENCES = 16
"""In the largest microbatch that is tried."""
STAGES_PER_RANK = (2, 3, 4, 8)
"""Of the schedules that have several."""
LIVE_BATCHES = (2, 4, 8)
"""Microbatches per pipeline rank that are tried beside all that a rank has."""


@dataclass(frozen=True)
class Pipeline:
    """How a pipeline runs."""

    schedule: str
    stages: int
    microbatches: int
    layers_per_stage: int | None
    """As the option; None: it follows from the schedule."""


@dataclass(frozen=True)
class Candidate:
    """A layout, a mode of recomputation, a size of microbatches."""

    degrees: Degrees
    recomputation: str
    """A key of `RECOMPUTATIONS`."""
    sequences: int
    """Of a microbatch."""
    batch_size: int
    """Sequences of a rank that are computed, or pass the pipeline, before the next."""
    pipeline: Pipeline | None

    @cached_property
    def options(self) -> Options:
        """The options that make it."""
        degrees = self.degrees
        options: Options = {
            "parallelism.data_parallel_replicate_degree": degrees.dp_replicate,
            "parallelism.data_parallel_shard_degree": degrees.dp_shard,
            "parallelism.tensor_parallel_degree": degrees.tp,
            "parallelism.context_parallel_degree": degrees.cp,
            "parallelism.pipeline_parallel_degree": degrees.pp,
            "parallelism.expert_parallel_degree": degrees.ep,
            "training.local_batch_size": self.batch_size,
            **RECOMPUTATIONS[self.recomputation],
        }
        if self.pipeline is not None:
            options |= {
                "parallelism.pipeline_parallel_schedule": self.pipeline.schedule,
                "parallelism.pipeline_parallel_microbatch_size": self.sequences,
            }
            if self.pipeline.layers_per_stage is not None:
                key = "parallelism.pipeline_parallel_layers_per_stage"
                options[key] = self.pipeline.layers_per_stage
        return options

    @property
    def order(self) -> tuple[object, ...]:
        """What decides between candidates that are equally fast: the simpler comes first."""
        degrees = self.degrees
        sizes = (degrees.pp, degrees.cp, degrees.tp, degrees.ep, degrees.dp_replicate)
        pipeline = self.pipeline
        rest = ("", 0) if pipeline is None else (pipeline.schedule, pipeline.stages)
        modes = list(RECOMPUTATIONS)
        return (*sizes, modes.index(self.recomputation), self.sequences, -self.batch_size, *rest)

    @property
    def kind(self) -> tuple[str, ...]:
        """What activations are kept for how long depends on, beside sizes."""
        schedule = "" if self.pipeline is None else self.pipeline.schedule
        return self.recomputation, schedule

    def needs_more(self, other: "Candidate") -> bool:
        """Return whether this takes at least as much memory as the other for certain.

        Shared and split alike, with states shared by at most as many ranks, microbatches as large,
        and a mode of recomputation that keeps as much.
        """
        ours, theirs = self.degrees, other.degrees
        if (ours.pp, ours.tp, ours.cp, ours.ep) != (theirs.pp, theirs.tp, theirs.cp, theirs.ep):
            return False
        if ours.dp_shard > theirs.dp_shard or self.sequences < other.sequences:
            return False
        if self.pipeline is not None and other.pipeline is not None:
            if self.pipeline.schedule != other.pipeline.schedule:
                return False
            if self.pipeline.stages != other.pipeline.stages or self.batch_size < other.batch_size:
                return False
        keeps = {"none": 2, "op_all": 1, "op": 1, "2": 1, "full": 0}
        same = self.recomputation == other.recomputation
        return same or keeps[self.recomputation] > keeps[other.recomputation]


def apply_options(config: Config, options: Options) -> Config:
    """Return the config with other values; the keys say in which section."""
    sections: dict[str, Options] = {}
    for key, value in options.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    changed = {
        section: getattr(config, section).model_copy(update=values)
        for section, values in sections.items()
    }
    return config.model_copy(update=changed)


def plan_candidate(config: Config, candidate: Candidate, world_size: int) -> RunPlan | None:
    """Return the plan of a candidate; None where the config check refuses it."""
    try:
        return plan_run(apply_options(config, candidate.options), world_size)
    except UserError:
        return None


def list_degrees(config: Config, world_size: int) -> Iterator[Degrees]:
    """Yield the degrees that multiply to the world size and that the model could be split by."""
    shape = plan_shape(config.model)
    whole = config.training.global_batch_size
    for pp in find_divisors(world_size):
        if pp > shape.n_layers + 2:
            continue
        for tp in find_divisors(world_size // pp):
            if shape.n_heads % tp or shape.n_kv_heads % tp:
                continue
            for cp in find_divisors(world_size // pp // tp):
                data = world_size // pp // tp // cp
                if whole % data or config.training.seq_len % (cp * tp):
                    continue
                for replicas in find_divisors(data):
                    plain = Degrees(pp, replicas, data // replicas, cp, tp)
                    yield from _list_expert_degrees(plain, shape.n_experts)


def _list_expert_degrees(plain: Degrees, experts: int) -> Iterator[Degrees]:
    yield plain
    if experts:
        ranks = plain.dp_shard * plain.cp * plain.tp
        for ep in find_divisors(ranks)[1:]:
            if experts % ep == 0:
                sizes = (plain.pp, plain.dp_replicate, plain.dp_shard, plain.cp, plain.tp)
                yield Degrees(*sizes, ep=ep)


def list_candidates(config: Config, degrees: Degrees) -> Iterator[Candidate]:
    """Yield the candidates of these degrees, as far as a few divisions can tell."""
    per_rank = config.training.global_batch_size // degrees.data_parallel
    sizes = [size for size in find_divisors(per_rank) if size <= MOST_SEQUENCES]
    for sequences in sizes:
        for recomputation in RECOMPUTATIONS:
            if degrees.pp == 1:
                yield Candidate(degrees, recomputation, sequences, sequences, None)
                continue
            for batch_size in _list_batches(per_rank, sequences, degrees.pp):
                for pipeline in list_pipelines(config, degrees.pp, batch_size // sequences):
                    yield Candidate(degrees, recomputation, sequences, batch_size, pipeline)


def _list_batches(per_rank: int, sequences: int, ranks: int) -> list[int]:
    """Return how many sequences may pass the pipeline together: all, or a few per rank."""
    divisors = [size for size in find_divisors(per_rank) if size % sequences == 0]
    batches = {per_rank} if per_rank % sequences == 0 else set()
    for factor in LIVE_BATCHES:
        batches |= {size for size in divisors if size == factor * ranks * sequences}
    return sorted(batches)


def list_pipelines(config: Config, ranks: int, microbatches: int) -> Iterator[Pipeline]:
    """Yield the schedules that could run so many microbatches."""
    layers = plan_shape(config.model).n_layers
    layers += config.parallelism.pipeline_parallel_first_stage_less_layers
    layers += config.parallelism.pipeline_parallel_last_stage_less_layers
    for name, schedule in SCHEDULES.items():
        fewest = default_stages(name, ranks)
        if schedule.microbatches == "stages" and microbatches < fewest:
            continue
        if schedule.stages_per_rank != "several":
            yield Pipeline(name, fewest, microbatches, None)
            continue
        for per_rank in STAGES_PER_RANK:
            stages = per_rank * ranks
            share = -(-layers // stages)
            if -(-layers // share) == stages:
                yield Pipeline(name, stages, microbatches, share)
