"""Files of tensors: what DCP loses is found, and nothing in a file is ever executed."""

import dataclasses
import errno
import io
import json
import os
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.checkpoints import build, names, record_of, saved_run, section, weights
from helpers.forking import in_group
from torch.distributed.checkpoint.metadata import BytesStorageMetadata

from torchtrain.checkpoint import Checkpointer, state, storage
from torchtrain.checkpoint.commit import INDEX, MARKER
from torchtrain.errors import CheckpointError, UserError


def test_a_slice_that_dcp_lost_fails_the_save(tmp_path, alone, monkeypatch):
    run = saved_run(tmp_path, (1,))
    write_data = storage.Writer.write_data

    def lossy(self, plan, planner):
        return write_data(self, dataclasses.replace(plan, items=plan.items[:-1]), planner)

    monkeypatch.setattr(storage.Writer, "write_data", lossy)
    with pytest.raises(CheckpointError, match=r"DCP wrote \d+ of \d+ slices"):
        run.save(2)
    assert names(tmp_path) == ["step-1"]


class FailingOnce(io.FileIO):
    """A file of which one write fails; what is written after it goes well."""

    writes = 0
    fails_at = 0

    def write(self, data):
        FailingOnce.writes += 1
        if FailingOnce.writes == FailingOnce.fails_at:
            raise OSError(errno.EDQUOT, "Disk quota exceeded")
        return super().write(data)


def test_the_disks_own_words_are_heard_whichever_write_fails(tmp_path, alone, monkeypatch):
    """In the midst of a tensor torch's writer fails in words of its own, and hides them."""
    tensors = {name: torch.ones(10_000) for name in ("a", "b")}
    monkeypatch.setattr(storage.io, "FileIO", FailingOnce)

    def save(name, fails_at):
        monkeypatch.setattr(FailingOnce, "writes", 0)
        monkeypatch.setattr(FailingOnce, "fails_at", fails_at)
        (tmp_path / name).mkdir()
        storage.write_tensors(tmp_path / name, tensors, dist.group.WORLD)

    save("whole", fails_at=0)
    writes = FailingOnce.writes
    assert writes > 3
    for fails_at in range(1, writes + 1):
        with pytest.raises(CheckpointError, match="Disk quota exceeded"):
            save(f"without-{fails_at}", fails_at)


class SlowDisk:
    """Stands for time.monotonic, and for a disk that takes a tenth of a second per MiB to write."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        self.written = 0
        monkeypatch.setattr("time.monotonic", lambda: self.now)
        write = storage.HashingFile.write

        def slow_write(file, data):
            self.now += len(data) / 2**20 / 10
            self.written += len(data)
            return write(file, data)

        monkeypatch.setattr(storage.HashingFile, "write", slow_write)


@pytest.mark.parametrize(
    ("mib", "written", "seconds"), [(0, 0, 0.0), (2.5, 2.5, 0.25), (16, 16, 1.6), (800, 16, 80.0)]
)
def test_the_first_saves_time_is_estimated_by_a_part_of_it(
    tmp_path, alone, monkeypatch, mib, written, seconds
):
    disk = SlowDisk(monkeypatch)
    monkeypatch.setattr(state, "measure", lambda *_: {"model/w": int(mib * 2**20)})
    checkpointer = Checkpointer(section(), tmp_path)
    checkpointer.prepare({}, None)
    assert checkpointer.save_seconds == disk.written == 0, "nobody asks how long it takes"
    checkpointer.prepare({}, None, estimate=True)
    assert checkpointer.save_seconds == pytest.approx(seconds)
    assert disk.written == int(written * 2**20)
    assert names(tmp_path) == [], "no probe is left"


def estimate_on_two(run: Path) -> None:
    """Be a rank; rank 1's disk is slow, and each has half of a checkpoint."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if dist.get_rank() == 1:
            SlowDisk(monkeypatch)
        else:
            monkeypatch.setattr("time.monotonic", lambda: 1000.0)
        monkeypatch.setattr(state, "measure", lambda *_: {"model/w": 8 * 2**20})
        checkpointer = Checkpointer(section(), run)
        checkpointer.prepare({}, None, estimate=dist.get_rank() == 0)
        assert checkpointer.save_seconds == pytest.approx(0.4), "for 4 MiB, on both"


@pytest.mark.slow
def test_the_slowest_ranks_estimate_counts(tmp_path):
    in_group(2, estimate_on_two, tmp_path)


class Payload:
    """An object whose pickle calls a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def reseal(step: Path) -> None:
    """Make the marker's sizes and digests match the files again, as an attacker would."""
    marker = json.loads((step / MARKER).read_text())
    for name, record in marker["files"].items():
        content = (step / name).read_bytes()
        record.update(record_of(content))
    (step / MARKER).write_text(json.dumps(marker))


def load(run: Path) -> None:
    model, optimizer = build()
    checkpointer = Checkpointer(section(), run)
    checkpointer.load(checkpointer.find(), weights(model), optimizer)


DOTTED = (
    b"\x80\x04\x8c\x27torch.distributed.checkpoint.metadata"
    b"\x8c\x1aMetadata.__init__.__globals__\x93."
)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, alone):
    saved_run(tmp_path, (1,))
    step, proof = tmp_path / "checkpoint/step-1", tmp_path / "it ran"
    good = (step / INDEX).read_bytes()

    def with_entry(entry, name="model/norm") -> bytes:
        index = pickle.loads(good)
        index.state_dict_metadata[name] = entry
        return pickle.dumps(index)

    def leading_outside() -> bytes:
        index = pickle.loads(good)
        next(iter(index.storage_data.values())).relative_path = "../../secret"
        return pickle.dumps(index)

    attacks = {
        "os.mkdir": pickle.dumps(Payload(os.mkdir, str(proof))),
        "builtins.exec": pickle.dumps(Payload(exec, f"open({str(proof)!r}, 'w')")),
        "in an entry": with_entry(Payload(os.mkdir, str(proof)), "bad"),
        "bytes": with_entry(BytesStorageMetadata()),
        "not a tensor": with_entry("text"),
        "a function of torch": pickle.dumps(Payload(torch.save, 1, str(proof))),
        "a dotted name": DOTTED,
        "another file": leading_outside(),
        "not an index": pickle.dumps({"a": 1}),
        "not a pickle": b"not a pickle",
    }
    for name, attack in attacks.items():
        (step / INDEX).write_bytes(attack)
        reseal(step)
        with pytest.raises(UserError, match="is refused"):
            load(tmp_path)
        assert not proof.exists(), name
    # The attack is a real one: an unrestricted unpickler falls for it.
    pickle.loads(attacks["os.mkdir"])
    assert proof.exists()


def test_tensors_are_read_without_running_code(tmp_path, alone):
    saved_run(tmp_path, (1,))
    step, proof = tmp_path / "checkpoint/step-1", tmp_path / "it ran"
    index = pickle.loads((step / INDEX).read_bytes())
    first = next(iter(index.storage_data.values()))
    torch.save(Payload(os.mkdir, str(proof)), tmp_path / "attack.pt")
    attack = (tmp_path / "attack.pt").read_bytes()
    content = (step / first.relative_path).read_bytes()
    first.offset, first.length = len(content), len(attack)
    (step / first.relative_path).write_bytes(content + attack)
    (step / INDEX).write_bytes(pickle.dumps(index))
    reseal(step)
    with pytest.raises(CheckpointError, match=r"rank 0.*Weights only load failed"):
        load(tmp_path)
    assert not proof.exists()
