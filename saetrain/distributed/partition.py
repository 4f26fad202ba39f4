"""Partition of SAEs over ranks by cost, and the largest lead of one rank: pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

HOOKPOINT_LATENTS = 4096
"""Latents whose training costs as much as reading one more hookpoint. On a CPU reading costs less,
on a GPU more; the value matters only where SAEs of a hookpoint could as well stay together."""

MAX_LEAD_BYTES = 1 << 30
"""Bytes of rows that the first rank may read ahead of the last one."""

_MIN_LEAD_STEPS = 8  # however large a batch is


@dataclass(frozen=True)
class SaeCost:
    """Sizes that decide the cost of one SAE's step."""

    hookpoint: str
    d_in: int
    num_latents: int


def partition(costs: Sequence[SaeCost], processes: int) -> list[list[int]]:
    """Assign SAEs to processes so that the largest load is as small as possible.

    The better of two partitions, and between equal ones the one that reads less: contiguous runs of
    SAEs in the order of hookpoints, cut where it is best; or the costliest SAE first, each to the
    process with the least load, which is at most 4/3 of the optimum (Graham, "Bounds on
    multiprocessing timing anomalies", 1969), reading aside.

    Args:
        costs: one for each SAE.
        processes: number of processes.

    Returns:
        For each process the indices of its SAEs, ascending: at least one, or, with fewer SAEs than
        processes, none for the last processes.
    """
    idle: list[list[int]] = [[]] * max(0, processes - len(costs))
    processes -= len(idle)
    candidates = [_cut(costs, processes), _assign_largest_first(costs, processes)]

    def max_and_total(candidate: list[list[int]]) -> tuple[int, int]:
        loads = [total_cost(costs, indices) for indices in candidate]
        return max(loads), sum(loads)

    return [sorted(indices) for indices in min(candidates, key=max_and_total)] + idle


def total_cost(costs: Sequence[SaeCost], indices: Sequence[int]) -> int:
    """Sum the costs of SAEs, and of reading each of their hookpoints once.

    Nearly all of a step is proportional to weights times rows, and all SAEs see the same rows.
    """
    read = {costs[i].hookpoint: costs[i].d_in for i in indices}
    steps = sum(costs[i].num_latents * costs[i].d_in for i in indices)
    return steps + HOOKPOINT_LATENTS * sum(read.values())


def _cut(costs: Sequence[SaeCost], processes: int) -> list[list[int]]:
    """Cut the SAEs, sorted by hookpoint, into runs with the smallest possible maximum."""
    first: dict[str, int] = {}
    for index, cost in enumerate(costs):
        first.setdefault(cost.hookpoint, index)
    line = sorted(range(len(costs)), key=lambda i: (first[costs[i].hookpoint], i))
    low, high = max(total_cost(costs, [i]) for i in line), total_cost(costs, line)
    while low < high:
        middle = (low + high) // 2
        enough = len(_runs(costs, line, processes, middle)) <= processes
        low, high = (low, middle) if enough else (middle + 1, high)
    return _runs(costs, line, processes, high)


def _runs(
    costs: Sequence[SaeCost], line: Sequence[int], processes: int, limit: int
) -> list[list[int]]:
    """Cut a line into at least `processes` runs, each of a cost up to `limit`."""
    runs = [[line[0]]]
    for position, index in enumerate(line[1:], 1):
        needed = len(line) - position == processes - len(runs)  # one for each process without any
        if needed or total_cost(costs, [*runs[-1], index]) > limit:
            runs.append([index])
        else:
            runs[-1].append(index)
    return runs


def _assign_largest_first(costs: Sequence[SaeCost], processes: int) -> list[list[int]]:
    """Assign the costliest SAE first, each to the process with the least load."""
    assigned: list[list[int]] = [[] for _ in range(processes)]
    for index in sorted(range(len(costs)), key=lambda i: (-total_cost(costs, [i]), i)):
        least = min(assigned, key=lambda indices: total_cost(costs, [*indices, index]))
        least.append(index)
    return assigned


def max_lead_steps(batch_size: int, row_bytes: int) -> int:
    """Return the steps that one rank may lead: `MAX_LEAD_BYTES` of rows, but at least 8 steps.

    What the first rank reads is then still in the page cache for the others on its machine.

    Args:
        batch_size: rows of a step.
        row_bytes: bytes of a row, of all hookpoints of the run.
    """
    return max(_MIN_LEAD_STEPS, MAX_LEAD_BYTES // (batch_size * row_bytes))
