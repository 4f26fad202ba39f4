"""Partition of SAEs over ranks, and the largest lead of one rank."""

from __future__ import annotations

import random

from saetrain.distributed.partition import (
    MAX_LEAD_BYTES,
    SaeCost,
    max_lead_steps,
    partition,
    total_cost,
)


def test_every_sae_has_one_process_and_every_process_an_sae() -> None:
    state = random.Random(0)
    for _ in range(300):
        count = state.randint(1, 40)
        widths = [2 ** state.randint(4, 12) for _ in range(5)]
        layers = [state.randrange(5) for _ in range(count)]
        costs = [SaeCost(f"layers.{n}", widths[n], state.randint(1, 2**17)) for n in layers]
        processes = state.randint(1, count)
        partitioned = partition(costs, processes)
        assert sorted(n for numbers in partitioned for n in numbers) == list(range(count))
        assert all(numbers and numbers == sorted(numbers) for numbers in partitioned)


def test_loads_are_balanced_to_the_cost_of_one_sae() -> None:
    state = random.Random(1)
    for _ in range(300):
        costs = [
            SaeCost(f"layers.{n % 4}", 64 * state.randint(1, 16), 1024 * state.randint(1, 64))
            for n in range(state.randint(8, 40))
        ]
        loads = [total_cost(costs, numbers) for numbers in partition(costs, 8)]
        assert max(loads) - min(loads) <= max(total_cost(costs, [n]) for n in range(len(costs)))


def test_a_wide_sae_costs_as_much_as_several_narrow_ones() -> None:
    narrow = [SaeCost("layers.0", 512, 8192)] * 4
    assert partition([SaeCost("layers.1", 512, 32768), *narrow], 2) == [[0], [1, 2, 3, 4]]


def test_saes_of_a_hookpoint_stay_together_where_it_costs_nothing() -> None:
    grid = [SaeCost(f"layers.{layer}", 512, 16384) for layer in range(4) for _ in range(3)]
    for numbers in partition(grid, 4):
        assert len({grid[n].hookpoint for n in numbers}) == 1


def test_with_more_processes_than_saes_the_last_ones_have_none() -> None:
    assert partition([SaeCost("layers.0", 16, 64)] * 2, 4) == [[0], [1], [], []]


def test_the_largest_lead_is_a_gigabyte_of_rows_but_at_least_eight_steps() -> None:
    assert max_lead_steps(4096, 1152) == MAX_LEAD_BYTES // (4096 * 1152)
    assert max_lead_steps(2**20, 2**14) == 8
