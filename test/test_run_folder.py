"""The run's folder: one run at a time, nothing overwritten, and what it says of itself."""

import errno
import itertools
import json
import os
import re
import shutil
import socket
from contextlib import suppress
from pathlib import Path

import pytest
from helpers.crashing import Crash

from torchtrain.config.toml import to_toml
from torchtrain.config_manager import JobConfig
from torchtrain.errors import UserError
from torchtrain.run_folder import RunFolder
from torchtrain.utils import make_folder, remove_unfinished, write_durably


def run_folder(path):
    return RunFolder(path, owner=True)


def test_a_second_run_is_refused_and_told_who_holds_the_folder(tmp_path):
    holder = run_folder(tmp_path)
    expected = f"is in use by process {os.getpid()} on {socket.gethostname()}."
    with pytest.raises(UserError, match=re.escape(expected)):
        run_folder(tmp_path)
    assert RunFolder(tmp_path, owner=False).path == holder.path, "other ranks lock nothing"


def test_the_lock_ends_with_its_process(tmp_path):
    child = os.fork()  # as it imports nothing, it takes no seconds
    if child == 0:
        try:
            folder = run_folder(tmp_path)
            os._exit(0 if folder.path == tmp_path else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
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


def test_a_cut_that_fails_or_is_killed_at_any_instant_doubles_no_line(tmp_path):
    """The first try dies before its first, second, … operation on a file; the next one does all."""
    folder = tmp_path / "run"
    kept, moved = '{"step": 1}\n{"step": 2}\n', '{"step": 3}\n{"st'
    crash = Crash(folder, events=("open", "os.rename", "os.truncate"))
    for operations in itertools.count():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(kept + moved)
        (folder / "metrics.superseded.jsonl").write_text('{"step": 7}\n')
        first = run_folder(folder)
        crash.left = operations
        with suppress(UserError):
            first.resume_at(2)
        died = crash.left < 0
        crash.left = None
        # An append that was cut short, as on a full disk or by a power cut.
        if any(folder.glob(".cut-*")):
            with open(folder / "metrics.superseded.jsonl", "a") as file:
                file.write('{"step": 3')
        first._lock_file.close()
        next_one = run_folder(folder)
        next_one.resume_at(2)
        next_one._lock_file.close()
        assert (folder / "metrics.jsonl").read_text() == kept
        superseded = (folder / "metrics.superseded.jsonl").read_text()
        assert superseded == '{"step": 7}\n{"step": 3}\n{"st\n'
        assert len(list(folder.iterdir())) == 3, "the lock and the two logs"
        if not died:
            break
    assert operations > 4


def test_a_log_that_is_no_text_is_moved_to_the_byte(tmp_path):
    """A power cut can leave anything at the end of a file that was not synced."""
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n\xff\x00\x80')
    run_folder(tmp_path).resume_at(1)
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"step": 1}\n'
    assert (tmp_path / "metrics.superseded.jsonl").read_bytes() == b"\xff\x00\x80\n"


def test_temporary_files_of_killed_runs_are_removed_and_a_users_own_are_not(tmp_path):
    for name in ("config.toml", "run.json", "metrics.jsonl", "samples.jsonl"):
        (tmp_path / f".{name}.a1b2_3c4").write_text("half")
    (tmp_path / ".config.toml.swp").write_text("an editor's")
    run_folder(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".config.toml.swp", ".lock"]


def test_what_write_durably_leaves_is_what_is_removed(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    path = tmp_path / "a[b].toml"
    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", killed)
        patched.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            write_durably(path, "text")
    assert len(list(tmp_path.iterdir())) == 1
    remove_unfinished(path)
    assert not list(tmp_path.iterdir())


WHILE_WRITING = {
    errno.ENOSPC: "the disk is full (No space left on device)",
    errno.EDQUOT: "the disk quota is used up (Disk quota exceeded)",
    errno.EFBIG: "the file is as large as files may be there, or as `ulimit -f` allows",
    errno.EROFS: "the file system is read-only (Read-only file system)",
    errno.EACCES: "Permission denied",
}


@pytest.mark.parametrize("number", WHILE_WRITING)
def test_a_start_that_cannot_write_is_one_message_that_names_the_file(
    tmp_path, monkeypatch, number
):
    def fails(*_):
        raise OSError(number, os.strerror(number))

    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1}\n{"step": 2}\n')
    folder = run_folder(tmp_path)
    calls = {
        "metrics.superseded.jsonl": (lambda: folder.resume_at(1), "fsync"),
        "config.toml": (lambda: folder.describe_run("", {}), "fsync"),
        "previous-1": (lambda: folder.begin_afresh([]), "rename"),
    }
    for name, (action, function) in calls.items():
        with monkeypatch.context() as patched:
            patched.setattr(os, function, fails)
            with pytest.raises(UserError) as said:
                action()
        expected = f"{tmp_path / name} cannot be written: {WHILE_WRITING[number]}"
        assert str(said.value).startswith(expected)
    assert log.read_text() == '{"step": 1}\n{"step": 2}\n', "nothing is lost"


def test_the_folder_is_locked_on_a_full_disk_too(tmp_path, monkeypatch):
    """A run that has nothing left to do needs no room to say so."""

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "write", full)
        run_folder(tmp_path / "a")
        holder = run_folder(tmp_path / "b")
    with pytest.raises(UserError, match="in use by another process"):
        run_folder(holder.path)


def test_earlier_outputs_are_moved_and_a_users_own_files_are_not(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    path = tmp_path / "run"
    folder = run_folder(path)
    for name in ("metrics.jsonl", "metrics.superseded.jsonl", "config.toml", "run.json", "notes"):
        (path / name).write_text(name)
    (path / "profiling" / "traces").mkdir(parents=True)
    (path / "hang" / "step-3").mkdir(parents=True)
    (path / "wandb").mkdir()
    (path / "wandb" / "run-id").write_text("1")
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
        "hang",
        "metrics.jsonl",
        "metrics.superseded.jsonl",
        "profiling",
        "run.json",
        "wandb",
    ]
    assert (path / "previous-11" / "metrics.jsonl").read_text() == "metrics.jsonl"
    assert outside.is_dir()
    (path / "tb").mkdir()
    folder.begin_afresh(outputs)
    assert not (path / "previous-12").exists(), "nothing to move"


def test_a_power_cut_does_not_take_a_new_folder_away(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync

    def note(descriptor):
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    make_folder(tmp_path / "a/b/c")
    assert {str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a/b")} <= set(synced)
    synced.clear()
    RunFolder(tmp_path / "a/b/c", owner=True)  # made by a run that was killed before it synced
    assert str(tmp_path / "a/b") in synced


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
