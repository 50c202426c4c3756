"""Weights that FSDP gathers in float8, a byte a number, where layers scale a tensor as one.

A layer casts its weight to float8 in any case. Here FSDP does so on each rank's shard, before the
gather and not after: the numbers are the same to the bit, since the scale is that of the whole
weight, found together by all ranks that share it, and since the shard goes through the compute
precision. Between a forward and its backward a rank holds one byte a number, too.

FSDP asks the local tensor of a weight for this by two methods:
https://github.com/pytorch/pytorch/blob/main/torch/distributed/fsdp/_fully_shard/_fsdp_param.py
torchao has its own such tensor. It makes all that reads a weight see another class, checkpoints
included; it rounds once where a layer rounds twice, to bf16 and to float8; under tensor parallelism
its scale is that of a rank's part; and it needs even shards.

Letters: O rows of a weight, the layer's outputs; I columns; R ranks that share the rows.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor

from torchtrain.models.decoder import Decoder
from torchtrain.parallelisms.float8 import is_tied
from torchtrain.shards import find_sharding


@dataclass(frozen=True)
class Cast:
    """How a layer casts its weight."""

    compute_dtype: torch.dtype
    """What the weight is rounded to first."""
    float8_dtype: torch.dtype
    products: Any
    """torchao's settings of the layer's products."""


class Float8Shard(Tensor):
    """A rank's shard [O / R, I] of a weight, which FSDP gathers in float8.

    Operations on it return plain tensors.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    cast: Cast
    sharding: tuple[tuple[DeviceMesh, int], ...]
    """The ranks that have other parts of the weight."""
    scale: Tensor | None
    """Of the whole weight, 0-dim, fp32, inside `kept_scales`."""

    @staticmethod
    def of(
        part: Tensor,
        cast: Cast,
        sharding: tuple[tuple[DeviceMesh, int], ...],
        scale: Tensor | None = None,
    ) -> "Float8Shard":
        """Return the shard with the memory of `part`."""
        shard = part.as_subclass(Float8Shard)
        shard.cast = cast
        shard.sharding = sharding
        shard.scale = scale
        return shard

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return it on another device: FSDP moves what is offloaded, and then asks for a cast."""
        return Float8Shard.of(super().to(*args, **kwargs), self.cast, self.sharding, self.scale)

    @torch.no_grad()
    def fsdp_pre_all_gather(
        self,
        mesh: DeviceMesh,
        outer_size: torch.Size,
        outer_stride: tuple[int, ...],
        module: nn.Module,
        mp_policy: MixedPrecisionPolicy,
    ) -> tuple[tuple[Tensor], tuple[Tensor]]:
        """Return what is gathered, bytes [O / R rounded up, I], and what goes with them: the scale.

        Args:
            mesh: of the R ranks.
            outer_size: [O, I] of what is gathered.
            outer_stride: of that.
            module: that has the weight.
            mp_policy: FSDP's.
        """
        from torchao.float8.float8_training_tensor import hp_tensor_and_scale_to_float8

        rows = -(-outer_size[0] // mesh.size())
        padded = self.new_zeros(rows, outer_size[1], dtype=self.cast.compute_dtype)
        padded[: len(self)] = self
        scale = self.scale if self.scale is not None else find_scales([self])[0]
        float8 = hp_tensor_and_scale_to_float8(padded, scale, self.cast.float8_dtype)
        return (float8._data.view(torch.uint8),), (scale,)

    def fsdp_post_all_gather(
        self,
        all_gather_outputs: tuple[Tensor],
        metadata: tuple[Tensor],
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor]] | None:
        """Return the gathered weight, and the tensor whose memory FSDP frees.

        Args:
            all_gather_outputs: bytes [O, I], possibly with more rows.
            metadata: the scale.
            param_dtype: the compute precision.
            out: what this has returned before, of which the bytes have the new values; it gets
                the new scale.
        """
        from torchao.float8.float8_training_tensor import Float8TrainingTensor, GemmInputRole

        (scale,) = metadata
        if scale.device.type != "cpu":
            # Made in FSDP's stream for gathers, it is read in this one until it is freed.
            scale.record_stream(torch.accelerator.current_stream())
        if out is not None:
            find_inner(out)._scale = scale
            return None
        data = all_gather_outputs[0].view(self.cast.float8_dtype)
        weight = Float8TrainingTensor(
            data, scale, param_dtype, self.cast.products, GemmInputRole.WEIGHT
        )
        return weight, (data,)


@torch.no_grad()
def gather_in_float8(model: Decoder, compute_dtype: torch.dtype) -> None:
    """Let FSDP gather the weights of the float8 layers in float8, but for those that are tied.

    Args:
        model: sharded, with its storage.
        compute_dtype: FSDP's, of parameters.
    """
    from torchao.float8.float8_linear import Float8Linear

    for name, module in model.named_modules():
        if not isinstance(module, Float8Linear) or is_tied(model, name):
            continue
        weight = module.weight
        assert isinstance(weight, DTensor)
        cast = Cast(
            compute_dtype=compute_dtype,
            float8_dtype=module.config.cast_config_weight.target_dtype,
            products=module.linear_mm_config,
        )
        weight._local_tensor = Float8Shard.of(weight.to_local(), cast, find_sharding(weight))


def find_inner(tensor: Tensor) -> Any:
    """Return the local tensor of a DTensor itself, where `to_local` may return a view."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor


@contextmanager
def kept_scales(weights: Iterable[Tensor]) -> Iterator[None]:
    """Find the scales of all weights at once, in one exchange, for what is gathered in the context.

    The weights must not change in it. Outside each is found as its weight is gathered, so that a
    scale never outlives its weight.
    """
    shards = [shard for shard in map(find_inner, weights) if isinstance(shard, Float8Shard)]
    for shard, scale in zip(shards, find_scales(shards), strict=True):
        shard.scale = scale
    try:
        yield
    finally:
        for shard in shards:
            shard.scale = None


@torch.no_grad()
def find_scales(shards: list[Float8Shard]) -> list[Tensor]:
    """Return the scales of the whole weights, each 0-dim, fp32. A collective call.

    All that are shared by the same ranks take one exchange, or two under tensor parallelism.
    """
    from torchao.float8.float8_utils import amax_to_scale

    alike: dict[Any, list[int]] = defaultdict(list)
    for number, shard in enumerate(shards):
        alike[shard.sharding, shard.cast].append(number)
    scales: dict[int, Tensor] = {}
    for (sharding, cast), numbers in alike.items():
        parts: list[Tensor] = []
        for shard in (shards[number] for number in numbers):
            parts.append(shard if len(shard) else shard.new_zeros(1))
        largest = torch.stack(torch._foreach_norm(parts, ord=torch.inf))
        largest = largest.to(sharding[0][0].device_type)
        for mesh, dim in sharding:
            dist.all_reduce(largest, dist.ReduceOp.MAX, mesh.get_group(dim))
        # Rounding keeps the order: this is the largest of the rounded numbers.
        rounded = largest.to(cast.compute_dtype)
        scales.update(zip(numbers, amax_to_scale(rounded, cast.float8_dtype), strict=True))
    return [scales[number] for number in range(len(shards))]
