"""Ranks that are killed: all at any time, one in any call, all at any operation on a file."""

import os
import signal
from functools import partial
from pathlib import Path

from torchtrain.tools.faults import counting
from torchtrain.tools.faults.forked import kill_all_ranks, own_rank
from torchtrain.tools.faults.trial import Trial


def kill_all(trial: Trial) -> None:
    """Kill all ranks at once, at any time: also while they meet, tokenize, load or save."""
    ranks = trial.start(options={"checkpoint.async_mode": trial.draw_mode()})
    try:
        ranks.wait(trial.rng.uniform(0, trial.bench.seconds))
        trial.faults += not ranks.wait(0)
    finally:
        ranks.kill()


def kill_one(trial: Trial) -> None:
    """Let one rank kill itself in any call of a function of the trainer."""
    victim = trial.rng.randrange(2)
    call = trial.draw_up_to(trial.bench.calls[victim])
    trial.end(partial(die_at_call, victim, call), {"checkpoint.async_mode": trial.draw_mode()})


def kill_at_operation(trial: Trial, mode: str) -> None:
    """Kill before a write, fsync, rename, … of any rank: all ranks, or by chance that one alone.

    Every second try leaves writes out, of which there are many. Successive tries begin with
    successive operations, of rank 0 and then of rank 1.
    """
    writes = trial.number % 2 == 0
    counts = trial.bench.operations if writes else trial.bench.rarer
    if trial.faults == 0:
        spread = 101 if writes else 1  # over the run, and after many tries over all
        place = trial.number // 2 * spread % sum(counts)
        victim = int(place >= counts[0])
        number = 1 + place - victim * counts[0]
    else:
        victim = trial.rng.randrange(2)
        number = trial.draw_up_to(counts[victim])
    alone = trial.rng.random() < 0.25
    inject = partial(die_at_operation, trial.run, victim, number, alone=alone, writes=writes)
    trial.end(inject, {"checkpoint.async_mode": mode})


def die_at_call(victim: int, call: int, *, alone: bool = True) -> None:
    """Have this rank kill itself, and the others unless `alone`, at that call."""

    def act(number: int) -> None:
        if number == call:
            if not alone:
                kill_all_ranks()
            os.kill(os.getpid(), signal.SIGKILL)

    if own_rank() == victim:
        counting.at_calls(act)


def die_at_operation(
    folder: Path, victim: int, operation: int, *, alone: bool, writes: bool
) -> None:
    """Have this rank kill itself, and the others unless `alone`, before that operation."""

    def act(number: int, _: object) -> None:
        if number == operation:
            if not alone:
                kill_all_ranks()
            os.kill(os.getpid(), signal.SIGKILL)

    if own_rank() == victim:
        counting.at_operations(folder, act, writes=writes)
