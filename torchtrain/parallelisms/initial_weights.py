"""Initial weights: a pure function of (seed, the parameter's full name), whatever the layout.

Each parameter is drawn whole, in fp32, on the training device, from a generator seeded by both; every rank then keeps
its own slice. So any mesh and any world size starts from the same bits, and no seed checkpoint is needed.
"""

import hashlib

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from torchtrain.models.llama import Transformer


def materialise(model: Transformer, device: torch.device, seed: int) -> None:
    """Give a (sharded) model on the meta device its storage on `device` and its initial weights."""
    model.to_empty(device=device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _copy_slice(parameter, draw(model, name, parameter.shape, device, seed))


def draw(model: Transformer, name: str, shape: torch.Size, device: torch.device, seed: int) -> Tensor:
    """The whole parameter `name` in fp32 on `device`."""
    spec = model.initial_values(name)
    whole = torch.empty(shape, dtype=torch.float32, device=device)
    if spec.kind == "ones":
        return whole.fill_(1.0)
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    cut = spec.cutoff * spec.std
    return nn.init.trunc_normal_(whole, mean=0.0, std=spec.std, a=-cut, b=cut, generator=generator)


def _copy_slice(parameter: Tensor, whole: Tensor) -> None:
    """Cast `whole` into the parameter, or its local slice into a DTensor's local shard; nothing is communicated."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(whole)
        return
    mine = distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.to_local().copy_(mine.to_local())
