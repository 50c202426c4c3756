"""How long an optimizer step takes, as a range with its reasons, before any device has run it.

A rank's time is counted, not measured: operations over the speed that such products reach, bytes
over the bandwidth of memory and links, and what hides behind what. Efficiencies are assumptions, of
which three sets make the range; docs/preflight.md holds them against published runs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch

from torchtrain.catalog.models import ModelShape
from torchtrain.catalog.schedules import stages_of
from torchtrain.config.plans import RunPlan
from torchtrain.config.schema import Config
from torchtrain.models.decoder import load_decoder
from torchtrain.tools.preflight.block_time import (
    BUBBLE,
    EXPERTS,
    OFFLOAD,
    OPTIMIZER,
    SHARDS,
    PassTime,
    Recomputed,
    Speeds,
    Terms,
    time_block,
    time_embedding,
    time_head,
)
from torchtrain.tools.preflight.block_work import Unit
from torchtrain.tools.preflight.devices import Device
from torchtrain.tools.preflight.links import Exchange, Groups, Links, list_groups
from torchtrain.tools.preflight.pipeline_order import (
    PipelineTime,
    StageTime,
    find_orders,
    time_orders,
)
from torchtrain.tools.preflight.sharding import Sharding, Stage, time_offload, time_update

MOST_PER_RANK = 4
"""Microbatches per pipeline rank that are simulated."""


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Which share of what a device can do a run reaches."""

    products: float
    """Of the best matrix products' speed: other shapes, and clocks under a lasting load."""
    attention: float
    """Of the attention kernels' speed."""
    memory: float
    """Of the bandwidth of the device's memory."""
    node: float
    """Of the bandwidth between devices of a node."""
    network: float
    """Of the bandwidth between nodes."""
    async_hidden: float
    """Of tensor-parallel exchanges, what async tensor parallelism hides."""


TYPICAL = Assumptions(
    products=0.76, attention=0.8, memory=0.8, node=0.7, network=0.7, async_hidden=0.4
)
FAST = Assumptions(
    products=0.9, attention=1.0, memory=0.9, node=0.85, network=0.85, async_hidden=0.6
)
SLOW = Assumptions(
    products=0.62, attention=0.6, memory=0.6, node=0.5, network=0.45, async_hidden=0.2
)


@dataclass(frozen=True)
class StepTime:
    """What a step takes."""

    terms: Mapping[str, float]
    """Seconds by reason, under typical assumptions; they add up to `seconds`."""
    seconds: float
    fastest_s: float
    slowest_s: float
    tokens: int
    """Of all ranks."""
    flops_per_token: float
    """Of the model, forward and backward, recomputation not counted."""
    peak_flops: float
    """Of all devices together."""

    def tokens_per_second(self, seconds: float) -> float:
        """Return the speed of the whole job, for one of the three times."""
        return self.tokens / seconds

    def mfu(self, seconds: float) -> float:
        """Return the model FLOPs utilization, for one of the three times."""
        return self.tokens_per_second(seconds) * self.flops_per_token / self.peak_flops


@cache
def count_flops_per_token(family: str, shape: ModelShape, seq_len: int) -> float:
    """Return the model's operations for one token, forward and backward, as it counts them."""
    with torch.device("meta"):
        model = load_decoder(family)(shape)
    return model.flops_per_token(seq_len)


def predict_step(
    config: Config, plan: RunPlan, device: Device, *, float8: bool = False
) -> StepTime:
    """Predict a step's time.

    Args:
        config: a checked config.
        plan: what follows from it for a world size; its shape has a vocabulary.
        device: the kind of all ranks' devices.
        float8: whether matrix products compute in float8 even where the config does not say so, as
            in some of the published runs that predictions are held against.
    """
    terms = time_step(config, plan, device, TYPICAL, float8=float8)
    degrees = plan.degrees
    return StepTime(
        terms={name: seconds for name, seconds in terms.items() if seconds > 0},
        seconds=terms.total(),
        fastest_s=time_step(config, plan, device, FAST, float8=float8).total(),
        slowest_s=time_step(config, plan, device, SLOW, float8=float8).total(),
        tokens=plan.batch.global_batch_size * config.training.seq_len,
        flops_per_token=count_flops_per_token(
            config.model.name, plan.shape, config.training.seq_len
        ),
        peak_flops=device.peak_flops * degrees.data_parallel * degrees.ranks_per_sample,
    )


def time_step(
    config: Config, plan: RunPlan, device: Device, assumed: Assumptions, *, float8: bool = False
) -> Terms:
    """Return the seconds of a step by term, on the rank that has most to do."""
    speeds = find_speeds(config, device, assumed, float8=float8)
    groups = list_groups(plan.degrees)
    pipeline = plan.pipeline
    sequences = plan.batch.microbatch_size if pipeline is None else pipeline.microbatch_size
    unit = Unit.of(config, plan.shape, plan.degrees, sequences)
    parts = Parts.of(config, unit, speeds, groups)
    stages = [Stage.of(names, plan.shape) for names in plan.stages]
    if pipeline is None:
        terms = _time_units(config, plan, parts, stages[0])
        own = parts.sharding.count_own(stages[0])
    else:
        terms, own = _time_pipeline(config, plan, parts, stages)
    units = plan.batch.accumulation_steps
    gathers = 1 if keeps_gathered(config) else 2 * units
    terms[OFFLOAD] = time_offload(config, speeds, own, gathers, units)
    terms[OPTIMIZER] = time_update(config, plan, speeds, own)
    return terms


def find_speeds(
    config: Config, device: Device, assumed: Assumptions, *, float8: bool = False
) -> Speeds:
    """Return what a run's parts reach on a device."""
    products = device.product_flops * assumed.products
    if config.training.mixed_precision_param == "float32":
        products *= device.fp32_share
    elif float8 or "quantize.linear.float8" in config.model.converters:
        products *= device.float8_gain
    compiled = config.compile.components if config.compile.enable else []
    parallelism = config.parallelism
    return Speeds(
        products=products,
        attention=device.product_flops * device.attention_share * assumed.attention,
        memory=device.memory_bandwidth * assumed.memory,
        links=Links(device, assumed.node, assumed.network),
        async_hidden=assumed.async_hidden if parallelism.enable_async_tensor_parallel else 0.0,
        fused="model" in compiled,
        fused_loss="loss" in compiled,
    )


def keeps_gathered(config: Config) -> bool:
    """Return whether gathered parameters are kept from the first forward to the update."""
    reshard = config.parallelism.fsdp_reshard_after_forward
    in_pipeline = config.parallelism.pipeline_parallel_degree > 1
    return reshard == "never" or (reshard == "default" and in_pipeline)


@dataclass(frozen=True)
class Parts:
    """The times of a model's parts on one rank."""

    blocks: dict[bool, PassTime]
    """Of a block, by whether it has experts."""
    embedding: PassTime
    head: PassTime
    sharding: Sharding

    @classmethod
    def of(cls, config: Config, unit: Unit, speeds: Speeds, groups: Groups) -> "Parts":
        """Time each part."""
        recomputed = Recomputed.of(config.activation_checkpoint, config.compile)
        kinds = (False, True) if unit.shape.n_experts else (False,)
        return cls(
            blocks={
                sparse: time_block(unit, speeds, groups, recomputed, sparse=sparse)
                for sparse in kinds
            },
            embedding=time_embedding(unit, speeds, groups),
            head=time_head(unit, speeds, groups),
            sharding=Sharding.of(config, unit, speeds, groups),
        )

    def time_stage(self, stage: Stage) -> PassTime:
        """Return the times of a whole stage, without FSDP's exchanges."""
        forward, backward, weights = Terms(), Terms(), 0.0
        parts = [(count, self.blocks[sparse]) for count, sparse in stage.kinds]
        parts += [(1, self.embedding)] if stage.embeds else []
        parts += [(1, self.head)] if stage.heads else []
        for count, part in parts:
            forward.add(part.forward, count)
            backward.add(part.backward, count)
            weights += count * part.weights
        return PassTime(forward, backward, weights)


def _time_units(config: Config, plan: RunPlan, parts: Parts, stage: Stage) -> Terms:
    """Return the terms of all microbatches of a rank that has the whole model."""
    units = plan.batch.accumulation_steps
    passed = parts.time_stage(stage)
    terms = Terms()
    terms.add(passed.forward, units)
    terms.add(passed.backward, units)
    kept = keeps_gathered(config)
    sharding = parts.sharding
    terms[SHARDS] = sharding.wait_forward(stage, parts.blocks) * (1 if kept else units)
    terms[SHARDS] += sharding.wait_backward(stage, parts.blocks, gathers=not kept) * units
    return terms


def _time_pipeline(
    config: Config, plan: RunPlan, parts: Parts, stages: list[Stage]
) -> tuple[Terms, float]:
    """Return the terms of the pipeline's busiest rank, and how many parameters it keeps."""
    pipeline = plan.pipeline
    assert pipeline is not None
    batches = plan.batch.accumulation_steps
    passed = [parts.time_stage(stage) for stage in stages]
    timed = time_pipeline(config, plan, parts, passed)
    rank = timed.busy.index(max(timed.busy))
    numbers = stages_of(rank, pipeline.schedule, len(stages), plan.degrees.pp)
    terms = Terms()
    for number in numbers:
        terms.add(passed[number].forward, batches * pipeline.microbatches)
        terms.add(passed[number].backward, batches * pipeline.microbatches)
    if pipeline.overlaps:  # forwards and backwards hide each other's exchanges
        terms[EXPERTS] -= terms.total() - batches * timed.busy[rank]
    terms[BUBBLE] = batches * timed.bubble
    sharding = parts.sharding
    waits = sum(sharding.wait_forward(stages[number], parts.blocks) for number in numbers)
    if keeps_gathered(config):
        last = sharding.reduce_all(stages[numbers[0]])  # whose backwards end last
        terms[SHARDS] = waits + batches * last
    else:
        back = sum(
            sharding.wait_backward(stages[number], parts.blocks, gathers=True) for number in numbers
        )
        terms[SHARDS] = (waits + back) * batches * pipeline.microbatches
    own = sum(sharding.count_own(stages[number]) for number in numbers)
    return terms, own


def time_pipeline(
    config: Config, plan: RunPlan, parts: Parts, passed: list[PassTime]
) -> PipelineTime:
    """Return how long the pipeline takes for a batch, in the order of its schedule."""
    pipeline = plan.pipeline
    assert pipeline is not None
    # Once it is full a pipeline repeats itself, so that a few microbatches tell the time of many.
    simulated = min(pipeline.microbatches, MOST_PER_RANK * plan.degrees.pp)
    orders = find_orders(
        pipeline.schedule,
        plan.degrees.pp,
        pipeline.stages,
        simulated,
        whole_backward=pipeline.whole_backward,
    )
    times = []
    for stage in passed:
        exchanged = stage.forward[EXPERTS] + stage.backward[EXPERTS]
        computed = stage.forward.total() + stage.backward.total() - exchanged
        times.append(
            StageTime(
                forward=stage.forward.total(),
                backward=stage.backward.total(),
                weights=stage.weights,
                hidden=min(exchanged, computed) if pipeline.overlaps else 0.0,
            )
        )
    handed = pipeline.microbatch_size * pipeline.activation_len * plan.shape.dim
    exchange = Exchange("send", handed * parts.sharding.unit.compute_bytes)
    links = parts.sharding.speeds.links
    timed = time_orders(orders, times, links.seconds(exchange, parts.sharding.groups.pp))
    return timed.repeat(pipeline.microbatches / simulated)
