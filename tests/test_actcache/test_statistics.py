from __future__ import annotations

import numpy as np
import pytest
import torch

from actcache.statistics import NORM_BINS, Statistics, compute, merge
from actcache.storage import CODECS

FLOAT32 = CODECS["float32"]


def rows(count: int, width: int = 5, seed: int = 0) -> np.ndarray:
    state = np.random.RandomState(seed)
    return (state.standard_normal((count, width)) * 3 + 1).astype("<f4")


@pytest.mark.parametrize("dtype", CODECS)
def test_sums_and_norms_are_those_of_the_rows_as_stored(dtype: str) -> None:
    codec = CODECS[dtype]
    tensor = torch.from_numpy(rows(2500)).to(getattr(torch, dtype))  # three blocks
    exact = tensor.double().numpy()
    found = compute(codec.from_torch(tensor), codec)
    norms = np.linalg.norm(exact, axis=1)
    assert (found.count, found.non_finite) == (2500, 0)
    np.testing.assert_allclose(found.total, exact.sum(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.total_squares, (exact**2).sum(axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.norm_total, norms.sum(), rtol=1e-12)
    np.testing.assert_allclose(found.norm_max, norms.max(), rtol=1e-12)
    assert found.norm_histogram.sum() == 2500


def test_means_and_variance_follow_their_formulas() -> None:
    x = rows(1500)
    exact = x.astype(np.float64)
    found = compute(x, FLOAT32)
    np.testing.assert_allclose(found.mean, exact.mean(axis=0), rtol=1e-12)
    variance = ((exact - exact.mean(axis=0)) ** 2).sum(axis=1).mean()
    np.testing.assert_allclose(found.variance, variance, rtol=1e-10)
    norms = np.linalg.norm(exact, axis=1)
    np.testing.assert_allclose(found.rms_norm, np.sqrt((norms**2).mean()), rtol=1e-12)
    np.testing.assert_allclose(found.mean_norm, norms.mean(), rtol=1e-12)


def test_the_squared_error_of_a_constant_is_that_of_predicting_it_for_every_row() -> None:
    x, constant = rows(300), np.linspace(-2, 2, 5)
    error = ((x.astype(np.float64) - constant) ** 2).sum()
    np.testing.assert_allclose(compute(x, FLOAT32).squared_error_of(constant), error, rtol=1e-12)


def test_rows_that_are_not_finite_are_counted_and_left_out_of_everything_else() -> None:
    x = rows(2000)
    x[3, 0], x[1500, 4], x[1501] = np.nan, np.inf, -np.inf
    found, clean = compute(x, FLOAT32), np.delete(x, [3, 1500, 1501], axis=0)
    assert (found.count, found.non_finite) == (1997, 3)
    np.testing.assert_allclose(found.total, clean.sum(axis=0, dtype=np.float64), rtol=1e-12)
    assert found.norm_histogram.sum() == 1997
    assert np.isfinite([found.variance, found.rms_norm, found.mean_norm, found.norm_max]).all()


def test_shards_without_a_finite_row_divide_by_nothing() -> None:
    found = compute(np.full((4, 5), np.nan, dtype="<f4"), FLOAT32)
    assert (found.count, found.non_finite, found.norm_max) == (0, 4, 0.0)
    assert (found.mean == 0).all()
    assert found.variance == found.rms_norm == found.mean_norm == 0.0


def test_float16s_largest_rows_do_not_overflow() -> None:
    x = np.full((3, 5), 65504.0, dtype="<f2")
    assert compute(x, CODECS["float16"]).norm_max == 65504.0 * np.sqrt(5)


def test_the_bin_of_a_norm_is_a_quarter_octave() -> None:
    norms = [1.0, 1.1, 2**0.25 * 1.001, 2.0, 0.0, 1e-30, 1e30]
    x = np.zeros((len(norms), 3), dtype="<f4")
    x[:, 0] = norms
    (bins,) = compute(x, FLOAT32).norm_histogram.nonzero()
    assert bins.tolist() == [0, 128, 129, 132, NORM_BINS - 1]
    assert compute(x, FLOAT32).norm_histogram[128] == 2


def test_shards_add_up_to_the_whole() -> None:
    x = rows(3000)
    x[2100] = np.nan
    parts = [compute(part, FLOAT32) for part in np.split(x, [1000, 1001])]
    merged, whole = merge(parts), compute(x, FLOAT32)
    for field in Statistics.__dataclass_fields__:
        np.testing.assert_allclose(getattr(merged, field), getattr(whole, field), rtol=1e-12)
    np.testing.assert_allclose(merged.variance, whole.variance, rtol=1e-10)


def test_merging_leaves_the_parts_as_they_were() -> None:
    part = compute(rows(10), FLOAT32)
    before = part.total.copy()
    merge([part, part])
    np.testing.assert_array_equal(part.total, before)


def test_the_bits_do_not_depend_on_what_lies_behind_a_block() -> None:
    """Every block is summed by itself: a shard's sums are those of its blocks, one by one."""
    x = rows(2048)
    blocks = merge(compute(block, FLOAT32) for block in (x[:1024], x[1024:]))
    assert compute(x, FLOAT32).total.tobytes() == blocks.total.tobytes()
