"""The run's folder: one run at a time, nothing overwritten, and what it says of itself."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.launching import ROOT

from torchtrain.config.toml import to_toml
from torchtrain.config_manager import JobConfig
from torchtrain.errors import UserError
from torchtrain.run_folder import RunFolder


def run_folder(path):
    return RunFolder(path, owner=True)


def test_a_second_run_is_refused_and_told_who_holds_the_folder(tmp_path):
    holder = run_folder(tmp_path)
    expected = f"is in use by process {os.getpid()} on {socket.gethostname()}."
    with pytest.raises(UserError, match=re.escape(expected)):
        run_folder(tmp_path)
    assert RunFolder(tmp_path, owner=False).path == holder.path, "other ranks lock nothing"


def test_the_lock_ends_with_its_process(tmp_path):
    code = (
        "import pathlib, torchtrain.run_folder; "
        f"folder = torchtrain.run_folder.RunFolder(pathlib.Path({str(tmp_path)!r}), owner=True)"
    )
    command = [sys.executable, "-c", code]
    for _ in range(2):
        subprocess.run(command, cwd=ROOT, check=True, timeout=60)
    run_folder(tmp_path)


def test_lines_past_the_resumed_step_are_moved_aside_and_a_torn_one_too(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    superseded = tmp_path / "metrics.superseded.jsonl"
    metrics.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    folder = run_folder(tmp_path)
    folder.resume_at(2)
    assert metrics.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert superseded.read_text() == '{"step": 3}\n{"st\n'
    folder.resume_at(1)
    assert metrics.read_text() == '{"step": 1}\n'
    assert superseded.read_text() == '{"step": 3}\n{"st\n{"step": 2}\n'
    folder.resume_at(1)
    assert superseded.read_text() == '{"step": 3}\n{"st\n{"step": 2}\n', "nothing to move"


def test_earlier_outputs_are_moved_and_a_users_own_files_are_not(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    path = tmp_path / "run"
    folder = run_folder(path)
    for name in ("metrics.jsonl", "metrics.superseded.jsonl", "config.toml", "run.json", "notes"):
        (path / name).write_text(name)
    (path / "profiling" / "traces").mkdir(parents=True)
    (path / "wandb").mkdir()
    for number in (4, 10, 9):
        (path / f"previous-{number}").mkdir()
    (path / "previous-old").mkdir()
    outputs = [Path("profiling/traces"), Path("tb"), outside]
    folder.begin_afresh(outputs)
    assert sorted(entry.name for entry in path.iterdir()) == [
        ".lock",
        "notes",
        "previous-10",
        "previous-11",
        "previous-4",
        "previous-9",
        "previous-old",
    ]
    assert sorted(entry.name for entry in (path / "previous-11").iterdir()) == [
        "config.toml",
        "metrics.jsonl",
        "metrics.superseded.jsonl",
        "profiling",
        "run.json",
        "wandb",
    ]
    assert (path / "previous-11" / "metrics.jsonl").read_text() == "metrics.jsonl"
    assert outside.is_dir()
    folder.begin_afresh(outputs)
    assert not (path / "previous-12").exists(), "nothing to move"


def test_a_run_folder_that_cannot_be_made_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=re.escape("job.dump_folder")):
        run_folder(tmp_path / "file" / "run")


def test_config_toml_can_be_given_back(tmp_path):
    options = ["--job.dump_folder", str(tmp_path), "--training.steps", "7"]
    config = JobConfig().parse_args(options, world_size=1)
    run_folder(tmp_path).describe_run(to_toml(config), {"world_size": 1})
    given_back = ["--job.config_file", str(tmp_path / "config.toml")]
    again = JobConfig().parse_args(given_back, world_size=4)
    assert again.training.steps == 7
    assert again.training.global_batch_size == -1
    assert json.loads((tmp_path / "run.json").read_text()) == {"world_size": 1}
