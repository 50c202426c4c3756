"""The room that a checkpoint of several ranks needs."""

import shutil
from types import SimpleNamespace
from unittest.mock import patch

import pytest
from helpers.checkpoints import build, section, weights
from helpers.forking import in_group

from torchtrain.checkpoint import Checkpointer


def ask_for_room(folder):
    """A rank of two that share every tensor: together they need what one rank alone would."""
    model, optimizer = build()
    parameters = sum(p.numel() for p in model.parameters())
    needed = 2 * (3 * 4 * parameters + 4 * len(list(model.parameters())))
    checkpointer = Checkpointer(section(), folder)
    with patch.object(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed)):
        checkpointer.prepare(weights(model), optimizer)


@pytest.mark.slow
def test_a_tensor_that_ranks_share_needs_room_once(tmp_path):
    in_group(2, ask_for_room, tmp_path)
