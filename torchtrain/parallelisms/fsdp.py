"""Fully sharded data parallelism (FSDP2): each rank keeps a slice of every parameter, gradient and optimizer state.

A block's parameters are gathered just before its forward and backward, in the compute precision; its gradients are
summed and scattered in the reduction precision. Source: https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from collections.abc import Iterable
from functools import partial

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from torchtrain.config_manager import Training
from torchtrain.models.llama import Transformer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def apply_fsdp(
    model: Transformer, mesh: DeviceMesh, training: Training, reshard_after_forward: str
) -> None:
    """Shard the model in place, a group of parameters a block; a mesh of one rank takes the same path.

    Args:
        model: on the meta device or materialised.
        mesh: one dimension shards; of two, the first replicates (HSDP).
        training: the precision of compute, into which gathered parameters and block inputs are cast, that of the
            gradient reduction and accumulation, and whether the shards, their gradients and so the optimizer's states
            are kept in the host's memory.
        reshard_after_forward: "always" frees gathered parameters after the forward and gathers them again for the
            backward; "never" keeps them; "default" frees all but the last group, which the backward needs first.
    """
    policy = MixedPrecisionPolicy(
        DTYPES[training.mixed_precision_param], DTYPES[training.mixed_precision_reduce]
    )
    # Pinned memory is for copies to an accelerator; without one there is nothing to pin for.
    pin = mesh.device_type != "cpu"
    offload = CPUOffloadPolicy(pin_memory=pin) if training.enable_cpu_offload else OffloadPolicy()
    shard = partial(fully_shard, mesh=mesh, mp_policy=policy, offload_policy=offload)
    reshard = reshard_after_forward != "never"
    tied_here = (
        model.shape.tied_embeddings and model.keeps("tok_embeddings") and model.keeps("output")
    )
    if (
        not tied_here
    ):  # one parameter can be in one group alone: then it is the whole model's, which is made last
        if model.keeps("tok_embeddings"):
            shard(model.tok_embeddings, reshard_after_forward=reshard)
        head: list[nn.Module] = [
            model.get_submodule(name) for name in ("norm", "output") if model.keeps(name)
        ]
        if head:
            shard(head, reshard_after_forward=reshard_after_forward == "always")
    for block in model.layers.values():
        shard(block, reshard_after_forward=reshard)
    shard(model, reshard_after_forward=reshard_after_forward == "always")
    for module in fsdp_modules(model):
        # The loss is already divided by the number of valid labels of all ranks, so gradients are summed, not averaged;
        # a plain SUM on every backend, since gloo knows no pre-multiplied sum.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """Those that gather and shard a group of parameters."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def reshard(parts: Iterable[Transformer]) -> None:
    """Free what a forward without a backward has left gathered, so that the weights are the shards again."""
    for part in parts:
        for module in fsdp_modules(part):
            module.reshard()
