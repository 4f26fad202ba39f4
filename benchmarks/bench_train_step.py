"""How long does a whole training step take, and in how much memory? Ours against others'.

    python benchmarks/bench_train_step.py [--pairs 20] [--threads 2]

All train from the same start on the same rows with the same optimiser: forward, backward, update,
unit norm, dead-latent counts. Weights are float32; on CUDA our product is TF32, while sparsify's
forward pass is bfloat16 by its own autocast. "ours, bfloat16" has --autocast; "dense" is SAELens's
way, top-k acts in a dense matrix and autograd, in our trainer. Contenders take turns, so that a
slow minute of the machine meets all of them. Milliseconds are the clock's; with --threads 1, on a
CPU, the thread's own, which other programs on the machine do not change. Memory is what torch
allocates in a step beyond weights and optimiser state, at its peak, gradients that are kept for the
next step included. Letters: N tokens, D d_in, M num_latents, K k.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from common import machine, print_table
from rivals import Contender, Setting, dense, ours, sparsify
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from saetrain.kernels.spare import forget_spares

SIZES = {
    "cpu": [(2048, 576, 4608, 32), (2048, 576, 18432, 32)],
    "cuda": [(8192, 768, 24576, 32), (8192, 2048, 65536, 32)],
}
WARM_UP = 2


def main() -> None:
    """Measure every size and optimiser of the device, then print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20, help="interleaved timings of each side")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":  # as both trainers do
        torch.set_float32_matmul_precision("high")
    clock = time.thread_time if device.type == "cpu" and options.threads == 1 else time.perf_counter
    lines = []
    for N, D, M, K in SIZES[device.type]:
        x = rows(N, D, device)
        for optimizer in ("signum", "adam"):
            setting = Setting(D, M, K, optimizer, 1000, 100, 0, device)
            made = contenders(setting, x)
            times = interleave(list(made.values()), x, options.pairs, device, clock)
            for (name, contender), taken in zip(made.items(), times, strict=True):
                ratios = [theirs / our for our, theirs in zip(taken, times[-1], strict=True)]
                low, middle, high = statistics.quantiles(ratios, n=4)
                lines.append(
                    [
                        f"({N}, {D}, {M}, {K})",
                        optimizer,
                        name,
                        f"{statistics.median(taken):.0f}",
                        f"**{middle:.2f}x**",
                        f"{low:.2f} to {high:.2f}",
                        f"{peak_bytes(contender, x) / 2**20:.0f}",
                    ]
                )
    print(f"{machine('triton', 'eai-sparsify')}, {torch.get_num_threads()} threads\n")
    header = ["(N, D, M, K)", "optimiser", "step", "ms", "faster", "quartiles", "peak, MB"]
    print_table(header, lines)


def contenders(setting: Setting, x: Tensor) -> dict[str, Contender]:
    """By name; the last is what the others are compared with."""
    mean, variance = x.mean(0), float((x - x.mean(0)).pow(2).sum() / len(x))
    return {
        "ours": ours(setting, mean, variance),
        "ours, bfloat16": ours(setting, mean, variance, autocast=True),
        "dense": dense(setting, mean, variance),
        "sparsify": sparsify(setting),
    }


def peak_bytes(contender: Contender, x: Tensor) -> int:
    """Most bytes that a step of a contender has taken and not given back."""
    step, _ = contender
    if x.is_cuda:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step(x, WARM_UP)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    forget_spares()  # so that what is taken anew is counted
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step(x, WARM_UP)
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def rows(N: int, D: int, device: torch.device) -> Tensor:
    """Rows with some structure: 16 of 4 D directions each, a mean, some noise. [N, D]"""
    generator = torch.Generator().manual_seed(0)
    directions = torch.randn(4 * D, D, generator=generator) / D**0.5
    chosen = torch.randint(4 * D, (N, 16), generator=generator)
    noise = 0.01 * torch.randn(N, D, generator=generator)
    made: Tensor = directions[chosen].sum(dim=1) + 0.5 + noise
    return made.to(device)


def interleave(
    sides: list[Contender],
    x: Tensor,
    pairs: int,
    device: torch.device,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[float]]:
    """Milliseconds of each side's steps, taken in turns."""
    times: list[list[float]] = [[] for _ in sides]
    for number in range(WARM_UP + pairs):
        for (step, _), taken in zip(sides, times, strict=True):
            _synchronise(device)
            began = clock()
            step(x, number)
            _synchronise(device)
            taken.append((clock() - began) * 1e3)
    return [taken[WARM_UP:] for taken in times]


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
