"""Measured rates of a machine, and the minimal work of a TopK training step.

Letters: N tokens, D d_in, M num_latents, K k.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import checkout  # noqa: F401  saetrain, from a plain checkout too
import torch
from timing import milliseconds

from saetrain.kernels.dense import Product

OptimizerName = Literal["signum", "adam"]
STAGES = ("encoder + selection", "decode", "backward", "update")


@dataclass(frozen=True)
class Ceilings:
    """Highest measured rates of this machine."""

    operations: float
    """A second, of a large product."""
    bytes: float
    """A second, read and written, of a large copy."""

    def __str__(self) -> str:
        return (
            f"ceilings, measured in this run: product {self.operations / 1e12:.3g} TFLOP/s, "
            f"copy {self.bytes / 1e9:.4g} GB/s, read and written"
        )


def measure_ceilings(device: torch.device, *, small: bool) -> Ceilings:
    """A square product in the dtype of products, and a copy much larger than any cache.

    On a CPU the faster of two libraries' products: which one that is depends on the processor.
    """
    on_cuda = device.type == "cuda"
    side = 8192 if on_cuda else (256 if small else 2048)
    dtype = torch.bfloat16 if on_cuda else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    count = 2**29 if on_cuda else (2**20 if small else 2**26)
    source = torch.randn(count, device=device)
    target = torch.empty_like(source)
    others = Product(b, b[0], side)
    product = min(_median(lambda: a @ b, device), _median(lambda: others(a), device))
    copy = _median(lambda: target.copy_(source), device)
    return Ceilings(2 * side**3 / product * 1e3, 8 * count / copy * 1e3)


def _median(run: Callable[[], object], device: torch.device) -> float:
    return statistics.median(milliseconds(run, device) for _ in range(10))


@dataclass(frozen=True)
class Work:
    """Floating operations, and bytes that must move if each number is read and written once."""

    operations: float
    bytes: float

    def floor(self, operations_a_second: float, bytes_a_second: float) -> float:
        """Return the minimal time of the work in milliseconds."""
        return 1e3 * max(self.operations / operations_a_second, self.bytes / bytes_a_second)


def work_of(
    sizes: tuple[int, int, int, int], dtype: torch.dtype, optimizer: OptimizerName, hit: int
) -> dict[str, Work]:
    """Return the minimal work of each stage.

    Selection needs no [N, M] buffer, so none is counted. Gradients of the weights are float32 and
    written whole, so that they can be summed over ranks or measured by norm.

    Args:
        sizes: (N, D, M, K).
        dtype: of products.
        optimizer: which.
        hit: latents that are used by some token of the batch.
    """
    N, D, M, K = sizes
    e = dtype.itemsize
    weights, rows, pairs = M * D, N * D, N * K
    chosen = pairs * (e + 8)  # acts and indices
    copies = e if e < 4 else 0
    state = {"signum": 12 + 8, "adam": 16 + 12}[optimizer]
    stages = (
        Work(2 * rows * M, (rows + weights) * e + chosen),
        Work(2 * pairs * D, (hit * D + rows) * e + chosen),
        Work(6 * pairs * D, (hit * D + 3 * rows) * e + 2 * chosen + 8 * weights),
        Work(0, 2 * weights * (state + copies)),
    )
    return dict(zip(STAGES, stages, strict=True))
