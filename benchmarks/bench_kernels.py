"""Time of each stage of a TopK training step, against sparsify and the hardware's floor.

    python benchmarks/bench_kernels.py [--smoke] [--rounds 15] [--sizes 0 1] [--device cuda]

Encoder and selection, decode, backward, update, and the whole step, of our kernels against
sparsify's installed package and a dense step by autograd (with Adam), all from the same weights and
rows; implementations are timed in turns. "floor" is the larger of operations over the rate of a
large product and bytes over the rate of a large copy, both measured in the same run; of the step,
the sum of its stages'. GB is the memory of a step beyond what it holds between steps. Latents fire
uniformly, or (zipf) in proportion to 1 / rank: a few at nearly every token. On CUDA rows and copies
of both weights are bfloat16; bench_train_step.py measures `saetrain fit`. Needs torch, triton on
CUDA, and sparsify for its columns; runs from a plain checkout. Letters: N tokens, D d_in, M
num_latents, K k.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import get_args

import torch
from ceilings import STAGES, Ceilings, OptimizerName, measure_ceilings, work_of
from kernel_sides import (
    Firing,
    Ours,
    Problem,
    Side,
    make_problem,
    make_sides,
    quartiles_text,
)
from report import machine, print_table
from timing import milliseconds
from torch.nn.functional import linear

SIZES = [
    (8192, 768, 24576, 32),
    (8192, 2048, 65536, 32),
    (8192, 2048, 65536, 128),
    (8192, 4096, 131072, 64),
    (32768, 4096, 131072, 64),
]
SMOKE = [(128, 48, 640, 4), (96, 32, 300, 8)]
STEP = "whole step"
GRAPH = "whole step, one graph"
WARM_UP = 3
HEADER = [
    "(N, D, M, K)",
    "firing",
    "stage",
    "ours, ms",
    "quartiles",
    "sparsify",
    "dense",
    "floor",
    "floor / ours",
    "sparsify / ours",
    "ours, GB",
    "sparsify, GB",
]


@dataclass(frozen=True)
class Memory:
    """Bytes on a GPU."""

    held: int
    """Between steps: weights and states."""
    step: int
    """The most that a step adds."""


@dataclass(frozen=True)
class Figures:
    """Results for one size, firing distribution and optimiser."""

    problem: Problem
    dead_tracker: Firing
    optimizer: OptimizerName
    times: dict[str, dict[str, list[float]]]
    """Milliseconds by stage and side."""
    floors: dict[str, float]
    """Milliseconds by stage."""
    product: float
    """Milliseconds of the encoder's bare product."""
    memory: dict[str, Memory]
    """By side."""


def main() -> None:
    """Run the selected measurements; print ceilings, goals, and last one table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=["cpu", "cuda"], default=default)
    parser.add_argument("--smoke", action="store_true", help="sizes that take a second each")
    parser.add_argument("--rounds", type=int, default=15, help="timings of each contender")
    parser.add_argument("--sizes", type=int, nargs="*", help="which of them, from 0")
    options = parser.parse_args()
    device = torch.device(options.device)
    sizes = SMOKE if options.smoke else SIZES
    if options.sizes is not None:
        sizes = [sizes[number] for number in options.sizes]
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # as both trainers do
    ceilings = measure_ceilings(device, small=options.smoke)
    found = []
    for size in sizes:
        for dead_tracker in get_args(Firing):
            for optimizer in get_args(OptimizerName):
                found.append(
                    measure(size, dead_tracker, optimizer, ceilings, options.rounds, device)
                )
                print(f"measured {size}, {dead_tracker}, {optimizer}", flush=True)
    threads = "" if device.type == "cuda" else f", {torch.get_num_threads()} threads"
    print(f"\n{machine('triton', 'eai-sparsify', device=device)}{threads}")
    print(f"{ceilings}\n")
    if device.type == "cuda":
        for line in goals(found):
            print(line)
    else:
        print("the goals are a GPU's, and are not judged here")
    print()
    print_table(HEADER, [line for figures in found for line in lines_of(figures)])


def measure(
    size: tuple[int, int, int, int],
    dead_tracker: Firing,
    optimizer: OptimizerName,
    ceilings: Ceilings,
    rounds: int,
    device: torch.device,
) -> Figures:
    """Build every side, compare the losses of first steps, and time all stages in turns."""
    problem = make_problem(size, dead_tracker, device)
    sides: list[Side] = []
    memory: dict[str, Memory] = {}
    losses = {}
    for make in make_sides(problem, optimizer):
        try:
            side, loss, taken = built(make, device)
        except torch.cuda.OutOfMemoryError:
            gc.collect()
            torch.cuda.empty_cache()
            continue
        sides.append(side)
        losses[side.name], memory[side.name] = loss, taken
    check_losses(losses)
    ours = sides[0]
    assert isinstance(ours, Ours)
    hit = int(ours.indices.unique().numel())
    work = work_of(problem.sizes, problem.low, optimizer, hit)
    floors = {stage: w.floor(ceilings.operations, ceilings.bytes) for stage, w in work.items()}
    floors[STEP] = sum(floors.values())

    times = {STEP: in_turns({side.name: side.step for side in sides}, rounds, device)}
    if device.type == "cuda":
        floors[GRAPH] = floors[STEP]
        times[GRAPH] = in_turns({"ours": graphed(ours)}, rounds, device)
    stages = {side.name: side.stages() for side in sides}
    for stage in STAGES:
        runs = {name: each[stage] for name, each in stages.items()}
        times[stage] = in_turns(runs, rounds, device)
    x, W = problem.x.to(problem.low), problem.W.to(problem.low)
    product = in_turns({"product": lambda: linear(x, W)}, rounds, device)["product"]
    return Figures(
        problem, dead_tracker, optimizer, times, floors, statistics.median(product), memory
    )


def built(make: Callable[[], Side], device: torch.device) -> tuple[Side, float, Memory]:
    """A side, its first loss, and its memory."""
    before = allocated(device)
    side = make()
    loss = float(side.step())
    held = allocated(device) - before
    return side, loss, Memory(held, peak(side.step, device))


def graphed(side: Side) -> Callable[[], object]:
    """Its step as one CUDA graph: what a launch costs the host does not show."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        side.step()
    return graph.replay


def check_losses(losses: dict[str, float]) -> None:
    """Stop if a side computes something else: first steps begin from the same weights."""
    for name, loss in losses.items():
        if not abs(loss - losses["ours"]) <= 0.02 * losses["ours"]:
            raise SystemExit(f"the first loss of {name} is {loss}, of ours {losses['ours']}")


def in_turns(
    runs: dict[str, Callable[[], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Milliseconds of each; one that finds too little memory has none."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    failed = set()
    for number in range(WARM_UP + rounds):
        for name, run in runs.items():
            if name in failed:
                continue
            try:
                taken = milliseconds(run, device)
            except torch.cuda.OutOfMemoryError:
                failed.add(name)
                torch.cuda.empty_cache()
                continue
            if number >= WARM_UP:
                times[name].append(taken)
    return times


def allocated(device: torch.device) -> int:
    """Bytes in use on a GPU."""
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def peak(run: Callable[[], object], device: torch.device) -> int:
    """The most bytes that a run adds to what is there, on a GPU."""
    if device.type != "cuda":
        run()
        return 0
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def goals(found: list[Figures]) -> list[str]:
    """Return each goal of each size with the measured ratio and whether it is met."""
    lines = []
    for figures in found:
        D, M, K = figures.problem.sizes[1:]
        what = f"{figures.problem.sizes}, {figures.dead_tracker}, {figures.optimizer}"
        step = medians(figures.times[STEP])
        if "sparsify" in step:
            faster = step["sparsify"] / step["ours"]
            aim = 3.0 if (D, M, K) == (2048, 65536, 32) else 2.5
            lines.append(told(what, f"{faster:.2f}x over sparsify", aim, faster >= aim))
        share = figures.floors[STEP] / step["ours"]
        lines.append(told(what, f"{share:.2f} of the floor", 0.6, share >= 0.6))
        over = medians(figures.times[STAGES[0]])["ours"] / figures.product
        if D in (768, 4096):
            aim = 1.15 if D == 4096 else 1.5
            lines.append(told(what, f"selection {over:.2f}x the product", aim, over <= aim))
        if "sparsify" in figures.memory:
            own, other = figures.memory["ours"], figures.memory["sparsify"]
            part, whole = own.step / other.step, (own.held + own.step) / (other.held + other.step)
            words = f"a step's memory {part:.2f} of sparsify's ({whole:.2f} with what stays)"
            lines.append(told(what, words, 1 / 3, part <= 1 / 3))
    return lines


def told(what: str, reached: str, aim: float, met: bool) -> str:
    """Format one goal."""
    return f"goal {aim:.2f}, {'met' if met else 'MISSED'}: {reached} at {what}"


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    """Return results by implementation, of those that were timed."""
    return {name: statistics.median(each) for name, each in times.items() if each}


def lines_of(figures: Figures) -> list[list[str]]:
    """The table's lines, one for each stage and one for the step."""
    lines = []
    for stage in (*STAGES, STEP, GRAPH):
        if stage not in figures.times:
            continue
        middle = medians(figures.times[stage])
        ours = figures.times[stage]["ours"]
        low, _, high = statistics.quantiles(ours, n=4)
        floor = figures.floors[stage]
        of_optimizer = stage in ("update", STEP, GRAPH)
        memory = figures.memory if stage == STEP and figures.problem.x.is_cuda else {}
        faster = middle["sparsify"] / middle["ours"] if "sparsify" in middle else None
        lines.append(
            [
                str(figures.problem.sizes),
                figures.dead_tracker,
                f"{stage}, {figures.optimizer}" if of_optimizer else stage,
                f"{middle['ours']:.3f}",
                quartiles_text(low, high),
                *(
                    f"{middle[name]:.3f}" if name in middle else ""
                    for name in ("sparsify", "dense")
                ),
                f"{floor:.3f}",
                f"{floor / middle['ours']:.2f}",
                "" if faster is None else f"**{faster:.2f}x**",
                *(
                    f"{memory[name].step / 1e9:.2f}" if name in memory else ""
                    for name in ("ours", "sparsify")
                ),
            ]
        )
    return lines


if __name__ == "__main__":
    main()
