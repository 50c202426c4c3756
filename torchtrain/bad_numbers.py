"""Steps whose loss or gradient is not finite, or lies far above the last ones: stop, or skip them.

All ranks judge the same numbers, those of the whole job, so they come to the same conclusion. A
step that is skipped leaves weights and optimizer as they are and counts like any other: the next
one has its own samples and its own learning rate.

Spikes are skipped as in OLMo-core's SkipStepOptimizer, https://github.com/allenai/OLMo-core.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from torchtrain.checkpoint.commit import GuardState
from torchtrain.config.schema import Training
from torchtrain.datasets.loader import DataLoader
from torchtrain.errors import NonFinite, SharedUserError
from torchtrain.logging_utils import logger
from torchtrain.metrics import StepSummary
from torchtrain.models.decoder import Decoder
from torchtrain.ranks import gathered, name_ranks
from torchtrain.shards import local

BadGradient = tuple[int, int, str]
"""Stage, place in it, and name of a parameter: they sort in the order of the model."""


class StepGuard:
    """Judges each step before its gradient reaches the weights.

    Args:
        section: the config's.
        loader: names the samples.
        parts: this rank's part of the model.
    """

    def __init__(self, section: Training, loader: DataLoader, parts: Mapping[int, Decoder]) -> None:
        self.section = section
        self.loader = loader
        self.parts = parts
        self.skipped = 0
        """Steps skipped so far."""
        self.in_a_row = 0
        """Those of them that come right before the next step."""
        self.recent: deque[tuple[float, float]] = deque(maxlen=section.spike_window)
        """Loss and gradient norm of the last steps that had finite ones, skipped or not."""

    @property
    def may_skip(self) -> bool:
        """Whether there are steps that would be skipped."""
        return self.section.on_nonfinite == "skip" or self.section.spike_deviations is not None

    def judge(self, summary: StepSummary, loss: Tensor) -> StepSummary:
        """Return the step's summary, which then says whether to skip it.

        All ranks call it. Only where something is not finite do they communicate.

        Args:
            summary: the same on all ranks.
            loss: this rank's part of it, 0-dim.

        Raises:
            NonFinite: the run is to stop, on all ranks.
            SharedUserError: the global batch has no valid label.
        """
        if summary.valid_labels == 0:
            samples = describe_samples(self.loader, summary.step)
            raise SharedUserError(
                f"step {summary.step}: no valid label in the global batch, {samples}"
            )
        fault = None
        if not is_finite(summary):
            fault = describe_origin(self.parts, loss)
        elif self.section.spike_deviations is not None:
            numbers = (summary.loss, summary.grad_norm)
            fault = find_spike(numbers, self.recent, self.section.spike_deviations)
            self.recent.append(numbers)
        if fault is None:
            self.in_a_row = 0
        else:
            self._skip(summary, fault)
        return replace(
            summary,
            skipped=fault is not None,
            skipped_steps=self.skipped if self.may_skip else None,
        )

    def _skip(self, summary: StepSummary, fault: str) -> None:
        """Count the step as skipped, and say so, unless it is to end the run."""
        self.in_a_row += 1
        self.skipped += 1
        step, limit = summary.step, self.section.max_skips
        what = (
            f"loss {summary.loss:g}, gradient norm {summary.grad_norm:g}, on "
            f"{describe_samples(self.loader, step)}; {fault}"
        )
        stops = not is_finite(summary) and self.section.on_nonfinite == "stop"
        if not stops and self.in_a_row <= limit:
            logger.warning(
                f"step {step} is skipped ({self.in_a_row} of at most {limit} in a row, "
                f"{self.skipped} in all): {what}"
            )
            return
        if not stops:
            what += f". No more than training.max_skips = {limit} steps in a row may be skipped"
        raise NonFinite(
            f"step {step}: {what}. The weights are still those of step {step - self.in_a_row}. "
            "Find the operation with --debug.detect_anomaly; a lower optimizer.lr or a longer "
            "warm-up often helps."
        )

    def state(self) -> GuardState:
        """Return what a resumed run must know."""
        return GuardState(
            skipped=self.skipped,
            in_a_row=self.in_a_row,
            recent=[list(numbers) for numbers in self.recent],
        )

    def resume(self, saved: GuardState | None) -> None:
        """Go on from a saved state; from None, an old checkpoint's, without a past."""
        if saved is not None:
            self.skipped = saved.skipped
            self.in_a_row = saved.in_a_row
            self.recent.extend((loss, norm) for loss, norm in saved.recent)


def is_finite(summary: StepSummary) -> bool:
    """Check that the step may change the weights."""
    return math.isfinite(summary.loss) and math.isfinite(summary.grad_norm)


def find_spike(
    numbers: tuple[float, float], recent: deque[tuple[float, float]], deviations: float
) -> str | None:
    """Say which of loss and gradient norm lies too far above those of the recent steps, if any.

    Args:
        numbers: the step's.
        recent: those before, without it; fewer than half of the window, or than 2, tell nothing.
        deviations: the allowed distance from their mean, in standard deviations.
    """
    assert recent.maxlen is not None
    if len(recent) < max(2, recent.maxlen // 2):
        return None
    for name, value, before in zip(
        ("loss", "gradient norm"), numbers, zip(*recent, strict=True), strict=True
    ):
        mean = math.fsum(before) / len(before)
        squares = math.fsum((each - mean) ** 2 for each in before)
        deviation = math.sqrt(squares / (len(before) - 1))
        if value - mean > deviations * deviation:
            return (
                f"the {name} lies more than {deviations:g} standard deviations above the mean of "
                f"the last {len(before)} steps ({mean:.4g}, deviation {deviation:.2g})"
            )
    return None


def describe_origin(parts: Mapping[int, Decoder], loss: Tensor) -> str:
    """Say where a step that is not finite is seen first. A collective call, off the accelerator.

    Args:
        parts: this rank's part of the model, with gradients that are reduced and not yet scaled.
        loss: this rank's part of the step's.
    """
    own = (bool(loss.isfinite().item()), find_bad_gradient(parts))
    by_rank = gathered(own)
    said = []
    ranks = [rank for rank, (finite, _) in enumerate(by_rank) if not finite]
    if ranks:
        said.append(f"the loss is not finite on {name_ranks(ranks)}")
    found = [bad for _, bad in by_rank if bad is not None]
    if found:
        first = min(found)
        ranks = [rank for rank, (_, bad) in enumerate(by_rank) if bad == first]
        said.append(
            f"the first parameter whose gradient is not finite is {first[2]}, on "
            f"{name_ranks(ranks)}"
        )
    return "; ".join(said) or "every element of the gradient is finite, but not its norm"


def find_bad_gradient(parts: Mapping[int, Decoder]) -> BadGradient | None:
    """Return the first of this rank's parameters whose gradient has an element that is not finite.

    It waits for the device, once for each parameter.
    """
    for stage, part in sorted(parts.items()):
        for place, (name, parameter) in enumerate(part.named_parameters()):
            if parameter.grad is not None and not local(parameter.grad).isfinite().all():
                return stage, place, name
    return None


def describe_samples(loader: DataLoader, step: int) -> str:
    """Return the global samples of one step, in words."""
    first = loader.samples_before(step)
    last = loader.samples_before(step + 1) - 1
    return f"global samples {first} to {last}"
