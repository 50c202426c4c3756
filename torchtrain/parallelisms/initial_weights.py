"""Initial weights: a pure function of (seed, the parameter's full name), whatever the layout.

Each parameter is drawn whole, in fp32, on the training device, from a generator seeded by both;
every rank then keeps its own slice. So any mesh and any world size starts from the same bits, and
no seed checkpoint is needed. Devices of different kinds draw different ones.
"""

import hashlib

import torch
from torch import Tensor, nn

from torchtrain.errors import SharedUserError
from torchtrain.kernel_checks import find_device_facts
from torchtrain.logging_utils import logger
from torchtrain.models.decoder import Decoder
from torchtrain.ranks import gathered, name_values
from torchtrain.shards import find_local_box, local

LARGE = 1 << 22
"""So many numbers are more than a GPU's threads draw in one turn."""

CUTOFF = 3.0
"""No value lies further from 0 than this many standard deviations."""


def require_same_draws(device: torch.device, *, loads: bool) -> None:
    """Refuse to train where the ranks' devices draw different weights. A collective call.

    Args:
        device: of this rank.
        loads: whether a checkpoint replaces the initial weights: then it is a warning.

    Raises:
        SharedUserError: names the devices, with their ranks.
    """
    kinds = gathered((find_device_facts(device).name, digest_draws(device)))
    if len({digest for _, digest in kinds}) == 1:
        return
    named = name_values(f"{name} (draws {digest})" for name, digest in kinds)
    fault = f"the ranks' devices draw different numbers from one seed: {named}"
    if not loads:
        raise SharedUserError(
            f"{fault}. Initial weights need devices of one kind; a checkpoint (such as "
            "checkpoint.initial_load_path) can be loaded on any"
        )
    logger.warning(f"{fault}. The weights are loaded; what ranks compute may differ by rounding")


def digest_draws(device: torch.device) -> str:
    """Return a digest of numbers drawn on the device: devices of a kind have the same.

    A GPU's threads draw a large tensor in turns, so which number stands where depends on how many
    threads it has (aten/src/ATen/native/cuda/DistributionTemplates.h). A CPU draws in order, and
    its kind shows in few numbers.
    """
    count = 1 << 12 if device.type == "cpu" else LARGE
    drawn = torch.empty(count, device=device)
    fill(drawn, 1.0, seed_generator("drawn", 0, device))
    return hashlib.sha256(drawn.cpu().numpy().tobytes()).hexdigest()[:8]


def materialize(
    model: Decoder, device: torch.device, seed: int | None, *, offload: bool = False
) -> None:
    """Give a (sharded) model on the meta device its storage and initial weights, drawn on `device`.

    Without a seed none are drawn, for a caller that loads them all. With `offload` the storage is
    the host's memory; else it is on `device` too. Buffers are zeros, on `device` in any case, since
    FSDP brings there parameters alone.
    """
    model.to_empty(device="cpu" if offload else device)
    if seed is not None:
        draw_weights(model, device, seed)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, torch.zeros_like(buffer, device=device))


def draw_weights(model: Decoder, device: torch.device, seed: int) -> None:
    """Draw the initial weights on `device`, and fill the model's parameters with them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole = torch.empty(parameter.shape, dtype=torch.float32, device=device)
            fill(whole, model.initial_std(name), seed_generator(name, seed, device))
            copy_slice(parameter, whole)


def seed_generator(name: str, seed: int, device: torch.device) -> torch.Generator:
    """Return the random generator of the parameter with this full name."""
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def fill(whole: Tensor, std: float | None, generator: torch.Generator) -> None:
    """Fill a whole parameter with ones, or with normal values of this deviation, cut off."""
    if std is None:
        whole.fill_(1.0)
    else:
        nn.init.trunc_normal_(
            whole, mean=0.0, std=std, a=-CUTOFF * std, b=CUTOFF * std, generator=generator
        )


def copy_slice(parameter: Tensor, whole: Tensor) -> None:
    """Cast `whole` into the parameter, or its local slice into a DTensor's local shard.

    Nothing is communicated.
    """
    for dim, (start, length) in enumerate(find_local_box(parameter)):
        whole = whole.narrow(dim, start, length)
    local(parameter).copy_(whole)
