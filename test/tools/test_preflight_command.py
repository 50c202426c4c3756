"""The command: what it prints of a run as it is configured, and of better layouts."""

import json
from itertools import pairwise

import pytest
from helpers.launching import ROOT

from torchtrain.config_manager import JobConfig
from torchtrain.tools.preflight import __main__ as preflight

LLAMA_8B = ["--job.config_file", str(ROOT / "train_configs" / "llama3_8b.toml")]
ON_H100S = ["--world-size", "8", "--device", "h100"]
SMALL = [
    *("--job.config_file", str(ROOT / "train_configs" / "debug_model.toml")),
    *("--training.global_batch_size", "8", "--training.steps", "1000"),
    *("--world-size", "2", "--device", "l40s"),
]


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)


def test_time_and_cost_are_printed_of_a_device(capsys):
    given = [*LLAMA_8B, "--training.dataset=c4", "--training.steps=1000", *ON_H100S]
    assert preflight.main([*given, "--price", "2", "--disk-gb-per-s", "4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for label in (
        "layout",
        "memory",
        "step",
        "speed",
        "MFU",
        "run",
        "devices",
        "cost",
        "checkpoint",
    ):
        assert sum(line.startswith(f"{label} ") for line in lines) == 1, label
    assert preflight.main([*given, "--price", "2", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    seconds = sum(printed["step"]["terms"].values())
    assert printed["step"]["seconds"] == pytest.approx(seconds)
    typical = printed["run"]["seconds"][1]
    assert 1000 * seconds <= typical < 1010 * seconds  # and what saves take
    assert printed["run"]["devices"] == 8


def test_the_best_layouts_are_printed_and_the_first_is_written(capsys, tmp_path):
    path = tmp_path / "best.toml"
    assert preflight.main([*SMALL, "--suggest", "--write", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(" 1. ")
    assert lines[-1] == f"the first is written to {path}"
    assert JobConfig().parse_args(["--job.config_file", str(path)], 2).training.steps == 1000
    assert preflight.main([*SMALL, "--suggest", "--write", str(path)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert preflight.main([*SMALL, "--suggest", "--json"]) == 0
    best = json.loads(capsys.readouterr().out)
    times = [each["step_s"] for each in best]
    assert all(first <= 1.01 * later for first, later in pairwise(times))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        (["--world-size", "0"], "--world-size 0: must be at least 1"),
        (["--world-size", "2", "--price", "2"], "--price needs --device"),
        (["--world-size", "2", "--suggest"], "--suggest needs --device"),
        ([*ON_H100S, "--write", "a.toml"], "--write needs --suggest"),
        ([*ON_H100S, "--price", "-2"], "--price -2.0: must be a positive number"),
        ([*ON_H100S, "--disk-gb-per-s", "nan"], "--disk-gb-per-s nan: must be a positive number"),
    ],
)
def test_what_cannot_be_meant_is_one_message(given, text, capsys):
    with pytest.raises(SystemExit) as caught:
        preflight.main([*LLAMA_8B, *given])
    assert caught.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith(text)


@pytest.mark.parametrize(
    ("device", "text"),
    [
        ("h1000", "--device h1000: unknown"),
        ("cpu", "--suggest --device cpu: its memory is not known"),
    ],
)
def test_a_device_that_cannot_be_judged_is_one_message(device, text, capsys):
    given = [*SMALL[:-1], device]
    assert preflight.main([*given, "--suggest"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {text}")
