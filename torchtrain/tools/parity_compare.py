"""What counts as the same model for `torchtrain.tools.parity`: differences and their limits."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tolerance:
    """The largest relative differences that rounding explains."""

    loss: float
    norm: float
    gradient: float
    """Of each parameter, ‖a − b‖ / ‖b‖ at step 1."""
    weights: float
    """The same of the weights after the last step."""


# fp32 keeps 24 bits (6e-8); layouts differ in the order of sums alone: measured up to 1e-7 in the
# loss and 7e-7 in a gradient. bf16 keeps 8 bits (4e-3), to which it rounds each product of forward
# and backward: 4e-4 and 9e-3. Adam divides a gradient by its own size, so an element whose gradient
# is little but rounding moves by up to a learning rate either way; weights have a tolerance of
# their own: 8e-6 and 6e-3 after four steps.
TOLERANCES = {
    "float32": Tolerance(loss=1e-6, norm=1e-5, gradient=1e-5, weights=5e-5),
    "bfloat16": Tolerance(loss=1e-3, norm=1e-2, gradient=3e-2, weights=2e-2),
}


@dataclass(frozen=True)
class Row:
    """A layout's line of the table; differences are None where it did not run to its end."""

    layout: str
    ranks: int
    verdict: str
    """ "same", or what is off, or why it did not run."""
    loss: float | None = None
    norm: float | None = None
    gradient: float | None = None
    weights: float | None = None
    seconds: float | None = None
    worst_gradient: str = ""
    worst_weights: str = ""


def compare(
    layout: str,
    ranks: int,
    results: dict[str, Any],
    reference: dict[str, Any],
    tolerance: Tolerance,
) -> Row:
    """Compare a layout's results with its reference's, both as `load_results` leaves them."""
    loss = max(map(relative, results["losses"], reference["losses"]))
    norm = max(map(relative, results["norms"], reference["norms"]))
    gradient, worst_gradient = worst(results["gradients"], reference["gradients"])
    weights, worst_weights = worst(results["weights"], reference["weights"])
    initial = {
        name: weight.to(results["initial"][name].dtype)
        for name, weight in reference["initial"].items()
    }
    initial_difference, worst_initial = worst(results["initial"], initial)
    faults = []
    if loss > tolerance.loss:
        faults.append("loss")
    if norm > tolerance.norm:
        faults.append("gradient norm")
    if gradient > tolerance.gradient:
        faults.append(f"gradient of {worst_gradient}")
    if weights > tolerance.weights:
        faults.append(f"weights of {worst_weights}")
    if initial_difference > 0:
        faults.append(f"initial weights of {worst_initial}")
    if results["drifted"]:
        faults.append(f"copies differ between ranks of {', '.join(results['drifted'][:3])}")
    return Row(
        layout=layout,
        ranks=ranks,
        verdict=f"OFF: {'; '.join(faults)}" if faults else "same",
        loss=loss,
        norm=norm,
        gradient=gradient,
        weights=weights,
        seconds=results["seconds"],
        worst_gradient=worst_gradient,
        worst_weights=worst_weights,
    )


def relative(value: Tensor | float, reference: Tensor | float) -> float:
    """Return ‖value − reference‖ / ‖reference‖, infinite if not finite or of another shape."""
    a = torch.as_tensor(value, dtype=torch.float64)
    b = torch.as_tensor(reference, dtype=torch.float64)
    if a.shape != b.shape:
        return math.inf
    difference = (a - b).norm().item()
    size = b.norm().item()
    if difference == 0:
        return 0.0
    return difference / size if size > 0 and math.isfinite(difference) else math.inf


def worst(values: dict[str, Tensor], reference: dict[str, Tensor]) -> tuple[float, str]:
    """Return the largest relative difference and the parameter that has it.

    A parameter that only one side has differs infinitely.
    """
    differences = []
    for name in values.keys() | reference.keys():
        if name in values and name in reference:
            differences.append((relative(values[name], reference[name]), name))
        else:
            differences.append((math.inf, name))
    return max(differences)
