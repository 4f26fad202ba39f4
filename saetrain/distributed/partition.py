"""Which process trains which SAE, and how far from each other they may be: pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

READING = 4096
"""Latents that cost as much as reading one more hookpoint. On a CPU reading costs less, on a GPU
more; it decides only where SAEs of a hookpoint could as well be kept together."""

MAX_LEAD_BYTES = 1 << 30
"""Rows that the first of the processes may have read before the last one."""

_APART_STEPS = 8  # at least, however large a batch is


@dataclass(frozen=True)
class SaeCost:
    """What decides the cost of one SAE's step."""

    hookpoint: str
    d_in: int
    num_latents: int


def partition(works: Sequence[SaeCost], processes: int) -> list[list[int]]:
    """Deal SAEs out to processes, so that the one with most to do has as little as possible.

    Of two ways the better one, and where they are as good, the one that reads less: SAEs of a
    hookpoint side by side, cut where it is best; or the costliest first, each to whoever then has
    least to do, which is at most 4/3 of the best there is (Graham, "Bounds on multiprocessing
    timing anomalies", 1969), reading apart.

    Args:
        works: one for each SAE.
        processes: how many.

    Returns:
        For each process the numbers of its SAEs, ascending: at least one, or, where there are
        fewer SAEs than processes, none for the last of these.
    """
    idle: list[list[int]] = [[]] * max(0, processes - len(works))
    processes -= len(idle)
    selectors = [_cut(works, processes), _deal(works, processes)]

    def burden(selector: list[list[int]]) -> tuple[int, int]:
        loads = [total_cost(works, numbers) for numbers in selector]
        return max(loads), sum(loads)

    return [sorted(numbers) for numbers in min(selectors, key=burden)] + idle


def total_cost(works: Sequence[SaeCost], numbers: Sequence[int]) -> int:
    """What a process with these SAEs has to do.

    Nearly all of a step is proportional to weights times rows, and all SAEs see the same rows.
    """
    read = {works[n].hookpoint: works[n].d_in for n in numbers}
    steps = sum(works[n].num_latents * works[n].d_in for n in numbers)
    return steps + READING * sum(read.values())


def _cut(works: Sequence[SaeCost], processes: int) -> list[list[int]]:
    """Hookpoint after hookpoint, cut into runs of which the costliest costs as little as can be."""
    first: dict[str, int] = {}
    for number, work in enumerate(works):
        first.setdefault(work.hookpoint, number)
    line = sorted(range(len(works)), key=lambda n: (first[works[n].hookpoint], n))
    low, high = max(total_cost(works, [n]) for n in line), total_cost(works, line)
    while low < high:
        middle = (low + high) // 2
        enough = len(_runs(works, line, processes, middle)) <= processes
        low, high = (low, middle) if enough else (middle + 1, high)
    return _runs(works, line, processes, high)


def _runs(
    works: Sequence[SaeCost], line: Sequence[int], processes: int, most: int
) -> list[list[int]]:
    """Runs of a line that cost no more than `most`, at least so many."""
    runs = [[line[0]]]
    for place, number in enumerate(line[1:], 1):
        needed = len(line) - place == processes - len(runs)  # one for each that has none
        if needed or total_cost(works, [*runs[-1], number]) > most:
            runs.append([number])
        else:
            runs[-1].append(number)
    return runs


def _deal(works: Sequence[SaeCost], processes: int) -> list[list[int]]:
    """The costliest first, each to whoever then has least to do."""
    dealt: list[list[int]] = [[] for _ in range(processes)]
    for number in sorted(range(len(works)), key=lambda n: (-total_cost(works, [n]), n)):
        least = min(dealt, key=lambda numbers: total_cost(works, [*numbers, number]))
        least.append(number)
    return dealt


def max_lead_steps(batch_size: int, row_bytes: int) -> int:
    """Steps that processes may be apart: `MAX_LEAD_BYTES` of rows, or 8 steps if that is more.

    So that what the first one reads is still in the page cache for the others on its machine.

    Args:
        batch_size: rows of a step.
        row_bytes: bytes of a row, of all hookpoints of the run.
    """
    return max(_APART_STEPS, MAX_LEAD_BYTES // (batch_size * row_bytes))
