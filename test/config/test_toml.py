"""The merged config as a TOML file: it reads back as what it was."""

import pytest
from helpers.configs import parse
from helpers.launching import ROOT
from hypothesis import given
from hypothesis import strategies as st

from torchtrain.config.toml import quoted, to_toml
from torchtrain.config_manager import JobConfig

TOMLS = sorted((ROOT / "train_configs").glob("*.toml"))

HOSTILE = [
    "",
    '"',
    "\\",
    "'''",
    '"""',
    "\n\r\t\b\f\x1b\x7f",
    "# no comment",
    "é 😀 \u2028\u0085",
    "[a]\nb = 1",
    "{}=",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_round_trip_of_hostile_text(text):
    config = JobConfig().parse_args([f"--job.description={text}"])
    assert parse(to_toml(config)).job.description == text


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))


@given(
    text=TEXT, lr=st.floats(min_value=5e-324, allow_infinity=False), seed=st.integers(0, 2**63 - 1)
)
def test_round_trip_of_any_value(text, lr, seed):
    config = JobConfig()
    config.job.description, config.optimizer.lr, config.debug.seed = text, lr, seed
    again = parse(to_toml(config))
    again.job.config_file = None
    assert again == config


@pytest.mark.parametrize("path", TOMLS, ids=lambda path: path.stem)
def test_round_trip_of_committed_files(path):
    ranks = 64 if "405b" in path.stem else 8
    config = JobConfig().parse_args(
        ["--job.config_file", str(path), "--training.dataset=c4"], world_size=ranks
    )
    text = to_toml(config)
    again = parse(text, world_size=ranks)
    assert again.job.config_file == "run.toml"
    again.job.config_file = config.job.config_file
    assert again == config
    assert "config_file" not in text
    assert "None" not in text
    assert "data_parallel_shard_degree = -1\n" in text


def test_a_value_is_quoted_as_toml_writes_it():
    assert quoted(None) == "unset"
    assert quoted(True) == "true"
    assert quoted(1e-3) == "0.001"
    assert quoted(["a", "b"]) == '["a", "b"]'
    assert quoted("x" * 200) == '"' + "x" * 116 + "..."
    assert quoted("x" * 118) == '"' + "x" * 118 + '"'
    assert quoted(10**5000) == "a number of thousands of digits"
