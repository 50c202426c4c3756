"""A run's metrics: the line on the screen, metrics.jsonl, TensorBoard and Weights & Biases.

What each rank adds to a step, and how that becomes one number, is step_metrics.py.
"""

import json
import math
import resource
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from torchtrain.config.schema import Metrics
from torchtrain.log_files import LogFile, TensorBoard, open_wandb
from torchtrain.logging_utils import Color, line_width, logger, use_color
from torchtrain.utils import METRICS_FILE, SAMPLES_FILE, make_printable

GIB = 2**30
TEXT_MARGIN = "  | "

# NVIDIA's pages give twice that for the tensor cores, "with sparsity".
PEAK_BF16_FLOPS = (
    ("H100 NVL", 835e12),  # 1,671 TFLOPS: nvidia.com/en-us/data-center/h100
    ("H100 PCIe", 756e12),  # 1,513, its data sheet of 2022
    ("H100", 989e12),  # SXM: 1,979
    ("H200 NVL", 835e12),  # 1,671: nvidia.com/en-us/data-center/h200
    ("H200", 989e12),  # SXM: 1,979; and GH200: nvidia.com/en-us/data-center/grace-hopper-superchip
    ("GB300", 2500e12),  # 360 PFLOPS of 72: nvidia.com/en-us/data-center/gb300-nvl72
    ("B300", 2250e12),  # 36 PFLOPS of 8: nvidia.com/en-us/data-center/hgx
    ("GB200", 2500e12),  # 5 PFLOPS: nvidia.com/en-us/data-center/gb200-nvl72
    ("B200", 2250e12),  # 36 PFLOPS of 8: nvidia.com/en-us/data-center/hgx
    ("A100", 312e12),  # 624: nvidia.com/en-us/data-center/a100
    ("L40S", 362e12),  # 733: nvidia.com/en-us/data-center/l40s
    ("MI300X", 1307e12),  # 1,307.4: amd.com/en/products/accelerators/instinct/mi300/mi300x.html
    ("MI325X", 1307e12),  # 1,307.4: amd.com/en/products/accelerators/instinct/mi300/mi325x.html
)
"""Dense bf16 peaks in FLOP/s, from the makers' data sheets, by part of the device's name. The first
that matches counts."""

MIG = "MIG "
"""In the name of a slice of an NVIDIA GPU, which has an unknown share of its peak."""


@dataclass(frozen=True)
class Metric:
    """Where a metric is shown."""

    group: str
    """In TensorBoard and Weights & Biases. An added metric is named group/name."""
    label: str = ""
    """In the line on the screen; empty: it is not there."""
    form: str = "{:.4g}"
    """How its value is formatted there."""
    color: str = ""


# The trainer's own, in the order of the line on the screen: where that gets too long, its last
# columns are dropped, so the most important stand first.
FIRST_METRICS = {
    "loss": Metric("loss", "loss", "{:.4f}", Color.GREEN),
    "val_loss": Metric("validation", "val_loss", "{:.4f}", Color.GREEN),
    "val_bits_per_byte": Metric("validation", "bits/byte", "{:.4f}", Color.GREEN),
    "grad_norm": Metric("optimizer", "norm", "{:.3f}", Color.YELLOW),
    "lr": Metric("optimizer", "lr", "{:.2e}"),
    "tokens_per_second": Metric("throughput", "tok/s", "{:,.0f}", Color.BLUE),
    "mfu": Metric("throughput", "mfu", "{:.1%}"),
}
# Added metrics stand here.
LAST_METRICS = {
    "skipped_steps": Metric("optimizer", "skipped", "{}"),
    "eta": Metric("throughput", "eta", "{}"),
    "memory_gib": Metric("memory", "mem", "{:.2f}GiB"),
    "data_time_pct": Metric("throughput", "data", "{:.0f}%"),
    "max_loss": Metric("loss"),
    "skipped": Metric("optimizer"),
    "tokens_seen": Metric("throughput"),
    "step_time_s": Metric("throughput"),
    "slowest_rank": Metric("throughput"),
    "slowest_rank_excess_pct": Metric("throughput"),
}
OWN_METRICS = FIRST_METRICS | LAST_METRICS


def find_peak_flops(
    device: torch.device, dtype: torch.dtype, given_tflops: float | None = None
) -> float | None:
    """Return the device's peak in FLOP/s for this compute precision, None if unknown (any CPU).

    What is given (`metrics.peak_tflops`) counts before what the device's name says.
    """
    if given_tflops is not None:
        return given_tflops * 1e12
    if device.type == "cpu" or dtype != torch.bfloat16:
        return None
    device_name = torch.get_device_module(device).get_device_name(device)
    if MIG in device_name:
        return None
    return next((peak for known, peak in PEAK_BF16_FLOPS if known in device_name), None)


def peak_memory_gib(device: torch.device) -> float:
    """Return the most memory this rank has held, in GiB.

    On an accelerator it is what was allocated, on a CPU what was resident.
    """
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device) / GIB
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux KiB
    return peak * unit / GIB


def reset_peak_memory(device: torch.device) -> None:
    """Let an accelerator's peak begin anew; a CPU's is that of the whole process."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)


@dataclass(frozen=True)
class StepSummary:
    """One optimizer step of the whole job, the same on every rank."""

    step: int
    loss: float
    """Mean over the valid labels of the global batch, nats per token."""
    max_loss: float
    """Largest mean loss of one sequence of the global batch."""
    valid_labels: int
    """Of the global batch."""
    grad_norm: float
    """Norm of the full model's gradient, before clipping."""
    lr: float
    """The rate the step used."""
    tokens_seen: int
    memory_gib: float
    """Peak of the worst rank."""
    data_time_s: float
    """Time the step waited for data, on the worst rank."""
    own_times_s: Sequence[float] = ()
    """What each rank had to do itself: see `Stopwatch.own_time_s`."""
    skipped: bool = False
    """Whether the step leaves the weights as they were."""
    skipped_steps: int | None = None
    """Steps skipped so far, with this one; None where none would be."""
    added: Mapping[str, float] = field(default_factory=dict)
    """What the model, the optimizer or a user's code has added, by name."""


@dataclass(frozen=True)
class TextSample:
    """What the model has written."""

    prompt: str
    text: str
    """What follows the prompt."""


class Stopwatch:
    """Times a step and the part of it that waited for data."""

    def __init__(self) -> None:
        self.step_started = time.perf_counter()
        self.data_time_s = 0.0
        self._ran_before_s = measure_running()

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Count the time inside as waiting."""
        started = time.perf_counter()
        ran_s = measure_running()
        yield
        self.data_time_s += time.perf_counter() - started
        self._ran_before_s += measure_running() - ran_s

    @property
    def own_time_s(self) -> float:
        """The part of the step in which this rank has not waited for others.

        It waited for its data, or its thread ran, or would have if it had had a core. Ranks whose
        collectives wait for each other take equally long; this tells them apart. With an
        accelerator it is the wait for data alone: the thread that waits for the device, and so for
        other ranks, runs.
        """
        if torch.accelerator.is_available():
            return self.data_time_s
        return self.data_time_s + measure_running() - self._ran_before_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the time inside out of the step."""
        started = time.perf_counter()
        yield
        self.step_started += time.perf_counter() - started

    def elapsed(self) -> float:
        """Return the seconds since the step began."""
        return time.perf_counter() - self.step_started


def measure_running() -> float:
    """Return for how many seconds this thread has run, or (Linux) waited for a core to run on."""
    queued_s = 0.0
    with suppress(OSError), open("/proc/thread-self/schedstat", "rb", buffering=0) as file:
        queued_s = int(file.read().split()[1]) / 1e9
    return time.thread_time() + queued_s


def make_finite(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with None for what is not finite: JSON has no NaN."""
    return {
        name: None if value is not None and not math.isfinite(value) else value
        for name, value in record.items()
    }


def find_slowest(own_times_s: Sequence[Sequence[float]], total_time_s: float) -> dict[str, float]:
    """Return which rank had most to do itself, and by how much more than the ranks' median.

    Args:
        own_times_s: of each step, by rank.
        total_time_s: of these steps; the excess is a percentage of it.
    """
    totals = [sum(of_rank) for of_rank in zip(*own_times_s, strict=True)]
    if len(totals) < 2:
        return {}
    most = max(totals)
    excess = most - statistics.median_low(totals)
    return {
        "slowest_rank": totals.index(most),
        "slowest_rank_excess_pct": 100 * excess / total_time_s,
    }


@dataclass(kw_only=True)
class MetricsLogger:
    """Logs the steps of a run; it exists on rank 0 only.

    Throughput is that of a window: the steps since the last full line. A process's first step is in
    no window, since it warms up (allocation, autotuning, compilation).
    """

    section: Metrics
    run_folder: Path
    """Where metrics.jsonl, `tb/` and `wandb/` go."""
    total_steps: int
    first_step: int
    """The one after those already taken."""
    tokens_per_step: int
    """Of the whole job."""
    flops_per_token: float
    """Of the model, forward and backward."""
    peak_flops: float | None
    """Of all devices of the job, in FLOP/s; None leaves MFU out."""
    log_lr: bool
    """Print step and learning rate of the steps that get no full line."""
    description: Mapping[str, Any]
    """Of the run, for Weights & Biases: its config and what was derived from it."""

    def __post_init__(self) -> None:
        self.color = use_color(sys.stdout, disabled=self.section.disable_color_printing)
        # Of each step: its time, that of waiting for data, each rank's own, in seconds.
        self.window: list[tuple[float, float, Sequence[float]]] = []
        self.metrics_file = LogFile(self.run_folder / METRICS_FILE)
        self.samples_file = LogFile(self.run_folder / SAMPLES_FILE)
        self.tensorboard = None
        if self.section.enable_tensorboard:
            name = self.section.save_tb_folder
            self.tensorboard = TensorBoard(self.run_folder, name, self.first_step)
        self.wandb = None
        if self.section.enable_wandb:
            self.wandb = open_wandb(self.run_folder, self.description)

    def log(
        self, summary: StepSummary, stopwatch: Stopwatch, validated: Mapping[str, float | None]
    ) -> None:
        """Report one step, in full if it is one of `log_freq`, the last, validated or skipped.

        Of any other step, print at most the learning rate.
        """
        step = summary.step
        step_time = stopwatch.elapsed()
        if step != self.first_step:
            self.window.append((step_time, summary.data_time_s, summary.own_times_s))
        is_turn = step % self.section.log_freq == 0 or step == self.total_steps
        if is_turn or validated or summary.skipped:
            self._log_in_full({**self._make_record(summary, step_time), **validated})
            self.window.clear()
        elif self.log_lr:
            rate = ("lr", f"{summary.lr:.2e}", "")
            logger.info(self._format_line([self._format_progress(step), rate]))

    def amend(self, step: int, validated: Mapping[str, float | None]) -> None:
        """Add a validation to the last line of metrics.jsonl, that of a step already logged."""
        record = {"step": step, **make_finite(validated)}
        self.metrics_file.amend(lambda line: json.dumps({**json.loads(line), **record}))
        self._show(record)

    def log_texts(self, step: int, samples: Sequence[TextSample]) -> None:
        """Report what the model has written after a step."""
        self.samples_file.append(json.dumps({"step": step, **asdict(each)}) for each in samples)
        shown = [f"after step {step} the model writes:"]
        codes = {}
        for number, sample in enumerate(samples, start=1):
            lines = make_printable(sample.prompt + sample.text).rstrip().split("\n")
            shown += [TEXT_MARGIN + line for line in lines]
            # Markdown sets it as it is.
            codes[f"text_samples/{number}"] = "\n".join("    " + line for line in lines)
        if self.tensorboard is not None:
            self.tensorboard.add_texts(codes, step)
        logger.info("\n".join(line[: line_width()] for line in shown))

    def sync(self) -> None:
        """Make safe from a power cut what was logged."""
        self.metrics_file.sync()
        self.samples_file.sync()

    def close(self) -> None:
        """Write out what is buffered, and say what could not be written."""
        self.metrics_file.close()
        self.samples_file.close()
        if self.tensorboard is not None:
            self.tensorboard.close()
        if self.wandb is not None:
            self.wandb.finish()

    def _log_in_full(self, record: dict[str, Any]) -> None:
        record = make_finite(record)
        self.metrics_file.append([json.dumps(record)])
        self._show(record)

    def _show(self, record: Mapping[str, Any]) -> None:
        """Report what metrics.jsonl has wherever else it is to be seen."""
        step = record["step"]
        scalars = {}
        for name, value in record.items():
            if name != "step" and value is not None:
                tag = f"{OWN_METRICS[name].group}/{name}" if name in OWN_METRICS else name
                scalars[tag] = value
        if self.tensorboard is not None:
            self.tensorboard.add_scalars(scalars, step)
        if self.wandb is not None:
            self.wandb.log(scalars, step=step)
        logger.info(self._format_record(record))

    def _make_record(self, summary: StepSummary, step_time: float) -> dict[str, Any]:
        """Return the line of metrics.jsonl; throughput is None where only the first step counts."""
        steps = self.window or [(step_time, summary.data_time_s, summary.own_times_s)]
        total_time = sum(step for step, _, _ in steps)
        data_time = sum(data for _, data, _ in steps)
        tokens_per_second = None
        mfu = None
        if self.window:
            tokens_per_second = self.tokens_per_step * len(steps) / total_time
            if self.peak_flops is not None:
                mfu = tokens_per_second * self.flops_per_token / self.peak_flops
        record = asdict(summary)
        del record["valid_labels"], record["data_time_s"]
        del record["own_times_s"], record["added"]
        if not summary.skipped:
            del record["skipped"]
        if summary.skipped_steps is None:
            del record["skipped_steps"]
        record |= {
            "tokens_per_second": tokens_per_second,
            "mfu": mfu,
            "data_time_pct": 100 * data_time / total_time,
            "step_time_s": total_time / len(steps),
        }
        record |= find_slowest([own for _, _, own in steps], total_time)
        return record | dict(summary.added)

    def _format_record(self, record: Mapping[str, Any]) -> str:
        """Return the line on the screen."""
        values = dict(record)
        if record.get("tokens_per_second") is not None:
            seconds = (self.total_steps - record["step"]) * record["step_time_s"]
            values["eta"] = timedelta(seconds=round(seconds))
        # Those of single layers, group/layer/name, are too many for the screen.
        added = {key: Metric("added", label=key) for key in record if key.count("/") == 1}
        cells = [self._format_progress(record["step"])]
        for key, metric in (FIRST_METRICS | added | LAST_METRICS).items():
            value = values.get(key)
            if value is not None and metric.label:
                cells.append((metric.label, metric.form.format(value), metric.color))
        return self._format_line(cells)

    def _format_progress(self, step: int) -> tuple[str, str, str]:
        return "step", f"{step:>{len(str(self.total_steps))}}/{self.total_steps}", Color.BOLD

    def _format_line(self, cells: list[tuple[str, str, str]]) -> str:
        """Return label, value and color of each cell as one line that does not wrap."""
        room = line_width()
        shown: list[str] = []
        for label, value, color in cells:
            room -= len(f"{label} {value}")
            if room < 0 and shown:
                break
            room -= 2  # between this cell and the next
            if self.color:
                shown.append(f"{Color.DIM}{label}{Color.RESET} {color}{value}{Color.RESET}")
            else:
                shown.append(f"{label} {value}")
        return "  ".join(shown)
