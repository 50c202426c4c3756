"""Nothing is lost: on one layout a stopped and resumed run equals the uninterrupted one to the bit.

On another layout the state and the data are exact and the losses agree to rounding.
"""

import os
import random
import shutil
import signal
import sys
from multiprocessing.connection import wait

import pytest
import torch
from helpers import forking, launching, quick
from helpers.forking import train
from helpers.launching import metrics, wait_for_step
from helpers.sameness import assert_same_state, curve, saved_tensors

pytestmark = pytest.mark.slow

STEPS = 8


def saving(data, folder, **overrides):
    return {
        **data,
        "job.dump_folder": folder,
        "training.steps": STEPS,
        "lr_scheduler.total_steps": STEPS,
        "checkpoint.enable": True,
        "checkpoint.interval": 4,
        **overrides,
    }


@pytest.fixture(scope="module")
def whole(tmp_path_factory, data):
    """Uninterrupted runs on 1 and on 2 ranks."""
    folders = {ranks: tmp_path_factory.mktemp("whole") / str(ranks) for ranks in (1, 2)}
    for ranks, folder in folders.items():
        train(ranks, saving(data, folder))
    return folders


def test_stopped_at_half_and_resumed_equals_uninterrupted(tmp_path, data, whole):
    folder = tmp_path / "run"
    train(2, saving(data, folder, **{"training.steps": STEPS // 2}))
    output = train(2, saving(data, folder))
    assert "step-4" in output
    assert curve(folder) == curve(whole[2])
    assert_same_state(folder, whole[2], STEPS, tmp_path)
    finished = train(2, saving(data, folder))
    assert "nothing to do" in finished
    assert curve(folder) == curve(whole[2])


KILLS = 4


def run_until_killed(arguments, victim, last_call, counted):
    """Be a rank of a run of which one kills itself at its `last_call`th call of our functions.

    It writes to the file `counted` how many calls it has made, where it lives to the end.
    """
    calls = 0

    def count(frame, event, _):
        nonlocal calls
        if event != "call" or not frame.f_code.co_filename.startswith(OURS):
            return
        calls += 1
        if calls == last_call:
            os.kill(os.getpid(), signal.SIGKILL)

    if own_rank() == victim:
        sys.setprofile(count)
    status = forking.run_trainer(arguments)
    sys.setprofile(None)
    if own_rank() == victim:
        counted.write_text(str(calls))
    return status


def own_rank():
    return int(os.environ["RANK"])


OURS = (str(launching.ROOT / "torchtrain"), str(launching.ROOT / "train.py"))


def kill_at(ranks, overrides, victim, last_call, counted):
    """Run until the victim has killed itself, and then kill the others; or to the end."""
    arguments = launching.options(overrides)
    run = forking.Ranks(ranks, run_until_killed, arguments, victim, last_call, counted)
    try:
        wait([run.processes[victim].sentinel], launching.TIMEOUT_S)
        if run.statuses[victim] == 0:
            run.finish(launching.TIMEOUT_S)
    finally:
        run.kill()
    assert run.statuses[victim] in (0, -signal.SIGKILL), run.printed


def test_killed_at_any_instant_and_resumed_equals_uninterrupted(tmp_path, data, whole):
    """A run is killed again and again, at calls drawn from all that its rest would make.

    It saves in the midst of training and beside it by turns.
    """
    folder = tmp_path / "run"
    counted = tmp_path / "counted"
    kill_at(2, saving(data, tmp_path / "counting"), 1, None, counted)
    calls = int(counted.read_text())
    rng = random.Random(2)
    for number in range(KILLS):
        mode = ("disabled", "async")[number // 2 % 2]
        more = {"checkpoint.interval": 2, "checkpoint.async_mode": mode}
        last_call = rng.randrange(1, calls)
        overrides = saving(data, folder, **more)
        kill_at(2, overrides, number % 2, last_call, tmp_path / f"kill-{number}")
    train(2, saving(data, folder))
    assert curve(folder) == curve(whole[2])
    assert_same_state(folder, whole[2], STEPS, tmp_path)


TP, CP = {"parallelism.tensor_parallel_degree": 2}, {"parallelism.context_parallel_degree": 2}
LAYOUTS = {
    "TP 2 x FSDP 2 to CP 2": ((4, TP), (2, CP)),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_resumed_on_another_layout(tmp_path, data, whole, name):
    folder = tmp_path / "run"
    (saved_on, layout), (resumed_on, other) = LAYOUTS[name]
    train(saved_on, saving(data, folder, **layout, **{"training.steps": STEPS // 2}))
    train(resumed_on, saving(data, folder, **other))
    for mine, theirs in zip(curve(folder), curve(whole[2]), strict=True):
        assert mine["step"] == theirs["step"]
        assert mine["lr"] == theirs["lr"]
        assert mine["tokens_seen"] == theirs["tokens_seen"]
        assert abs(mine["loss"] - theirs["loss"]) <= 1e-6 * theirs["loss"]
        assert abs(mine["grad_norm"] - theirs["grad_norm"]) <= 1e-5 * theirs["grad_norm"]


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_one_before_is_used(tmp_path, data, whole):
    folder = tmp_path / "run"
    shutil.copytree(whole[1], folder)
    shard = next((folder / "checkpoint" / f"step-{STEPS}").glob("*.distcp"))
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    output = train(1, saving(data, folder))
    assert "warning" in output
    assert f"step-{STEPS}" in output
    assert (folder / "checkpoint" / f"step-{STEPS}.damaged").is_dir()
    assert curve(folder) == curve(whole[1])
    assert_same_state(folder, whole[1], STEPS, tmp_path)


# A signal that is sent after step 2 comes before the last one.
SLOW_FROM_STEP_3 = """
import time
from torchtrain import attempts

real = attempts.begin_step


def begin_step(step):
    real(step)
    time.sleep(0.5 * (step > 2))


attempts.begin_step = begin_step  # before train.py imports it
"""


def test_a_signal_to_the_launcher_saves_and_the_run_goes_on_from_there(tmp_path, data, whole):
    """On one rank; that all ranks stop after the same step is in test_stopping.

    SIGUSR2 is the one that torchrun does not know; SIGTERM is in test_restarts.
    """
    folder = tmp_path / "run"
    (tmp_path / "slow.py").write_text(SLOW_FROM_STEP_3)
    given = {"checkpoint.interval": 1000, "experimental.custom_import": tmp_path / "slow.py"}
    with quick.running(1, saving(data, folder, **given)) as process:
        wait_for_step(lambda: process.poll() is None, folder, 2)
        process.send_signal(signal.SIGUSR2)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGUSR2, output
    assert "stopped by SIGUSR2" in output
    last = metrics(folder)[-1]["step"]
    assert [path.name for path in (folder / "checkpoint").glob("step-*")] == [f"step-{last}"]
    train(1, saving(data, folder))
    assert curve(folder) == curve(whole[1])


def test_changed_schedule_is_logged_and_changed_data_is_refused(tmp_path, data, whole):
    folder = tmp_path / "run"
    shutil.copytree(whole[1], folder)
    longer = {
        "training.steps": STEPS + 2,
        "lr_scheduler.total_steps": STEPS + 2,
        "lr_scheduler.min_lr_factor": 0.5,
    }
    for key, value in (
        ("training.seq_len", 16),
        ("debug.seed", 7),
        ("training.global_batch_size", 4),
    ):
        output = train(1, saving(data, folder, **longer, **{key: value}), expect=2)
        assert key.split(".")[1] in output
        assert "Traceback" not in output
        assert curve(folder) == curve(whole[1]), "a refused resume changed the metrics"
    output = train(1, saving(data, folder, **longer))
    assert "schedule differs" in output
    lines = curve(folder)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 3))
    assert lines[-1]["lr"] == pytest.approx(4e-4)


def test_weights_alone_start_a_new_run_and_a_global_batch_of_minus_one_is_taken_from_the_checkpoint(
    tmp_path, data, whole
):
    folder = tmp_path / "fine-tuned"
    source = whole[2] / "checkpoint" / f"step-{STEPS}"
    # A rate too small to change any weight, so that what was loaded can be compared at the end.
    output = train(
        1, saving(data, folder, **{"checkpoint.initial_load_path": source, "optimizer.lr": 1e-30})
    )
    assert str(source) in output
    assert [line["step"] for line in metrics(folder)] == list(range(1, STEPS + 1))
    mine, theirs = (saved_tensors(run, STEPS, tmp_path / "whole.pt") for run in (folder, whole[2]))
    weights = [name for name in theirs if name.startswith("model/")]
    assert all(torch.equal(mine[name], theirs[name]) for name in weights)
    assert not all(torch.equal(mine[name], theirs[name]) for name in theirs), (
        "the optimizer was loaded too"
    )

    folder = tmp_path / "minus-one"
    free = {"training.global_batch_size": -1, "training.local_batch_size": 4}
    train(2, saving(data, folder, **free, **{"training.steps": STEPS // 2}))
    train(1, saving(data, folder, **free))
    for mine, theirs in zip(curve(folder), curve(whole[2]), strict=True):
        assert abs(mine["loss"] - theirs["loss"]) <= 1e-6 * theirs["loss"]


def test_missing_step_is_an_error_that_names_those_there(tmp_path, data, whole):
    folder = tmp_path / "run"
    shutil.copytree(whole[1], folder)
    output = train(2, saving(data, folder, **{"checkpoint.load_step": 5}), expect=2)
    assert output.count("4, 8") == 1
    train(1, saving(data, folder, **{"checkpoint.load_step": 4}))
    assert curve(folder) == curve(whole[1])
