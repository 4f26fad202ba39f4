from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actcache.cache.writer import kept_positions, norm_outliers, row_norms
from actcache.format.manifest import Identity, read_manifest
from actcache.format.receipts import FILTERS


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


def test_a_row_over_the_median_at_one_hookpoint_is_an_outlier() -> None:
    norms = {"a": np.array([1.0, 2, 3, 30, 2]), "b": np.array([50.0, 5, 5, 5, 5])}
    assert norm_outliers(norms, 10).tolist() == [False, False, False, True, False]
    assert norm_outliers(norms, 9.9).tolist() == [True, False, False, True, False]


def test_a_non_finite_row_is_an_outlier_and_excluded_from_the_median() -> None:
    norms = {"a": np.array([1.0, np.inf, np.nan, 2, 3, np.inf, np.nan])}
    assert norm_outliers(norms, 2).tolist() == [False, True, True, False, False, True, True]
    assert norm_outliers({"a": np.array([np.nan, np.inf])}, 5).all()
    assert norm_outliers({"a": np.empty(0)}, 5).shape == (0,)


def test_norms_are_euclidean_and_do_not_overflow_float32() -> None:
    rows = np.array([[3, 4], [0, 0], [2e38, 2e38], [np.inf, 0]], dtype=np.float32)
    expected = [5, 0, np.sqrt(2) * float(np.float32(2e38)), np.inf]
    np.testing.assert_allclose(row_norms(rows), expected, rtol=1e-12)
