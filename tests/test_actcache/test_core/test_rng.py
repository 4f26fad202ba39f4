from __future__ import annotations

import numpy as np

from actcache.core import rng


def test_a_stream_never_changes() -> None:
    assert rng.stream("blocks", 0, 1).permutation(8).tolist() == [5, 4, 7, 1, 3, 0, 2, 6]
    assert rng.stream("held-out", 3).randint(2**31, size=2).tolist() == [1688371433, 1266736078]


def test_streams_of_other_purposes_or_numbers_differ() -> None:
    draws = {
        rng.stream(purpose, *numbers).randint(2**31, size=4).tobytes()
        for purpose in ("blocks", "window")
        for numbers in [(0,), (1,), (0, 0), (0, 1), (1, 0), (0, 1, 0), (2**32 - 1,)]
    }
    assert len(draws) == 14


def test_a_stream_does_not_touch_numpys_global_state() -> None:
    np.random.seed(1)
    expected = np.random.random_sample()
    np.random.seed(1)
    rng.stream("blocks", 0).permutation(100)
    assert np.random.random_sample() == expected


def test_permutation_equals_that_of_a_new_stream() -> None:
    for numbers in ((0, 0, 3, 4), (2**32 - 1,), (7, 1)):
        expected = rng.stream("window", *numbers).permutation(100)
        np.testing.assert_array_equal(rng.permutation(100, "window", *numbers), expected)
