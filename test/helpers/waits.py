"""Where the host waits for the device: a count on a GPU, and a stand-in for it on a CPU."""

import traceback
import warnings
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from unittest.mock import patch

import torch
from helpers.launching import ROOT
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

import train
from torchtrain.config_manager import JobConfig
from torchtrain.ranks import join_process_group

SYNCHRONIZING = "called a synchronizing CUDA operation"  # PyTorch's own words


def waits_of_steps(config, device):
    """Train, and return what waited in each step, from its forward to the next one's.

    The last step is left out: what comes after it is no step's.
    """
    loop, forward = train.train, train.forward_backward
    found, starts = [], []

    def train_watched(*arguments):
        with counting_waits(device) as waits:

            def begin(*given):
                starts.append(len(waits))
                return forward(*given)

            with patch.object(train, "forward_backward", begin):
                loop(*arguments)
        found.extend(map(str, waits))

    with patch.object(train, "train", train_watched):
        train.run(config, device)
    return [found[start:end] for start, end in pairwise(starts)]


def wait_once_a_step(runs, settled):
    """Be a rank of runs, each given by its arguments, that wait once in each step.

    Args:
        runs: by name.
        settled: the first steps may wait more often: how many.
    """
    device = join_process_group(60)
    for name, arguments in runs.items():
        waits = waits_of_steps(JobConfig().parse_args(arguments), device)
        assert [len(of_step) for of_step in waits[settled:]] == [1] * (len(waits) - settled), (
            name,
            waits,
        )


@contextmanager
def counting_waits(device):
    """Yield a list that gets an item for each wait, on this kind of device, of what runs inside."""
    if device.type == "cpu":
        with Waits() as waits:
            yield waits.found
        return
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.filterwarnings("always", message=SYNCHRONIZING)
            yield caught
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Waits(TorchFunctionMode):
    """Notes where the host would wait for an accelerator, if this CPU were one.

    A tensor counts as on the host only if it was made of numbers without naming a device, was
    brought there by `cpu`, or was computed from such tensors alone.
    """

    READS = (
        *("item", "tolist", "numpy", "cpu", "__bool__", "__int__", "__float__", "__index__"),
        # What has a result of a size that depends on its input's values, or is a number.
        *("nonzero", "argwhere", "masked_select", "unique", "unique_consecutive", "bincount"),
        *("equal", "allclose", "is_nonzero"),
    )

    def __init__(self):
        super().__init__()
        self.found = []
        self.on_host = {}  # by id; keeps them alive, so that no other tensor gets the id

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        given = [each for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)]
        on_host = bool(given) and all(id(each) in self.on_host for each in given)
        moves = name == "to" and any(isinstance(each, torch.device) for each in args)
        uploads = moves and on_host and not kwargs.get("non_blocking")
        reads = name in self.READS or counts_elements(name, args, kwargs)
        if uploads or (reads and not on_host):
            self.found.append(innermost_of_ours())
        result = function(*args, **kwargs)
        made = name in ("tensor", "as_tensor") and not given and kwargs.get("device") is None
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor):
                self.on_host.pop(id(each), None)
                if name == "cpu" or made or (on_host and not moves):
                    self.on_host[id(each)] = each
        return result


def counts_elements(name, args, kwargs):
    """Check for an index that is a mask, and for repetitions whose sum nobody has given."""
    if name == "__getitem__":
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(each, torch.Tensor) and each.dtype == torch.bool for each in index)
    if name == "repeat_interleave":
        repeats = args[1] if len(args) > 1 else kwargs.get("repeats")
        return isinstance(repeats, torch.Tensor) and kwargs.get("output_size") is None
    return False


def innermost_of_ours():
    """Return file and function, of the package or train.py, of the innermost call of theirs."""
    frames = [(Path(frame.filename), frame.name) for frame in traceback.extract_stack()]
    ours = [ROOT / "train.py", *(ROOT / "torchtrain").rglob("*.py")]
    file, name = [frame for frame in frames if frame[0] in ours][-1]
    return f"{file.stem}.{name}"
