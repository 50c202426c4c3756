"""The committed config files."""

import pytest
from helpers.configs import assert_one_fault
from helpers.launching import ROOT

from torchtrain.config_manager import JobConfig
from torchtrain.errors import ConfigError

TOMLS = sorted((ROOT / "train_configs").glob("*.toml"))
LARGE = [path for path in TOMLS if path.stem != "debug_model"]


def test_committed_files_are_the_promised_ones():
    assert [path.stem for path in TOMLS] == [
        *(
            "debug_model",
            "llama2_13b",
            "llama2_70b",
            "llama2_7b",
            "llama3_405b",
            "llama3_70b",
            "llama3_8b",
        ),
    ]


@pytest.mark.parametrize("path", TOMLS, ids=lambda path: path.stem)
def test_committed_files_fit_the_usual_world_sizes(path):
    sizes = {"debug_model": (1, 2, 3, 4, 6, 8), "llama3_405b": (64, 128, 256, 512)}
    for world_size in sizes.get(path.stem, (8, 64, 256, 512)):
        config = JobConfig().parse_args(
            ["--job.config_file", str(path), "--training.dataset=c4"], world_size
        )
        assert config.notes == []
        assert config.training.global_batch_size > 0, "set in every committed file"
        if path.stem != "debug_model":
            family, size = path.stem.split("_")
            assert (config.model.name, config.model.flavor) == (family, size.upper())


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_a_large_file_wants_a_dataset_and_says_so_alone(path):
    with pytest.raises(ConfigError) as raised:
        JobConfig().parse_args(["--job.config_file", str(path)], world_size=512)
    fragments = ["training.dataset = '' names no dataset; set it, for example to jsonl"]
    assert_one_fault(str(raised.value), str(path), fragments)
