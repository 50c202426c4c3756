"""Steps given to a MetricsLogger, and what it has written of them."""

import json

from torchtrain.config.schema import Metrics
from torchtrain.logging_utils import init_logging
from torchtrain.metrics import MetricsLogger, StepSummary, Stopwatch


class FixedStopwatch(Stopwatch):
    """A step that took this long."""

    def __init__(self, seconds):
        super().__init__()
        self.seconds = seconds

    def elapsed(self):
        return self.seconds


def summary(step, **changes):
    values = {
        "step": step,
        "loss": 7.0 - step / 10,
        "max_loss": 8.0,
        "valid_labels": 90,
        "grad_norm": 1.25,
        "lr": 8e-4,
        "tokens_seen": 100 * step,
        "memory_gib": 0.5,
        "data_time_s": 0.1,
    }
    return StepSummary(**{**values, **changes})


def metrics_logger(folder, section=None, *, resumed_step=0, peak_flops=None, log_lr=True, total=6):
    return MetricsLogger(
        section=section or Metrics(),
        run_folder=folder,
        total_steps=total,
        first_step=resumed_step + 1,
        tokens_per_step=100,
        flops_per_token=10.0,
        peak_flops=peak_flops,
        log_lr=log_lr,
        description={"training": {"steps": total}},
    )


def log(metrics, steps, validated=None, **changes):
    init_logging()  # here, since pytest gives each phase of a test a stdout of its own
    for step in steps:
        # The first step of a process takes long: it warms up.
        metrics.log(
            summary(step, **changes),
            FixedStopwatch(50.0 if step == metrics.first_step else 2.0),
            validated or {},
        )
    metrics.close()


def records(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
