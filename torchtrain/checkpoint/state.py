"""The tensors of a checkpoint and their names; it knows no particular optimizer.

An optimizer's state is what `optimizer.state` holds for each parameter: tensors and numbers. The
settings in its parameter groups are not part of it: they come from the config.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from torchtrain.checkpoint.commit import Source
from torchtrain.dtypes import DTYPES
from torchtrain.errors import UserError
from torchtrain.shards import local
from torchtrain.utils import describe_differences

Weights = Mapping[str, Tensor]
"""A rank's parameters by their names in the whole model, as sharded, and its buffers, for which the
optimizer has no state. Tied ones come once."""

WHAT_TO_DO = "Choose another optimizer.name, or train without checkpoint.enable"


def list_weights(weights: Weights) -> dict[str, Tensor]:
    """Return the weights by their names in a checkpoint, sharing their memory."""
    return {f"model/{name}": weight.detach() for name, weight in weights.items()}


def list_exported(weights: Weights, dtype: str | None) -> dict[str, Tensor]:
    """Return the weights by their names in a checkpoint, the parameters in `export_dtype`."""
    tensors = list_weights(weights)
    if dtype is not None:
        for name, weight in weights.items():
            if isinstance(weight, nn.Parameter):  # buffers keep the precision that they need
                tensors[f"model/{name}"] = tensors[f"model/{name}"].to(DTYPES[dtype])
    return tensors


def list_states(weights: Weights, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's states by their names in a checkpoint.

    Tensors share their memory; of a number it is a new tensor, see `take_numbers`.

    Raises:
        UserError: a state is neither a tensor nor a number, or of no parameter.
    """
    if not optimizer.state.keys() <= set(weights.values()):
        raise UserError(
            f"a checkpoint cannot hold what {type(optimizer).__name__} keeps for all parameters "
            f"together; its state must be that of each. {WHAT_TO_DO}"
        )
    tensors = {}
    for name, states, key in _each_state(weights, optimizer):
        value = states[key]
        if not isinstance(value, (Tensor, int, float)):
            raise UserError(
                f"a checkpoint cannot hold {name}: {type(optimizer).__name__} keeps a "
                f"{type(value).__name__}, and only tensors and numbers can be saved. {WHAT_TO_DO}"
            )
        if isinstance(value, float):
            value = torch.tensor(value, dtype=torch.float64)  # which holds all of it
        tensors[name] = torch.as_tensor(value)
    return tensors


def take_numbers(weights: Weights, optimizer: Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back as numbers those of the loaded `tensors` that are numbers in the optimizer."""
    for name, states, key in _each_state(weights, optimizer):
        value = states[key]
        if not isinstance(value, Tensor):
            states[key] = type(value)(tensors[name].item())


def _each_state(
    weights: Weights, optimizer: Optimizer
) -> Iterator[tuple[str, dict[Hashable, Any], Hashable]]:
    """Yield the name of each state, with the dictionary and the key where the optimizer has it."""
    for parameter_name, parameter in weights.items():
        states = optimizer.state.get(parameter, {})
        for key, value in states.items():
            if value is not None:
                yield f"optimizer/{parameter_name}/{key}", states, key


def has_states(optimizer: Optimizer) -> bool:
    """Return whether the optimizer keeps anything yet; most do from their first step on."""
    return any(optimizer.state.values())


def make_states(optimizer: Optimizer) -> None:
    """Let the optimizer make the states that its first step would, with any values.

    It takes a step on gradients of zero at a learning rate of 0. Weights, settings, gradients and
    random states are put back afterwards, to the bit. Collective where the optimizer's step is.
    """
    parameters = [
        parameter
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.requires_grad
    ]
    # On the host: what the accelerator holds now must not exceed what a step of training needs.
    kept = [local(parameter.detach()).to("cpu", copy=True) for parameter in parameters]
    gradients = [parameter.grad for parameter in parameters]
    settings = [dict(group) for group in optimizer.param_groups]
    random = get_random_states(parameters)
    try:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        for group in optimizer.param_groups:
            rate = group.get("lr")
            group["lr"] = torch.zeros_like(rate) if isinstance(rate, Tensor) else 0.0
        optimizer.step()
    finally:
        for parameter, weight, gradient in zip(parameters, kept, gradients, strict=True):
            local(parameter.detach()).copy_(weight)
            parameter.grad = gradient
        for group, before in zip(optimizer.param_groups, settings, strict=True):
            group.clear()
            group.update(before)
        set_random_states(random)


def measure(weights: Weights, optimizer: Optimizer) -> dict[str, int]:
    """Return the bytes of each tensor of a checkpoint, over all ranks that share it.

    States that the optimizer has not made yet are made to be measured, and then removed.
    """
    is_new = not has_states(optimizer)
    if is_new:
        make_states(optimizer)
    tensors = list_weights(weights) | list_states(weights, optimizer)
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    if is_new:
        optimizer.state.clear()
    return sizes


def list_training_state(
    weights: Weights, optimizer: Optimizer | None, saved: Iterable[str]
) -> dict[str, Tensor]:
    """Return the tensors to load into; those of the optimizer are made where they are missing.

    A parameter that has no state in the checkpoint while others have, since it never had a
    gradient, keeps none here either.

    Args:
        weights: this rank's.
        optimizer: over the same parameters; None takes only the weights.
        saved: the names in the checkpoint.
    """
    if optimizer is None:
        return list_weights(weights)
    if not has_states(optimizer):
        make_states(optimizer)
    owners = {name.rpartition("/")[0] for name in saved if name.startswith("optimizer/")}
    if owners:
        for name, parameter in weights.items():
            if f"optimizer/{name}" not in owners:
                optimizer.state.pop(parameter, None)
    return list_weights(weights) | list_states(weights, optimizer)


def check_tensors(
    source: Source,
    entries: dict[str, TensorStorageMetadata],
    tensors: dict[str, Tensor],
    everyones: set[str],
    optimizer: Optimizer | None,
    changed_states: str = "",
) -> list[str]:
    """Check that checkpoint and model have the same tensors.

    Args:
        source: names the checkpoint.
        entries: its index.
        tensors: this rank's, to be loaded.
        everyones: the names of all ranks' tensors.
        optimizer: None loads only the weights, which may be converted.
        changed_states: why the optimizer's tensors differ if they alone do, where that is known.

    Returns:
        The tensors that will be converted to another dtype, in words.

    Raises:
        UserError: names what differs.
    """
    kinds = ("model",) if optimizer is None else ("model", "optimizer")
    saved = {name for name in entries if name.split("/")[0] in kinds}
    reshaped = []
    converted = []
    for name in sorted(saved & tensors.keys()):
        there, here = list(entries[name].size), list(tensors[name].shape)
        if there != here:
            reshaped.append(f"{name} {there} instead of {here}")
        dtype = entries[name].properties.dtype
        if dtype != tensors[name].dtype:
            converted.append(f"{name} {dtype} instead of {tensors[name].dtype}")
    differences = {
        "lacks": sorted(tensors.keys() - saved),
        "has, unknown to this model,": sorted(saved - everyones),
        "has in another shape": reshaped,
        "has in another precision": converted if optimizer is not None else [],
    }
    found = describe_differences(differences)
    names = [name for some in differences.values() for name in some]
    if found and changed_states and all(name.startswith("optimizer/") for name in names):
        raise UserError(f"{source.path} cannot be resumed: {changed_states}")
    if found:
        raise UserError(
            f"{source.path} is not a checkpoint of this model: {found}. Compare "
            "[model] (a vocab_size of 0 is the tokenizer's), [optimizer] and training.dtype."
        )
    return converted


def get_random_states(tensors: Iterable[Tensor]) -> dict[str, Tensor]:
    """Return this rank's random states, as bytes, by device type: the CPU's and the tensors'."""
    kinds = dict.fromkeys(["cpu", *(tensor.device.type for tensor in tensors)])
    return {kind: _random(kind).get_rng_state() for kind in kinds}


def set_random_states(states: dict[str, Tensor]) -> None:
    """Set this rank's random states; the last part of a name is the device type."""
    for name, state in states.items():
        _random(name.rpartition("/")[2]).set_rng_state(state)


def _random(kind: str) -> Any:
    """Return the module that has the random state of this type of device."""
    return torch if kind == "cpu" else torch.get_device_module(kind)


def list_random_states(
    weights: Weights, entries: Mapping[str, TensorStorageMetadata] | None = None
) -> dict[str, Tensor]:
    """Return this rank's random states by their names in a checkpoint.

    Training draws nothing after the initial weights; an optimizer may.

    Args:
        weights: this rank's.
        entries: a checkpoint's index; what it lacks, or has for another kind of device, is none.
    """
    states = get_random_states(weights.values())
    named = {f"rng/{dist.get_rank()}/{kind}": state for kind, state in states.items()}
    if entries is not None:
        for name, state in named.items():
            if name not in entries or entries[name].size != state.shape:
                return {}
    return named
