"""Ranks whose devices draw other numbers from the same seed do not start together."""

import os
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from helpers.forking import in_group, on_ranks, run_trainer
from helpers.launching import options

from torchtrain import ranks
from torchtrain.errors import SharedUserError
from torchtrain.kernel_checks import DeviceFacts
from torchtrain.logging_utils import init_logging
from torchtrain.parallelisms import initial_weights
from torchtrain.parallelisms.initial_weights import digest_draws, require_same_draws

CPU = torch.device("cpu")
draw = initial_weights.fill


def draw_in_other_turns(whole, std, generator):
    """As a GPU with another number of threads: the first turn is the same, and what follows not."""
    draw(whole, std, generator)
    whole[1000:] = whole[1000:].flip(0)


def test_a_kind_of_device_is_known_by_the_order_of_its_draws():
    with patch.object(initial_weights, "fill", draw_in_other_turns):
        other = digest_draws(CPU)
    assert digest_draws(CPU) == digest_draws(CPU) != other


def compare_draws():
    """Rank 2 has another card; rank 3's has another name, and draws the same."""
    rank = dist.get_rank()
    init_logging(rank, 4)
    name = ["A100-40GB", "A100-40GB", "H100", "A100-80GB"][rank]
    facts = DeviceFacts(type="cuda", name=name, has_bf16=True)
    with patch.object(initial_weights, "find_device_facts", lambda device: facts):
        require_same_draws(CPU, loads=False)
        same = digest_draws(CPU)
        with patch.object(initial_weights, "fill", draw_in_other_turns if rank == 2 else draw):
            with pytest.raises(SharedUserError) as caught:
                require_same_draws(CPU, loads=False)
            require_same_draws(CPU, loads=True)
    with patch.object(initial_weights, "fill", draw_in_other_turns):
        other = digest_draws(CPU)
    assert str(caught.value) == (
        "the ranks' devices draw different numbers from one seed: A100-40GB (draws "
        f"{same}) on ranks 0, 1, H100 (draws {other}) on rank 2, A100-80GB (draws {same}) on rank "
        "3. Initial weights need devices of one kind; a checkpoint (such as "
        "checkpoint.initial_load_path) can be loaded on any"
    )


@pytest.mark.slow
def test_devices_of_different_kinds_are_named_with_their_ranks():
    (warning,) = in_group(4, compare_draws, timeout_s=60).splitlines()
    assert warning.startswith("warning: the ranks' devices draw different numbers from one seed: A")
    assert warning.endswith("The weights are loaded; what ranks compute may differ by rounding")


def run_on_another_device(arguments):
    """A rank of a run whose second rank has another kind of device."""
    turns = draw_in_other_turns if os.environ["RANK"] == "1" else draw
    with patch.object(initial_weights, "fill", turns):
        return run_trainer(arguments)


def run_without_driver(arguments):
    """A rank of a run whose second rank has another type of device: its driver is broken."""
    is_broken = os.environ["RANK"] == "1"
    device = CPU if is_broken else torch.device("meta")  # for a GPU, which is not used here
    unused = "training on the CPU, since PyTorch cannot use /dev/nvidia0: no driver"
    with (
        patch.object(ranks, "choose_device", lambda accelerator: device),
        patch.object(ranks, "describe_unused_gpus", lambda: unused if is_broken else None),
    ):
        return run_trainer(arguments)


@pytest.mark.slow
def test_a_run_does_not_begin_on_two_kinds_of_devices_but_resumes_on_them(tmp_path, data):
    given = {**data, "job.dump_folder": tmp_path / "run", "checkpoint.enable": True}
    first = options({**given, "training.steps": 1})
    printed = on_ranks(2, run_on_another_device, first, expect=2, timeout_s=60)
    assert len(printed.splitlines()) == 1
    assert printed.startswith("error: the ranks' devices draw different numbers from one seed: CPU")
    assert not (tmp_path / "run" / "run.json").exists()
    on_ranks(2, run_trainer, first, timeout_s=60)
    more = options({**given, "training.steps": 2})
    printed = on_ranks(2, run_without_driver, more, expect=2, timeout_s=60)
    assert (
        "error: the ranks need devices of one type, and have meta on rank 0, cpu (training on the "
        "CPU, since PyTorch cannot use /dev/nvidia0: no driver) on rank 1\n"
    ) in printed
    printed = on_ranks(2, run_on_another_device, more, timeout_s=60)
    assert printed.count("warning: the ranks' devices draw different numbers") == 1
    assert "done: 2 steps" in printed
