"""The small run that a campaign trains: untouched, and as its tries are to end."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import RLock
from types import MappingProxyType
from typing import Any

from torchtrain.checkpoint.commit import INDEX, MARKER, STATE
from torchtrain.installation import PROGRAM
from torchtrain.tools.faults import counting
from torchtrain.tools.faults.forked import ForkedRanks, Inject
from torchtrain.tools.parity_plan import as_text
from torchtrain.utils import METRICS_FILE

STEPS = 10
INTERVAL = 2
PATIENCE_S = 120.0
"""How long a run, or what is left of one after a fault, has to end by itself: at least this."""
PATIENCE = 10.0
"""Or so many times what an untouched run has taken, where that is longer: a machine can be busy."""
SMALL: dict[str, Any] = {
    "model.dim": 32,
    "model.n_layers": 2,
    "model.n_heads": 4,
    "model.n_kv_heads": 2,
    "model.ffn_hidden_dim": 64,
    "training.dataset": "text",
    "training.seq_len": 32,
    "training.local_batch_size": 4,
    "training.global_batch_size": 8,
    "training.steps": STEPS,
    "training.mixed_precision_param": "float32",
    "metrics.enable_tensorboard": False,
    "checkpoint.enable": True,
    "checkpoint.interval": INTERVAL,
    "checkpoint.keep_latest_k": 2,
    "validation.enable": True,
    "validation.held_out_share": 0.1,
    "validation.freq": 3,
    "validation.steps": 1,
    "text_samples.prompts": None,
}
OF_THE_MACHINE = frozenset(
    {
        "memory_gib",
        "tokens_per_second",
        "mfu",
        "data_time_pct",
        "step_time_s",
        "slowest_rank",
        "slowest_rank_excess_pct",
    }
)
"""Keys of metrics.jsonl that two runs need not share."""


Options = Mapping[str, Any]
"""Options of the trainer by name, over those of the small run."""
NO_OPTIONS: Options = MappingProxyType({})


class Lost(Exception):
    """A try did not end as it must."""


@dataclass
class Bench:
    """The folder of a campaign: corpus, untouched runs, one folder for each try."""

    folder: Path
    seconds: float = 0.0
    """What the untouched run took."""
    patience_s: float = PATIENCE * PATIENCE_S
    """How long a run has to end by itself; before one is measured, very long."""
    calls: list[int] = field(default_factory=list)
    """How many calls of the trainer's functions each of its ranks made."""
    operations: list[int] = field(default_factory=list)
    """How often each of its ranks wrote, synced, made, renamed or removed something."""
    rarer: list[int] = field(default_factory=list)
    """How many of these operations were no writes."""
    _launch_seconds: float = 0.0
    lock: RLock = field(default_factory=RLock)
    """Held while something is made that tries share."""

    def prepare(self) -> None:
        """Write the corpus, and train the untouched run once, and once more to count."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_corpus(self.folder / "corpus")
        self.train(self.folder / "untouched")
        started = time.monotonic()
        self.train(self.folder / "counted", partial(counting.count, self.folder))
        self.seconds = time.monotonic() - started
        self.patience_s = max(PATIENCE_S, PATIENCE * self.seconds)
        self.calls, self.operations, self.rarer = counting.read(self.folder, ranks=2)
        self.compare(self.folder / "counted")

    def launch_seconds(self) -> float:
        """Return what an untouched launch takes, as users make it; it has the bits of forks."""
        with self.lock:
            if not self._launch_seconds:
                run = self.folder / "launched"
                command = [sys.executable, "-m", "torchtrain.tools.launch", *self.options(run)]
                environment = {**os.environ, "NGPU": "2", "OMP_NUM_THREADS": "1"}
                started = time.monotonic()
                subprocess.run(command, env=environment, check=True, capture_output=True)
                self._launch_seconds = time.monotonic() - started
                self.patience_s = max(self.patience_s, PATIENCE * self._launch_seconds)
                self.compare(run)
        return self._launch_seconds

    def untouched(self, task: Options = NO_OPTIONS, ranks: int = 2) -> Path:
        """Return the folder of the untouched run of a task, made once per campaign."""
        if not task and ranks == 2:
            return self.folder / "untouched"
        return self._make(f"untouched-{name_task(task, ranks)}", task, ranks)

    def make_half(self, steps: int, task: Options = NO_OPTIONS, ranks: int = 2) -> Path:
        """Return the folder of a run that was to end after so many of its steps."""
        shorter = {"training.steps": steps, "lr_scheduler.total_steps": STEPS}
        return self._make(f"half-{steps}-{name_task(task, ranks)}", {**task, **shorter}, ranks)

    def _make(self, name: str, options: Options, ranks: int) -> Path:
        folder = self.folder / name
        with self.lock:
            if not folder.exists():
                self.train(folder, options=options, ranks=ranks)
        return folder

    def copy_half(self, run: Path, steps: int, task: Options = NO_OPTIONS, ranks: int = 2) -> None:
        """Lay down a run that has ended after so many of its steps."""
        half = self.make_half(steps, task, ranks)
        shutil.copytree(half, run)
        shutil.copytree(tokens_of(half), tokens_of(run))

    def options(self, run: Path, more: Options = NO_OPTIONS) -> list[str]:
        """Return the trainer's command line for a run in this folder."""
        paths = {
            "job.dump_folder": run,
            "training.dataset_path": self.folder / "corpus",
            "data.cache_folder": tokens_of(run),
        }
        values = SMALL | paths | dict(more)
        file = str(PROGRAM / "train_configs" / "debug_model.toml")
        given = [f"--{name}={as_text(value)}" for name, value in values.items()]
        return ["--job.config_file", file, *given]

    def start(
        self, run: Path, inject: Inject | None = None, options: Options = NO_OPTIONS, ranks: int = 2
    ) -> ForkedRanks:
        """Start a run in the background."""
        printed = run.parent / f"{run.name}.printed"
        return ForkedRanks(ranks, self.options(run, options), printed, inject)

    def train(
        self, run: Path, inject: Inject | None = None, options: Options = NO_OPTIONS, ranks: int = 2
    ) -> str:
        """Train to the end and return what was printed.

        Raises:
            Lost: it does not end, or not with status 0.
        """
        started = self.start(run, inject, options, ranks)
        try:
            has_ended = started.wait(self.patience_s)
        finally:
            started.kill()
        if not has_ended:
            raise Lost(f"a run without a fault did not end in {self.patience_s:.0f} s")
        if any(started.statuses):
            raise Lost(f"a run without a fault ended with {started.statuses}: {started.output}")
        return started.output

    def compare(self, run: Path, untouched: Path | None = None) -> None:
        """Check that a run has an untouched run's curve and final state, to the bit.

        Raises:
            Lost: it has not.
        """
        untouched = untouched or self.untouched()
        mine, theirs = read_curve(run), read_curve(untouched)
        for ours, expected in zip(mine, theirs, strict=False):
            if ours != expected:
                raise Lost(f"{METRICS_FILE}: {ours} instead of {expected}")
        if len(mine) != len(theirs):
            raise Lost(f"{METRICS_FILE} has {len(mine)} lines instead of {len(theirs)}")
        compare_states(last_checkpoint(run), last_checkpoint(untouched))


def tokens_of(run: Path) -> Path:
    """Return the folder of a run's token caches."""
    return run.parent / f"{run.name}-tokens"


def name_task(task: Options, ranks: int) -> str:
    """Return a folder's name for a task: its ranks, and its options in short."""
    options = json.dumps(dict(task), sort_keys=True).encode()
    return f"{ranks}-{hashlib.sha256(options).hexdigest()[:8]}"


def write_corpus(folder: Path) -> None:
    """Write a few text files, always the same."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 7))) for _ in range(60)]
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(40):
        lines = (" ".join(rng.choices(words, k=rng.randint(4, 12))) for _ in range(30))
        (folder / f"{number:02}.txt").write_text(".\n".join(lines), encoding="utf-8")


def last_checkpoint(run: Path) -> Path:
    """Return the folder of the checkpoint after the last step."""
    return run / "checkpoint" / f"step-{STEPS}"


def read_curve(run: Path) -> list[dict[str, Any]]:
    """Return the logged lines, without what belongs to the machine.

    Raises:
        Lost: there are none.
    """
    file = run / METRICS_FILE
    if not file.exists():
        raise Lost(f"{file} is not there")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [
        {key: value for key, value in line.items() if key not in OF_THE_MACHINE} for line in lines
    ]


def compare_states(mine: Path, theirs: Path) -> None:
    """Check that two checkpoints hold the same tensors, to the bit, and the same position.

    Raises:
        Lost: they do not.
    """
    if not (mine / MARKER).exists():
        raise Lost(f"{mine} is not a complete checkpoint")
    ours, expected = (json.loads((path / STATE).read_text()) for path in (mine, theirs))
    for key in ("step", "tokens_seen", "data", "shape"):
        if ours[key] != expected[key]:
            raise Lost(f"{mine / STATE}: {key} is {ours[key]} instead of {expected[key]}")
    if read_records(mine) != read_records(theirs):
        compare_tensors(mine, theirs)  # which may be the same in other bytes


def read_records(checkpoint: Path) -> dict[str, Any]:
    """Return what the marker says of the files of tensors, their digests too."""
    files = json.loads((checkpoint / MARKER).read_text())["files"]
    return {name: record for name, record in files.items() if name not in (STATE, INDEX)}


def compare_tensors(mine: Path, theirs: Path) -> None:
    """Check that two checkpoints hold the same tensors, to the bit, in whatever shards.

    Random states aside, which are a rank's own.

    Raises:
        Lost: they do not.
    """
    import torch

    ours, expected = read_tensors(mine), read_tensors(theirs)
    if ours.keys() != expected.keys():
        raise Lost(f"{mine} has not the tensors of {theirs}")
    for name, tensor in ours.items():
        if tensor.dtype != expected[name].dtype or tensor.shape != expected[name].shape:
            raise Lost(f"{mine}: {name} has another type or shape than in {theirs}")
        as_bytes = [
            value.contiguous().view(-1).view(torch.uint8) for value in (tensor, expected[name])
        ]
        if not torch.equal(*as_bytes):
            raise Lost(f"{mine}: {name} has other bits than in {theirs}")


def read_tensors(checkpoint: Path) -> dict[str, Any]:
    """Return the tensors of a checkpoint, whole, without the random states."""
    import torch
    from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

    with tempfile.NamedTemporaryFile() as file:
        dcp_to_torch_save(checkpoint, file.name)
        tensors = torch.load(file.name, weights_only=True)
    return {name: value for name, value in tensors.items() if not name.startswith("rng/")}
