"""Paths in options: `~` is the user's home in each, and the address of another storage is none."""

import pytest

from torchtrain.checkpoint.saving import Saver
from torchtrain.config.plans import list_output_folders
from torchtrain.config.schema import Checkpoint
from torchtrain.config_manager import JobConfig
from torchtrain.errors import ConfigError
from torchtrain.tools import convert, trained_model
from torchtrain.utils import describe_no_folder


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


WRITTEN = (
    "job.dump_folder",
    "checkpoint.folder",
    "metrics.save_tb_folder",
    "profiling.save_traces_folder",
    "profiling.save_memory_snapshot_folder",
    "data.cache_folder",
)


@pytest.mark.parametrize("key", WRITTEN)
@pytest.mark.parametrize(
    "given", ["s3://bucket/run", "GS://b", "hf://me/run", "file:///a", "s3:/b"]
)
def test_an_address_is_no_folder(home, key, given):
    with pytest.raises(ConfigError) as refused:
        JobConfig().parse_args([f"--{key}={given}"], world_size=1)
    assert f'{key} = "{given}" is an address, and a run writes to folders alone' in str(
        refused.value
    )
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("key", WRITTEN)
@pytest.mark.parametrize("given", ["$HOME/run", "${SCRATCH}/run", "/data/$USER"])
def test_a_variable_that_no_shell_has_replaced_is_no_folder(home, key, given):
    (home / "config.toml").write_text(f'{key} = "{given}"\n')
    with pytest.raises(ConfigError, match="has a variable, which only a shell replaces") as refused:
        JobConfig().parse_args(["--job.config_file=~/config.toml"], world_size=1)
    assert f'{key} = "{given}" ' in str(refused.value)


def test_what_a_command_writes_is_a_path_too(home, capsys):
    for given in ("s3://bucket/model", "$HOME/model"):
        for command in (["to-hf", "run", given], ["from-hf", "model", given]):
            with pytest.raises(SystemExit) as ended:
                convert.main(command)
            assert ended.value.code == 2
            assert f"{given!r} {describe_no_folder(given)}" in capsys.readouterr().err
    assert list(home.iterdir()) == []


@pytest.mark.parametrize("given", ["runs/a:b", "a:b/c", "./s3", "/s3:/a", "C/:/x", "a$", "5$"])
def test_a_colon_is_no_address(home, given):
    assert JobConfig().parse_args(["--job.dump_folder", given], 1).job.dump_folder == given


def test_home_in_every_option(home):
    (home / "config.toml").write_text("[training]\nsteps = 7\n")
    (home / "other").mkdir()
    arguments = ["--job.config_file=~/config.toml", "--checkpoint.enable"]
    arguments += ["--checkpoint.initial_load_path=~/other"]
    arguments += [f"--{key}=~/folder" for key in WRITTEN]
    config = JobConfig().parse_args(arguments, world_size=1)
    assert config.training.steps == 7
    folders = list_output_folders(config)
    assert set(folders.values()) == {home / "folder"}
    assert set(folders) == set(WRITTEN) - {"job.dump_folder", "data.cache_folder"}


def test_initial_load_path_that_is_not_in_the_home(home):
    arguments = ["--checkpoint.enable", "--checkpoint.initial_load_path=~/gone"]
    with pytest.raises(ConfigError, match='initial_load_path = "~/gone" is not a folder that'):
        JobConfig().parse_args(arguments, world_size=1)


def test_checkpoints_in_the_home_are_saved_and_found_there(home, monkeypatch):
    monkeypatch.setattr("torchtrain.checkpoint.saving.patient_group", lambda: None)
    saver = Saver(Checkpoint(folder="~/saved"), home / "run")
    assert saver.folder == home / "saved"
    (home / "run").mkdir()
    (home / "run" / "config.toml").write_text('[checkpoint]\nfolder = "~/saved"\n')
    assert trained_model.find_checkpoint_folder(home / "run") == str(home / "saved")
