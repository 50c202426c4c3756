"""What fails within a run that lives on: the disk, the thread that saves, a number, a clock."""

import errno
import math
import os
import re
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from torchtrain.tools.faults import counting
from torchtrain.tools.faults.bench import INTERVAL, STEPS, Lost
from torchtrain.tools.faults.disk import Operation
from torchtrain.tools.faults.forked import own_rank, replace
from torchtrain.tools.faults.trial import Trial
from torchtrain.tools.layouts import REPLICATE_2

MAKES_LARGER = ("create", "write", "mkdir", "rename")
FAILS_ON = {
    errno.ENOSPC: MAKES_LARGER,
    errno.EFBIG: ("write",),
    errno.EIO: ("fsync",),
}
"""On which operations the disk raises what."""


def fail_disk(trial: Trial, number: int) -> None:
    """Have the disk raise an error: once, for a while, or from some operation on for ever.

    The run ends and names the cause, or goes on; then the disk is well again.
    """
    rng = trial.rng
    operations = trial.bench.operations
    victim = rng.choices(range(2), operations)[0]
    first = trial.draw_up_to(operations[victim])
    last = first + rng.choice([0, 10, operations[victim]])
    options = {
        "checkpoint.async_mode": trial.draw_mode(),
        "checkpoint.on_save_error": rng.choice(["stop", "continue"]),
    }
    inject = partial(fail_operations, trial.run, victim, range(first, last + 1), number)
    ranks = trial.end(inject, options)
    if any(ranks.statuses):
        require_cause(ranks.output, re.escape(os.strerror(number)))
        trial.refusals += 1
    else:
        trial.faults += 1


def fail_operations(folder: Path, victim: int, numbers: range, error: int) -> None:
    """Have these operations of one rank fail."""

    def act(number: int, operation: Operation) -> None:
        if number in numbers and operation.kind in FAILS_ON[error]:
            raise OSError(error, os.strerror(error), operation.path)

    if own_rank() == victim:
        counting.at_operations(folder, act)


def fail_writer(trial: Trial) -> None:
    """Have what writes beside training raise an error that nobody expects, at one of the saves."""
    saves_left = (STEPS - trial.find_newest()) // INTERVAL
    if not saves_left:
        return
    victim, save = trial.rng.randrange(2), trial.rng.randint(1, saves_left)
    where = trial.rng.choice(["write_tensors", "file"])
    inject = partial(raise_in_writer, victim, save, where)
    ranks = trial.end(inject, {"checkpoint.async_mode": "async"})
    require_cause(ranks.output, "the writer's own fault")
    trial.refusals += 1


def raise_in_writer(victim: int, save: int, where: str) -> None:
    """Raise in the writer of one rank at that save: before DCP is called, or while it writes."""
    from torchtrain.checkpoint import saving, storage

    calls = 0

    def fail_in_turn(real: Callable[..., Any], *given: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == save:
            raise ZeroDivisionError("the writer's own fault")
        return real(*given, **named)

    if own_rank() != victim:
        return
    if where == "write_tensors":
        replace(saving, "write_tensors", fail_in_turn)
    else:
        replace(storage, "HashingFile", fail_in_turn)


def spoil_gradient(trial: Trial) -> None:
    """Make one number of one rank's gradient NaN, in one step."""
    first = trial.find_newest() + 1
    if first > STEPS:
        return
    victim, step = trial.rng.randrange(2), trial.rng.randint(first, STEPS)
    ranks = trial.end(partial(make_nan, victim, step))
    if ranks.statuses != [1, 1]:
        raise Lost(f"NaN ended the ranks with {ranks.statuses}")
    require_cause(ranks.output, rf"step {step}: .*nan")
    trial.refusals += 1


def make_nan(victim: int, step: int) -> None:
    """Have this rank's gradient be NaN in that step, if it is the victim."""
    import train

    def spoil(real: Callable[..., Any], trainer: Any, microbatches: Any) -> Any:
        result = real(trainer, microbatches)
        if trainer.step + 1 == step:
            gradient = next(iter(trainer.weights.values())).grad
            gradient.to_local().view(-1)[:1].fill_(math.nan)
        return result

    if own_rank() == victim:
        replace(train, "forward_backward", spoil)


def flip_bit(trial: Trial) -> None:
    """Flip a bit of what one replica holds: the next check must find it, before a save.

    Between two checks it can turn the loss into NaN, which is found first; and what an optimizer
    keeps can lose the difference in its next update.
    """
    rng = trial.rng
    trial.task = REPLICATE_2
    freq, victim = rng.choice([1, INTERVAL]), rng.randrange(2)
    step = rng.randint(trial.find_newest() + 1, STEPS)
    check = -(-step // freq) * freq
    inject = partial(flip_after_step, victim, step, rng.random(), rng.random())
    ranks = trial.end(inject, {"debug.replica_check_freq": freq})
    flipped = re.search(r"flipped a bit of (\S+)", ranks.output)
    if ranks.statuses == [0, 0] and step < check:
        trial.faults += 1
        return
    if ranks.statuses != [1, 1] or flipped is None:
        raise Lost(f"a flipped bit ended the ranks with {ranks.statuses}: {ranks.output}")
    found = rf"step {check}: silent corruption: {re.escape(flipped[1])}, .* rank 0 and rank 1"
    require_cause(ranks.output, f"{found}|step {check}: loss (nan|inf)" if step < check else found)
    if trial.find_newest() >= step:
        raise Lost(f"a bit was flipped in step {step}, and step {trial.find_newest()} was saved")
    trial.refusals += 1


def flip_after_step(victim: int, step: int, which: float, where: float) -> None:
    """Have one rank flip a bit of a parameter, or of its state in the optimizer, after that step.

    Args:
        victim: the rank.
        step: after whose update.
        which: of all tensors, from 0 to 1.
        where: of all its bits, from 0 to 1.
    """
    import train
    from torchtrain.shards import local

    def flip(real: Callable[..., Any], trainer: Any, **how: Any) -> None:
        real(trainer, **how)
        if trainer.step != step:
            return
        held = [
            (name, local(tensor))
            for name, weight in trainer.weights.items()
            for tensor in (weight, *trainer.optimizer.state[weight].values())
        ]
        name, tensor = held[int(which * len(held))]
        content = tensor.detach().view(-1).view(torch.uint8)
        byte, bit = divmod(int(where * 8 * len(content)), 8)
        content[byte] ^= 1 << bit
        print(f"flipped a bit of {name}", flush=True)

    if own_rank() == victim:
        replace(train, "optimizer_step", flip)


def stop_one(trial: Trial) -> None:
    """Have one rank stand still in a step, as under SIGSTOP: the others must not wait for ever."""
    first = trial.find_newest() + 2  # the step before it has a timeout of its own
    if first > STEPS:
        return
    victim, step = trial.rng.randrange(2), trial.rng.randint(first, STEPS)
    timeout = {"comm.train_timeout_seconds": 3}
    ranks = trial.start(partial(stand_still, victim, step), timeout)
    try:
        if not ranks.wait(trial.bench.patience_s, until_one_has_ended=True):
            raise Lost(f"no rank ended though rank {victim} stood still: {ranks.output}")
        statuses = ranks.statuses
    finally:
        ranks.kill()
    trial.faults += 1
    if statuses[1 - victim] != 1:
        raise Lost(f"rank {victim} stood still, and the ranks ended with {statuses}")
    require_cause(ranks.output, f"rank {victim} did not answer")
    trial.refusals += 1


def stand_still(victim: int, step: int) -> None:
    """Stop this rank in that step, if it is the victim."""
    import train

    def stand(real: Callable[..., Any], trainer: Any, microbatches: Any) -> Any:
        if trainer.step + 1 == step:
            os.kill(os.getpid(), signal.SIGSTOP)
        return real(trainer, microbatches)

    if own_rank() == victim:
        replace(train, "forward_backward", stand)


def move_clock(trial: Trial) -> None:
    """Set one rank's clock to another time in any call: nothing may come of it."""
    victim = trial.rng.randrange(2)
    call = trial.rng.randint(1, trial.bench.calls[victim])
    seconds = trial.rng.choice([-86400.0, -3600.0, 3600.0, 86400.0 * 365])
    more = {"checkpoint.interval_minutes": 60, "job.max_minutes": 60 * 24 * 700}
    trial.bench.train(trial.run, partial(jump, victim, call, seconds), more)
    trial.faults += 1


def jump(victim: int, call: int, seconds: float) -> None:
    """Have `time.time` be off by so much from that call on, in one rank."""
    real = time.time

    def act(number: int) -> None:
        if number == call:
            time.time = lambda: real() + seconds

    if own_rank() == victim:
        counting.at_calls(act)


def require_cause(output: str, cause: str) -> None:
    """Check that what was printed names the cause in one of its lines.

    Raises:
        Lost: it does not.
    """
    if not re.search(cause, output):
        raise Lost(f"no line names the cause ({cause}): {output}")
