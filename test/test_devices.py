"""Which device a rank takes, and what is said of a GPU that cannot be used."""

import os
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.forking import on_ranks
from helpers.launching import options

import train
from torchtrain import devices, ranks
from torchtrain.config_manager import JobConfig
from torchtrain.devices import choose_device, describe_unused_gpus
from torchtrain.errors import UserError
from torchtrain.tools import launch

ELASTIC = "TORCHELASTIC_RUN_ID"


@pytest.mark.parametrize(
    ("variables", "visible", "index"),
    [
        ({}, 8, 0),
        ({"LOCAL_RANK": "3"}, 8, 3),
        ({"LOCAL_RANK": "3", ELASTIC: "run"}, 4, 3),
        ({"LOCAL_RANK": "0", ELASTIC: "run"}, 1, 0),
        ({"LOCAL_RANK": "3"}, 1, 0),  # srun --gpus-per-task=1
        ({"WORLD_SIZE": "4"}, 1, 0),
        ({"WORLD_SIZE": "1"}, 4, 0),
    ],
)
def test_a_rank_takes_the_accelerator_of_its_local_rank_or_the_only_one(
    monkeypatch, variables, visible, index
):
    see(monkeypatch, variables, visible)
    assert choose_device("cuda") == torch.device("cuda", index)


@pytest.mark.parametrize(
    ("variables", "visible", "said"),
    [
        (
            {"LOCAL_RANK": "4"},
            4,
            "LOCAL_RANK = 4, but this rank sees 4 accelerators: start no more ranks on a node than "
            "it has, or let each rank see one of its own alone",
        ),
        # torchrun's ranks would all get the same one.
        ({"LOCAL_RANK": "1", ELASTIC: "run"}, 1, "LOCAL_RANK = 1, but this rank sees 1 acc"),
        # Those of one node would all take the first.
        ({"WORLD_SIZE": "4"}, 4, "LOCAL_RANK is not set, but this rank sees 4 accelerators, "),
    ],
)
def test_a_local_rank_beyond_what_is_visible_is_told_both_numbers(
    monkeypatch, variables, visible, said
):
    see(monkeypatch, variables, visible)
    with pytest.raises(UserError) as caught:
        choose_device("cuda")
    assert str(caught.value).startswith(said)


def see(monkeypatch, variables, visible):
    for name in ("LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv(ELASTIC, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: visible)


def test_without_an_accelerator_the_cpu_is_every_ranks(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device(None) == torch.device("cpu")


def run_on_one_gpu(arguments):
    """A rank on a machine with one GPU; gloo stands in for NCCL."""
    ranks.usable_accelerator = lambda: "cuda"
    dist.get_default_backend_for_device = lambda device: "gloo"
    torch.accelerator.device_count = lambda: 1
    torch.accelerator.set_device_index = lambda index: None
    return train.main(JobConfig().parse_args(arguments))


@pytest.mark.slow
def test_more_ranks_than_gpus_end_together_with_one_message(tmp_path, data):
    given = options({**data, "job.dump_folder": tmp_path / "run"})
    printed = on_ranks(2, run_on_one_gpu, given, expect=2, timeout_s=60)
    (line,) = printed.splitlines()
    assert line.startswith("error: LOCAL_RANK = 1, but this rank sees 1 accelerator: ")
    assert not (tmp_path / "run").exists()


@pytest.fixture
def dev(tmp_path, monkeypatch):
    """A folder in place of /dev, with the files of two NVIDIA GPUs that nothing hides."""
    for name in ("null", "nvidiactl", "nvidia-uvm", "nvidia0", "nvidia1"):
        (tmp_path / name).touch()
    monkeypatch.setattr(devices, "DEVICE_FILES", tmp_path)
    monkeypatch.setattr(torch.version, "hip", None)
    for name in devices.VISIBLE_DEVICES:
        monkeypatch.delenv(name, raising=False)
    return tmp_path


class Module:
    """What a build for this kind of GPU has in place of torch.cuda."""

    def __init__(self, fault):
        self.fault = fault

    def init(self):
        raise RuntimeError(self.fault)


TOO_OLD = "The NVIDIA driver on your system is too old (found version 11040). Update it."


def test_pytorchs_own_words_are_not_printed_by_every_rank(monkeypatch, recwarn):
    def find(*, check_available):
        warnings.warn(f"CUDA initialization: {TOO_OLD}", stacklevel=2)

    monkeypatch.setattr(torch.accelerator, "current_accelerator", find)
    assert devices.usable_accelerator() is None
    assert not list(recwarn)


@pytest.mark.parametrize(
    ("accelerator", "permitted", "cause"),
    [
        (None, True, f"torch {torch.__version__} is a build without GPUs"),
        ("cuda", False, "no permission to read and write them"),
        ("cuda", True, TOO_OLD.rstrip(".")),
    ],
)
def test_gpus_that_cannot_be_used_are_named_with_the_cause(
    dev, monkeypatch, accelerator, permitted, cause
):
    found = None if accelerator is None else torch.device(accelerator)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: found)
    monkeypatch.setattr(torch, "get_device_module", lambda _: Module(f"{TOO_OLD}\na trace"))
    monkeypatch.setattr(os, "access", lambda path, mode: permitted)
    assert describe_unused_gpus() == (
        f"training on the CPU, since PyTorch cannot use {dev}/nvidia0, {dev}/nvidia1: {cause}. "
        "To train on the CPU on purpose, set CUDA_VISIBLE_DEVICES="
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("CUDA_VISIBLE_DEVICES", ""),
        ("CUDA_VISIBLE_DEVICES", "-1"),
        ("CUDA_VISIBLE_DEVICES", "NoDevFiles"),
        ("ROCR_VISIBLE_DEVICES", ""),
    ],
)
@pytest.mark.usefixtures("dev")
def test_gpus_that_are_hidden_are_not_spoken_of(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert describe_unused_gpus() is None


def test_a_machine_without_gpus_says_nothing(dev):
    for file in dev.glob("nvidia[0-9]"):
        file.unlink()
    assert describe_unused_gpus() is None, "the driver's own files are no GPU's"


@pytest.mark.usefixtures("dev")
def test_the_launcher_says_that_it_starts_ranks_on_the_cpu(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(launch, "DRIVERS", [str(tmp_path / "nvidiactl")])
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)
    assert launch.visible_gpus() == 0
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: training on the CPU, since PyTorch cannot use ")


def test_a_rank_that_no_launcher_of_ours_has_started_says_it(monkeypatch, caplog):
    """Ours has said it, on each node."""
    monkeypatch.setattr(ranks, "describe_unused_gpus", lambda: "cannot use the GPU")
    monkeypatch.setattr(ranks.logger, "propagate", True)
    monkeypatch.setattr(ranks.logger, "handlers", [])  # pytest's own, where it did not propagate
    for name, said in ((None, ["cannot use the GPU"]), ("first", [])):
        caplog.clear()
        if name is not None:
            monkeypatch.setenv("TORCHTRAIN_ATTEMPT", name)
        ranks.join_process_group(60)
        dist.destroy_process_group()
        assert caplog.messages == said


EXPANDABLE = "expandable_segments:True"


@pytest.mark.parametrize(
    ("given", "driver", "on_cpu", "expected"),
    [
        ({}, "nvidiactl", False, {"PYTORCH_ALLOC_CONF": EXPANDABLE}),
        ({}, "nvidiactl", True, {}),
        ({}, "dxg", False, {}),
        ({"PYTORCH_ALLOC_CONF": ""}, "nvidiactl", False, {"PYTORCH_ALLOC_CONF": ""}),
        # The older name: the new one would count before it.
        (
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"},
            "nvidiactl",
            False,
            {"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:512"},
        ),
    ],
)
def test_memory_grows_in_segments_on_nvidias_gpus_where_nobody_has_set_how(
    tmp_path, monkeypatch, given, driver, on_cpu, expected
):
    (tmp_path / driver).touch()
    monkeypatch.setattr(launch, "NVIDIA", str(tmp_path / "nvidiactl"))
    environment = dict(given)
    launch.set_up_environment(2, environment, on_cpu=on_cpu)
    assert {key: value for key, value in environment.items() if "ALLOC" in key} == expected


def test_pytorch_reads_the_setting_of_the_launcher_and_the_older_names():
    """An unknown name would be passed over without a word."""
    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    if not library.exists():
        pytest.skip("not a build for Linux")
    text = library.read_bytes()
    for name in launch.ALLOCATOR_VARIABLES:
        assert b"\0" + name.encode() + b"\0" in text
