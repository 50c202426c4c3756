"""What is logged while a disk is full: nothing ends, nothing is half written, little is lost."""

import errno
import os
import resource
from contextlib import contextmanager

import pytest
from helpers.logged import log, metrics_logger, records

from torchtrain.config.schema import Metrics
from torchtrain.errors import UserError
from torchtrain.log_files import LogFile, TensorBoard
from torchtrain.logging_utils import logger
from torchtrain.metrics import TextSample


@pytest.fixture
def said(caplog, monkeypatch):
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    caplog.set_level("INFO", logger="torchtrain")
    return caplog


@contextmanager
def no_file_larger_than(size):
    """Have the kernel refuse to write beyond a size, after it has written what fits."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_lines_wait_for_room_and_none_is_half_written(tmp_path, said):
    path = tmp_path / "log"
    file = LogFile(path)
    file.append(["one", "two"])
    with no_file_larger_than(10):
        for line in ("three", "four"):
            file.append([line])
            assert path.read_text() == "one\ntwo\n"
    said_once = [record.getMessage() for record in said.records]
    assert said_once == [
        f"{path} cannot be written: the file is as large as files may be there, or as `ulimit -f` "
        "allows (File too large). Training goes on, and the lines wait in memory until there is "
        "room"
    ]
    file.append(["five"])
    assert path.read_text() == "one\ntwo\nthree\nfour\nfive\n"
    assert said.records[-1].getMessage() == f"{path} can be written again: 2 lines had waited"
    file.close()
    assert len(said.records) == 2, "nothing is missing"


def test_at_the_end_it_is_said_what_is_missing(tmp_path, said):
    file = LogFile(tmp_path / "log")
    with no_file_larger_than(3):
        file.append(["three"])
        file.append(["four"])
        file.close()
    lost = f"{tmp_path / 'log'} lacks its last 2 lines, which could not be written"
    assert said.records[-1].getMessage() == lost
    file.close()
    assert (tmp_path / "log").read_text() == "three\nfour\n", "tried once more"


def test_a_log_that_may_not_be_written_is_found_before_training(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written: Is a directory"):
        metrics_logger(tmp_path)


def test_training_goes_on_while_nothing_can_be_logged(tmp_path, said):
    metrics = metrics_logger(tmp_path, Metrics(enable_tensorboard=True), total=3)
    with no_file_larger_than(0):
        log(metrics, [1, 2])
        metrics.log_texts(2, [TextSample("a", "b")])
        metrics.sync()
    metrics.close()
    assert [record["step"] for record in records(tmp_path)] == [1, 2]


def test_tensorboards_curves_end_where_they_cannot_be_written(tmp_path, said, capfd):
    board = TensorBoard(tmp_path, "tb", 1)
    board.add_scalars({"loss": 2.0}, 1)
    with no_file_larger_than(0):
        board.add_scalars({"loss": 1.5}, 2)
        board.add_texts({"text": "a"}, 2)
    board.add_scalars({"loss": 1.0}, 3)
    board.close()
    (record,) = said.records
    assert record.getMessage().startswith(f"{tmp_path / 'tb'} cannot be written: the file is as")
    assert "Traceback" not in capfd.readouterr().err


def test_tensorboard_on_a_full_disk_is_one_message_at_the_start(tmp_path, capfd):
    with no_file_larger_than(0), pytest.raises(UserError, match=r"tb cannot be written: the file"):
        TensorBoard(tmp_path, "tb", 1)
    assert "Traceback" not in capfd.readouterr().err


def test_what_is_logged_is_synced_when_asked_and_only_then(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync

    def recording(descriptor):
        synced.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    metrics = metrics_logger(tmp_path)
    monkeypatch.setattr(os, "fsync", recording)
    log(metrics, [1])
    metrics.log_texts(1, [TextSample("a", "b")])
    assert not synced
    metrics.sync()
    names = ("metrics.jsonl", "samples.jsonl")
    assert {(tmp_path / name).stat().st_ino for name in names} < set(synced)
    assert tmp_path.stat().st_ino in synced, "the names of new files too"


def test_a_sync_that_fails_is_a_warning(tmp_path, said, monkeypatch):
    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    file = LogFile(tmp_path / "log")
    file.sync()
    file.append(["one"])
    monkeypatch.setattr(os, "fsync", full)
    file.sync()
    assert "log cannot be synced: the disk is full" in said.text
