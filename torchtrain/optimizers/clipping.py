"""Clipping by the norm of the whole model's gradient."""

from collections import defaultdict
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from torchtrain.shards import find_sharding, local


def clip_grad_norm_(
    parameters: Iterable[Tensor], max_norm: float, stages: dist.ProcessGroup | None = None
) -> Tensor:
    """Scale the gradients in place to a norm, over the whole model, of at most `max_norm`.

    A collective call for sharded parameters: every rank of their meshes must make it.

    Args:
        parameters: plain tensors or DTensors, each once; those without a gradient are skipped.
        max_norm: of the 2-norm.
        stages: the ranks that have the model's other parameters (pipeline parallelism).

    Returns:
        The norm before clipping: 0-dim, fp32, the same on every rank.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = compute_norm(gradients, stages)
    # As PyTorch's own clipping does; but where the norm is not finite, the gradients stay as they
    # are, to show which of them is not.
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0).where(norm.isfinite(), 1.0)
    if gradients:
        torch._foreach_mul_([local(gradient) for gradient in gradients], scale)
    return norm


def compute_norm(gradients: list[Tensor], stages: dist.ProcessGroup | None = None) -> Tensor:
    """Return the 2-norm of all gradients, every element of every shard counted once: 0-dim, fp32.

    `torch.nn.utils.get_total_norm` is not used: a CPU's fp32 norm adds a whole tensor's squares in
    a few running sums and is off by 1e-5 at a million elements and 1e-3 at twenty million, and in
    bf16 it keeps three digits. Here fp32 sums run over one row each, and fp64 takes it from there.
    On a device, each gradient costs one kernel.
    """
    rows: dict[tuple[tuple[DeviceMesh, int], ...], list[Tensor]] = defaultdict(list)
    for gradient in gradients:
        norms = torch.linalg.vector_norm(local(gradient), dim=-1, dtype=torch.float32)
        rows[find_sharding(gradient)].append(norms.flatten())
    total = torch.zeros((), dtype=torch.float64, device=gradients[0].device if gradients else None)
    for shards, norms_of_rows in rows.items():
        subtotal = torch.cat(norms_of_rows).double().square().sum()
        for mesh, dim in shards:
            dist.all_reduce(subtotal, group=mesh.get_group(dim))
        total += subtotal
    if stages is not None:
        dist.all_reduce(total, group=stages)
    return total.sqrt().float()
