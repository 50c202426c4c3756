"""What two runs have in common to the bit, where one was stopped and the other was not."""

import torch
from helpers.launching import metrics
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

CURVE = ("step", "loss", "max_loss", "grad_norm", "lr", "tokens_seen")


def curve(folder):
    """Return what of a run's lines is no measurement of time or memory."""
    return [{key: line[key] for key in CURVE} for line in metrics(folder)]


def saved_tensors(folder, step, scratch):
    """Return every tensor of a checkpoint, whole, but for the random states, a rank's own."""
    dcp_to_torch_save(folder / "checkpoint" / f"step-{step}", scratch)
    loaded = torch.load(scratch, weights_only=True)
    return {name: tensor for name, tensor in loaded.items() if not name.startswith("rng/")}


def assert_same_state(a, b, step, scratch):
    """Check that two runs' checkpoints of a step hold the same bits; `scratch` is a folder."""
    mine, theirs = (saved_tensors(run, step, scratch / "whole.pt") for run in (a, b))
    assert mine.keys() == theirs.keys()
    assert any(name.endswith("exp_avg_sq") for name in mine)
    for name in mine:
        assert torch.equal(mine[name], theirs[name]), name
