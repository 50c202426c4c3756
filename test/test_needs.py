"""What the options of a run need is found before anything is tokenized, written or moved."""

import errno
import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from helpers.launching import options

import train
from torchtrain import needs
from torchtrain.config.plans import DEBUG_TOKENIZER
from torchtrain.config.schema import Data
from torchtrain.config.sources import DataSource
from torchtrain.config_manager import JobConfig
from torchtrain.datasets.open import check_sources
from torchtrain.datasets.tokenizer import load_tokenizer
from torchtrain.errors import UserError
from torchtrain.needs import check_compilers
from torchtrain.tools.prepare import prepare
from torchtrain.utils import import_package, require_package


class WandbError(Exception):
    """What wandb's own errors inherit from."""


def wandb_without_a_key():
    def refuse(**_):
        raise WandbError("No API key configured.")

    return SimpleNamespace(Error=WandbError, login=refuse)


EXPORT = {"checkpoint.enable": True, "checkpoint.last_save_in_hf": True}
PARQUET = {"validation.enable": True, "validation.dataset": "parquet"}
FROM_HUB = {"validation.enable": True, "validation.dataset": "c4_validation"}
ON_A_FILE = "/dev/null/a/folder"
CASES = {
    "wandb": (
        {"metrics.enable_wandb": True},
        {"wandb": None},
        "metrics.enable_wandb = true needs the package wandb: pip install wandb",
    ),
    "a key of wandb's": (
        {"metrics.enable_wandb": True},
        {"wandb": wandb_without_a_key()},
        "metrics.enable_wandb = true: No API key configured. "
        "Or set WANDB_API_KEY, or WANDB_MODE=offline",
    ),
    "tensorboard": (
        {"metrics.enable_tensorboard": True},
        {"tensorboard": None},
        "metrics.enable_tensorboard = true needs the package tensorboard: pip install tensorboard",
    ),
    "what converts": (
        EXPORT,
        {"google.protobuf": None},
        "checkpoint.last_save_in_hf = true needs the package protobuf: pip install protobuf",
    ),
    "pyarrow": (
        PARQUET,
        {"pyarrow": None},
        "the parquet file '{folder}/a.parquet' needs the package pyarrow: pip install pyarrow",
    ),
    "datasets": (
        FROM_HUB,
        {"datasets": None},
        "validation.dataset of 'allenai/c4' needs the package datasets: pip install datasets",
    ),
    "the hub": (
        FROM_HUB,
        {},
        "validation.dataset: 'allenai/c4' of the Hugging Face Hub cannot be reached",
    ),
    "a GPU": (
        {"profiling.enable_memory_snapshot": True},
        {},
        "profiling.enable_memory_snapshot = true needs a CUDA device; this run is on cpu",
    ),
    "a compiler": (
        {"compile.enable": True},
        {},
        "compile.enable = true needs a compiler of C++, and there is no no-such-compiler: "
        "install one, or name another in CXX",
    ),
    "a folder for TensorBoard": (
        {"metrics.enable_tensorboard": True, "metrics.save_tb_folder": ON_A_FILE},
        {},
        f"metrics.save_tb_folder = {ON_A_FILE!r} cannot be written: '/dev/null' is not a folder",
    ),
    "a folder for checkpoints": (
        {"checkpoint.enable": True, "checkpoint.folder": ON_A_FILE},
        {},
        f"checkpoint.folder = {ON_A_FILE!r} cannot be written: '/dev/null' is not a folder",
    ),
    "a folder for traces": (
        {"profiling.enable_profiling": True, "profiling.save_traces_folder": ON_A_FILE},
        {},
        f"profiling.save_traces_folder = {ON_A_FILE!r} cannot be written: '/dev/null' is not a",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_what_an_option_needs_is_found_before_anything_is_done(
    tmp_path, monkeypatch, data, capfd, case
):
    overrides, packages, said = CASES[case]
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("of an earlier run\n")
    (tmp_path / "a.parquet").write_bytes(b"")
    if "parquet" in overrides.values():
        overrides = {**overrides, "validation.dataset_path": tmp_path}
    for name, package in packages.items():
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")  # nobody is
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    given = {
        **data,
        "data.cache_folder": tmp_path / "cache",
        "metrics.enable_tensorboard": False,
        "job.dump_folder": run,
        **overrides,
    }
    assert train.main(JobConfig().parse_args(options(given))) == 2
    dist.destroy_process_group()
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: {said.format(folder=tmp_path)}")
    of_a_source = case in ("pyarrow", "datasets", "the hub")  # which is opened a little later
    left = sorted(path.name for path in run.iterdir())
    assert left == [".lock"] * of_a_source + ["metrics.jsonl"]
    assert not (tmp_path / "cache").exists()


def test_what_is_missing_is_found_before_a_checkpoint_is_touched(
    tmp_path, monkeypatch, data, capfd
):
    run = tmp_path / "run"
    for name in ("step-2", ".tmp-step-3-torn"):
        (run / "checkpoint" / name).mkdir(parents=True)
        (run / "checkpoint" / name / "complete.json").write_text("damaged")
    before = sorted(run.rglob("*"))
    monkeypatch.setitem(sys.modules, "wandb", wandb_without_a_key())
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    given = {"job.dump_folder": run, "checkpoint.enable": True, "metrics.enable_wandb": True}
    assert train.main(JobConfig().parse_args(options({**data, **given}))) == 2
    dist.destroy_process_group()
    assert "No API key configured" in capfd.readouterr().err
    assert sorted(run.rglob("*")) == before


def test_a_folder_under_a_closed_one_is_one_message(tmp_path, monkeypatch):
    """For root no folder is closed, so what the system says of one is made up."""
    closed = tmp_path / "closed"
    closed.mkdir()
    real = os.lstat, os.stat

    def refusing(call):
        def look(path, *given, **named):
            if str(path).startswith(f"{closed}/"):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return call(path, *given, **named)

        return look

    for name, call in zip(("lstat", "stat"), real, strict=True):
        monkeypatch.setattr(os, name, refusing(call))
    monkeypatch.setattr(os, "access", lambda path, _: path != closed)
    given = ["--checkpoint.enable", "--checkpoint.folder", str(closed / "a" / "b")]
    config = JobConfig().parse_args(given, world_size=1)
    with pytest.raises(UserError, match=r"cannot be written: nothing can be made in '.*/closed'$"):
        needs.check_folders(config)


def test_on_a_gpu_the_compiler_needs_triton_and_a_compiler_of_c(monkeypatch):
    device = torch.device("cuda")
    for options_ in (["--compile.enable"], ["--training.document_masking"]):
        config = JobConfig().parse_args(options_, world_size=1)
        option = f"{options_[0].removeprefix('--')} = true"
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, "triton", None)
            with pytest.raises(UserError, match=f"^{option} needs the package triton: pip"):
                check_compilers(config, device)
            patched.setitem(sys.modules, "triton", SimpleNamespace())
            patched.setenv("CC", "no-such-compiler")
            said = []
            patched.setattr(needs.logger, "warning", said.append)
            check_compilers(config, device)
            (line,) = said  # the kernels may all be in its cache
            assert line.startswith(f"{option} needs a compiler of C, and there is no no-such-comp")
            patched.setenv("CC", sys.executable)
            check_compilers(config, device)
            assert len(said) == 1
    check_compilers(config, torch.device("cpu"))
    check_compilers(JobConfig(), device)


def test_a_package_that_is_there_and_broken_is_one_message(tmp_path, monkeypatch):
    (tmp_path / "torn_package.py").write_text("import no_such_module\n")
    monkeypatch.syspath_prepend(tmp_path)
    require_package("torn_package", "an option")
    message = r"^an option needs the package torn_package, which cannot be imported: No module nam"
    with pytest.raises(UserError, match=message):
        import_package("torn_package", "an option")


def test_a_tokenizer_without_its_package_is_one_message(tmp_path, monkeypatch):
    (tmp_path / "tokenizer.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(UserError, match=r"tokenizer\.json' needs the package tokenizers: pip"):
        load_tokenizer(tmp_path)


def test_a_path_of_training_and_validation_is_looked_for_once_under_trainings_key(tmp_path):
    missing = DataSource("text", str(tmp_path / "missing"), option="validation.dataset")
    there = DataSource("text", str(tmp_path), option="training.dataset")
    both = [replace(missing, option="training.dataset"), missing]
    data, tokenizer = Data(), load_tokenizer(DEBUG_TOKENIZER)
    check_sources(both, data, tokenizer)  # it is opened next, and its fault known at once
    with pytest.raises(UserError, match=r"^training\.dataset = .*missing"):
        check_sources([there, *both], data, tokenizer)


def test_sources_are_opened_before_the_first_is_tokenized(tmp_path):
    (tmp_path / "words.txt").write_text("some words")
    (tmp_path / "ids.bin").write_bytes(b"odd")
    mixture = [f"text {tmp_path / 'words.txt'} = 1", f"tokens {tmp_path / 'ids.bin'} = 1"]
    given = ["--data.cache_folder", str(tmp_path / "cache"), "--data.mixture", ",".join(mixture)]
    with pytest.raises(UserError, match="3 bytes, which is not"):
        prepare(JobConfig().parse_args(given, world_size=0), workers=1)
    assert not (tmp_path / "cache").exists()
