"""What befalls the files of a checkpoint between two starts."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torchtrain.checkpoint.commit import INDEX, MARKER, STATE
from torchtrain.checkpoint.digests import make_record, new_hasher
from torchtrain.tools.faults.bench import Lost
from torchtrain.tools.faults.forked import kill_all_ranks, replace
from torchtrain.tools.faults.trial import Trial, require_resumed

HALF = 6
"""The step after which the run ends that is damaged, where a try begins with damage."""


def flip(file: Path, trial: Trial) -> None:
    """Change one bit of one byte."""
    content = bytearray(file.read_bytes())
    content[trial.rng.randrange(len(content))] ^= 1 << trial.rng.randrange(8)
    file.write_bytes(content)


def cut(file: Path, trial: Trial) -> None:
    """Cut off the end."""
    os.truncate(file, trial.rng.randrange(file.stat().st_size))


def swap(file: Path, trial: Trial) -> None:
    """Put there what the checkpoint before has under that name."""
    shutil.copyfile(file.parent.with_name(f"step-{trial.list_complete()[1]}") / file.name, file)


def delete(file: Path, trial: Trial) -> None:
    """Remove it."""
    file.unlink()


DAMAGES: tuple[Callable[[Path, Trial], None], ...] = (flip, cut, swap, delete)


def damage(trial: Trial) -> None:
    """Flip, cut, swap or delete a file of the newest checkpoint; successive tries take all."""
    newest = find_victim(trial)
    if newest is None:
        return
    newest_step, older_step, *_ = trial.list_complete()
    files = sorted(newest.iterdir())
    kind = DAMAGES[trial.number // len(files) % len(DAMAGES)]
    file = files[trial.number % len(files)]
    before = file.read_bytes()
    kind(file, trial)
    is_same = file.exists() and file.read_bytes() == before
    allowed = [newest_step] if is_same else [older_step]
    if file.name == MARKER:  # where it can be changed and nothing follow, as in torch's version
        allowed = [newest_step, older_step]
    start_until_loaded(trial, newest, allowed)


def leave_half(trial: Trial) -> None:
    """Leave a newest checkpoint that lacks its marker and some more files, under either name."""
    newest = find_victim(trial)
    if newest is None:
        return
    after = f"step-{trial.find_newest() + 1}"
    half = newest.with_name(trial.rng.choice([after, f".tmp-{after}-0"]))
    shutil.copytree(newest, half)
    (half / MARKER).unlink()
    files = sorted(file for file in half.iterdir() if file.name != INDEX)
    for file in trial.rng.sample(files, trial.rng.randint(0, len(files))):
        file.unlink()
    if not (half / STATE).exists():  # with its index alone it would be another program's
        (half / INDEX).unlink()
    trial.faults += 1


class Planted:
    """What creates a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.file,))


def plant_code(trial: Trial) -> None:
    """Make the index a pickle that runs code, with its right size and digest in the marker."""
    newest = find_victim(trial)
    if newest is None:
        return
    older = trial.list_complete()[1]
    planted = trial.folder / "planted code has run"
    content = pickle.dumps(Planted(planted))
    (newest / INDEX).write_bytes(content)
    marker = json.loads((newest / MARKER).read_text())
    hasher = new_hasher()
    hasher.update(content)
    marker["files"][INDEX] = make_record(len(content), hasher)
    (newest / MARKER).write_text(json.dumps(marker))
    try:
        start_until_loaded(trial, newest, [older])
    finally:
        if planted.exists():
            raise Lost("planted code has run")


def find_victim(trial: Trial) -> Path | None:
    """Return the newest checkpoint of the run; None if there is no older one to go back to.

    A try that has no run yet gets one that is half done.
    """
    if not trial.run.exists():
        trial.bench.copy_half(trial.run, HALF)
    complete = trial.list_complete()
    return trial.run / "checkpoint" / f"step-{complete[0]}" if len(complete) > 1 else None


def start_until_loaded(trial: Trial, damaged: Path, allowed: list[int]) -> None:
    """Start the run until it has loaded a checkpoint of the `allowed` steps.

    Where that is refused, the damaged one is taken away.

    Raises:
        Lost: it ends in another way.
    """
    trial.faults += 1
    ranks = trial.start(die_at_first_step)
    try:
        ranks.wait(trial.bench.patience_s)
    finally:
        ranks.kill()
    require_resumed(ranks.output, allowed)
    if ranks.statuses == [2, 2]:
        if "Traceback" in ranks.output or damaged.name not in ranks.output:
            raise Lost(f"refused without a message: {ranks.output}")
        trial.refusals += 1
        shutil.rmtree(damaged)
    elif ranks.statuses not in ([0, 0], [-9, -9]):
        raise Lost(f"a damaged checkpoint ended the ranks with {ranks.statuses}: {ranks.output}")


def die_at_first_step() -> None:
    """Have all ranks killed when they begin to train."""
    import train

    replace(train, "forward_backward", lambda *_: kill_all_ranks())
