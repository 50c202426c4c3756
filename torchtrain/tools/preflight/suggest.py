"""The layouts that would be fastest of those that fit: `--suggest`.

Candidates are taken in the order of a lower bound of their time. The first ones are timed in full,
then asked whether they fit, until the best ten are known: whatever is left has a larger bound.
"""

import heapq
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from torchtrain.catalog.schedules import SCHEDULES
from torchtrain.config.checks import check
from torchtrain.config.layout import Degrees
from torchtrain.config.plans import RunPlan, plan_shape
from torchtrain.config.schema import Config
from torchtrain.config.toml import to_toml, toml_value
from torchtrain.dtypes import DTYPES
from torchtrain.errors import UserError
from torchtrain.metrics import GIB
from torchtrain.tools.preflight.block_work import Unit
from torchtrain.tools.preflight.candidates import (
    Candidate,
    Options,
    Pipeline,
    apply_options,
    list_candidates,
    list_degrees,
    plan_candidate,
)
from torchtrain.tools.preflight.devices import Device
from torchtrain.tools.preflight.links import list_groups
from torchtrain.tools.preflight.sharding import Stage
from torchtrain.tools.preflight.step_time import (
    TYPICAL,
    Parts,
    StepTime,
    find_speeds,
    keeps_gathered,
    time_step,
)
from torchtrain.tools.preflight.time_report import describe_seconds

BEST = 10
"""How many are named."""
MOST_MEASURED = 100
"""How many are asked whether they fit, which takes seconds for each."""
UNEVEN = 0.8
"""The least share of the bubble of equal stages that unequal ones can have."""
LEARNED = 0.9
"""What one candidate takes beyond its bound, so much of it others of its kind are taken to, too."""
SAME = 0.01
"""Times that differ by less count as equal: the simpler layout comes first."""


@dataclass(frozen=True)
class Suggestion:
    """A layout that fits."""

    options: Options
    config: Config
    plan: RunPlan
    terms: Mapping[str, float]
    """Seconds of a step."""
    memory: int
    """Bytes of the worst rank."""

    @property
    def seconds(self) -> float:
        """Of a step."""
        return sum(self.terms.values())


@dataclass(frozen=True)
class Search:
    """What candidates are judged by."""

    config: Config
    world_size: int
    device: Device
    measure: Callable[[Config], int]
    """Returns the bytes that the worst rank takes."""
    limit: float
    """Bytes that a rank may take."""

    def find_best(self, count: int = BEST) -> list[Suggestion]:
        """Return the fastest that fit, the best first.

        Raises:
            UserError: the global batch is not fixed, so that layouts would differ in what they
                compute; or none fits.
        """
        if self.config.training.global_batch_size == -1:
            raise UserError(
                "training.global_batch_size = -1 follows from the layout: set it, so that layouts "
                "can be compared"
            )
        found = self._find_all(count)
        if not found:
            raise UserError(
                f"no layout of {self.world_size} ranks fits into {self.limit / GIB:.1f} GiB: take "
                "more ranks or larger ones, a shorter training.seq_len, or "
                "training.enable_cpu_offload"
            )
        return found

    def _find_all(self, count: int) -> list[Suggestion]:
        bounds = {
            degrees: Bounds(self.config, degrees, self.device)
            for degrees in list_degrees(self.config, self.world_size)
        }
        queue = [(rank_of(time), each.order, False, each) for time, each in self._list(bounds)]
        heapq.heapify(queue)
        found: list[Suggestion] = []
        too_large: list[Candidate] = []
        learned: dict[tuple[str, ...], float] = {}
        measured = 0
        while queue and len(found) < count and measured < MOST_MEASURED:
            _, order, is_timed, candidate = heapq.heappop(queue)
            bound = bounds[candidate.degrees]
            factor = learned.get(candidate.kind, 1.0)
            if bound.memory(candidate, factor) > self.limit:
                continue
            if any(candidate.needs_more(each) for each in too_large):
                continue
            if not is_timed:
                seconds = self._time(candidate)
                if seconds is not None:
                    heapq.heappush(queue, (rank_of(seconds), order, True, candidate))
                continue
            measured += 1
            suggestion = self._judge(candidate)
            if suggestion.memory <= self.limit:
                found.append(suggestion)
                continue
            too_large.append(candidate)
            seen = LEARNED * bound.find_factor(candidate, suggestion.memory)
            learned[candidate.kind] = max(1.0, min(seen, learned.get(candidate.kind, seen)))
        return found

    def _list(self, bounds: Mapping[Degrees, "Bounds"]) -> Iterator[tuple[float, Candidate]]:
        """Yield the candidates that may fit, with a time that they take at least."""
        for degrees, bound in bounds.items():
            for candidate in list_candidates(self.config, degrees):
                if bound.memory(candidate) < self.limit:
                    yield bound.seconds(candidate), candidate

    def _time(self, candidate: Candidate) -> float | None:
        """Return the seconds of a step; None where the layout is not allowed."""
        config = apply_options(self.config, candidate.options)
        plan = plan_candidate(self.config, candidate, self.world_size)
        if plan is None or check(config, self.world_size):
            return None
        return time_step(config, plan, self.device, TYPICAL).total()

    def _judge(self, candidate: Candidate) -> Suggestion:
        """Return the candidate with what it takes."""
        config = apply_options(self.config, candidate.options)
        plan = plan_candidate(self.config, candidate, self.world_size)
        assert plan is not None
        terms = time_step(config, plan, self.device, TYPICAL)
        return Suggestion(candidate.options, config, plan, terms, self.measure(config))


def rank_of(seconds: float) -> int:
    """Return a number that is equal for times which a prediction cannot tell apart: within 1 %."""
    return math.floor(math.log(seconds) / math.log(1 + SAME))


class Bounds:
    """Least times and least memory of the candidates that have the same degrees."""

    def __init__(self, config: Config, degrees: Degrees, device: Device) -> None:
        self.config = config
        self.degrees = degrees
        self.shape = plan_shape(config.model)
        self.speeds = find_speeds(config, device, TYPICAL)
        self.groups = list_groups(degrees)
        self.whole = Stage.of(self.shape.layer_names, self.shape)
        self._passes: dict[tuple[int, str], tuple[float, float]] = {}
        unit = self._unit(1)
        parts = Parts.of(config, unit, self.speeds, self.groups)
        self.own = parts.sharding.count_own(self.whole) / degrees.pp
        self.gathered = self.own * self.groups.fsdp.size * unit.compute_bytes
        self.gathered -= parts.sharding.count_saved(self.whole) / degrees.pp
        # A pipeline's gradients stay whole until the last microbatch.
        self.gradients = self.own * self.groups.fsdp.size * parts.sharding.reduce_bytes
        self.activations = self._count_activations(unit)
        self.passed = unit.hidden_bytes / unit.sequence_shards
        self.logits = self._count_logits(unit) if degrees.pp == 1 else 0.0

    def _unit(self, sequences: int) -> Unit:
        return Unit.of(self.config, self.shape, self.degrees, sequences)

    def seconds(self, candidate: Candidate) -> float:
        """Return what a candidate takes at least: what it computes, and the least of bubbles."""
        forward, backward = self._time_pass(candidate)
        per_rank = self.config.training.global_batch_size // self.degrees.data_parallel
        units = per_rank / candidate.sequences
        ranks = self.degrees.pp
        busy = units * (forward + backward) / ranks
        if candidate.pipeline is None:
            return busy
        batches = per_rank / candidate.batch_size
        per_rank_stages = candidate.pipeline.stages / ranks
        bubble = (ranks - 1) * (forward + backward) / ranks / per_rank_stages
        splits = SCHEDULES[candidate.pipeline.schedule].splits_backward
        compiled = self.config.compile.enable and "model" in self.config.compile.components
        splits &= candidate.recomputation == "none" and not compiled  # else backwards are whole
        return busy + batches * (0.0 if splits else UNEVEN * bubble)

    def _time_pass(self, candidate: Candidate) -> tuple[float, float]:
        """Return a forward and a backward through the whole model."""
        key = candidate.sequences, candidate.recomputation
        if key not in self._passes:
            config = apply_options(self.config, candidate.options)
            unit = self._unit(candidate.sequences)
            passed = Parts.of(config, unit, self.speeds, self.groups).time_stage(self.whole)
            self._passes[key] = passed.forward.total(), passed.backward.total()
        return self._passes[key]

    def memory(self, candidate: Candidate, factor: float = 1.0) -> float:
        """Return what a rank takes at least; `factor` multiplies the bound of activations."""
        return self._count_fixed(candidate) + factor * self._count_kept(candidate)

    def find_factor(self, candidate: Candidate, memory: float) -> float:
        """Return the factor that explains what a candidate was found to take."""
        return (memory - self._count_fixed(candidate)) / self._count_kept(candidate)

    def _count_fixed(self, candidate: Candidate) -> float:
        """Return what states, gathered weights, whole gradients and buffers take at least."""
        training = self.config.training
        stored = DTYPES[training.dtype].itemsize
        states = 0.0 if training.enable_cpu_offload else self.own * 4 * stored
        if self.config.optimizer.name == "Muon":
            states *= 3 / 4
        if candidate.pipeline is not None:
            states += self._count_buffers(candidate.pipeline, candidate.sequences)
            states += self.gradients
            if keeps_gathered(apply_options(self.config, candidate.options)):
                states += self.gathered
        return states

    def _count_kept(self, candidate: Candidate) -> float:
        """Return what the forwards of all live microbatches keep at least."""
        live = 1
        if candidate.pipeline is not None:
            microbatches = candidate.pipeline.microbatches
            is_gpipe = candidate.pipeline.schedule == "GPipe"
            live = microbatches if is_gpipe else min(self.degrees.pp, microbatches)
        kept = self.activations[candidate.recomputation] * live / self.degrees.pp
        return (kept + self.logits) * candidate.sequences

    def _count_buffers(self, pipeline: Pipeline, sequences: int) -> float:
        """Return what a rank in the middle receives into: a buffer for each microbatch, both ways.

        (`memory.Run.count_passed_on`.)
        """
        neighbors = 2 * pipeline.stages / self.degrees.pp - (self.degrees.pp == 2)
        return pipeline.microbatches * neighbors * self.passed * sequences

    def _count_activations(self, unit: Unit) -> dict[str, float]:
        """Return what a sequence leaves in all blocks at least, by mode of recomputation.

        Every block keeps its input; without recomputation also what its products and its attention
        take and give.
        """
        shape, tp = self.shape, self.degrees.tp
        heads = 2 * (shape.n_heads + shape.n_kv_heads) * shape.width_per_head / tp
        inner = 3 * min(shape.ffn_hidden_dim, shape.width_per_expert) / tp
        block = unit.tokens * unit.compute_bytes * shape.dim / unit.sequence_shards
        widths = unit.tokens * unit.compute_bytes * (heads + inner)
        full = shape.n_layers * block
        none = shape.n_layers * (3 * block + widths)
        both = full + none
        return {
            "none": none,
            "op_all": both / 3,
            "op": both / 4,
            "2": both / 2,
            "full": full,
        }

    def _count_logits(self, unit: Unit) -> float:
        """Return what the logits of a sequence take."""
        shared = self.degrees.tp if unit.loss_parallel else 1
        return unit.tokens * self.shape.vocab_size / shared * unit.compute_bytes


def describe(found: list[Suggestion], step: StepTime) -> list[str]:
    """Return the best in words, with the options of each, and why the first beats the second."""
    lines = []
    for number, each in enumerate(found, start=1):
        mfu = step.mfu(each.seconds)
        lines.append(
            f"{number:>2}. {describe_seconds(each.seconds)} per step, MFU {100 * mfu:.0f} %, "
            f"{each.memory / GIB:.1f} GiB: {each.plan.describe_layout()}"
        )
        lines += [f"      {line}" for line in describe_options(each.options)]
    if len(found) > 1:
        lines.append(compare(found, 1))
        slower = (n for n, each in enumerate(found) if each.seconds > (1 + SAME) * found[0].seconds)
        differs = next(slower, 1)
        if differs > 1:
            lines.append(compare(found, differs))
    return lines


def describe_options(options: Options) -> list[str]:
    """Return the options as lines of TOML, by section."""
    sections: dict[str, list[str]] = {}
    for key, value in options.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, []).append(f"{name} = {toml_value(value)}")
    return [line for section, keys in sections.items() for line in (f"[{section}]", *keys)]


def compare(found: list[Suggestion], number: int) -> str:
    """Return why the first is faster than another: the terms that differ most."""
    best, other = found[0], found[number]
    gain = other.seconds - best.seconds
    text = f"1 beats {number + 1} by {describe_seconds(gain)} ({100 * gain / best.seconds:.1f} %)"
    if gain < SAME * best.seconds:
        text = f"1 and {number + 1} take the same time, as far as can be told; 1 is simpler"
    terms = sorted(best.terms.keys() | other.terms.keys())
    gains = {term: other.terms.get(term, 0.0) - best.terms.get(term, 0.0) for term in terms}
    ordered = sorted(gains.items(), key=lambda item: -abs(item[1]))
    least = 0.002 * best.seconds
    for word, sign in (("less", 1), ("more", -1)):
        named = [(name, sign * each) for name, each in ordered if sign * each > least]
        if named:
            listed = ", ".join(f"{name} ({describe_seconds(each)})" for name, each in named)
            text += f"; {word} of {listed}"
    return text


def write_config(config: Config, path: Path) -> None:
    """Write a whole config, which a run can be started with.

    Raises:
        UserError: there is a file already, or it cannot be written.
    """
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(to_toml(config))
    except FileExistsError:
        raise UserError(f"--write {path}: exists already; name another file") from None
    except OSError as fault:
        raise UserError(f"--write {path}: {fault.strerror}") from None
