"""What a run tells: a line a step, metrics.jsonl, TensorBoard, Weights & Biases."""

import json
import resource
import sys
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from torchtrain.config_manager import JobConfig
from torchtrain.errors import UserError
from torchtrain.logging_utils import BLUE, BOLD, DIM, GREEN, RESET, YELLOW, logger, use_colour
from torchtrain.utils import METRICS_FILE

GIB = 2**30

# Dense bf16 peaks in FLOP/s, from the makers' data sheets; the first name found in the device's counts.
PEAK_BF16_FLOPS = (
    ("H100 NVL", 835e12),
    ("H100 PCIe", 756e12),
    ("H100", 989e12),
    ("H200", 989e12),
    ("B200", 2250e12),
    ("A100", 312e12),
    ("L40S", 362e12),
    ("MI300X", 1307e12),
)


# The full line on the screen, between step and remaining time: name, key in metrics.jsonl, format and colour.
COLUMNS = (
    ("loss", "loss", "{:.4f}", GREEN),
    ("grad_norm", "grad_norm", "{:.3f}", YELLOW),
    ("lr", "lr", "{:.2e}", ""),
    ("tok/s", "tokens_per_second", "{:,.0f}", BLUE),
    ("mfu", "mfu", "{:.1%}", ""),
    ("mem", "memory_gib", "{:.2f} GiB", ""),
    ("data", "data_time_pct", "{:.1f}%", ""),
    ("val_loss", "val_loss", "{:.4f}", GREEN),
    ("bits/byte", "val_bits_per_byte", "{:.4f}", GREEN),
)


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The device's peak in FLOP/s for this compute precision, or None where it is not known (every CPU)."""
    if device.type == "cpu" or dtype != torch.bfloat16:
        return None
    name = torch.get_device_module(device).get_device_name(device)
    return next((peak for known, peak in PEAK_BF16_FLOPS if known in name), None)


def peak_memory_gib(device: torch.device) -> float:
    """Most memory this rank has held: allocated on the accelerator, or resident in RAM on a CPU."""
    if device.type == "cpu":
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return (
            peak if sys.platform == "darwin" else peak * 1024
        ) / GIB  # KiB on Linux, bytes on macOS
    return torch.accelerator.max_memory_allocated(device) / GIB


@dataclass(frozen=True)
class StepSummary:
    """One optimizer step of the whole job, the same on every rank."""

    step: int
    loss: float
    """Mean over the valid labels of the global batch, nats a token."""
    max_loss: float
    """Largest mean loss of one sequence of the global batch."""
    grad_norm: float
    """Norm of the full model's gradient, before clipping."""
    lr: float
    """The rate the step used."""
    tokens_seen: int
    memory_gib: float
    """Peak, worst rank."""
    data_time_s: float
    """Time the step waited for data, worst rank."""


class Stopwatch:
    """Times a step and the part of it that waited for data."""

    def __init__(self) -> None:
        self.step_started = time.perf_counter()
        self.data_time_s = 0.0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time inside as waiting."""
        started = time.perf_counter()
        yield
        self.data_time_s += time.perf_counter() - started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out of the step."""
        started = time.perf_counter()
        yield
        self.step_started += time.perf_counter() - started

    def elapsed(self) -> float:
        """Seconds since the step began."""
        return time.perf_counter() - self.step_started


@dataclass
class MetricsLogger:
    """Rank 0's voice. A window is the steps since the last full line; a process's first step is never in one,
    since it warms up (allocation, autotuning, compilation)."""

    config: JobConfig
    run_folder: Path
    """Where metrics.jsonl, `tb/` and `wandb/` go."""
    facts: dict[str, Any]
    """What run.json says of the run: tokens_per_step, and first_step, the one after those already taken."""
    flops_per_token: float
    """Of the model, forward and backward."""
    peak_flops: float | None
    """Of all devices of the job, FLOP/s; None leaves MFU out."""

    def __post_init__(self) -> None:
        self.section, self.log_lr = self.config.metrics, self.config.lr_scheduler.log_lr
        self.total_steps, self.first_step = self.config.training.steps, self.facts["first_step"]
        self.colour = use_colour(self.section.disable_color_printing)
        self.window: list[tuple[float, float]] = []  # (step time, data time) in seconds
        self.jsonl = open(self.run_folder / METRICS_FILE, "a", encoding="utf-8")  # noqa: SIM115 (open for the whole run)
        self.tensorboard = self._open_tensorboard() if self.section.enable_tensorboard else None
        self.wandb = self._open_wandb() if self.section.enable_wandb else None

    def log(
        self, summary: StepSummary, stopwatch: Stopwatch, validated: Mapping[str, float | None]
    ) -> None:
        """Report one step: in full at every `log_freq` steps, at the last and with what was `validated`.

        Else step and rate alone.
        """
        step_time = stopwatch.elapsed()
        if summary.step != self.first_step:
            self.window.append((step_time, summary.data_time_s))
        if (
            summary.step % self.section.log_freq
            and summary.step != self.total_steps
            and not validated
        ):
            if self.log_lr:
                logger.info(
                    self._line([self._progress(summary.step), ("lr", f"{summary.lr:.2e}", "")])
                )
            return
        record = {**self._record(summary, step_time), **validated}
        self.jsonl.write(json.dumps(record) + "\n")
        self.jsonl.flush()
        scalars = {
            name: value for name, value in record.items() if name != "step" and value is not None
        }
        if self.tensorboard is not None:
            for name, value in scalars.items():
                self.tensorboard.add_scalar(name, value, summary.step)
            self.tensorboard.flush()  # a killed run then lacks nothing up to its last checkpoint
        if self.wandb is not None:
            self.wandb.log(scalars, step=summary.step)
        logger.info(self._describe(record))
        self.window.clear()

    def close(self) -> None:
        """Write out what is buffered."""
        self.jsonl.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()

    def _record(self, summary: StepSummary, step_time: float) -> dict[str, Any]:
        """The line of metrics.jsonl; throughput is null where only the first step could tell."""
        steps = self.window or [(step_time, summary.data_time_s)]
        total_time, data_time = sum(step for step, _ in steps), sum(data for _, data in steps)
        tokens_per_second = (
            self.facts["tokens_per_step"] * len(steps) / total_time if self.window else None
        )
        mfu = None
        if tokens_per_second is not None and self.peak_flops is not None:
            mfu = tokens_per_second * self.flops_per_token / self.peak_flops
        record = asdict(summary)
        del record["data_time_s"]
        return record | {
            "tokens_per_second": tokens_per_second,
            "mfu": mfu,
            "data_time_pct": 100 * data_time / total_time,
            "step_time_s": total_time / len(steps),
        }

    def _describe(self, record: dict[str, Any]) -> str:
        """The line on the screen."""
        parts = [self._progress(record["step"])]
        for name, key, form, colour in COLUMNS:
            if record.get(key) is not None and (key != "lr" or self.log_lr):
                parts.append((name, form.format(record[key]), colour))
        if record["tokens_per_second"] is not None:
            left = (self.total_steps - record["step"]) * record["step_time_s"]
            parts.append(("eta", str(timedelta(seconds=round(left))), ""))
        return self._line(parts)

    def _progress(self, step: int) -> tuple[str, str, str]:
        return "step", f"{step:>{len(str(self.total_steps))}}/{self.total_steps}", BOLD

    def _line(self, parts: list[tuple[str, str, str]]) -> str:
        if not self.colour:
            return "  ".join(f"{name} {value}" for name, value, _ in parts)
        return "  ".join(
            f"{DIM}{name}{RESET} {colour}{value}{RESET}" for name, value, colour in parts
        )

    def _open_tensorboard(self) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an interrupted run wrote past the step it resumes from: one curve, no doubling back.
        return SummaryWriter(
            str(self.run_folder / self.section.save_tb_folder), purge_step=self.first_step
        )

    def _open_wandb(self) -> Any:
        try:
            import wandb
        except ImportError:
            raise UserError(
                "metrics.enable_wandb = true needs the package wandb: pip install wandb"
            ) from None
        folder = self.run_folder / "wandb"
        folder.mkdir(exist_ok=True)
        id_file = folder / "run-id"
        if not id_file.exists():
            id_file.write_text(uuid.uuid4().hex)
        # The same id again continues the same run's curves. Project, entity and mode come from WANDB_* variables.
        config = {**self.config.model_dump(mode="json"), "run": self.facts}
        return wandb.init(
            dir=str(self.run_folder), id=id_file.read_text(), resume="allow", config=config
        )
