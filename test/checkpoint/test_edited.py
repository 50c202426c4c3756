"""A marker or a train_state.json that was edited or damaged: the next older checkpoint is taken."""

import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers.checkpoints import flip, names, record_of, saved_run, section

from torchtrain.checkpoint import Checkpointer, Source
from torchtrain.checkpoint.commit import INDEX, MARKER, STATE, Marker
from torchtrain.errors import UserError

EDITS = {
    # One value of the marker: what stands there instead, and what is then said.
    ("marker", "format"): [
        (None, "it has no format"),
        (1, "its entry 'files' is not the sizes and digests"),
        ("[]", "its entry 'format' is not a number from 1 to 2"),
        ("1", "its entry 'format' is not a number from 1 to 2"),
        (1.0, "its entry 'format' is not a number from 1 to 2"),
        (True, "its entry 'format' is not a number from 1 to 2"),
        (0, "its entry 'format' is not a number from 1 to 2"),
        (-2, "its entry 'format' is not a number from 1 to 2"),
    ],
    ("marker", "step"): [
        (None, "it has no step"),
        ("2", "its entry 'step' is not a number of steps"),
        (2.0, "its entry 'step' is not a number of steps"),
        (-2, "its entry 'step' is not a number of steps"),
        (3, "it is of step 3"),
    ],
    ("marker", "world_size"): [
        (None, "it has no world_size"),
        ("1", "its entry 'world_size' is not a number of ranks"),
        (0, "its entry 'world_size' is not a number of ranks"),
        (2, "its world_size is 2, and it has the random states of 1 rank"),
    ],
    ("marker", "torch"): [(None, "it has no torch"), (2.9, "its entry 'torch' is not a version")],
    ("marker", "files"): [
        (None, "it has no files"),
        ("[]", "its entry 'files' is not the sizes and digests"),
        ("{}", "its entry 'files' is not the sizes and digests"),
        ('{"a": 1}', "its entry 'files' is not the sizes and digests"),
    ],
    ("marker", "news"): [(1, "it has an unknown entry 'news'")],
    ("state", "step"): [
        (None, "it has no step"),
        ("2", "its entry 'step' is not a number of steps"),
        (True, "its entry 'step' is not a number of steps"),
        (1, r"is of step 1, and its complete\.json of step 2"),
    ],
    ("state", "tokens_seen"): [
        (None, "it has no tokens_seen"),
        ("200", "its entry 'tokens_seen' is not a number of tokens"),
        (-1, "its entry 'tokens_seen' is not a number of tokens"),
    ],
    ("state", "data"): [(None, "it has no data"), ("[]", "its entry 'data' is not a JSON object")],
    ("state", "config"): [
        (None, "it has no config"),
        ("[]", "its entry 'config' is not keys by section"),
        ('{"a": 1}', "its entry 'config' is not keys by section"),
    ],
    ("state", "shape"): [(1, "its entry 'shape' is not a JSON object")],
    ("state", "model_only"): [(0, "its entry 'model_only' is not true or false")],
}
"""By file and field: a value, None for none, a text of JSON for more, and what is said of it."""


def edit(file: Path, name: str, value) -> None:
    content = json.loads(file.read_text())
    if value is None:
        del content[name]
    elif isinstance(value, str) and value[0] in "[{":
        content[name] = json.loads(value)
    else:
        content[name] = value
    file.write_text(json.dumps(content))


def reseal(step: Path, name: str) -> None:
    """Have the marker hold the size and the digest that a file has now."""
    marker = json.loads((step / MARKER).read_text())
    content = (step / name).read_bytes()
    record = record_of(content)
    marker["files"][name] = record
    (step / MARKER).write_text(json.dumps(marker))


def assert_the_older_is_taken(run: Path, log, reason: str) -> None:
    log.clear()
    found = Checkpointer(section(), run).find()
    assert found.progress.step == 1, reason
    (said,) = [record.getMessage() for record in log.records]
    assert re.search(rf"step-2 is not usable .*{reason}", said)
    shutil.rmtree(run / "checkpoint/step-2.damaged")


@pytest.mark.parametrize(("file", "field"), EDITS)
def test_any_field_that_is_edited_is_damage_and_the_older_one_is_used(
    tmp_path, alone, log, file, field
):
    saved_run(tmp_path, (1, 2))
    step = tmp_path / "checkpoint/step-2"
    shutil.copytree(step, tmp_path / "whole")
    for value, reason in EDITS[file, field]:
        edit(step / (MARKER if file == "marker" else STATE), field, value)
        if file == "state":
            reseal(step, STATE)
        assert_the_older_is_taken(tmp_path, log, reason)
        shutil.copytree(tmp_path / "whole", step)


def test_what_a_later_version_has_added_is_refused_and_left_alone(tmp_path, alone):
    saved_run(tmp_path, (1, 2))
    step = tmp_path / "checkpoint/step-2"
    edit(step / STATE, "news", 1)
    reseal(step, STATE)
    with pytest.raises(UserError, match=r"train_state.json has news, .* a later one wrote it"):
        Checkpointer(section(), tmp_path).find()
    assert step.exists()


def test_a_record_of_a_file_that_is_edited_is_damage(tmp_path, alone, log):
    saved_run(tmp_path, (1, 2))
    step = tmp_path / "checkpoint/step-2"
    shutil.copytree(step, tmp_path / "whole")
    shard = "__0_0.distcp"
    wrong = "its entry 'files' is not the sizes and digests"
    for name in (shard, INDEX, STATE):
        size = (step / name).stat().st_size
        edits = {
            "bytes": {
                None: wrong,
                str(size): wrong,
                -1: wrong,
                size + 1: rf"has {size} bytes instead of {size + 1}",
            },
            "xxh3_128": {
                None: wrong,
                "0": wrong,
                "0" * 32: "its xxh3_128 is not the one",
                "0" * 64: wrong,
                5: wrong,
            },
            "sha256": {"0" * 64: wrong},
            "news": {1: wrong},
        }
        for key, values in edits.items():
            for value, reason in values.items():
                marker = json.loads((step / MARKER).read_text())
                marker["files"][name][key] = value
                if value is None:
                    del marker["files"][name][key]
                (step / MARKER).write_text(json.dumps(marker))
                assert_the_older_is_taken(tmp_path, log, reason)
                shutil.copytree(tmp_path / "whole", step)
        marker = json.loads((step / MARKER).read_text())
        del marker["files"][name]
        (step / MARKER).write_text(json.dumps(marker))
        if name == shard:
            os.unlink(step / shard)  # whether it is there or not
        reason = f"it does not name {shard}" if name == shard else wrong
        assert_the_older_is_taken(tmp_path, log, reason)
        shutil.copytree(tmp_path / "whole", step)


def find_or_refuse(run: Path) -> Source | str:
    try:
        return Checkpointer(section(load_only=True), run).find()
    except UserError as refused:
        return str(refused)


@pytest.mark.slow
def test_any_flipped_bit_of_a_marker_is_damage_or_changes_nothing(tmp_path, alone, log):
    """But the format may be a later one then, and the version of torch, which nothing reads."""
    saved_run(tmp_path, (1, 2))
    step = tmp_path / "checkpoint/step-2"
    whole = (step / MARKER).read_bytes()
    fates = Counter()
    for position in range(len(whole)):
        flip(step / MARKER, position)
        found = find_or_refuse(tmp_path)
        if isinstance(found, str):
            assert re.search("has format [359]; this version", found)
            fates["refused"] += 1
        else:
            fates[found.progress.step] += 1
            if found.progress.step == 2:
                marker = found.marker.model_copy(update={"torch": torch.__version__})
                assert marker == Marker(**json.loads(whole))
        (step / MARKER).write_bytes(whole)
    assert fates["refused"] <= 1
    assert fates[1] > len(whole) / 2


def test_what_is_no_marker_at_all_is_damage(tmp_path, alone, log):
    saved_run(tmp_path, (1, 2))
    step = tmp_path / "checkpoint/step-2"
    shutil.copytree(step, tmp_path / "whole")
    for content, reason in {
        b"[" * 100_000: "RecursionError",
        b"\xff\x00": "DecodeError",
        b"[]": "it is not a JSON object",
        b"null": "it is not a JSON object",
        b"9" * 5000: "ValueError",
    }.items():
        (step / MARKER).write_bytes(content)
        assert_the_older_is_taken(tmp_path, log, reason)
        shutil.copytree(tmp_path / "whole", step)


def test_a_file_that_cannot_be_read_is_one_message(tmp_path, alone):
    """It may be whole: nothing is set aside."""
    saved_run(tmp_path, (1, 2))
    marker = tmp_path / "checkpoint/step-2" / MARKER
    marker.unlink()
    marker.mkdir()
    with pytest.raises(UserError, match=r"step-2/complete\.json cannot be read: Is a directory"):
        Checkpointer(section(), tmp_path).find()
    assert names(tmp_path) == ["step-1", "step-2"]


def test_only_the_runs_own_checkpoints_must_be_of_their_folders_step(tmp_path, alone):
    saved_run(tmp_path, (1,))
    (tmp_path / "checkpoint/step-1").rename(tmp_path / "step-5")
    other = section(initial_load_path=str(tmp_path / "step-5"))
    assert Checkpointer(other, tmp_path / "new").find().progress.step == 1


def test_a_state_of_another_step_is_damage(tmp_path, alone, log):
    """Each file is whole, but they are of different checkpoints."""
    saved_run(tmp_path, (1, 2))
    first, second = (tmp_path / f"checkpoint/step-{step}" for step in (1, 2))
    marker = json.loads((second / MARKER).read_text())
    marker["files"][STATE] = json.loads((first / MARKER).read_text())["files"][STATE]
    (second / MARKER).write_text(json.dumps(marker))
    shutil.copy(first / STATE, second / STATE)
    assert_the_older_is_taken(tmp_path, log, "train_state.json is of step 1")
