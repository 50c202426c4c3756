"""The digests of a checkpoint's files, and checkpoints with those of an earlier format."""

import hashlib
import json

import pytest
import torch
from helpers.checkpoints import (
    assert_bitwise,
    flip,
    loaded,
    names,
    record_of,
    saved_run,
    section,
)

from torchtrain.checkpoint import Checkpointer
from torchtrain.checkpoint.commit import MARKER
from torchtrain.checkpoint.digests import find_altered
from torchtrain.errors import UserError


def test_all_of_a_large_file_is_hashed(tmp_path):
    content = bytearray(5 * 2**20)
    records = {"large": record_of(content)}
    (tmp_path / "large").write_bytes(content)
    assert find_altered(tmp_path, records, ["large"], 2) is None
    content[-1] ^= 1
    (tmp_path / "large").write_bytes(content)
    assert "its file large is damaged" in find_altered(tmp_path, records, ["large"], 2)


def test_of_many_files_each_is_hashed(tmp_path):
    files = [f"file-{number}" for number in range(9)]
    records = {}
    for name in files:
        (tmp_path / name).write_text(name)
        records[name] = record_of(name.encode())
    for name in files:
        assert find_altered(tmp_path, records, files, 2) is None
        flip(tmp_path / name, 0)
        said = find_altered(tmp_path, records, files, 2)
        assert (
            said == f"its file {name} is damaged: its xxh3_128 is not the one it was written with"
        )
        flip(tmp_path / name, 0)
    (tmp_path / files[-1]).unlink()
    with pytest.raises(UserError, match="file-8 cannot be read: No such file"):
        find_altered(tmp_path, records, files, 2)


def make_format_1(step) -> None:
    """Make a checkpoint what earlier versions wrote."""
    marker = json.loads((step / MARKER).read_text())
    marker["format"] = 1
    for name in marker["files"]:
        content = (step / name).read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        marker["files"][name] = {"bytes": len(content), "sha256": digest}
    (step / MARKER).write_text(json.dumps(marker))


def test_checkpoints_of_the_earlier_format_are_verified_by_their_own_digest(tmp_path, alone, log):
    run = saved_run(tmp_path, (1, 2))
    for step in (1, 2):
        make_format_1(tmp_path / f"checkpoint/step-{step}")
    step, state = loaded(tmp_path)
    assert step == 2
    assert_bitwise(state, run.states[2])
    flip(tmp_path / "checkpoint/step-2/__0_0.distcp", 2500)
    step, state = loaded(tmp_path)
    assert step == 1
    assert_bitwise(state, run.states[1])
    assert "__0_0.distcp is damaged: its sha256 is not the one" in log.text
    run.save(2)
    marker = json.loads((tmp_path / "checkpoint/step-2" / MARKER).read_text())
    assert marker["format"] == 2
    assert names(tmp_path) == ["step-1", "step-2", "step-2.damaged"]


@pytest.mark.parametrize(("given", "other"), [(1, 2), (2, 1)])
def test_a_digest_of_the_other_format_is_damage(tmp_path, alone, log, given, other):
    saved_run(tmp_path, (1, 2))
    step = tmp_path / "checkpoint/step-2"
    if given == 1:
        make_format_1(step)
    marker = json.loads((step / MARKER).read_text())
    assert marker["format"] == given
    (step / MARKER).write_text(json.dumps({**marker, "format": other}))
    assert Checkpointer(section(), tmp_path).find().progress.step == 1
    assert "its entry 'files' is not the sizes and digests" in log.text


def test_torchs_own_setting_of_checksums_is_left_as_it_was(tmp_path, alone):
    for setting in (False, True):
        torch.serialization.set_crc32_options(setting)
        saved_run(tmp_path / str(setting), (1,))
        assert torch.serialization.get_crc32_options() is setting
