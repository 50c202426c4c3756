"""Metrics by name: each rank adds values in a step, and one small collective reduces them all.

`metrics.add("router/max_load", load, reduce="max")` is all that a new metric needs: it appears in
metrics.jsonl, in TensorBoard, in Weights & Biases and on the screen. A module of the model or an
optimizer has metrics of its own by inheriting from `MetricSource`.
"""

import zlib
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from torchtrain.errors import SharedUserError, UserError
from torchtrain.ranks import gather_rows, gathered, together

Reduction = Literal["sum", "mean", "max", "min"]

FIRST_GATHER = 64
"""Numbers per rank in the collective of every step; only what goes beyond costs a second one."""

FAILED = -1.0
"""The signature of a rank whose metrics could not be collected."""


class MetricSource:
    """A module of the model, or an optimizer, that has metrics of its own.

    Every rank must add the same names with the same reductions. With pipeline parallelism, a module
    that only some stages hold therefore leaves the adding to one that they all hold.
    """

    def add_metrics(self, metrics: "StepMetrics") -> None:
        """Add this rank's values of the step.

        The trainer calls it once per step on every rank, when gradients are reduced and clipped
        and the weights are not updated yet.
        """
        raise NotImplementedError


def find_metric_sources(
    parts: Iterable[nn.Module], optimizer: torch.optim.Optimizer
) -> list[MetricSource]:
    """Return the modules of `parts` that have metrics, and the optimizer if it has."""
    candidates: list[object] = []
    for part in parts:
        candidates.extend(part.modules())
    candidates.append(optimizer)
    return [candidate for candidate in candidates if isinstance(candidate, MetricSource)]


class _Value:
    """What this rank has added under one name; a mean keeps its sum and its number of terms."""

    def __init__(self, reduce: Reduction, term: Tensor) -> None:
        self.reduce = reduce
        self.total = term
        self.count = 1

    def include(self, term: Tensor) -> None:
        self.count += 1
        if self.reduce == "max":
            self.total = torch.maximum(self.total, term)
        elif self.reduce == "min":
            self.total = torch.minimum(self.total, term)
        else:
            self.total = self.total + term


class StepMetrics:
    """The metrics that one rank adds in one step."""

    def __init__(self) -> None:
        self._values: dict[str, _Value] = {}
        self._fault: BaseException | None = None
        self._by_rank: dict[str, Tensor] = {}

    def add(self, name: str, value: float | Tensor, *, reduce: Reduction) -> None:
        """Add this rank's value; several values of one name in a step are reduced like the ranks'.

        Args:
            name: `group/name`, such as `router/entropy`. (The trainer's own have no group.)
            value: a number, or a tensor of one element, which stays on its device until the step's
                collective. Of a DTensor, add its `full_tensor()`.
            reduce: how values become one. The mean is that of all values added, whichever rank
                added how many. Ranks that share samples each count.

        Raises:
            UserError: the reduction is unknown, or not that of an earlier value of this name.
        """
        if reduce not in ("sum", "mean", "max", "min"):
            raise UserError(
                f"metric {name!r}: reduce = {reduce!r} is not one of sum, mean, max, min"
            )
        term = torch.as_tensor(value).detach().double().reshape(())
        earlier = self._values.get(name)
        if earlier is None:
            self._values[name] = _Value(reduce, term)
        elif earlier.reduce == reduce:
            earlier.include(term)
        else:
            raise UserError(
                f"metric {name!r} was added with reduce = {earlier.reduce!r} and with {reduce!r}"
            )

    def collect(self, sources: Iterable[MetricSource]) -> None:
        """Add what `sources` have to say; a fault of theirs is raised by `reduce`, on all ranks."""
        added = StepMetrics()
        try:
            for source in sources:
                source.add_metrics(added)
            for name in added._values:
                group, slash, rest = name.partition("/")
                if not (group and slash and rest):
                    raise UserError(f"metric {name!r}: its name must be group/name")
        except Exception as fault:
            self._fault = fault
        self._values.update(added._values)

    def reduce(self, device: torch.device) -> dict[str, float]:
        """Return each metric of the whole job; every rank must call it, and gets the same.

        They come in the order in which this rank has added them, the most important first on the
        screen.

        The ranks' values are gathered and combined in rank order, so a sum does not depend on the
        order of arrival.

        Raises:
            SharedUserError: the ranks have added different metrics.
            PeerFault: a source of another rank failed; that rank raises its own fault.
        """
        names = sorted(self._values)
        specs = [f"{name} ({self._values[name].reduce})" for name in names]
        signature = FAILED if self._fault else float(zlib.crc32("\n".join(specs).encode()))
        terms = [torch.tensor(signature, dtype=torch.float64)]
        for name in names:
            value = self._values[name]
            terms.append(value.total)
            if value.reduce == "mean":
                terms.append(torch.tensor(value.count, dtype=torch.float64))
        row = torch.stack([_put(term, device) for term in terms])

        by_rank = _gather(row[:FIRST_GATHER], FIRST_GATHER)
        signatures = by_rank[:, 0].tolist()
        if FAILED in signatures or len(set(signatures)) > 1:
            together(self._raise_fault)
            raise SharedUserError(_describe_difference(gathered(specs)))
        if len(row) > FIRST_GATHER:
            rest = _gather(row[FIRST_GATHER:], len(row) - FIRST_GATHER)
            by_rank = torch.cat([by_rank, rest], dim=1)
        reduced = self._combine(names, by_rank[:, 1:])
        return {name: reduced[name] for name in self._values}

    def of_each_rank(self, name: str) -> list[float]:
        """Return what each rank had added under a name (of a mean, the sum), after `reduce`."""
        values: list[float] = self._by_rank[name].tolist()
        return values

    def _raise_fault(self) -> None:
        if self._fault is not None:
            raise self._fault

    def _combine(self, names: list[str], by_rank: Tensor) -> dict[str, float]:
        """Return each metric from the columns [R, …] of the ranks' values."""
        results = []
        column = 0
        for name in names:
            reduce = self._values[name].reduce
            values = self._by_rank[name] = by_rank[:, column]
            column += 1
            if reduce == "max":
                results.append(values.max())
            elif reduce == "min":
                results.append(values.min())
            elif reduce == "sum":
                results.append(values.sum())
            else:
                results.append(values.sum() / by_rank[:, column].sum())
                column += 1
        numbers = torch.stack(results).tolist() if results else []
        return dict(zip(names, numbers, strict=True))


def _put(number: Tensor, device: torch.device) -> Tensor:
    """Return a 0-dim tensor on `device`; a host's goes there as a fill's argument.

    A copy of it would wait for the device.
    """
    if number.device == device:
        return number
    return torch.full((), number.item(), dtype=torch.float64, device=device)


def _gather(row: Tensor, width: int) -> Tensor:
    """Return the rows of all ranks, [R, width]; shorter ones are filled up with zeros.

    They come on the host, which waits for them.
    """
    padded = row.new_zeros(width)
    padded[: len(row)] = row
    return gather_rows(padded).cpu()


def _describe_difference(specs_by_rank: list[list[str]]) -> str:
    """Return what the first rank that differs from rank 0 has added otherwise."""
    first = set(specs_by_rank[0])
    for rank, specs in enumerate(specs_by_rank):
        if set(specs) != first:
            missing = ", ".join(sorted(first - set(specs))) or "nothing"
            extra = ", ".join(sorted(set(specs) - first)) or "nothing"
            return (
                f"the ranks have added different metrics: only rank 0 has {missing}; only rank "
                f"{rank} has {extra}. Every rank must add the same names with the same reductions"
            )
    raise AssertionError("the signatures differ, the metrics do not")
