"""The speed of matrix products alone: what a training step's speed is held against.

Run as a program, in the environment of a rank:

    python -m torchtrain.tools.bench.products DEVICE DTYPE TOKENS DIM WIDTH

It prints FLOP/s as JSON, of a layer [TOKENS, DIM] to [TOKENS, WIDTH] and the two products of its
gradients, and of square matrices.
"""

import json
import statistics
import sys
import time

import torch
from torch import Tensor

from torchtrain.dtypes import DTYPES

SECONDS = 0.4
"""Time for each product."""
SQUARE = {"cpu": 2048, "cuda": 8192}


def measure_product(a: Tensor, b: Tensor) -> float:
    """Return the FLOP/s of a @ b, [M, K] and [K, N]: 2·M·K·N in the median time of many."""
    out = a @ b
    times: list[float] = []
    began = time.perf_counter()
    while not times or time.perf_counter() - began < SECONDS:
        if a.device.type != "cpu":
            torch.accelerator.synchronize()
        started = time.perf_counter()
        torch.mm(a, b, out=out)
        if a.device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - started)
    return 2.0 * a.shape[0] * a.shape[1] * b.shape[1] / statistics.median(times)


def measure_products(
    device: str, dtype: torch.dtype, sizes: tuple[int, int, int]
) -> dict[str, float]:
    """Return the FLOP/s of each product, by name."""
    tokens, dim, width = sizes
    square = SQUARE[device]

    def random(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=device).to(dtype)

    x, weight, gradient = random(tokens, dim), random(width, dim), random(tokens, width)
    return {
        "square": measure_product(random(square, square), random(square, square)),
        "forward": measure_product(x, weight.T),
        "gradient of the input": measure_product(gradient, weight),
        "gradient of the weight": measure_product(gradient.T, x),
    }


def main(arguments: list[str]) -> None:
    """Print the speeds."""
    device, dtype, *sizes = arguments
    tokens, dim, width = map(int, sizes)
    print(json.dumps(measure_products(device, DTYPES[dtype], (tokens, dim, width))))


if __name__ == "__main__":
    main(sys.argv[1:])
