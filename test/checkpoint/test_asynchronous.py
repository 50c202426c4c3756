"""Saving beside training: what is saved, what is waited for, and who hears of a failure."""

import errno
import threading
import time
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from helpers.checkpoints import (
    assert_bitwise,
    build,
    everything,
    loaded,
    names,
    progress,
    saved_run,
    section,
    train,
    weights,
)
from helpers.forking import in_group

from torchtrain.checkpoint import Checkpointer, asynchronous, saving, storage
from torchtrain.errors import CheckpointError, NonFinite, Stopped, UserError
from torchtrain.shards import local

BESIDE = {"async_mode": "async"}


class Gate:
    """Stands for write_tensors: waits until it may write."""

    def __init__(self, monkeypatch):
        self.write = saving.write_tensors
        self.is_open = threading.Event()
        self.fault = None
        monkeypatch.setattr(saving, "write_tensors", self)

    def __call__(self, *given):
        assert self.is_open.wait(60)
        if self.fault is not None:
            raise self.fault
        return self.write(*given)


@pytest.fixture
def gate(monkeypatch):
    return Gate(monkeypatch)


def run_beside(tmp_path, **options):
    """A run of two steps that saves beside training."""
    model, optimizer = build()
    train(model, optimizer, range(2))
    return model, optimizer, Checkpointer(section(**BESIDE, **options), tmp_path)


@torch.no_grad()
def poison(model, optimizer):
    """Make every weight and state NaN."""
    for parameter in weights(model).values():
        local(parameter).fill_(float("nan"))
        for value in optimizer.state[parameter].values():
            local(value).fill_(float("nan"))


def test_what_changes_after_the_copy_is_not_saved(tmp_path, alone, gate, log):
    model, optimizer, checkpointer = run_beside(tmp_path)
    expected = everything(model, optimizer)
    for step in (2, 3):  # the memory of the first copy is used again
        gate.is_open.clear()
        checkpointer.save(weights(model), optimizer, progress(step))
        before = everything(model, optimizer)
        poison(model, optimizer)
        checkpointer.poll()
        assert f"step-{step}" not in names(tmp_path)
        gate.is_open.set()
        checkpointer.finish()
        found, state = loaded(tmp_path)
        assert found == step
        assert_bitwise(state, expected if step == 2 else before)
        model, optimizer = build()
        train(model, optimizer, range(3))
    assert "saving" in log.text
    assert "beside training, which stood still for 0." in log.text


def test_a_save_waits_for_the_one_before(tmp_path, alone, gate):
    model, optimizer, checkpointer = run_beside(tmp_path)
    states = {2: everything(model, optimizer)}
    checkpointer.save(weights(model), optimizer, progress(2))
    train(model, optimizer, range(2, 3))
    states[3] = everything(model, optimizer)
    threading.Timer(0.3, gate.is_open.set).start()
    checkpointer.save(weights(model), optimizer, progress(3))
    assert "step-2" in names(tmp_path), "complete before the next begins"
    checkpointer.finish()
    assert names(tmp_path) == ["step-2", "step-3"]
    for step in (3, 2):  # going back sets the later one aside
        assert_bitwise(loaded(tmp_path, load_step=step)[1], states[step])


@pytest.mark.parametrize("ending", [None, Stopped(15, 3), NonFinite("NaN")])
def test_the_last_one_is_waited_for(tmp_path, alone, gate, ending):
    model, optimizer, checkpointer = run_beside(tmp_path)
    threading.Timer(0.3, gate.is_open.set).start()
    expected = nullcontext() if ending is None else pytest.raises(type(ending))
    with expected, checkpointer.finishing():
        checkpointer.save(weights(model), optimizer, progress(2))
        if ending:
            raise ending
    assert names(tmp_path) == ["step-2"]


def test_a_crash_does_not_wait(tmp_path, alone, gate):
    model, optimizer, checkpointer = run_beside(tmp_path)
    with pytest.raises(ZeroDivisionError), checkpointer.finishing():  # noqa: PT012
        checkpointer.save(weights(model), optimizer, progress(2))
        raise ZeroDivisionError
    gate.is_open.set()
    checkpointer.finish()


def test_a_failure_is_told_at_the_next_step_and_leaves_what_was_there(tmp_path, alone, gate):
    run = saved_run_with_gate_open(tmp_path, gate)
    model, optimizer, checkpointer = run.model, run.optimizer, run.checkpointer
    gate.fault = OSError(errno.ENOSPC, "No space left on device")
    checkpointer.save(weights(model), optimizer, progress(3))
    with pytest.raises(OSError, match="No space left"):
        poll_until_ended(checkpointer)
    assert names(tmp_path) == ["step-1"], "and nothing of the failed one"
    gate.fault = None
    checkpointer.save(weights(model), optimizer, progress(3))
    checkpointer.finish()
    assert names(tmp_path) == ["step-1", "step-3"]


def saved_run_with_gate_open(tmp_path, gate):
    gate.is_open.set()
    run = saved_run(tmp_path, (1,), **BESIDE)
    run.checkpointer.finish()
    return run


def poll_until_ended(checkpointer):
    """Take steps until the save has ended."""
    deadline = time.monotonic() + 60
    while not checkpointer.background.is_idle:
        assert time.monotonic() < deadline
        checkpointer.poll()
        time.sleep(0.01)


@pytest.mark.parametrize("mode", ["disabled", "async"])
def test_training_goes_on_after_a_failed_save_if_it_may(tmp_path, alone, gate, log, mode):
    gate.is_open.set()
    run = saved_run(tmp_path, (1,), async_mode=mode, on_save_error="continue")
    model, optimizer, checkpointer = run.model, run.optimizer, run.checkpointer
    checkpointer.finish()
    gate.fault = CheckpointError("the disk is full")
    checkpointer.save(weights(model), optimizer, progress(2))
    checkpointer.finish()
    assert "the disk is full. Training goes on (checkpoint.on_save_error)" in log.text
    assert names(tmp_path) == ["step-1"]
    with pytest.raises(CheckpointError), checkpointer.finishing():
        checkpointer.save(weights(model), optimizer, progress(3), is_last=True)
    gate.fault = None
    checkpointer.save(weights(model), optimizer, progress(4), is_last=True)
    checkpointer.finish()
    assert names(tmp_path) == ["step-1", "step-4"]


def test_without_memory_for_the_copy_training_waits(tmp_path, alone, gate, log, monkeypatch):
    """Once there is room for it, saves are made beside training again."""
    gate.is_open.set()
    model, optimizer, checkpointer = run_beside(tmp_path)
    size = sum(local(tensor).nbytes for tensor in everything(model, optimizer).values())
    for step, room in ((2, size - 1), (3, size + 2**20)):
        monkeypatch.setattr(asynchronous, "find_available_bytes", lambda room=room: float(room))
        checkpointer.save(weights(model), optimizer, progress(step))
        assert checkpointer.background.is_idle == (step == 2)
        assert ("in spite of checkpoint.async_mode: copies of the" in log.text) == (step == 2)
        log.clear()
        checkpointer.finish()
    assert names(tmp_path) == ["step-2", "step-3"]
    monkeypatch.setattr(asynchronous, "find_available_bytes", lambda: 1 / 0)
    checkpointer.save(weights(model), optimizer, progress(4))  # into the same memory
    checkpointer.finish()


@pytest.mark.parametrize("ending", ["is_last", "stopping"])
def test_a_save_that_ends_the_run_takes_no_copy(tmp_path, alone, gate, monkeypatch, ending):
    gate.is_open.set()
    model, optimizer, checkpointer = run_beside(tmp_path)
    monkeypatch.setattr(asynchronous, "find_available_bytes", lambda: 1 / 0)
    checkpointer.save(weights(model), optimizer, progress(2), **{ending: True})
    assert names(tmp_path) == ["step-2"]


def test_pinned_memory_needs_an_accelerator(tmp_path, alone):
    if torch.accelerator.is_available():
        pytest.skip("there is one here")
    with pytest.raises(UserError, match=r'finds no accelerator here.*set "async"'):
        Checkpointer(section(async_mode="async_with_pinned_mem"), tmp_path)


# When, and how long


def test_a_save_is_due_when_a_ranks_time_is_up(tmp_path, alone, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(saving.time, "monotonic", lambda: now)
    checkpointer = Checkpointer(section(interval=100, interval_minutes=1.5), tmp_path)
    assert not checkpointer.should_save(1, 9)
    now += 89
    assert not checkpointer.should_save(2, 9)
    now += 1
    assert checkpointer.should_save(3, 9)
    model, optimizer = build()
    train(model, optimizer, range(1))
    checkpointer.save(weights(model), optimizer, progress(3))
    assert not checkpointer.should_save(4, 9)
    now += 90
    assert checkpointer.should_save(5, 9)


def test_every_nth_is_kept_for_ever(tmp_path, alone):
    saved_run(tmp_path, tuple(range(1, 10)), keep_latest_k=2, keep_every=3)
    assert names(tmp_path) == ["step-3", "step-6", "step-8", "step-9"]


# On several ranks


def save_on_two(run: Path) -> None:
    """Be a rank that saves step 2 beside training; rank 1 is slow, and fails at step 3."""
    rank = dist.get_rank()
    write = saving.write_tensors
    model, optimizer = build()
    train(model, optimizer, range(2))
    checkpointer = Checkpointer(section(**BESIDE), run)
    is_released = threading.Event()

    def slow(*given):
        if rank == 1:
            assert is_released.wait(60)
        return write(*given)

    saving.write_tensors = slow
    checkpointer.save(weights(model), optimizer, progress(2))
    expected = everything(model, optimizer)
    train(model, optimizer, range(2, 3))  # its collectives pass by those of the save
    for _ in range(20):
        checkpointer.poll()
        assert not checkpointer.background.is_idle, "not while rank 1 writes"
    is_released.set()
    poll_until_ended(checkpointer)
    step, state = loaded(run)
    assert step == 2
    assert_bitwise(state, expected)

    def full(file, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    if rank == 1:
        storage.HashingFile.write = full
    checkpointer.save(weights(model), optimizer, progress(3))
    with pytest.raises(CheckpointError, match=r"rank 1: .*GiB are free there"):
        poll_until_ended(checkpointer)
    assert checkpointer.background.is_idle, "on both at the same step"


def fail_to_copy_on_one(run: Path) -> None:
    """Be a rank of two; rank 1 has no memory for the copy, but for that of step 4."""
    model, optimizer = build()
    train(model, optimizer, range(2))
    checkpointer = Checkpointer(section(**BESIDE, on_save_error="continue"), run)
    background = checkpointer.background
    faults = [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory"), None]
    for step, fault in enumerate(faults, start=2):
        with patch.object(background, "_stager", wraps=background._stager) as stager:
            stager.stage.side_effect = fault if dist.get_rank() == 1 else None
            checkpointer.save(weights(model), optimizer, progress(step))
        assert background.is_idle == (fault is not None), "no thread waits for another"
    checkpointer.finish()


@pytest.mark.slow
def test_training_goes_on_where_one_rank_cannot_copy(tmp_path):
    printed = in_group(2, fail_to_copy_on_one, tmp_path, timeout_s=60)
    assert names(tmp_path) == ["step-4"]
    for cause in ("no memory", "DefaultCPUAllocator: can't allocate memory"):
        fault = f"the state could not be copied to the host: {cause}. Training goes on"
        assert f"rank 1 failed: {fault}" in printed


@pytest.mark.slow
def test_ranks_see_the_end_of_a_save_and_its_failure_together(tmp_path):
    in_group(2, save_on_two, tmp_path)
    assert names(tmp_path) == ["step-2"]
