"""The fault campaign: what it takes for lost, and a small one."""

import io
import json
import logging
import os
import random
import shutil
from pathlib import Path

import pytest
from helpers.forking import on_ranks

from torchtrain.checkpoint.commit import INDEX, MARKER, STATE
from torchtrain.tools.faults import bench, campaign, disk, each_operation, power, trial
from torchtrain.tools.faults.__main__ import main
from torchtrain.tools.faults.bench import STEPS, Bench, Lost
from torchtrain.tools.faults.campaign import FAULTS, MIXED, Tally
from torchtrain.tools.faults.disk import Operation
from torchtrain.tools.faults.replay import Disk

# The disk, told


def write_in_all_ways(folder):
    """Be a rank that changes a folder in each way that the trainer does; check what was told."""
    told = []
    disk.watch(folder, lambda operation: told.append(operation))
    (folder / "new").mkdir()
    with open(folder / "new" / "text", "w", encoding="utf-8") as file:
        file.write("line\n")
    with open(folder / "new" / "text", "ab", buffering=0) as file:
        file.write(b"more")
        os.fsync(file.fileno())
    with io.BufferedWriter(io.FileIO(folder / "shard", "xb")) as file:
        file.write(b"tensor")
    descriptor = os.open(folder / "made", os.O_WRONLY | os.O_CREAT)
    with os.fdopen(descriptor, "w") as file:
        file.write("state")
    os.replace(folder / "made", folder / "state")
    os.truncate(folder / "state", 3)
    shutil.rmtree(folder / "new")
    (folder.parent / "elsewhere").write_text("not told of")
    found = [(one.kind, Path(one.path).name, one.data, one.position) for one in told]
    assert found == [
        ("mkdir", "new", b"", 0),
        ("create", "text", b"", 0),
        ("write", "text", b"line\n", 0),
        ("write", "text", b"more", 5),
        ("fsync", "text", b"", 0),
        ("create", "shard", b"", 0),
        ("write", "shard", b"tensor", 0),
        ("create", "made", b"", 0),
        ("write", "made", b"state", 0),
        ("rename", "made", b"", 0),
        ("truncate", "state", b"", 3),
        ("remove", "text", b"", 0),
        ("rmdir", "new", b"", 0),
    ]
    assert (folder / "state").read_text() == "sta"
    assert (folder / "shard").read_bytes() == b"tensor"


@pytest.mark.slow
def test_each_operation_on_the_disk_is_told(tmp_path):
    (tmp_path / "watched").mkdir()
    on_ranks(1, write_in_all_ways, tmp_path / "watched")


# A disk after a power cut


def after_power_cut(target, operations, keep, start=None):
    """Return the files that a power cut leaves of these operations under /run."""
    played = Disk(Path("/run"), start)
    for operation in operations:
        played.do(operation)

    class Chosen(random.Random):
        def choice(self, values):
            return keep if keep in values else values[-1]

    played.cut_power(target, Chosen(0))
    return {
        path.relative_to(target).as_posix(): path.read_bytes()
        for path in target.rglob("*")
        if path.is_file()
    }


CREATE = Operation("create", "/run/a")
WRITE = Operation("write", "/run/a", data=b"abc")
SYNC = Operation("fsync", "/run/a")
RENAME = Operation("rename", "/run/a", target="/run/b")
SYNC_FOLDER = Operation("fsync", "/run")


@pytest.mark.parametrize(
    ("operations", "keep", "left"),
    [
        ([CREATE, WRITE, SYNC], "synced", {}),
        ([CREATE, WRITE, SYNC_FOLDER], "synced", {"a": b""}),
        ([CREATE, WRITE, SYNC, SYNC_FOLDER], "synced", {"a": b"abc"}),
        ([CREATE, WRITE, SYNC, SYNC_FOLDER, RENAME], "synced", {"a": b"abc"}),
        ([CREATE, WRITE, SYNC, SYNC_FOLDER, RENAME, SYNC_FOLDER], "synced", {"b": b"abc"}),
        ([CREATE, WRITE, RENAME], "names", {"b": b""}),
        ([CREATE, WRITE, SYNC, WRITE, RENAME], "names", {"b": b"abc"}),
        ([CREATE, WRITE, SYNC_FOLDER, Operation("remove", "/run/a")], "synced", {"a": b""}),
        ([Operation("remove", "/run/none"), Operation("write", "/run/x/y")], "synced", {}),
    ],
)
def test_what_a_power_cut_leaves(tmp_path, operations, keep, left):
    assert after_power_cut(tmp_path / "after", operations, keep) == left


def test_what_was_there_before_is_synced(tmp_path):
    (tmp_path / "before/sub").mkdir(parents=True)
    (tmp_path / "before/sub/old").write_bytes(b"12345")
    changes = [
        Operation("write", "/run/sub/old", data=b"xy", position=1),
        Operation("truncate", "/run/sub/old", position=4),
    ]
    before = {"sub/old": b"12345"}
    assert after_power_cut(tmp_path / "a", changes, "synced", tmp_path / "before") == before
    changes.append(Operation("fsync", "/run/sub/old"))
    after = after_power_cut(tmp_path / "b", changes, "synced", tmp_path / "before")
    assert after == {"sub/old": b"1xy4"}


def test_a_record_is_read_as_it_was_written(tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(power.counting, "at_operations", lambda root, tell: heard.append(tell))
    logger = logging.getLogger("torchtrain")
    monkeypatch.setattr(logger, "filters", [])
    power.record_operations(tmp_path / "run")
    heard[0](1, WRITE)
    for said in ("saving /a/step-4 beside training", "saved /a/step-4 (2.0 MiB) in 0.1 s"):
        assert logger.filter(logging.LogRecord("", logging.INFO, "", 0, said, None, None))
    assert power.read(tmp_path / "run") == [WRITE, Operation("said", "", target="4")]


# What is taken for lost


def write_run(folder, loss=2.0, digest="a", step=STEPS, **files):
    """Write a run's folder that has one line, and one checkpoint without tensors."""
    checkpoint = folder / "checkpoint" / f"step-{STEPS}"
    checkpoint.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": loss}) + "\n")
    state = {"step": step, "tokens_seen": 1, "data": {}, "shape": {}}
    (checkpoint / STATE).write_text(json.dumps(state))
    shards = {name: {"sha256": digest} for name in ("__0_0.distcp", INDEX)}
    (checkpoint / MARKER).write_text(json.dumps({"files": shards}))
    return folder


def test_another_number_or_state_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "compare_tensors", lambda *_: 1 / 0)
    small = Bench(tmp_path)
    write_run(tmp_path / "untouched")
    small.compare(write_run(tmp_path / "same"))
    with pytest.raises(Lost, match=r"'loss': 2\.0000000000000004"):
        small.compare(write_run(tmp_path / "loss", loss=2.0000000000000004))
    with pytest.raises(Lost, match="step is 8 instead of 10"):
        small.compare(write_run(tmp_path / "step", step=8))
    with pytest.raises(ZeroDivisionError):  # the tensors are looked at
        small.compare(write_run(tmp_path / "tensors", digest="b"))
    more = write_run(tmp_path / "more")
    with open(more / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 2, "loss": 1.0}) + "\n")
    with pytest.raises(Lost, match="has 2 lines instead of 1"):
        small.compare(more)
    (tmp_path / "same/checkpoint" / f"step-{STEPS}" / MARKER).unlink()
    with pytest.raises(Lost, match="not a complete checkpoint"):
        small.compare(tmp_path / "same")


@pytest.mark.parametrize(
    ("output", "newest", "is_right"),
    [
        ("loaded /a/step-4 (step 4, model and optimizer) in 1 s", 4, True),
        ("loaded /a/step-4 (step 4, model and optimizer) in 1 s", 6, False),
        ("loaded /a/step-4 (step 4, model and optimizer) in 1 s", [4, 6], True),
        ("step  1/10  loss 8.1", 0, True),
        ("step  1/10  loss 8.1", 2, False),
        ("nothing to do: /a/step-10 already holds", STEPS, True),
        ("nothing to do: /a/step-10 already holds", 8, False),
        ("killed before it said anything", 8, True),
    ],
)
def test_a_start_must_go_on_from_the_newest(output, newest, is_right):
    if is_right:
        trial.require_resumed(output, newest)
    else:
        with pytest.raises(Lost, match="went on after step"):
            trial.require_resumed(output, newest)


@pytest.mark.parametrize(
    "leftover", [".config.toml.abcdefgh", "checkpoint/.tmp-step-2-x", "checkpoint/x"]
)
def test_what_is_left_behind_is_lost(tmp_path, leftover):
    run = write_run(tmp_path / "run")
    (run / "checkpoint/step-4.damaged-2").mkdir()
    (run / "previous-1").mkdir()
    trial.require_clean(run)
    (run / leftover).mkdir()
    with pytest.raises(Lost, match="left behind"):
        trial.require_clean(run)


# The plan and the command


def test_every_fault_is_tried_and_the_same_seed_makes_the_same_tries():
    few = campaign.plan(FAULTS, kills=1, seed=3)
    assert sorted(few) == sorted((name, 0) for name in FAULTS)
    many = campaign.plan(FAULTS, kills=1000, seed=3)
    assert many == campaign.plan(FAULTS, kills=1000, seed=3)
    assert many != campaign.plan(FAULTS, kills=1000, seed=4)
    assert {name for name, _ in many[:200]} == set(FAULTS), "all come early"
    assert [number for name, number in many if name == "all-killed"] == list(
        range(sum(name == "all-killed" for name, _ in many))
    )
    expected = sum((1 + FAULTS[name].in_a_row) / 2 for name, _ in many)
    assert expected == pytest.approx(1000, rel=0.05)


def test_the_table_adds_up():
    tallies = {"all-killed": Tally(3, 7, 2, 0, 5, 1), "file-damaged": Tally(1, 1, 1, 1, 2, 0)}
    header, *lines, total = campaign.as_table(tallies).split("\n")
    assert [line.split()[0] for line in lines] == ["all-killed", "file-damaged"]
    assert total.split() == ["all", "4", "8", "3", "1", "7", "1"]
    assert header.split()[-1] == "lost"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--only", "all-kiled"], "did you mean all-killed?"),
        (["--try", "3"], "--try needs --only"),
        (["--kills", "0"], "must be at least 1"),
        (["--every-operation", "--only", "one-save"], "exclude each other"),
    ],
)
def test_what_cannot_be_asked_for_is_one_line(capsys, arguments, text):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1


def test_one_save_is_told_from_the_others():
    """The sweep of a dead one's folder comes before, and the next save ends it."""
    save = each_operation.OneSave(5)
    folder = "/run/checkpoint"
    operations = [
        ("remove", f"{folder}/.tmp-step-5-dead/shard"),
        ("mkdir", folder),
        ("mkdir", f"{folder}/.tmp-step-5-new"),
        ("write", f"{folder}/.tmp-step-5-new/shard"),
        ("rename", f"{folder}/.tmp-step-5-new"),
        ("rename", f"{folder}/step-3"),
        ("rmdir", f"{folder}/.tmp-removed-step-3-x"),
        ("mkdir", f"{folder}/.tmp-step-6-new"),
        ("write", f"{folder}/.tmp-step-6-new/shard"),
    ]
    included = [save.includes(Operation(*operation)) for operation in operations]
    assert included == [False, False, True, True, True, True, True, False, False]
    assert save.is_over


def test_every_operation_is_killed_at_once(tmp_path, monkeypatch):
    counts = {1: [8], 2: [9, 5]}
    monkeypatch.setattr(
        each_operation, "count_operations", lambda bench, mode, ranks: counts[ranks]
    )
    tries = each_operation.list_tries(Bench(tmp_path), "async")
    assert [len(kills) for kills in tries] == [6, 2, 6, 6, 2]
    assert all(len({kill.ranks for kill in kills}) == 1 for kills in tries)
    kills = [(kill.ranks, kill.victim, kill.operation) for kills in tries for kill in kills]
    assert kills == [
        *((1, 0, number) for number in range(1, 9)),
        *((2, 0, number) for number in range(1, 10)),
        *((2, 1, number) for number in range(1, 6)),
    ]
    planned = campaign.plan_every_operation(Bench(tmp_path))
    assert planned == [(name, k) for name in ("one-save", "one-save-async") for k in range(5)]


@pytest.mark.slow
def test_a_run_with_a_dozen_faults_in_a_row_ends_as_if_there_had_been_none(tmp_path, capsys):
    """The small campaign of CI: one of each kind, as far as the run gets."""
    assert len(MIXED) > 12
    arguments = ["--only", "mixed", "--try", "0", "--seed", "1", "--folder", str(tmp_path / "c")]
    status = main(arguments)
    printed = capsys.readouterr().out
    assert status == 0, printed
    line = next(line for line in printed.splitlines() if line.startswith("mixed")).split()
    assert int(line[3]) >= 4, "faults were made"
    assert not list((tmp_path / "c").glob("mixed-*")), "a try that is survived leaves nothing"
