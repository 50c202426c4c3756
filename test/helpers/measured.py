"""What the tensors of a rank really take while the trainer trains, each storage counted once."""

import json
from pathlib import Path
from unittest.mock import patch

import torch
import torch.distributed as dist
from helpers.forking import in_group
from helpers.launching import ROOT

import train as trainer
from torchtrain.config_manager import JobConfig
from torchtrain.set_up import set_up
from torchtrain.tools.preflight.live_bytes import LiveBytes
from torchtrain.tools.preflight.memory import estimate_memory

STEPS = 2  # the optimizer's states come with the first


class LiveStorages(LiveBytes):
    """Counts as preflight's traces do, and sees FSDP free and refill the gathered weights."""

    def __enter__(self):
        resize = torch.UntypedStorage.resize_

        def resize_and_count(storage, size):
            result = resize(storage, size)
            self.resize(storage)
            return result

        self.patched = patch.object(torch.UntypedStorage, "resize_", resize_and_count)
        self.patched.start()
        return super().__enter__()

    def __exit__(self, *raised):
        self.patched.stop()
        return super().__exit__(*raised)

    def _add(self, storage):
        if storage.device.type != "meta":  # DTensor works out shapes on fake tensors
            super()._add(storage)


def read(file, ranks, options):
    """Return a committed config under these options, for so many ranks."""
    toml = str(ROOT / "train_configs" / f"{file}.toml")
    return JobConfig().parse_args(["--job.config_file", toml, *options], ranks)


def measure(ranks, cases, folder):
    """Train each case on so many ranks and return the largest peak of a rank, in bytes."""
    in_group(ranks, measure_rank, cases, str(folder), timeout_s=600)
    peaks = [json.loads((Path(folder) / f"{rank}").read_text()) for rank in range(ranks)]
    return [max(of_a_case) for of_a_case in zip(*peaks, strict=True)]


def measure_rank(cases, folder):
    peaks = [train_and_count(*case) for case in cases]
    (Path(folder) / str(dist.get_rank())).write_text(json.dumps(peaks))


def train_and_count(file, options):
    """Return this rank's peak, in bytes."""
    config = read(file, dist.get_world_size(), options)
    live = LiveStorages()
    with live:
        run = set_up(config, torch.device("cpu"))
        live.begin_phase()  # before, each weight was whole: drawn
        for step in range(1, STEPS + 1):
            trainer.forward_backward(run, run.loader.read(step))
            trainer.clip_gradients(run)
            trainer.optimizer_step(run)
    return live.peak


def predict(file, ranks, options, device_type="cpu"):
    """Return what the rank that takes most is predicted to take, by parts."""
    config = read(file, ranks, options)
    return max(estimate_memory(config, ranks, device_type), key=lambda rank: rank.total)


def compare(file, ranks, options, folder):
    """Return the predicted and the measured peak of the rank that takes most, in bytes."""
    (measured,) = measure(ranks, [(file, options)], folder)
    return predict(file, ranks, options), measured
