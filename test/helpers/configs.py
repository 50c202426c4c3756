"""Config files written by a test, read as the trainer reads them."""

from pathlib import Path

import pytest

from torchtrain.config_manager import JobConfig
from torchtrain.errors import ConfigError


def write(text: str | bytes) -> str:
    """Write run.toml into the current folder, the test's own."""
    Path("run.toml").write_bytes(text.encode() if isinstance(text, str) else text)
    return "run.toml"


def parse(text: str | bytes = "", *args: str, world_size: int = 1) -> JobConfig:
    """Return what the file and the command line give."""
    return JobConfig().parse_args(["--job.config_file", write(text), *args], world_size)


def report(text: str | bytes = "", *args: str, world_size: int = 1) -> str:
    """Return the report on a config that must be refused."""
    with pytest.raises(ConfigError) as raised:
        parse(text, *args, world_size=world_size)
    return str(raised.value)


def assert_one_fault(said: str, where: str, fragments: list[str]) -> None:
    """Check that the report has a single fault, from the file or command line `where`."""
    assert said.startswith(f"The configuration has 1 fault:\n  {where}: "), said
    for fragment in fragments:
        assert fragment in said
