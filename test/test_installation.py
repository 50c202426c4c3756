"""A Python without the dependencies is told so, by every command, in one line and with status 2."""

import subprocess
import sys

import pytest
from helpers.launching import ROOT, environment

from torchtrain.installation import NEEDED, PROGRAM


@pytest.mark.parametrize(
    "command",
    [
        ["train.py"],
        ["-m", "torchtrain.tools.launch"],
        ["-m", "torchtrain.tools.parity"],
        ["-m", "torchtrain.tools.train_tokenizer"],
        ["-m", "torchtrain.tools.bench_data"],
        ["-m", "torchtrain.tools.prepare"],
        ["-m", "torchtrain.datasets.prepare"],
        ["-m", "torchtrain.config_manager"],
    ],
    ids=" ".join,
)
def test_a_python_without_torch_is_told_in_one_line_what_to_do(command):
    without_site_packages = [sys.executable, "-S", *command]
    ended = subprocess.run(
        without_site_packages,
        cwd=ROOT,
        env=environment(1, PYTHONPATH=""),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 2, ended.stderr
    assert ended.stdout == ""
    assert ended.stderr.count("\n") == 1
    assert f"has no {', '.join(NEEDED)}. " in ended.stderr
    assert "source " in ended.stderr
    assert ".venv/bin/activate" in ended.stderr


def test_the_program_is_where_train_py_and_its_configs_are():
    assert (PROGRAM / "train.py").is_file()
    assert (PROGRAM / "train_configs" / "debug_model.toml").is_file()
