"""The package where it is installed: its wheel, the command `torchtrain`, and a Python without the
dependencies, which is told so in one line."""

import re
import subprocess
import sys

import pytest
from helpers.installed import install_wheel
from helpers.launching import ROOT, environment

from torchtrain.installation import NEEDED, PROGRAM
from torchtrain.tools.__main__ import COMMANDS


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


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    return install_wheel(tmp_path_factory.mktemp("installed"))


def run(installed, folder, *arguments):
    """What the installed command gives in an empty folder."""
    folder.mkdir(exist_ok=True)
    ended = subprocess.run(
        [installed.script, *arguments],
        cwd=folder,
        env=installed.environment(2),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert "Traceback" not in ended.stderr
    assert not list(folder.iterdir())
    return ended


def test_the_wheel_holds_the_package_with_the_program_and_its_configs(installed):
    configs = {f"program/train_configs/{file.name}" for file in (ROOT / "train_configs").iterdir()}
    needed = {"program/train.py", "py.typed", "datasets/debug_tokenizer.model"}
    inside = {name.removeprefix("torchtrain/") for name in installed.names}
    for name in configs | needed:
        assert any(one.startswith(name) for one in inside), name
    assert {re.sub(r"-.*", "", name.split("/")[0]) for name in installed.names} == {"torchtrain"}


def test_the_installed_command_lists_what_there_is_to_run(installed, tmp_path):
    listed = run(installed, tmp_path / "empty", "--help")
    assert (listed.returncode, listed.stderr) == (0, "")
    lines = listed.stdout.splitlines()
    for name, command in COMMANDS.items():
        assert sum(line.split() == [name, *command.summary.split()] for line in lines) == 1, name
    wrong = run(installed, tmp_path / "empty", "reprot", "outputs")
    assert (wrong.returncode, wrong.stdout) == (2, "")
    first, *rest = wrong.stderr.splitlines()
    assert first == "error: torchtrain has no command 'reprot'; did you mean report?"
    assert rest[-len(COMMANDS) :] == lines[-len(COMMANDS) :]


def test_the_installed_command_finds_configs_by_name_and_lists_them(installed, tmp_path):
    config = ["--job.config_file=llama3_8b.toml", "--training.dataset=c4"]
    checked = run(installed, tmp_path / "empty", "check-config", "--world-size=8", "--", *config)
    assert (checked.returncode, checked.stderr) == (0, "")
    assert "sharded over 8 ranks" in checked.stdout
    refused = run(installed, tmp_path / "empty", "--job.config_file", "llama8b.toml")
    assert (refused.returncode, refused.stdout) == (2, "")
    names = ", ".join(sorted(file.name for file in (ROOT / "train_configs").glob("*.toml")))
    assert refused.stderr.rstrip().endswith(f"; those that come with torchtrain are {names}")
