"""How long does a whole training step take, ours against sparsify's?

    python benchmarks/bench_train_step.py [--pairs 20]

Both train from the same start on the same rows with the same optimiser: forward, backward, update,
unit norm, dead-latent counts. Weights are float32; on CUDA our product is TF32, while sparsify's
forward pass is bfloat16 by its own autocast. Contenders take turns, so that a slow minute of the
machine meets both. Letters: N tokens, D d_in, M num_latents, K k.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from common import machine, print_table
from rivals import Contender, Setting, ours, sparsify
from torch import Tensor

SIZES = {
    "cpu": [(2048, 576, 4608, 32), (2048, 576, 18432, 32)],
    "cuda": [(8192, 768, 24576, 32), (8192, 2048, 65536, 32)],
}
WARM_UP = 2


def main() -> None:
    """Measure every size and optimiser of the device, then print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20, help="interleaved timings of each side")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":  # as both trainers do
        torch.set_float32_matmul_precision("high")
    lines = []
    for N, D, M, K in SIZES[device.type]:
        x = rows(N, D, device)
        for optimizer in ("signum", "adam"):
            setting = Setting(D, M, K, optimizer, 1000, 100, 0, device)
            mean, variance = x.mean(0), float((x - x.mean(0)).pow(2).sum() / N)
            sides = [ours(setting, mean, variance), sparsify(setting)]
            times = interleave(sides, x, options.pairs, device)
            ratios = [theirs / our for our, theirs in zip(*times, strict=True)]
            medians = [statistics.median(side) for side in times]
            low, middle, high = statistics.quantiles(ratios, n=4)
            lines.append(
                [
                    f"({N}, {D}, {M}, {K})",
                    optimizer,
                    f"{medians[0]:.1f}",
                    f"{medians[1]:.1f}",
                    f"**{middle:.2f}x**",
                    f"{low:.2f} to {high:.2f}",
                ]
            )
    print(f"{machine('triton', 'eai-sparsify')}, {torch.get_num_threads()} threads\n")
    header = ["(N, D, M, K)", "optimiser", "ours, ms", "sparsify, ms", "faster", "quartiles"]
    print_table(header, lines)


def rows(N: int, D: int, device: torch.device) -> Tensor:
    """Rows with some structure: 16 of 4 D directions each, a mean, some noise. [N, D]"""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4 * D, D, generator=generator) / D**0.5
    chosen = torch.randint(4 * D, (N, 16), generator=generator)
    noise = 0.01 * torch.randn(N, D, generator=generator)
    made: Tensor = directions[chosen].sum(dim=1) + 0.5 + noise
    return made.to(device)


def interleave(
    sides: list[Contender], x: Tensor, pairs: int, device: torch.device
) -> list[list[float]]:
    """Milliseconds of each side's steps, taken in turns."""
    times: list[list[float]] = [[] for _ in sides]
    for number in range(WARM_UP + pairs):
        for (step, _), taken in zip(sides, times, strict=True):
            _synchronise(device)
            began = time.perf_counter()
            step(x, number)
            _synchronise(device)
            taken.append((time.perf_counter() - began) * 1e3)
    return [taken[WARM_UP:] for taken in times]


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
