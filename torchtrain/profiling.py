"""Profiler traces, CUDA memory snapshots, and Python's garbage collection."""

import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from torchtrain.config.schema import Profiling
from torchtrain.errors import UserError
from torchtrain.logging_utils import logger
from torchtrain.utils import describe_os_error, expand_user, remove_if_possible

MEMORY_SNAPSHOT_ENTRIES = 100_000
"""Allocations kept in a snapshot's ring buffer."""


def check_snapshots(config: Profiling, device: torch.device) -> None:
    """Check that the device can record memory snapshots, if they are asked for.

    Raises:
        UserError: it cannot.
    """
    if config.enable_memory_snapshot and device.type != "cuda":
        raise UserError(
            "profiling.enable_memory_snapshot = true needs a CUDA device; this run is on "
            f"{device.type}"
        )


class Profiler:
    """Traces `profiler_active` steps in every `profile_freq`; keeps the history of allocations.

    A trace is a Chrome trace (chrome://tracing, ui.perfetto.dev), one file per rank, in
    `<dump_folder>/<save_traces_folder>/step-N/`; a snapshot is read by
    https://pytorch.org/memory_viz. Either is made only where the config asks for it.

    Raises:
        UserError: memory snapshots asked for on a device that cannot record them.
    """

    def __init__(
        self, config: Profiling, run_folder: Path, device: torch.device, rank: int
    ) -> None:
        check_snapshots(config, device)
        self.config = config
        self.run_folder = run_folder
        self.rank = rank
        self.step_number = 0
        self.trace = self._make_trace() if config.enable_profiling else None
        if config.enable_memory_snapshot:
            torch.cuda.memory._record_memory_history(max_entries=MEMORY_SNAPSHOT_ENTRIES)

    def _make_trace(self) -> torch.profiler.profile:
        """Return the profiler of the CPU and, where there is one, of the accelerator."""
        config = self.config
        steps = torch.profiler.schedule(
            wait=config.profile_freq - config.profiler_warmup - config.profiler_active,
            warmup=config.profiler_warmup,
            active=config.profiler_active,
        )
        return torch.profiler.profile(
            schedule=steps, on_trace_ready=self._write_trace, record_shapes=True
        )

    def step(self, step: int) -> None:
        """Tell the profiler that optimizer step `step` has ended."""
        self.step_number = step
        if self.trace is not None:
            self.trace.step()
        if self.config.enable_memory_snapshot and step % self.config.profile_freq == 0:
            self.write_memory_snapshot(f"step-{step}")

    def write_memory_snapshot(self, name: str) -> None:
        """Write the history of allocations; after an out-of-memory error it is wanted most."""
        if not self.config.enable_memory_snapshot:
            return
        path = self.run_folder / expand_user(self.config.save_memory_snapshot_folder) / name
        write = torch.cuda.memory._dump_snapshot
        _write_if_possible("memory snapshot", path / f"rank{self.rank}.pickle", write)

    def _write_trace(self, trace: torch.profiler.profile) -> None:
        path = (
            self.run_folder
            / expand_user(self.config.save_traces_folder)
            / f"step-{self.step_number}"
        )
        write = trace.export_chrome_trace
        _write_if_possible("profiler trace", path / f"rank{self.rank}.json.gz", write)

    def recording(self) -> AbstractContextManager[Any]:
        """Record while the loop runs."""
        return nullcontext() if self.trace is None else self.trace


def _write_if_possible(what: str, file: Path, write: Callable[[str], object]) -> None:
    """Write a file, and log where; one that the disk has no room for does not end the run."""
    started = time.perf_counter()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write(str(file))
    except OSError as fault:
        remove_if_possible(file)  # a part of it would be taken for the whole
        logger.warning(
            f"the {what} {file} cannot be written: {describe_os_error(fault)}. Training goes on "
            "without it"
        )
    else:
        seconds = time.perf_counter() - started
        logger.info(f"{what}: {file.parent} ({seconds:.1f} s to write)")


class GarbageCollection:
    """Collects garbage on every rank at the same steps: one rank's pause makes all ranks wait."""

    def __init__(self, every: int, *, debug: bool) -> None:
        self.every = every
        self.debug = debug
        gc.disable()
        gc.collect()
        gc.freeze()  # what set-up built stays to the end; no collection needs to walk it

    def step(self, step: int) -> None:
        """Collect young objects every `every` steps; with `debug`, all at each step, and count."""
        if self.debug:
            logger.info(f"step {step}: garbage collection found {gc.collect()} unreachable objects")
        elif step % self.every == 0:
            gc.collect(1)
