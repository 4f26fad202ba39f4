"""Time and memory of a whole training step, ours against other libraries.

    python benchmarks/bench_train_step.py [--pairs 20] [--threads 2] [--sizes 0 1] [--smoke]

All train from the same start on the same rows with the same optimiser: forward, backward, update,
unit norm, dead-latent counts; ours is what `saetrain fit` does. Weights are float32; on CUDA our
product is TF32, while sparsify's forward pass is bfloat16 by its own autocast. "ours, bfloat16" has
--precision bfloat16, the default on CUDA, and "ours, float32" has --precision float32; "dense" is
SAELens's method, top-k acts in a dense matrix and autograd, in our trainer, on CUDA in bfloat16.
AuxK is on, and no latent dead yet; with "AuxK acting" a twentieth of them is. Implementations are
timed in turns, so that a slow minute of the machine affects all of them. Milliseconds are wall
time; with --threads 1, on a CPU, the thread's CPU time. On CUDA, "one graph" is --cuda-graphs: the
whole step recorded once and
replayed, and so are eight small SAEs on the same rows; what a graph keeps is not in its peak.
"floor" is the sum over stages of the larger of operations over the rate of a large product and
bytes over that of a large copy, both measured in the same run, in bfloat16 on CUDA and float32 on a
CPU. Memory is what torch allocates in a step beyond weights and optimiser state, at its peak,
gradients that are kept for the next step included. Needs torch, triton on CUDA, and for its side
sparsify; runs from a plain checkout. Letters: N tokens, D d_in, M num_latents, K k.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections.abc import Callable
from importlib.util import find_spec
from typing import get_args

import torch
from ceilings import OptimizerName, measure_ceilings, work_of
from report import machine, print_table
from rivals import Contender, Setting, dense, ours, ours_together, sparsify
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from saetrain.kernels.grad_memory import free_memory
from saetrain.model.sae import Sae

Sizes = tuple[int, int, int, int]
"""(N, D, M, K)."""
SIZES: dict[str, list[Sizes]] = {
    "cpu": [(2048, 576, 4608, 32), (2048, 576, 18432, 32)],
    "cuda": [
        (8192, 768, 24576, 32),
        (8192, 2048, 65536, 32),
        (8192, 2048, 65536, 128),
        (8192, 4096, 131072, 64),
        (32768, 4096, 131072, 64),
    ],
}
SMOKE: list[Sizes] = [(96, 32, 320, 4), (64, 24, 300, 8)]
MANY, SMALL = 8, (1024, 512, 4096, 32)
"""SAEs together, and their size."""
WARM_UP = 3  # the last of them records a graph
HEADER = [
    "(N, D, M, K)",
    "optimiser",
    "step",
    "ms",
    "faster than sparsify",
    "quartiles",
    "floor, ms",
    "floor / step",
    "peak, MB",
]


def main() -> None:
    """Measure every size and optimiser of the device, then print one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20, help="interleaved timings of each side")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--sizes", type=int, nargs="*", help="which of them, from 0")
    parser.add_argument("--smoke", action="store_true", help="sizes that take a second each")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":  # as both trainers do
        torch.set_float32_matmul_precision("high")
    clock = time.thread_time if device.type == "cpu" and options.threads == 1 else time.perf_counter
    sizes = SMOKE if options.smoke else SIZES[device.type]
    if options.sizes is not None:
        sizes = [sizes[number] for number in options.sizes]
    ceilings = measure_ceilings(device, small=options.smoke)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    lines = []
    for size in sizes:
        x = rows(*size[:2], device)
        for optimizer in get_args(OptimizerName):
            work = work_of(size, dtype, optimizer, hit=latents_hit(x, size))
            floor = sum(w.floor(ceilings.operations, ceilings.bytes) for w in work.values())
            made = contenders(setting_of(size, optimizer, device), x)
            lines += compare(str(size), optimizer, x, made, floor, options.pairs, clock)
            print(f"measured {size}, {optimizer}", flush=True)
    if device.type == "cuda":
        x = rows(*SMALL[:2], device)
        for optimizer in get_args(OptimizerName):
            work = work_of(SMALL, dtype, optimizer, hit=latents_hit(x, SMALL))
            floor = MANY * sum(w.floor(ceilings.operations, ceilings.bytes) for w in work.values())
            made = many(setting_of(SMALL, optimizer, device), x)
            name = f"{MANY} of {SMALL}"
            lines += compare(name, optimizer, x, made, floor, options.pairs, clock)
            print(f"measured {name}, {optimizer}", flush=True)
    print(f"\n{machine('triton', 'eai-sparsify')}, {torch.get_num_threads()} threads")
    print(f"{ceilings}\n")
    print_table(HEADER, lines)


def compare(
    size: str,
    optimizer: OptimizerName,
    x: Tensor,
    made: dict[str, Contender],
    floor: float,
    pairs: int,
    clock: Callable[[], float],
) -> list[list[str]]:
    """Return the table's lines of one size and optimiser, without sides that run out of memory."""
    times = interleave(made, x, pairs, clock)
    lines = []
    for name, taken in times.items():
        ms = statistics.median(taken)
        faster = spread = ""
        if "sparsify" in times:
            ratios = [other / own for own, other in zip(taken, times["sparsify"], strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            faster, spread = f"**{middle:.2f}x**", f"{low:.2f} to {high:.2f}"
        lines.append(
            [
                size,
                optimizer,
                name,
                f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}",
                faster,
                spread,
                f"{floor:.3g}",
                f"{floor / ms:.2f}",
                f"{peak_bytes(made[name], x) / 2**20:.0f}",
            ]
        )
    return lines


def setting_of(size: Sizes, optimizer: OptimizerName, device: torch.device) -> Setting:
    """A run of 1,000 steps."""
    _, D, M, K = size
    return Setting(D, M, K, optimizer, 1000, 100, 0, device)


def contenders(setting: Setting, x: Tensor) -> dict[str, Contender]:
    """Return sides by name, without sparsify if not installed and graphs without CUDA."""
    mean, variance = moments(x)
    made = {
        "ours": ours(setting, mean, variance),
        "ours, bfloat16": ours(setting, mean, variance, autocast=True),
        "ours, AuxK acting": ours(setting, mean, variance, dead=setting.num_latents // 20),
        "dense": dense(setting, mean, variance),
    }
    if x.is_cuda:
        made["ours, float32"] = _without_tf32(ours(setting, mean, variance))
        acting = ours(setting, mean, variance, autocast=True, dead=setting.num_latents // 20)
        made["ours, bfloat16, AuxK acting"] = acting
        graph = ours_together(setting, mean, variance, autocast=True)
        made["ours, bfloat16, one graph"] = graph
    if find_spec("sparsify") is not None:
        made["sparsify"] = sparsify(setting)
    return made


def _without_tf32(contender: Contender) -> Contender:
    """Make the steps of a contender with --precision float32."""
    step, finish = contender

    def exact(x: Tensor, number: int) -> None:
        torch.set_float32_matmul_precision("highest")
        step(x, number)
        torch.set_float32_matmul_precision("high")

    return exact, finish


def many(setting: Setting, x: Tensor) -> dict[str, Contender]:
    """Several small SAEs of ours, launch by launch and as one graph."""
    return {
        name: ours_together(setting, *moments(x), autocast=True, saes=MANY, graph=graph)
        for name, graph in (("ours, bfloat16", False), ("ours, bfloat16, one graph", True))
    }


def moments(x: Tensor) -> tuple[Tensor, float]:
    """Mean of rows, and mean of their squared distance from it."""
    return x.mean(0), float((x - x.mean(0)).pow(2).sum() / len(x))


@torch.no_grad()
def latents_hit(x: Tensor, size: Sizes) -> int:
    """Count the latents that any row of x activates before the first step."""
    _, D, M, K = size
    indices = Sae(D, M, K, device=x.device)(x).top_indices
    assert indices is not None
    return int(indices.unique().numel())


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
    free_memory()  # so that what is taken anew is counted
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
    sides: dict[str, Contender],
    x: Tensor,
    pairs: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Milliseconds of each side's steps, taken in turns; of those that find enough memory."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(WARM_UP + pairs):
        for name in list(times):
            step, _ = sides[name]
            try:
                _synchronise(x.device)
                began = clock()
                step(x, number)
                _synchronise(x.device)
            except torch.cuda.OutOfMemoryError:
                del times[name]
                gc.collect()
                torch.cuda.empty_cache()
                continue
            times[name].append((clock() - began) * 1e3)
    return {name: taken[WARM_UP:] for name, taken in times.items()}


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
