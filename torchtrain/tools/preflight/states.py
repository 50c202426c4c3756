"""What a layer's weights take on a rank, sharded and gathered: FSDP's groups, as it forms them.

Source of what FSDP allocates when: torch/distributed/fsdp/_fully_shard, `_fsdp_param_group.py` and
`_fsdp_collectives.py`.
"""

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import torch

from torchtrain.config.layout import Degrees
from torchtrain.config.schema import Training
from torchtrain.dtypes import DTYPES

FLOAT8 = 1
"""Bytes of a number."""


@dataclass(frozen=True)
class Weights:
    """The bytes of one or several groups of weights on a rank."""

    parameters: int = 0
    """Sharded: what the optimizer updates; 0 where that is in the host's memory. Their gradients
    take as much."""
    gathered: int = 0
    """Whole, in the compute precision or in float8."""
    each_gathered: tuple[int, ...] = ()
    """That, of each weight."""
    gradients: int = 0
    """Whole, in the compute precision: what a backward leaves."""
    gather_buffer: int = 0
    """What an all-gather receives into, before it is copied to `gathered`; 0 on one rank."""
    reduce_buffer: int = 0
    """What a reduce-scatter sends, in the reduction precision."""
    reduced: int = 0
    """What it receives."""
    accumulated: int = 0
    """Whole gradients that wait for it over a pipeline's microbatches."""
    ends_held: int = 0
    """What the all-reduce over replicas holds until the end of the backward."""

    def __add__(self, other: "Weights") -> "Weights":
        """Return both together."""
        fields = self.__dataclass_fields__
        ours, theirs = vars(self), vars(other)
        return Weights(**{field: ours[field] + theirs[field] for field in fields})


NO_WEIGHTS = Weights()


def weigh(
    shapes: Mapping[str, torch.Size],
    names: Iterable[str],
    degrees: Degrees,
    training: Training,
    in_float8: Collection[str] = (),
) -> Weights:
    """Return what the weights of these names take.

    Args:
        shapes: of this rank's part of each weight, before FSDP.
        names: of the weights.
        degrees: of the run.
        training: the precisions.
        in_float8: names of those that are gathered in float8.
    """
    computed = DTYPES[training.mixed_precision_param].itemsize
    total = NO_WEIGHTS
    for name in names:
        ranks = degrees.dp_shard * degrees.cp
        if ".experts." in name and (degrees.ep > 1 or degrees.tp > 1):
            ranks = degrees.expert_shard
        gathered = FLOAT8 if name in in_float8 else computed
        total += weigh_one(shapes[name], ranks, degrees.dp_replicate, training, gathered)
    return total


def weigh_one(
    shape: torch.Size, ranks: int, replicas: int, training: Training, gathered: int
) -> Weights:
    """Return what one weight takes on the rank that has the most of it.

    Args:
        shape: of a tensor-parallel rank's part.
        ranks: that shard it.
        replicas: of these.
        training: the precisions.
        gathered: bytes of a number that is gathered.
    """
    stored = DTYPES[training.dtype].itemsize
    computed = DTYPES[training.mixed_precision_param].itemsize
    reduced = DTYPES[training.mixed_precision_reduce].itemsize
    numbers = math.prod(shape)
    # As `fsdp.place`: of experts the first dimension that comes out even, else rows, filled up.
    is_even = len(shape) >= 3 and any(size % ranks == 0 for size in shape)
    rows = shape[0] if is_even else math.ceil(shape[0] / ranks) * ranks
    padded = numbers // shape[0] * rows
    shard = padded // ranks
    return Weights(
        parameters=0 if training.enable_cpu_offload else shard * stored,
        gathered=padded * gathered,
        each_gathered=(padded * gathered,),
        gradients=numbers * computed,
        gather_buffer=padded * gathered if ranks > 1 else 0,
        reduce_buffer=padded * reduced,
        reduced=shard * reduced,
        accumulated=numbers * reduced,
        ends_held=shard * reduced if replicas > 1 and reduced != stored else 0,
    )
