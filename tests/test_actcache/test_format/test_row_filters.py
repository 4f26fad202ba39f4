from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actcache.format.manifest import FILTERS, Identity, kept_positions, read_manifest


@pytest.fixture(scope="module")
def identity(make_cache: Callable[..., Path]) -> Identity:
    return read_manifest(make_cache(shards=1, sequences=1)).identity


def kept(identity: Identity, tokens: list[list[int]], lengths: list[int], **changes: Any) -> Any:
    identity = dataclasses.replace(identity, ctx_len=len(tokens[0]), **changes)
    found, dropped = kept_positions(
        identity, np.array(tokens, dtype=np.int32), np.array(lengths, dtype=np.int32)
    )
    assert tuple(dropped) == FILTERS
    assert found.sum() + sum(dropped.values()) == found.size
    return found.astype(int).tolist(), {k: n for k, n in dropped.items() if n}


def test_padding_and_leading_positions_have_no_rows(identity: Identity) -> None:
    rows = [[5, 6, 7, 8], [5, 6, 0, 0]]
    assert kept(identity, rows, [4, 2], skip_positions=0) == (
        [[1, 1, 1, 1], [1, 1, 0, 0]],
        {"padding": 2},
    )
    assert kept(identity, rows, [4, 2], skip_positions=1) == (
        [[0, 1, 1, 1], [0, 1, 0, 0]],
        {"padding": 2, "skip_positions": 2},
    )


def test_rows_of_excluded_tokens_are_dropped_at_any_position(identity: Identity) -> None:
    rows = [[1, 9, 7, 9], [8, 6, 1, 9]]
    assert kept(identity, rows, [4, 3], exclude_special=(1,), exclude_tokens=(7, 9)) == (
        [[0, 0, 0, 0], [0, 1, 0, 0]],
        {"padding": 1, "skip_positions": 2, "exclude_special": 1, "exclude_tokens": 3},
    )


@given(
    st.lists(st.lists(st.integers(0, 6), min_size=5, max_size=5), min_size=1, max_size=4),
    st.integers(0, 4),
    st.frozensets(st.integers(0, 6)),
    st.frozensets(st.integers(0, 6)),
    st.integers(0, 5),
)
def test_a_position_is_counted_once_under_the_first_filter_that_drops_it(
    identity: Identity,
    rows: list[list[int]],
    skip: int,
    special: frozenset[int],
    tokens: frozenset[int],
    length: int,
) -> None:
    counts = dict.fromkeys(FILTERS, 0)
    remaining = 0
    for row in rows:
        for position, token in enumerate(row):
            if position >= length:
                counts["padding"] += 1
            elif position < skip:
                counts["skip_positions"] += 1
            elif token in special:
                counts["exclude_special"] += 1
            elif token in tokens:
                counts["exclude_tokens"] += 1
            else:
                remaining += 1
    found, dropped = kept(
        identity,
        rows,
        [length] * len(rows),
        skip_positions=skip,
        exclude_special=tuple(sorted(special)),
        exclude_tokens=tuple(sorted(tokens)),
    )
    assert np.sum(found) == remaining
    assert dropped == {name: n for name, n in counts.items() if n}
