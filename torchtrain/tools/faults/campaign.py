"""Which faults there are, in which order they are tried, and the table."""

import errno
import random
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from functools import partial

from torchtrain.tools.faults import (
    damaging,
    each_operation,
    failing,
    killing,
    launching,
    power,
    resharding,
    stopping,
)
from torchtrain.tools.faults.bench import Bench, Lost
from torchtrain.tools.faults.trial import Trial

FORKED, LAUNCHED = "forked", "launched"
IN_A_ROW = 4
"""A run is killed up to so many times."""


@dataclass(frozen=True)
class Fault:
    """A kind of fault: a line of the table."""

    make: Callable[[Trial], None]
    """Makes one in the try's run; raises `Lost` if that does not end as it must."""
    share: float
    """Of the tries."""
    in_a_row: int = 1
    """How many times at most it is made in a try."""
    ranks: str = FORKED
    """Whether its ranks are forked, or launched as users do."""
    finish: Callable[[Trial], None] = Trial.finish
    """Goes on without a fault, and compares."""


def mix(trial: Trial) -> None:
    """Make one fault of each kind that any run can have, in a row, in any order."""
    for name in trial.rng.sample(MIXED, len(MIXED)):
        FAULTS[name].make(trial)


def launched(make: Callable[[Trial], None], share: float) -> Fault:
    """Return a fault of launches."""
    return Fault(make, share, ranks=LAUNCHED)


FAULTS = {
    "all-killed": Fault(killing.kill_all, 0.25, IN_A_ROW),
    "one-killed": Fault(killing.kill_one, 0.15, IN_A_ROW),
    "killed-at-operation": Fault(
        partial(killing.kill_at_operation, mode="disabled"), 0.15, IN_A_ROW
    ),
    "killed-at-operation-async": Fault(
        partial(killing.kill_at_operation, mode="async"), 0.15, IN_A_ROW
    ),
    "disk-full": Fault(partial(failing.fail_disk, number=errno.ENOSPC), 0.05),
    "file-too-large": Fault(partial(failing.fail_disk, number=errno.EFBIG), 0.02),
    "sync-fails": Fault(partial(failing.fail_disk, number=errno.EIO), 0.03),
    "writer-raises": Fault(failing.fail_writer, 0.02),
    "signals": Fault(stopping.stop, 0.1, IN_A_ROW),
    "file-damaged": Fault(damaging.damage, 0.1),
    "half-written": Fault(damaging.leave_half, 0.02),
    "code-planted": Fault(damaging.plant_code, 0.01),
    "nan-on-one-rank": Fault(failing.spoil_gradient, 0.02),
    "one-stands-still": Fault(failing.stop_one, 0.02),
    "clock-jumps": Fault(failing.move_clock, 0.02),
    "mixed": Fault(mix, 0.02),
    "power-cut": Fault(partial(power.cut_power, mode="disabled"), 0.1),
    "power-cut-async": Fault(partial(power.cut_power, mode="async"), 0.05),
    "one-save": Fault(partial(each_operation.make, mode="disabled"), 0.02),
    "one-save-async": Fault(partial(each_operation.make, mode="async"), 0.02),
    "bit-flipped": Fault(failing.flip_bit, 0.03),
    "signals-compiling": Fault(stopping.stop_compiling, 0.03),
    "signals-stalled": Fault(stopping.stop_stalled, 0.03),
    "under-each-layout": Fault(resharding.kill_under_layout, 0.05, IN_A_ROW),
    "another-layout": Fault(resharding.reshard, 0.05, finish=resharding.compare_run),
    "launch-killed": launched(launching.kill_launch, 0.02),
    "launcher-killed": launched(launching.kill_launcher, 0.03),
    "rank-killed-and-restarted": launched(launching.restart, 0.03),
    "node-lost-and-back": Fault(
        launching.lose_node, 0.03, ranks=LAUNCHED, finish=launching.compare_nodes
    ),
    "launched-twice": launched(launching.launch_twice, 0.02),
    "launcher-signaled": launched(launching.stop_launcher, 0.03),
}
MIXED = list(FAULTS)[: list(FAULTS).index("clock-jumps")]


@dataclass
class Tally:
    """A line of the table: what became of the tries of a fault."""

    tries: int = 0
    faults: int = 0
    survived: int = 0
    refused: int = 0
    steps_again: int = 0
    lost: int = 0


@dataclass(frozen=True)
class Ended:
    """A try that has ended."""

    trial: Trial
    lost: str
    """What was not as it must be, if anything was."""


def plan(names: Iterable[str], kills: int, seed: int) -> list[tuple[str, int]]:
    """Return the tries, by fault and number, in an order in which all faults come early.

    Each fault has its share, and is tried at least once.
    """
    tries = []
    wanted = kills / sum(fault.share * (1 + fault.in_a_row) / 2 for fault in FAULTS.values())
    for name in names:
        count = max(1, round(FAULTS[name].share * wanted))
        tries += [((number + 0.5) / count, name, number) for number in range(count)]
    offset = random.Random(seed)
    return [
        (name, number)
        for _, name, number in sorted(tries, key=lambda one: (one[0], offset.random()))
    ]


def plan_every_operation(bench: Bench) -> list[tuple[str, int]]:
    """Return the tries that kill at every operation of a save, in both ways of saving."""
    return [
        (name, number)
        for name, mode in (("one-save", "disabled"), ("one-save-async", "async"))
        for number in range(len(each_operation.list_tries(bench, mode)))
    ]


def run(bench: Bench, tries: Iterable[tuple[str, int]], seed: int, jobs: int) -> Iterator[Ended]:
    """Make the tries, `jobs` at a time, and yield each when it has ended."""
    with ThreadPoolExecutor(jobs) as threads:
        waiting = [threads.submit(attempt, bench, seed, *one) for one in tries]
        try:
            for future in as_completed(waiting):
                yield future.result()
        finally:
            threads.shutdown(cancel_futures=True)


def attempt(bench: Bench, seed: int, name: str, number: int) -> Ended:
    """Make a try; one that raises anything else than `Lost` is lost too."""
    trial = Trial(bench, name, number, seed)
    try:
        for _ in range(trial.rng.randint(1, FAULTS[trial.name].in_a_row)):
            FAULTS[trial.name].make(trial)
        FAULTS[trial.name].finish(trial)
    except Lost as fault:
        return Ended(trial, str(fault))
    except Exception as fault:
        return Ended(trial, f"{type(fault).__name__}: {fault}")
    return Ended(trial, "")


def count(tallies: dict[str, Tally], ended: Ended) -> None:
    """Add a try to the table."""
    trial = ended.trial
    tally = tallies.setdefault(trial.name, Tally())
    tally.tries += 1
    tally.faults += trial.faults
    tally.refused += bool(trial.refusals)
    tally.survived += not ended.lost
    tally.lost += bool(ended.lost)
    tally.steps_again += trial.steps_again


COLUMNS = "{:<28}{:<10}{:>6}{:>8}{:>10}{:>9}{:>13}{:>6}"


def as_table(tallies: dict[str, Tally]) -> str:
    """Return the table as text."""
    lines = [
        COLUMNS.format(
            "fault", "ranks", "tries", "faults", "survived", "refused", "steps again", "lost"
        )
    ]
    total = Tally()
    for name in FAULTS:
        if name not in tallies:
            continue
        values = vars(tallies[name])
        lines.append(COLUMNS.format(name, FAULTS[name].ranks, *values.values()))
        for key, value in values.items():
            setattr(total, key, getattr(total, key) + value)
    lines.append(COLUMNS.format("all", "", *vars(total).values()))
    return "\n".join(lines)
