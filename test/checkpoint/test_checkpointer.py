"""What a run saves, keeps, and resumes from."""

import itertools
import os
import shutil
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
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

from torchtrain.checkpoint import Checkpointer
from torchtrain.checkpoint.commit import MARKER, STATE
from torchtrain.errors import UserError

# Saving


def test_which_steps_are_saved(tmp_path, alone):
    def saved(**options):
        checkpointer = Checkpointer(section(**options), tmp_path)
        return [step for step in range(1, 8) if checkpointer.should_save(step, 7)]

    assert saved() == [2, 4, 6, 7]
    assert saved(enable_first_step_checkpoint=True) == [1, 2, 4, 6, 7]
    assert saved(load_only=True) == []
    assert saved(enable=False) == []
    assert Checkpointer(section(), tmp_path).should_save(3, 7, stopping=True)


def test_the_same_step_is_not_written_again(tmp_path, alone, log):
    run = saved_run(tmp_path, (2,))
    step = tmp_path / "checkpoint/step-2"
    before = {path: path.stat().st_mtime_ns for path in step.iterdir()}
    train(run.model, run.optimizer, range(1))
    run.save(2)
    assert "not written again" in log.text
    assert before == {path: path.stat().st_mtime_ns for path in step.iterdir()}
    (step / MARKER).unlink()
    run.save(2)
    assert names(tmp_path) == ["step-2", "step-2.incomplete"]
    assert "step-2.incomplete" in log.text
    assert_bitwise(loaded(tmp_path)[1], everything(run.model, run.optimizer))


def test_retention_counts_only_complete_checkpoints(tmp_path, alone):
    run = saved_run(tmp_path, (1, 2, 3, 4, 5))
    (tmp_path / "checkpoint/step-4" / MARKER).unlink()
    (tmp_path / "checkpoint/.tmp-step-9-dead").mkdir()
    run.save(6, Checkpointer(section(keep_latest_k=3), tmp_path))
    assert names(tmp_path) == ["step-3", "step-4", "step-5", "step-6"]
    run.save(7, Checkpointer(section(keep_latest_k=1), tmp_path))
    assert names(tmp_path) == ["step-4", "step-7"]


def test_a_checkpoint_that_cannot_be_removed_is_a_warning(tmp_path, alone, log, monkeypatch):
    run = saved_run(tmp_path, (1,))

    def busy(path, **_):
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(shutil, "rmtree", busy)
    run.save(2, Checkpointer(section(keep_latest_k=1), tmp_path))
    assert "could not be removed" in log.text
    monkeypatch.undo()
    assert loaded(tmp_path)[0] == 2


def test_a_checkpoint_loses_its_name_before_anything_in_it_is_deleted(tmp_path, alone, monkeypatch):
    """Where a removal stops half-way, what is left is swept, and never taken for a damaged one."""
    run = saved_run(tmp_path, (1,))
    events = []
    rename, fsync, rmtree = os.rename, os.fsync, shutil.rmtree

    def recorded(name, action):
        def act(*arguments, **options):
            events.append(name)
            action(*arguments, **options)

        return act

    monkeypatch.setattr(os, "rename", recorded("rename", rename))
    monkeypatch.setattr(os, "fsync", recorded("sync", fsync))
    monkeypatch.setattr(os, "unlink", recorded("delete", os.unlink))
    monkeypatch.setattr(shutil, "rmtree", recorded("delete all", rmtree))
    run.save(2, Checkpointer(section(keep_latest_k=1), tmp_path))
    assert events[-1] == "delete"
    assert events[: events.index("delete all") + 1][-3:] == ["rename", "sync", "delete all"]
    assert names(tmp_path) == ["step-2"]


def test_a_checkpoint_that_cannot_be_renamed_stays_whole(tmp_path, alone, log, monkeypatch):
    run = saved_run(tmp_path, (1,))
    rename = os.rename

    def busy_when_removing(source, target):
        if "removed" in Path(target).name:
            raise OSError(16, "Device or resource busy")
        rename(source, target)

    monkeypatch.setattr(os, "rename", busy_when_removing)
    run.save(2, Checkpointer(section(keep_latest_k=1), tmp_path))
    assert "could not be removed" in log.text
    assert names(tmp_path) == ["step-1", "step-2"]
    assert run.checkpointer.verify(tmp_path / "checkpoint/step-1").progress.step == 1


# Choosing what to resume from


def test_disabled_or_empty_means_a_start_at_zero(tmp_path, alone):
    saved_run(tmp_path, (1,))
    assert Checkpointer(section(enable=False), tmp_path).find() is None
    assert Checkpointer(section(), tmp_path / "fresh").find() is None
    unfinished = tmp_path / "fresh/checkpoint/.tmp-step-3-abc"
    unfinished.mkdir(parents=True)
    (unfinished / MARKER).write_text("{}")
    assert Checkpointer(section(), tmp_path / "fresh").find() is None


def test_training_never_starts_over_when_all_checkpoints_are_damaged(tmp_path, alone):
    saved_run(tmp_path, (1, 2))
    for step in (1, 2):
        flip(tmp_path / f"checkpoint/step-{step}" / STATE, 5)
    saved_run(tmp_path / "elsewhere", (4,))
    path = str(tmp_path / "elsewhere/checkpoint/step-4")
    for _ in range(2):  # at the next launch too, when they have been renamed
        with pytest.raises(UserError, match="none of them is a complete checkpoint"):
            Checkpointer(section(initial_load_path=path), tmp_path).find()
    assert names(tmp_path) == ["step-1.damaged", "step-2.damaged"]


def test_load_step_takes_that_step_and_supersedes_later_ones(tmp_path, alone, log):
    run = saved_run(tmp_path, (1, 2, 3))
    absent = r"checkpoint\.load_step = 7 .*not there.*Complete steps in .*: 1, 2, 3"
    with pytest.raises(UserError, match=absent):
        Checkpointer(section(load_step=7), tmp_path).find()
    loaded(tmp_path, load_step=1, load_only=True)
    assert names(tmp_path) == ["step-1", "step-2", "step-3"]
    step, state = loaded(tmp_path, load_step=1)
    assert step == 1
    assert_bitwise(state, run.states[1])
    assert names(tmp_path) == ["step-1", "step-2.superseded", "step-3.superseded"]
    assert "step-3.superseded" in log.text


def test_initial_load_path(tmp_path, alone, log):
    other = saved_run(tmp_path / "other", (4,))
    path = tmp_path / "other/checkpoint/step-4"

    def source(run, path=path, **options):
        return Checkpointer(section(initial_load_path=str(path), **options), tmp_path / run).find()

    # The weights alone: optimizer states stay those of a new run.
    found = source("new")
    assert found.path == path
    assert found.progress == progress(4)
    assert found.model_only
    model, optimizer = build(seed=3)
    Checkpointer(section(), tmp_path / "new").load(found, weights(model), optimizer)
    expected = {key: value for key, value in other.states[4].items() if key.startswith("model/")}
    assert_bitwise(everything(model, optimizer), expected)
    # All of it.
    found = source("new", initial_load_model_only=False)
    assert not found.model_only
    Checkpointer(section(), tmp_path / "new").load(found, weights(model), optimizer)
    assert_bitwise(everything(model, optimizer), other.states[4])
    # The run's own go first, and that is said.
    saved_run(tmp_path / "new", (1,))
    assert source("new").progress.step == 1
    assert "initial_load_path is not used" in log.text
    # Another run's checkpoint is never renamed.
    flip(path / "__0_0.distcp", 2000)
    with pytest.raises(UserError, match=r"initial_load_path = .*__0_0\.distcp is damaged"):
        source("third")
    assert names(tmp_path / "other") == ["step-4"]
    with pytest.raises(UserError, match=r"initial_load_path = .*it is not there"):
        source("third", tmp_path / "nowhere")


# Before training


def test_room_for_two_checkpoints_is_asked_for(tmp_path, alone, monkeypatch):
    model, optimizer = build()
    parameters = sum(p.numel() for p in model.parameters())
    # In fp32 the weights and AdamW's two moments of each, and its count of steps.
    needed = 2 * (3 * 4 * parameters + 4 * len(list(model.parameters())))
    checkpointer = Checkpointer(section(), tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    checkpointer.prepare(weights(model), optimizer)
    assert names(tmp_path) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed - 1))
    said = f"{tmp_path}/checkpoint has .* GiB free, but two checkpoints need"
    with pytest.raises(UserError, match=said):
        checkpointer.prepare(weights(model), optimizer)
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_found_before_training(tmp_path, alone):
    (tmp_path / "checkpoint").write_text("a file where the folder should be")
    model, optimizer = build()
    with pytest.raises(UserError, match="cannot be written"):
        Checkpointer(section(), tmp_path).prepare(weights(model), optimizer)


def leave_unfinished(run: Path) -> None:
    folder = run / "checkpoint"
    for name in (".tmp-step-2-dead", ".tmp-removed-step-0-dead"):
        (folder / name).mkdir()
        (folder / name / "__0_0.distcp").write_text("half")
    (folder / ".tmp-probe-dead").write_text("x")
    (folder / "..tmp-probe-dead.k1_m2n3o").write_text("of an earlier version")


def test_what_dead_runs_left_is_swept(tmp_path, alone):
    run = saved_run(tmp_path, (1,))
    leave_unfinished(tmp_path)
    Checkpointer(section(load_only=True), tmp_path).find()
    assert len(names(tmp_path)) == 5, "who only loads removes nothing"
    run.checkpointer.find()  # which is all that a run does that has no steps left
    assert names(tmp_path) == ["step-1"]
    leave_unfinished(tmp_path)
    run.checkpointer.prepare(weights(run.model), run.optimizer)
    assert names(tmp_path) == ["step-1"]


def test_the_probe_is_found_by_the_sweep_whenever_the_run_is_killed(tmp_path, alone):
    run = saved_run(tmp_path, (1,))
    crash = Crash(tmp_path / "checkpoint")
    seen = set()
    died = True
    for operations in itertools.count():
        crash.left = operations
        with suppress(OSError, UserError):
            run.checkpointer.prepare(weights(run.model), run.optimizer)
        died = crash.left < 0
        crash.left = None
        seen.update(names(tmp_path))
        run.checkpointer.find()
        assert names(tmp_path) == ["step-1"]
        if not died:
            break
    assert any("probe" in name for name in seen)


def test_the_optimizer_is_as_before_after_preparing(tmp_path, alone):
    model, optimizer = build()
    with torch.no_grad():
        model.norm[0].fill_(-0.0)
    before = everything(model, optimizer)
    Checkpointer(section(), tmp_path).prepare(weights(model), optimizer)
    assert_bitwise(everything(model, optimizer), before)
