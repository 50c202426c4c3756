"""Runs under each layout that are killed and go on, on the same one or another.

On the same one they end with the untouched run's bits; on another state and data are exact, and the
losses agree to rounding.
"""

import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from torchtrain.tools.faults.bench import (
    STEPS,
    Lost,
    Options,
    compare_tensors,
    read_curve,
    read_tensors,
)
from torchtrain.tools.faults.forked import replace
from torchtrain.tools.faults.killing import die_at_call
from torchtrain.tools.faults.trial import Trial
from torchtrain.tools.layouts import CP_2, EP_2, PP_2, REPLICATE_2, TASKS, TP_2

LAYOUTS: dict[str, tuple[int, Options]] = {
    "1": (1, {}),
    "FSDP 2": (2, {}),
    "TP 2": (2, TP_2),
    "PP 2": (2, PP_2),
    "CP 2": (2, CP_2),
}
"""Ranks and options by name."""
LAYOUTS_OF_EXPERTS = {"FSDP 2": (2, {}), "EP 2": (2, EP_2), "TP 2": (2, TP_2)}
EXPERTS = TASKS["experts"].overrides
LAYOUTS_IN_TURN: dict[str, Options] = {
    "TP 2": TP_2,
    "PP 2": PP_2,
    "CP 2": CP_2,
    "EP 2": {**EXPERTS, **EP_2},
    "HSDP 2": REPLICATE_2,
}
"""Of two ranks, whose runs are killed and go on under the same one."""
TOLERANCE = 2e-5
"""By how much a loss or norm may differ, relative to itself."""


def reshard(trial: Trial) -> None:
    """Kill a run in any call, and let it go on, to the end, on another layout."""
    layouts = LAYOUTS_OF_EXPERTS if has_experts(trial) else LAYOUTS
    task = EXPERTS if has_experts(trial) else {}
    (trial.ranks, before), (ranks_after, after) = trial.rng.sample(list(layouts.values()), 2)
    call = trial.rng.randint(trial.bench.calls[0] // 2, trial.bench.calls[0])
    trial.end(partial(die_at_call, 0, call), {**task, **before})
    newest = trial.find_newest()
    saved = trial.folder / "saved"
    if newest:
        shutil.copytree(trial.run / "checkpoint" / f"step-{newest}", saved)
    loaded = trial.folder / "loaded"
    trial.bench.train(trial.run, partial(keep_loaded, loaded), {**task, **after}, ranks_after)
    if newest and newest < STEPS:
        compare_tensors(loaded / "checkpoint" / f"step-{newest}", saved)


def kill_under_layout(trial: Trial) -> None:
    """Kill one rank, or all, in any call under each of these layouts in turn; it goes on there."""
    kinds = [*LAYOUTS_IN_TURN.values()]
    trial.task = kinds[trial.number % len(kinds)]
    victim = trial.rng.randrange(2)
    call = trial.draw_up_to(trial.bench.calls[victim])
    die = partial(die_at_call, victim, call, alone=trial.rng.random() < 0.5)
    trial.end(die, {"checkpoint.async_mode": trial.draw_mode()})


def compare_run(trial: Trial) -> None:
    """Compare a try's run with the untouched one."""
    task = EXPERTS if has_experts(trial) else {}
    compare_to_rounding(trial.run, trial.bench.untouched(task))


def has_experts(trial: Trial) -> bool:
    """Return whether its model has experts: every fourth."""
    return trial.number % 4 == 3


def keep_loaded(folder: Path) -> None:
    """Have the ranks save, to another folder, what they have loaded."""
    import train
    from torchtrain.checkpoint import Checkpointer
    from torchtrain.resuming import progress_of

    def resume(real: Any, trainer: Any, checkpointer: Any, source: Any) -> None:
        real(trainer, checkpointer, source)
        copy = Checkpointer(trainer.config.checkpoint, folder)
        copy.save(trainer.model_state, trainer.optimizer, progress_of(trainer))

    replace(train, "resume", resume)


def compare_to_rounding(run: Path, untouched: Path, *, was_stopped: bool = False) -> None:
    """Check that a run has the untouched run's curve, to rounding.

    Where it `was_stopped` after a step, that step's line may lack a validation.

    Raises:
        Lost: it has not.
    """
    mine, theirs = read_curve(run), read_curve(untouched)
    if [line["step"] for line in mine] != [line["step"] for line in theirs]:
        raise Lost(f"the steps of {run} are not those of {untouched}")
    for ours, expected in zip(mine, theirs, strict=True):
        for key, value in expected.items():
            if was_stopped and key.startswith("val_") and key not in ours:
                continue
            if value is not None and not math.isclose(ours[key], value, rel_tol=TOLERANCE):
                raise Lost(f"step {ours['step']}: {key} is {ours[key]} instead of {value}")


def compare_weights_to_rounding(mine: Path, theirs: Path) -> None:
    """Check that two checkpoints hold the same weights, to rounding.

    What differs is measured against each parameter's norm.

    Raises:
        Lost: they do not.
    """
    ours, expected = read_tensors(mine), read_tensors(theirs)
    if ours.keys() != expected.keys():
        raise Lost(f"{mine} has not the tensors of {theirs}")
    for name in ours:
        if name.startswith("model/"):
            difference = (ours[name] - expected[name]).norm() / expected[name].norm()
            if difference > TOLERANCE:
                raise Lost(f"{mine}: {name} differs by {difference:.1e} of its norm")
