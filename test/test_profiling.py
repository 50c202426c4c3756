"""Traces, memory snapshots and garbage collection, without a run around them."""

import errno
import gc
import gzip
import json
import logging
from pathlib import Path

import pytest
import torch

from torchtrain import profiling
from torchtrain.config.schema import Profiling
from torchtrain.errors import UserError
from torchtrain.profiling import GarbageCollection, Profiler

CPU = torch.device("cpu")


@pytest.fixture
def log(caplog, monkeypatch):
    """The lines logged so far."""
    monkeypatch.setattr(profiling.logger, "handlers", [])
    monkeypatch.setattr(profiling.logger, "propagate", True)
    return caplog


def test_a_trace_holds_the_active_steps_of_its_cycle(tmp_path):
    section = Profiling(
        enable_profiling=True,
        save_traces_folder="traces",
        profile_freq=5,
        profiler_warmup=1,
        profiler_active=2,
    )
    profiler = Profiler(section, tmp_path, CPU, rank=3)
    with profiler.recording():
        for step in range(1, 12):
            torch.ones(2) + 1
            profiler.step(step)
    files = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.*"))
    assert [file.as_posix() for file in files] == [
        "traces/step-10/rank3.json.gz",
        "traces/step-5/rank3.json.gz",
    ]
    with gzip.open(tmp_path / "traces" / "step-5" / "rank3.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    # PyTorch counts from 0: steps 4 and 5, after two idle ones and one of warm-up.
    steps = {name for name in names if name and name.startswith("ProfilerStep")}
    assert steps == {"ProfilerStep#3", "ProfilerStep#4"}
    assert "aten::add" in names


def test_nothing_is_recorded_unless_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", pytest.fail)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", pytest.fail)
    profiler = Profiler(Profiling(profile_freq=1), tmp_path, CPU, rank=0)
    with profiler.recording():
        profiler.step(1)
    profiler.write_memory_snapshot("out-of-memory")
    assert not list(tmp_path.iterdir())


def test_memory_snapshots(tmp_path, monkeypatch):
    begun = []
    written = []
    monkeypatch.setattr(
        torch.cuda.memory, "_record_memory_history", lambda **given: begun.append(given)
    )
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", written.append)
    section = Profiling(
        enable_memory_snapshot=True, save_memory_snapshot_folder="memory", profile_freq=2
    )
    with pytest.raises(UserError, match="needs a CUDA device; this run is on cpu"):
        Profiler(section, tmp_path, CPU, rank=0)
    assert not begun
    profiler = Profiler(section, tmp_path, torch.device("cuda"), rank=1)
    assert begun == [{"max_entries": 100_000}]
    for step in (1, 2, 3, 4):
        profiler.step(step)
    profiler.write_memory_snapshot("out-of-memory")
    folders = ["step-2", "step-4", "out-of-memory"]
    assert written == [str(tmp_path / "memory" / name / "rank1.pickle") for name in folders]
    assert all((tmp_path / "memory" / name).is_dir() for name in folders)


def fill_the_disk(path, *_):
    """Write a part of a file, and find no room for the rest."""
    Path(path).write_bytes(b"a part")
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_costs_the_trace_and_not_the_run(tmp_path, log, monkeypatch):
    monkeypatch.setattr(
        torch.profiler.profile, "export_chrome_trace", lambda _, path: fill_the_disk(path)
    )
    section = Profiling(enable_profiling=True, profile_freq=2, profiler_warmup=1, profiler_active=1)
    profiler = Profiler(section, tmp_path, CPU, rank=0)
    with profiler.recording():
        for step in range(1, 5):
            profiler.step(step)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "nothing half written"
    said = "rank0.json.gz cannot be written: the disk is full (No space left on device). Training"
    assert log.text.count(said) == 2, "each is tried"


def test_a_full_disk_costs_the_memory_snapshot_and_not_the_run(tmp_path, log, monkeypatch):
    monkeypatch.setattr(torch.cuda.memory, "_record_memory_history", lambda **given: None)
    monkeypatch.setattr(torch.cuda.memory, "_dump_snapshot", fill_the_disk)
    section = Profiling(enable_memory_snapshot=True, save_memory_snapshot_folder="memory")
    profiler = Profiler(section, tmp_path, torch.device("cuda"), rank=1)
    profiler.write_memory_snapshot("out-of-memory")
    assert not list((tmp_path / "memory/out-of-memory").iterdir())
    (tmp_path / "memory/step-5").write_text("no folder can be made here")
    profiler.write_memory_snapshot("step-5")
    assert "step-5/rank1.pickle cannot be written: File exists" in log.text


@pytest.fixture
def collections(monkeypatch):
    """The generation of each collection; Python's own switch is put back."""
    generations = []

    def collect(generation=2):
        generations.append(generation)
        return 7

    monkeypatch.setattr(gc, "collect", collect)
    monkeypatch.setattr(gc, "freeze", lambda: generations.append("freeze"))
    yield generations
    gc.enable()


def test_garbage_is_collected_at_the_same_steps_everywhere(collections):
    collector = GarbageCollection(3, debug=False)
    assert not gc.isenabled(), "Python would collect whenever it likes, on each rank"
    assert collections == [2, "freeze"]
    collections.clear()
    seen = []
    for step in range(1, 8):
        collector.step(step)
        seen.append(len(collections))
    assert seen == [0, 0, 1, 1, 1, 2, 2]
    assert collections == [1, 1]


def test_debugging_collects_everything_each_step_and_counts(collections, caplog, monkeypatch):
    monkeypatch.setattr(profiling.logger, "handlers", [])
    monkeypatch.setattr(profiling.logger, "propagate", True)
    collector = GarbageCollection(50, debug=True)
    collections.clear()
    with caplog.at_level(logging.INFO, logger="torchtrain"):
        collector.step(1)
        collector.step(2)
    assert collections == [2, 2]
    assert caplog.messages == [
        "step 1: garbage collection found 7 unreachable objects",
        "step 2: garbage collection found 7 unreachable objects",
    ]
