"""Runs of the trainer, started as a user starts them, timed from outside.

A line of metrics.jsonl is written at the end of each step. The moments at which the lines appear
tell what their contents leave out: how long the first step took to come, and for how long training
stood still between two steps.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtrain.catalog.models import ModelShape
from torchtrain.errors import UserError
from torchtrain.installation import PROGRAM
from torchtrain.tools.bench.sizes import Size
from torchtrain.tools.launch import set_up_environment
from torchtrain.utils import METRICS_FILE

POLL_S = 0.002
PATIENCE_S = 3600.0
"""How long a run may take."""
NAMES_OF_A_LAUNCHER = ("PET_", "TORCHELASTIC", "MASTER_", "RDZV_", "GLIBC_TUNABLES")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is the same for all runs of a benchmark."""

    device: str
    """cpu or cuda."""
    ranks: int
    dtype: str
    """Of the computation."""
    compiled: bool
    options: tuple[str, ...] = ()
    """Further options of the trainer, in place of the benchmark's own."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What a run was seen to do."""

    tokens_per_second: float
    """Of all ranks; the median of the second third of the steps."""
    step_time_s: float
    """The same median."""
    data_time_pct: float
    memory_gib: float
    """Peak of the worst rank."""
    first_step_s: float
    """From the launch to the end of the first step."""
    save_stall_s: float
    """For how long training stood still for a checkpoint."""


def measure_run(size: Size, setting: Setting, tree: Path = PROGRAM) -> Figures:
    """Train `size` in a folder of its own, which is removed again.

    Args:
        size: what to train.
        setting: how.
        tree: the checkout whose trainer runs.

    Raises:
        UserError: the run did not end well.
    """
    with tempfile.TemporaryDirectory(prefix="torchtrain-bench-") as folder:
        options = list_options(size, setting, Path(folder))
        command = [sys.executable, "-m", "torchtrain.tools.launch", *options]
        started = time.monotonic()
        with (
            open(Path(folder) / "output", "wb") as output,
            subprocess.Popen(
                command,
                cwd=tree,
                env=make_environment(setting, tree),
                stdout=output,
                stderr=subprocess.STDOUT,
            ) as launcher,
        ):
            try:
                arrivals = watch(launcher, Path(folder) / "run" / METRICS_FILE, started)
            finally:
                if launcher.poll() is None:
                    launcher.send_signal(signal.SIGTERM)
        if launcher.returncode != 0:
            said = (Path(folder) / "output").read_text(errors="replace")
            raise UserError(f"the run ended with {launcher.returncode}:\n{said[-3000:]}")
        lines = (Path(folder) / "run" / METRICS_FILE).read_text().splitlines()
    return summarize([json.loads(line) for line in lines], arrivals, save_step(size))


def list_options(size: Size, setting: Setting, folder: Path) -> list[str]:
    """Return the command line of a run of `size` in `folder`."""
    options = {
        "job.config_file": PROGRAM / "train_configs" / "debug_model.toml",
        "job.dump_folder": folder / "run",
        **{f"model.{key}": value for key, value in size.model.items()},
        "training.seq_len": size.seq_len,
        "training.local_batch_size": size.batch,
        "training.global_batch_size": size.batch * setting.ranks,
        "training.steps": size.steps,
        "training.mixed_precision_param": setting.dtype,
        "compile.enable": setting.compiled,
        "metrics.log_freq": 1,
        "metrics.enable_tensorboard": False,
        "text_samples.prompts": "none",
        "checkpoint.enable": True,
        "checkpoint.interval": save_step(size),
    }
    given = {word.split("=")[0] for word in setting.options}
    words = []
    for key, value in options.items():
        text = str(value).lower() if isinstance(value, bool) else str(value)
        if f"--{key}" not in given:
            words += [f"--{key}", text]
    return [*words, *setting.options]


def save_step(size: Size) -> int:
    """Return the step after which the run saves; steps beside and after the save follow."""
    return size.steps * 2 // 3


def make_environment(setting: Setting, tree: Path) -> dict[str, str]:
    """Return the environment of a run: nothing of a launcher around the benchmark."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(NAMES_OF_A_LAUNCHER)
    }
    environment |= {"NGPU": str(setting.ranks), "PYTHONPATH": str(tree)}
    if setting.device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return environment


def time_products(shape: ModelShape, size: Size, setting: Setting) -> dict[str, float]:
    """Return the FLOP/s of matrix products alone, by name, with the threads that a rank has.

    Raises:
        UserError: they could not be computed.
    """
    environment = make_environment(setting, PROGRAM)
    set_up_environment(setting.ranks, environment, on_cpu=setting.device == "cpu")
    sizes = (size.batch * size.seq_len, shape.dim, shape.ffn_hidden_dim)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torchtrain.tools.bench.products",
            setting.device,
            setting.dtype,
            *map(str, sizes),
        ],
        env=environment,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise UserError(f"matrix products of {setting.dtype}:\n{done.stderr[-3000:]}")
    speeds: dict[str, float] = json.loads(done.stdout)
    return speeds


def watch(launcher: subprocess.Popen[bytes], file: Path, started: float) -> list[float]:
    """Return when each line of a growing file appeared, in seconds after `started`.

    Raises:
        UserError: the run takes hours.
    """
    arrivals: list[float] = []
    while True:
        ended = launcher.poll() is not None
        lines = file.read_bytes().count(b"\n") if file.exists() else 0
        now = time.monotonic() - started
        arrivals += [now] * (lines - len(arrivals))
        if ended:
            return arrivals
        if now > PATIENCE_S:
            raise UserError(f"the run was not done after {PATIENCE_S:.0f} s")
        time.sleep(POLL_S)


def summarize(rows: list[Mapping[str, Any]], arrivals: list[float], saved_after: int) -> Figures:
    """Turn the lines of metrics.jsonl, and when each appeared, into figures.

    Args:
        rows: one for each step, from the first.
        arrivals: in seconds after the launch.
        saved_after: the step that was followed by a save, not the last.
    """
    measured = rows[len(rows) // 3 : saved_after]
    # Beside the step itself: what a line's own step time leaves out.
    between = [
        later - earlier - row["step_time_s"]
        for earlier, later, row in zip(arrivals, arrivals[1:], rows[1:], strict=False)
    ]
    usual = statistics.median(between)
    return Figures(
        tokens_per_second=statistics.median(row["tokens_per_second"] for row in measured),
        step_time_s=statistics.median(row["step_time_s"] for row in measured),
        data_time_pct=statistics.median(row["data_time_pct"] for row in measured),
        memory_gib=max(row["memory_gib"] for row in rows),
        first_step_s=arrivals[0],
        save_stall_s=max(0.0, between[saved_after - 1] - usual),
    )
