"""Fully sharded data parallelism (FSDP2): parameters, gradients, optimizer states in slices.

A block's parameters are gathered just before its forward and backward, in the compute precision;
its gradients are summed and scattered in the reduction precision. Source:
https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from collections.abc import Iterable
from functools import partial

from torch import nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, Shard

from torchtrain.config.schema import Training
from torchtrain.dtypes import DTYPES
from torchtrain.models.decoder import Decoder
from torchtrain.parallelisms.expert_parallel import find_sparse
from torchtrain.parallelisms.mesh import Mesh


def apply_fsdp(model: Decoder, mesh: Mesh, training: Training, reshard_after_forward: str) -> None:
    """Shard the model in place, one group of parameters per block, also on a mesh of one rank.

    Args:
        model: on the meta device or materialized.
        mesh: the ranks of the run; those of experts may be arranged in another way.
        training: the precision of compute, into which gathered parameters and block inputs are
            cast, that of the gradient reduction and accumulation, and whether the shards, their
            gradients and so the optimizer's states are kept in the host's memory.
        reshard_after_forward: "always" frees gathered parameters after the forward and gathers
            them again for the backward; "never" keeps them; "default" frees all but the last
            group, which the backward needs first.
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
        mesh=mesh.fsdp,
        mp_policy=policy,
        offload_policy=offload,
        shard_placement_fn=partial(place, ranks=mesh.fsdp.size(-1)),
    )
    shard_experts = partial(
        shard,
        mesh=mesh.fsdp_experts,
        shard_placement_fn=partial(place, ranks=mesh.fsdp_experts.size(-1)),
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
    for sparse in find_sparse(model):
        if mesh.fsdp_experts is not mesh.fsdp:
            shard_experts(sparse.experts, reshard_after_forward=frees_blocks)
    for block in model.layers.values():
        shard(block, reshard_after_forward=frees_blocks)
    shard(model, reshard_after_forward=frees_last)
    reduces = max(mesh.fsdp.size(), mesh.fsdp_experts.size()) > 1
    for module in find_fsdp_modules(model):
        # The loss is already divided by the number of valid labels of all ranks, so gradients are
        # summed, not averaged; a plain SUM on every backend, since gloo has no pre-multiplied sum.
        # On one rank the two are the same, but FSDP would divide, into a copy.
        if reduces:
            module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def place(parameter: nn.Parameter, ranks: int) -> Shard:
    """Return the dimension that is sharded: rows, or of experts the first that comes out even.

    A rank may have fewer experts than ranks share them, and rows are filled up: many ranks would
    have none. FSDP cuts no other dimension unevenly.
    """
    if parameter.ndim < 3:
        return Shard(0)
    sizes = parameter.to_local().shape if isinstance(parameter, DTensor) else parameter.shape
    even = (dim for dim, size in enumerate(sizes) if size % ranks == 0)
    return Shard(next(even, 0))


def find_fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """Return the modules that gather and shard a group of parameters."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def free_gathered(parts: Iterable[nn.Module]) -> None:
    """Free what a forward without a backward left gathered: the weights are shards again."""
    for part in parts:
        for module in find_fsdp_modules(part):
            module.reshard()
