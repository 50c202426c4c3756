"""The committed config files."""

import pytest
from helpers.configs import assert_one_fault
from helpers.launching import ROOT

from torchtrain.config_manager import JobConfig
from torchtrain.errors import ConfigError

TOMLS = sorted((ROOT / "train_configs").glob("*.toml"))
LARGE = [path for path in TOMLS if not path.stem.startswith("debug")]


def test_committed_files_are_the_promised_ones():
    assert [path.stem for path in TOMLS] == [
        *(
            "debug_model",
            "debug_moe",
            "llama2_13b",
            "llama2_70b",
            "llama2_7b",
            "llama3_405b",
            "llama3_70b",
            "llama3_8b",
            "mixtral_8x7b",
            "qwen3_30b_a3b",
            "qwen3_8b",
        ),
    ]


@pytest.mark.parametrize("path", TOMLS, ids=lambda path: path.stem)
def test_committed_files_fit_the_usual_world_sizes(path):
    small = (1, 2, 3, 4, 6, 8)
    sizes = {"debug_model": small, "debug_moe": small, "llama3_405b": (64, 128, 256, 512)}
    for world_size in sizes.get(path.stem, (8, 64, 256, 512)):
        config = JobConfig().parse_args(
            ["--job.config_file", str(path), "--training.dataset=c4"], world_size
        )
        assert config.notes == []
        assert config.training.global_batch_size > 0, "set in every committed file"
        if path in LARGE:
            family, _, size = path.stem.partition("_")
            flavor = config.model.flavor.lower().replace("-", "_")
            assert (config.model.name, flavor) == (family, size)


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.stem)
def test_a_large_file_wants_a_dataset_and_says_so_alone(path):
    with pytest.raises(ConfigError) as raised:
        JobConfig().parse_args(["--job.config_file", str(path)], world_size=512)
    fragments = ["training.dataset = '' names no dataset; set it, for example to jsonl"]
    assert_one_fault(str(raised.value), str(path), fragments)
