"""What a whole run takes: days, device-hours, money, and room for its checkpoints."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from torchtrain.catalog.models import ModelShape
from torchtrain.checkpoint.state import measure
from torchtrain.config.plans import RunPlan
from torchtrain.config.schema import Checkpoint, Config
from torchtrain.dtypes import DTYPES
from torchtrain.models.decoder import load_decoder
from torchtrain.optimizers.build import build_optimizer
from torchtrain.tools.preflight.devices import GB, Device
from torchtrain.tools.preflight.links import Group
from torchtrain.tools.preflight.step_time import StepTime

HOUR = 3600
DAY = 24 * HOUR
DISK_GB_PER_S = 2.0
"""What a node is taken to write per second, in GB, where nothing is said: a local NVMe disk, or its
share of a parallel file system."""
STAND_IN = 2
"""Rows and columns of the weights that the optimizer is asked with."""


@dataclass(frozen=True)
class CheckpointCost:
    """What saving takes."""

    parameters: int
    """Bytes of the weights of one checkpoint."""
    states: int
    """Bytes of the optimizer's states in it."""
    write_s: float
    """From the first byte to the last."""
    stall_s: float
    """For how long training stands still."""
    saves: int
    """Over the run, by `checkpoint.interval`."""
    most_at_once: int | None
    """Checkpoints on the disk while one is written; None: all of the run's."""

    @property
    def size(self) -> int:
        """Bytes of one checkpoint."""
        return self.parameters + self.states

    @property
    def disk(self) -> int:
        """Bytes that the disk must have room for."""
        return self.size * (self.saves if self.most_at_once is None else self.most_at_once)


@dataclass(frozen=True)
class RunCost:
    """What a run takes: each figure for the fastest, the typical and the slowest step."""

    steps: int
    tokens: int
    seconds: tuple[float, float, float]
    devices: int
    price: float | None
    """Of one device for an hour."""
    checkpoint: CheckpointCost | None
    """None: it saves none."""

    @property
    def days(self) -> list[float]:
        """Days from the first step to the last."""
        return [seconds / DAY for seconds in self.seconds]

    @property
    def device_hours(self) -> list[float]:
        """Hours of all devices together."""
        return [seconds / HOUR * self.devices for seconds in self.seconds]

    @property
    def costs(self) -> list[float] | None:
        """What they cost, in the currency of the price."""
        if self.price is None:
            return None
        return [hours * self.price for hours in self.device_hours]


def cost_run(
    config: Config,
    plan: RunPlan,
    device: Device,
    step: StepTime,
    *,
    price: float | None = None,
    disk_gb_per_s: float | None = None,
) -> RunCost:
    """Return what all steps of a run take.

    Args:
        config: a checked config.
        plan: what follows from it.
        device: the kind of all ranks' devices.
        step: how long a step takes.
        price: of one device for an hour.
        disk_gb_per_s: what all ranks together write per second; by default `DISK_GB_PER_S` for
            each node.
    """
    ranks = plan.degrees.data_parallel * plan.degrees.ranks_per_sample
    checkpoint = None
    if config.checkpoint.enable and not config.checkpoint.load_only:
        if disk_gb_per_s is None:
            disk_gb_per_s = DISK_GB_PER_S * Group(ranks, 1).nodes(device)
        checkpoint = cost_checkpoint(config, plan, device, ranks, disk_gb_per_s)
    steps = plan.steps
    stalls = 0.0 if checkpoint is None else checkpoint.saves * checkpoint.stall_s
    times = (step.fastest_s, step.seconds, step.slowest_s)
    fastest, typical, slowest = (steps * seconds + stalls for seconds in times)
    return RunCost(
        steps=steps,
        tokens=steps * step.tokens,
        seconds=(fastest, typical, slowest),
        devices=ranks,
        price=price,
        checkpoint=checkpoint,
    )


def cost_checkpoint(
    config: Config, plan: RunPlan, device: Device, ranks: int, disk_gb_per_s: float
) -> CheckpointCost:
    """Return what saving takes at a speed of the disks."""
    parameters, states = measure_checkpoint(config, plan.shape)
    size = parameters + states
    write_s = size / (disk_gb_per_s * GB)
    is_async = config.checkpoint.async_mode != "disabled"
    copy_s = size / ranks / device.host_bandwidth
    section = config.checkpoint
    return CheckpointCost(
        parameters=parameters,
        states=states,
        write_s=write_s,
        stall_s=copy_s if is_async else write_s,
        saves=math.ceil(plan.steps / section.interval),
        most_at_once=count_kept(section, plan.steps),
    )


def count_kept(section: Checkpoint, steps: int) -> int | None:
    """Return the most checkpoints that exist at once, with the one being written; None: all."""
    saves = math.ceil(steps / section.interval)
    if section.keep_latest_k == 0:
        return None
    kept = 0
    if section.keep_every:
        kept = steps // math.lcm(section.interval, section.keep_every)
    return min(saves, section.keep_latest_k + 1 + kept)


def measure_checkpoint(config: Config, shape: ModelShape) -> tuple[int, int]:
    """Return the bytes of a checkpoint's weights, and of the optimizer's states in it.

    The states are those that the run's own optimizer makes, asked with small weights of the same
    names: one as large as its weight grows with it, a number does not.
    """
    dtype = DTYPES[config.training.dtype]
    with torch.device("meta"):
        model = load_decoder(config.model.name)(shape).to(dtype)
    weights = dict(model.named_parameters())
    small = {
        name: nn.Parameter(torch.ones([STAND_IN] * weight.dim(), dtype=dtype))
        for name, weight in weights.items()
    }
    # Rates and patterns change no state's size; a rate may have to be found yet.
    section = config.optimizer.model_copy(update={"lr": 1.0, "groups": []})
    sizes = measure(small, build_optimizer(small, section))
    states = 0.0
    for name, size in sizes.items():
        kind, _, rest = name.partition("/")
        if kind != "optimizer":
            continue
        parameter = rest.rpartition("/")[0]
        grows = size >= small[parameter].nbytes
        states += size * (weights[parameter].numel() / small[parameter].numel() if grows else 1)
    names = model.state_dict().keys()  # a tied output's too, which is no buffer
    kept = [each for name, each in model.named_buffers() if name in names]
    parameters = sum(tensor.nbytes for tensor in (*weights.values(), *kept))
    return parameters, round(states)
