"""A step of one rank among many that are not there, and the bytes of each collective it calls."""

import os
import warnings
from collections import Counter
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from torchtrain.config.plans import plan_run
from torchtrain.set_up import set_up_model

# By the part of an operation's name; where the tensor is that its size is given by.
KINDS = {
    "all_gather_into_tensor": "result",
    "_allgather_base_": "result",
    "reduce_scatter_tensor": "input",
    "_reduce_scatter_base_": "input",
    "all_to_all_single": "input",
    "all_reduce": "input",
}
NAMES = {
    "all_gather_into_tensor": "all_gather",
    "_allgather_base_": "all_gather",
    "reduce_scatter_tensor": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "all_to_all_single": "all_to_all",
    "all_reduce": "all_reduce",
}


class Counting(TorchDispatchMode):
    """Adds up the bytes of collectives, by kind and by whether the call was FSDP's."""

    def __init__(self, smallest=0):
        super().__init__()
        self.smallest = smallest
        self.bytes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.rpartition("::")[2]
        if name in KINDS:
            is_native = func._schema.name.startswith("c10d::")
            if is_native:  # output first, then input
                tensor = args[0] if KINDS[name] == "result" else args[1]
            else:
                tensor = result if KINDS[name] == "result" else args[0]
            size = tensor.numel() * tensor.element_size()
            if name == "all_to_all_single" and not tensor.is_floating_point():
                result.copy_(tensor)  # counts of rows; with torch 2.11 they are what memory held
            if size >= self.smallest:
                self.bytes["FSDP's" if is_native else "others'", NAMES[name]] += size
        return result


@contextmanager
def lonely_rank(world_size):
    """Be rank 0 of so many, whose collectives return at once."""
    assert not dist.is_initialized()
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def count_step(config, world_size, smallest=0):
    """Return the bytes of the collectives of a microbatch's forward and backward.

    Those smaller than `smallest` are left out.
    """
    assert "WORLD_SIZE" not in os.environ
    plan = plan_run(config, world_size)
    with lonely_rank(world_size), warnings.catch_warnings(action="ignore"):
        model = set_up_model(config, plan, torch.device("cpu"))
        (part,) = model.parts.values()
        shape = (plan.batch.microbatch_size, config.training.seq_len)
        tokens = model.shard(torch.zeros(shape, dtype=torch.int64))
        with Counting(smallest) as counting, model.loss_context():
            model.sequence_losses(part(tokens, None), tokens).sum().backward()
    return counting.bytes
