"""A checkpoint is complete or not there: damage is found, and a crash loses nothing."""

import json
import logging
import os
import re
import shutil
import signal
import stat
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.checkpoints import (
    assert_bitwise,
    build,
    everything,
    flip,
    loaded,
    names,
    progress,
    saved_run,
    section,
    train,
    weights,
)
from helpers.crashing import Crash
from helpers.forking import in_group

from torchtrain.checkpoint import Checkpointer
from torchtrain.checkpoint.commit import INDEX, MARKER, STATE, commit
from torchtrain.errors import CheckpointError, UserError

# Damage


def remove_all(step: Path) -> None:
    for path in step.iterdir():
        path.unlink()


def lead_marker_outside(step: Path) -> None:
    marker = json.loads((step / MARKER).read_text())
    marker["files"][f"../{step.name}/{STATE}"] = marker["files"][STATE]
    (step / MARKER).write_text(json.dumps(marker))


DAMAGE = {
    "truncated tensors": (
        lambda step: os.truncate(step / "__0_0.distcp", 3000),
        r"__0_0\.distcp has 3000 bytes instead of \d+",
    ),
    "longer tensors": (
        lambda step: (step / "__0_0.distcp").open("ab").write(b"x"),
        r"__0_0\.distcp has \d+ bytes instead of \d+",
    ),
    "flipped bit in the tensors": (
        lambda step: flip(step / "__0_0.distcp", 2500),
        r"__0_0\.distcp is damaged: its xxh3_128",
    ),
    "flipped bit in the index": (
        lambda step: flip(step / INDEX, 100),
        r"\.metadata is damaged: its xxh3_128",
    ),
    "flipped bit in the state": (
        lambda step: flip(step / STATE, 20),
        r"train_state\.json is damaged: its xxh3_128",
    ),
    "missing tensors": (
        lambda step: (step / "__0_0.distcp").unlink(),
        r"__0_0\.distcp is missing",
    ),
    "missing index": (lambda step: (step / INDEX).unlink(), r"\.metadata is missing"),
    "missing state": (lambda step: (step / STATE).unlink(), r"train_state\.json is missing"),
    "missing marker": (lambda step: (step / MARKER).unlink(), "never finished or is half removed"),
    "empty marker": (
        lambda step: (step / MARKER).write_text(""),
        r"complete\.json is damaged: JSONDecodeError",
    ),
    "marker of nothing": (
        lambda step: (step / MARKER).write_text('{"format": 2, "files": {}}'),
        r"complete\.json is damaged: it has no step",
    ),
    "marker that leads outside": (
        lead_marker_outside,
        "its entry 'files' is not the sizes and digests",
    ),
    "empty folder": (remove_all, "never finished or is half removed"),
}
"""What is done to the folder of a step, and what is then said to be wrong with it."""

INCOMPLETE = ("missing marker", "empty folder")


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_set_aside_and_the_older_one_used(tmp_path, alone, log, kind):
    run = saved_run(tmp_path, (1, 2))
    damage, reason = DAMAGE[kind]
    damage(tmp_path / "checkpoint/step-2")
    with pytest.raises(UserError, match=r"checkpoint\.load_step = 2 .*Complete steps in .*: 1\."):
        Checkpointer(section(load_step=2), tmp_path).find()
    assert Checkpointer(section(load_only=True), tmp_path).find().progress.step == 1
    assert names(tmp_path) == ["step-1", "step-2"]
    step, state = loaded(tmp_path)
    assert step == 1
    assert_bitwise(state, run.states[1])
    aside = "step-2.incomplete" if kind in INCOMPLETE else "step-2.damaged"
    assert names(tmp_path) == ["step-1", aside]
    warnings = [record.getMessage() for record in log.records if record.levelno == logging.WARNING]
    (said,) = [warning for warning in warnings if aside in warning]
    assert re.search(f"step-2 is not usable .*{reason}", said)
    # The step is taken again, and may be damaged again.
    run.save(2)
    damage(tmp_path / "checkpoint/step-2")
    assert loaded(tmp_path)[0] == 1
    assert names(tmp_path) == ["step-1", aside, f"{aside}-2"]


def test_what_rank_0_does_not_find_of_another_ranks_files_is_not_committed(tmp_path):
    (tmp_path / "there").write_bytes(b"abc")
    for name, found in (("gone", "nothing"), ("there", "3")):
        files = {name: {"bytes": 4, "xxh3_128": "0"}}
        with pytest.raises(CheckpointError, match=f"^{name} was .* 4 bytes, .* finds {found}: is"):
            commit(tmp_path, tmp_path / "step-1", progress(1), files)
        assert not (tmp_path / MARKER).exists()


def test_a_later_format_is_refused_and_left_alone(tmp_path, alone):
    saved_run(tmp_path, (1,))
    marker = tmp_path / "checkpoint/step-1" / MARKER
    marker.write_text(json.dumps({**json.loads(marker.read_text()), "format": 3, "news": 1}))
    with pytest.raises(
        UserError, match="has format 3; this version of torchtrain reads formats up to 2"
    ):
        Checkpointer(section(), tmp_path).find()
    assert names(tmp_path) == ["step-1"]


def test_another_programs_checkpoint_is_told_so_and_left_alone(tmp_path, alone):
    """Only DCP's own files are there, as torchtitan leaves them."""
    saved_run(tmp_path, (1,))
    foreign = tmp_path / "checkpoint/step-1"
    (foreign / MARKER).unlink()
    (foreign / STATE).unlink()
    with pytest.raises(UserError, match=r"is not a torchtrain checkpoint.*torchtitan's") as said:
        Checkpointer(section(), tmp_path).find()
    assert str(foreign) in str(said.value)
    assert "never finished" not in str(said.value)
    assert names(tmp_path) == ["step-1"]


# A crash at any instant


def test_all_is_synced_before_the_rename_and_the_rename_after(tmp_path, alone, monkeypatch):
    events, written = [], []
    fsync, rename, replace = os.fsync, os.rename, os.replace

    def recording_fsync(descriptor):
        state = os.fstat(descriptor)
        events.append((state.st_ino, None if stat.S_ISDIR(state.st_mode) else state.st_size))
        fsync(descriptor)

    def recording_rename(source, target):
        events.append((Path(source).name.split("-")[0], Path(target).name))
        rename(source, target)

    def recording_replace(source, target):
        written.append(Path(target).name)
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recording_fsync)
    monkeypatch.setattr(os, "replace", recording_replace)
    monkeypatch.setattr(os, "rename", recording_rename)
    saved_run(tmp_path, (1,))
    monkeypatch.undo()
    step = tmp_path / "checkpoint/step-1"
    at = events.index((".tmp", "step-1"))
    for path in step.iterdir():  # with its full size: flushed first
        assert (path.stat().st_ino, path.stat().st_size) in events[:at], path.name
    marker = (step / MARKER).stat()
    assert events[:at][-2:] == [(marker.st_ino, marker.st_size), (step.stat().st_ino, None)]
    assert events[at + 1 :] == [(step.parent.stat().st_ino, None)]
    assert written == [STATE, MARKER], "the marker is written once, and last"


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_a_crash_before_any_file_operation_leaves_a_whole_checkpoint(tmp_path, alone, mode):
    """Save step 2 over step 1, keeping one; die before the first, second, … operation; resume."""
    run = saved_run(tmp_path / "start", (1,))
    before = run.states[1]
    train(run.model, run.optimizer, range(1, 2))
    after = everything(run.model, run.optimizer)
    folder = tmp_path / "run"
    crash = Crash(folder)
    outcomes = []
    died = True
    while died:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "start", folder)
        checkpointer = Checkpointer(section(keep_latest_k=1, async_mode=mode), folder)
        crash.left = len(outcomes)
        with suppress(OSError, RuntimeError):
            run.save(2, checkpointer)
            checkpointer.finish()
        died = crash.left < 0
        crash.left = None
        step, state = loaded(folder)
        assert_bitwise(state, {1: before, 2: after}[step])
        assert set(names(folder)) <= {"step-1", "step-2"}, "a start has swept the rest"
        for name in names(folder):  # nothing is left half removed, with nobody to remove it
            assert not isinstance(run.checkpointer.verify(folder / "checkpoint" / name), str)
        outcomes.append(step)
        run.save(3, Checkpointer(section(keep_latest_k=1), folder))
        assert not [name for name in names(folder) if name.startswith(".tmp-")]
    assert outcomes == sorted(outcomes)
    assert set(outcomes) == {1, 2}
    assert len(outcomes) > 15


def save_over_and_be_killed(run: Path, operations: int) -> None:
    model, optimizer = build()
    train(model, optimizer, range(2))
    crash = Crash(run, die=True)
    checkpointer = Checkpointer(section(keep_latest_k=1), run)
    crash.left = operations
    checkpointer.save(weights(model), optimizer, progress(2))


def is_write_of(name: str):
    return lambda event, path: event == "open" and ".tmp-step-2-" in path and name in path


INSTANTS = {
    "in the middle of the tensors": (is_write_of(".distcp"), 1),
    "before the index": (is_write_of(INDEX), 1),
    "before the marker": (is_write_of(MARKER), 1),
    "before the rename": (lambda event, path: event == "os.rename" and "step-2" in path, 1),
    "before the old one loses its name": (
        lambda event, path: event == "os.rename" and path.endswith("step-1"),
        2,
    ),
    "before the old one's contents are removed": (lambda event, path: ".tmp-removed" in path, 2),
}
"""Before which operation the process is killed, and which step must be there then."""


@pytest.mark.slow
def test_a_killed_process_leaves_a_whole_checkpoint(tmp_path, alone):
    run = saved_run(tmp_path / "start", (1,))
    train(run.model, run.optimizer, range(1, 2))
    states = {1: run.states[1], 2: everything(run.model, run.optimizer)}
    shutil.copytree(tmp_path / "start", tmp_path / "whole")
    watch = Crash(tmp_path / "whole")
    checkpointer = Checkpointer(section(keep_latest_k=1), tmp_path / "whole")
    watch.left = sys.maxsize
    run.save(2, checkpointer)
    watch.left = None
    for name, (is_reached, expected) in INSTANTS.items():
        operations = next(n for n, seen in enumerate(watch.seen) if is_reached(*seen))
        folder = tmp_path / name
        shutil.copytree(tmp_path / "start", folder)
        in_group(1, save_over_and_be_killed, folder, operations, expect=-signal.SIGKILL)
        step, state = loaded(folder)
        assert step == expected, name
        assert_bitwise(state, states[step])
