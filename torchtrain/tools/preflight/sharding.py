"""What FSDP's exchanges and the update cost a rank: parameters gathered, reduced, changed.

A block's parameters are gathered while the one before computes, and its gradients are reduced while
the next one's backward does: a step waits for what is longer than that, and for the first gather
and the last reduction, which have nothing to hide behind.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torchtrain.catalog.models import ModelShape
from torchtrain.config.plans import RunPlan
from torchtrain.config.schema import Config
from torchtrain.dtypes import DTYPES
from torchtrain.tools.preflight.block_time import EAGER_TRAFFIC, PassTime, Speeds
from torchtrain.tools.preflight.block_work import Unit
from torchtrain.tools.preflight.float8 import InFloat8, Share, find_in_float8
from torchtrain.tools.preflight.links import HOP_S, START_S, Exchange, Group, Groups
from torchtrain.tools.preflight.states import FLOAT8

PASSES = {"fused": 10, "foreach": 10 * EAGER_TRAFFIC, "for-loop": 10 * EAGER_TRAFFIC}
"""Tensors as large as the parameters that a step of AdamW and the clipping before it read or write:
three for norm and scale, seven for the update, which fused reads and writes each state once."""
SMALL_COLLECTIVES = 6
"""Of a step: labels counted, the norm over each dimension of the mesh, the ranks' metrics."""
NO_SHARE = Share()
SCALE_BYTES = 4.0
HOST_MEMORY = 20e9
"""Bytes per second at which one rank's share of a host updates what is kept there."""


@dataclass(frozen=True)
class Stage:
    """What a pipeline stage has, or the whole model without a pipeline."""

    dense: int
    """Blocks without experts."""
    sparse: int
    """Blocks with experts."""
    embeds: bool
    """Whether it has the embedding."""
    heads: bool
    """Whether it has the output."""

    @classmethod
    def of(cls, names: Sequence[str], shape: ModelShape) -> "Stage":
        """Describe the stage that has these layer names."""
        layers = [int(name.split(".")[1]) for name in names if name.startswith("layers.")]
        sparse = sum(shape.is_sparse(layer) for layer in layers)
        return cls(
            dense=len(layers) - sparse,
            sparse=sparse,
            embeds="tok_embeddings" in names,
            heads="output" in names,
        )

    @property
    def kinds(self) -> list[tuple[int, bool]]:
        """Numbers of blocks, without and with experts, where there are any."""
        both = [(self.dense, False), (self.sparse, True)]
        return [(count, sparse) for count, sparse in both if count > 0]


@dataclass(frozen=True)
class Sharding:
    """FSDP's exchanges for the parts of a model, in seconds."""

    unit: Unit
    speeds: Speeds
    groups: Groups
    reduce_bytes: int
    """Of an element of the gradients that are reduced."""
    in_float8: InFloat8
    """What is gathered so."""
    scales_apart: bool
    """Whether the scale of each weight in float8 takes an exchange of its own."""

    @classmethod
    def of(cls, config: Config, unit: Unit, speeds: Speeds, groups: Groups) -> "Sharding":
        """Describe a run's."""
        reduce_bytes = DTYPES[config.training.mixed_precision_reduce].itemsize
        return cls(
            unit,
            speeds,
            groups,
            reduce_bytes,
            find_in_float8(config, unit.shape, unit.degrees.tp),
            not config.quantize_linear_float8.precompute_float8_dynamic_scale_for_fsdp,
        )

    def gather(self, *, sparse: bool) -> float:
        """Return the seconds of gathering a block's parameters."""
        dense, experts = self.unit.count_parameters(sparse=sparse)
        return self._gather(dense, self.groups.fsdp, self.share(sparse=sparse)) + self._gather(
            experts, self.groups.fsdp_experts
        )

    def share(self, *, sparse: bool) -> Share:
        """Return what of a block is gathered in float8."""
        return self.in_float8.sparse if sparse else self.in_float8.dense

    def reduce(self, *, sparse: bool) -> float:
        """Return the seconds of reducing a block's gradients, over replicas too."""
        dense, experts = self.unit.count_parameters(sparse=sparse)
        return self._reduce(dense, self.groups.fsdp) + self._reduce(
            experts, self.groups.fsdp_experts
        )

    def _gather(self, parameters: float, group: Group, share: Share = NO_SHARE) -> float:
        if parameters == 0:
            return 0.0
        links = self.speeds.links
        size = parameters * self.unit.compute_bytes - self._count_saved(share)
        seconds = links.seconds(Exchange("all_gather", size), group)
        if self.scales_apart:
            scale = Exchange("all_reduce", SCALE_BYTES)
            sharing = (group, self.groups.tp)
            seconds += share.weights * sum(links.seconds(scale, each) for each in sharing)
        return seconds

    def _reduce(self, parameters: float, group: Group) -> float:
        if parameters == 0:
            return 0.0
        size = parameters * self.reduce_bytes
        links = self.speeds.links
        within = links.seconds(Exchange("reduce_scatter", size), group)
        own = Exchange("all_reduce", size / group.size)
        return within + links.seconds(own, self.groups.replicas)

    @property
    def gather_embedding(self) -> float:
        """Seconds of gathering the embedding."""
        return self._gather(self.unit.matrix_parameters(), self.groups.fsdp)

    @property
    def gather_output(self) -> float:
        """Seconds of gathering the output."""
        return self._gather(self.unit.matrix_parameters(), self.groups.fsdp, self.in_float8.output)

    @property
    def reduce_matrix(self) -> float:
        """Seconds of reducing its gradient."""
        return self._reduce(self.unit.matrix_parameters(), self.groups.fsdp)

    def wait_forward(self, stage: Stage, blocks: dict[bool, PassTime]) -> float:
        """Return for how long a forward waits for parameters.

        `blocks` are the times of a block, by whether it has experts.
        """
        waits = 0.0
        for count, sparse in stage.kinds:
            hiding = blocks[sparse].forward.total()
            waits += count * max(0.0, self.gather(sparse=sparse) - hiding)
            if stage.heads:
                waits += max(0.0, self.gather_output - hiding) / len(stage.kinds)
        if stage.embeds:
            return waits + self.gather_embedding
        return waits + max((self.gather(sparse=sparse) for _, sparse in stage.kinds), default=0.0)

    def wait_backward(self, stage: Stage, blocks: dict[bool, PassTime], *, gathers: bool) -> float:
        """Return for how long a backward waits for parameters and for its gradients' reduction."""
        waits = 0.0
        for count, sparse in stage.kinds:
            exchanges = self.reduce(sparse=sparse)
            exchanges += self.gather(sparse=sparse) if gathers else 0.0
            waits += count * max(0.0, exchanges - blocks[sparse].backward.total())
        if stage.embeds:
            return waits + self.reduce_matrix
        return waits + max((self.reduce(sparse=sparse) for _, sparse in stage.kinds), default=0.0)

    def reduce_all(self, stage: Stage) -> float:
        """Return the seconds of reducing all gradients of a stage."""
        blocks = sum(count * self.reduce(sparse=sparse) for count, sparse in stage.kinds)
        return blocks + (stage.embeds + stage.heads) * self.reduce_matrix

    def count_own(self, stage: Stage) -> float:
        """Return the parameters of a stage that one rank keeps."""
        own = 0.0
        for count, sparse in stage.kinds:
            dense, experts = self.unit.count_parameters(sparse=sparse)
            own += count * dense / self.groups.fsdp.size
            own += count * experts / self.groups.fsdp_experts.size
        both_tied = self.unit.shape.tied_embeddings and stage.embeds and stage.heads
        matrices = 1 if both_tied else stage.embeds + stage.heads
        return own + matrices * self.unit.matrix_parameters() / self.groups.fsdp.size

    def count_saved(self, stage: Stage) -> float:
        """Return the bytes that a stage's gathered parameters do not take because of float8."""
        shares = [(count, self.share(sparse=sparse)) for count, sparse in stage.kinds]
        shares += [(1, self.in_float8.output)] if stage.heads else []
        return sum(count * self._count_saved(share) for count, share in shares)

    def _count_saved(self, share: Share) -> float:
        return share.numbers * (self.unit.compute_bytes - FLOAT8)


def time_update(config: Config, plan: RunPlan, speeds: Speeds, own: float) -> float:
    """Return the seconds of clipping and of the optimizer, for so many parameters of a rank.

    Muon's matrices are computed by one rank each; here they are spread evenly.
    """
    section = config.optimizer
    element = DTYPES[config.training.dtype].itemsize
    memory = HOST_MEMORY if config.training.enable_cpu_offload else speeds.memory
    seconds = own * element * PASSES[section.implementation] / memory
    ranks = plan.degrees.data_parallel * plan.degrees.ranks_per_sample
    nodes = Group(ranks, 1).nodes(speeds.links.device)
    seconds += SMALL_COLLECTIVES * (START_S + HOP_S * (nodes - 1))
    if section.name == "Muon":
        width = plan.shape.dim
        # Each iteration: a Gram matrix, its square, and a product with the matrix.
        flops = section.muon_ns_steps * 6.0 * width * own
        seconds += flops / plan.degrees.dp_replicate / speeds.products
        world = Group(ranks, 1)
        exchanged = Exchange("all_to_all", own * element)
        seconds += 2 * speeds.links.seconds(exchanged, world)
    return seconds


def time_offload(config: Config, speeds: Speeds, own: float, gathers: int, units: int) -> float:
    """Return the seconds of copies between host and device, where states are kept on the host."""
    if not config.training.enable_cpu_offload:
        return 0.0
    training = config.training
    down = own * DTYPES[training.dtype].itemsize * gathers
    up = own * DTYPES[training.mixed_precision_reduce].itemsize * units
    return (down + up) / speeds.links.device.host_bandwidth
