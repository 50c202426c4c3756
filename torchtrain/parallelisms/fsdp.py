"""Fully sharded data parallelism (FSDP2): parameters, gradients, optimizer states in slices.

A block's parameters are gathered just before its forward and backward, in the compute precision;
its gradients are summed and scattered in the reduction precision. Source:
https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
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
from torch.distributed.tensor import DTensor, Shard

from torchtrain.config.schema import Training
from torchtrain.models.decoder import Decoder
from torchtrain.models.moe import Experts

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def apply_fsdp(
    model: Decoder,
    mesh: DeviceMesh,
    training: Training,
    reshard_after_forward: str,
    expert_mesh: DeviceMesh | None = None,
) -> None:
    """Shard the model in place, one group of parameters per block, also on a mesh of one rank.

    Args:
        model: on the meta device or materialized.
        mesh: one dimension shards; of two, the first replicates (HSDP).
        training: the precision of compute, into which gathered parameters and block inputs are
            cast, that of the gradient reduction and accumulation, and whether the shards, their
            gradients and so the optimizer's states are kept in the host's memory.
        reshard_after_forward: "always" frees gathered parameters after the forward and gathers
            them again for the backward; "never" keeps them; "default" frees all but the last
            group, which the backward needs first.
        expert_mesh: of the experts, which are then groups of their own; None: they are a part of
            their block's.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=DTYPES[training.mixed_precision_param],
        reduce_dtype=DTYPES[training.mixed_precision_reduce],
    )
    offload = OffloadPolicy()
    if training.enable_cpu_offload:
        # Pinned memory is for copies to an accelerator; without one there is nothing to pin for.
        offload = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu")
    shard = partial(
        fully_shard,
        mesh=mesh,
        mp_policy=policy,
        offload_policy=offload,
        shard_placement_fn=partial(choose_dimension, ranks=mesh.size(-1)),
    )
    frees_blocks = reshard_after_forward != "never"
    frees_last = reshard_after_forward == "always"
    # A parameter can be in one group only, so tied weights stay in the root group, made last.
    if not model.has_both_ends_tied:
        if model.keeps("tok_embeddings"):
            shard(model.tok_embeddings, reshard_after_forward=frees_blocks)
        head = [model.get_submodule(name) for name in ("norm", "output") if model.keeps(name)]
        if head:
            shard(head, reshard_after_forward=frees_last)
    for block in model.layers.values():
        if expert_mesh is not None:
            choose = partial(choose_dimension, ranks=expert_mesh.size(-1))
            for experts in find_experts(block):
                shard(
                    experts,
                    mesh=expert_mesh,
                    shard_placement_fn=choose,
                    reshard_after_forward=frees_blocks,
                )
        shard(block, reshard_after_forward=frees_blocks)
    shard(model, reshard_after_forward=frees_last)
    for module in find_fsdp_modules(model):
        # The loss is already divided by the number of valid labels of all ranks, so gradients are
        # summed, not averaged; a plain SUM on every backend, since gloo has no pre-multiplied sum.
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def choose_dimension(parameter: nn.Parameter, ranks: int) -> Shard | None:
    """Return where to cut a parameter; None cuts rows, the last of which may be fewer or none.

    Experts may be fewer than the ranks, so that many ranks would have none: their weights are cut
    where it comes out even.
    """
    if parameter.ndim < 3:
        return None
    sizes = parameter.to_local().shape if isinstance(parameter, DTensor) else parameter.shape
    even = [dim for dim, size in enumerate(sizes) if size % ranks == 0]
    return Shard(even[0]) if even else None


def find_experts(block: nn.Module) -> list[Experts]:
    """Return the experts of a block, if it has any."""
    return [module for module in block.modules() if isinstance(module, Experts)]


def find_fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """Return the modules that gather and shard a group of parameters."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def free_gathered(parts: Iterable[nn.Module]) -> None:
    """Free what a forward without a backward left gathered: the weights are shards again."""
    for part in parts:
        for module in find_fsdp_modules(part):
            module.reshard()
