from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from actcache.format import statistics
from actcache.format.statistics import BLOCK_ROWS, NORM_BINS, Statistics, merge, parts
from actcache.storage import ROW_DTYPES, RowDtype, StoredRows

FLOAT32 = ROW_DTYPES["float32"]


def rows(count: int, width: int = 5, seed: int = 0) -> np.ndarray:
    state = np.random.RandomState(seed)
    return (state.standard_normal((count, width)) * 3 + 1).astype("<f4")


def compute(x: np.ndarray, row_dtype: RowDtype, mapper: Any = map) -> Statistics:
    return merge(parts(StoredRows({"activations": x}), row_dtype, mapper))


@pytest.mark.parametrize("count", [1, 31, 33, 2500, BLOCK_ROWS + 100])
@pytest.mark.parametrize("dtype", ROW_DTYPES)
def test_sums_and_norms_are_those_of_the_rows_as_stored(dtype: str, count: int) -> None:
    row_dtype = ROW_DTYPES[dtype]
    stored = row_dtype.from_torch(torch.from_numpy(rows(count)))
    exact = row_dtype.to_torch(stored).double().numpy()
    found = statistics.compute(stored, row_dtype)
    norms = np.linalg.norm(exact, axis=1)
    assert (found.count, found.non_finite) == (count, 0)
    error = np.abs(found.total - exact.sum(axis=0)) / np.abs(exact).sum(axis=0)
    assert error.max() < 1e-6
    np.testing.assert_allclose(found.total_squares, (exact**2).sum(axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.norm_total, norms.sum(), rtol=1e-7)
    np.testing.assert_allclose(found.norm_max, norms.max(), rtol=1e-6)
    np.testing.assert_array_equal(found.abs_max, np.abs(exact).max(axis=0))
    assert found.norm_histogram.sum() == count
    assert found.near_overflow == 0


def distant(count: int, mean: float, width: int = 8) -> np.ndarray:
    return (rows(count, width) / 3 + mean).astype("<f4")


@pytest.mark.parametrize("mean", [0.0, 1.0, 100.0, 1000.0])
@pytest.mark.parametrize("dtype", ROW_DTYPES)
def test_a_mean_far_from_zero_costs_the_variance_no_precision(dtype: str, mean: float) -> None:
    row_dtype = ROW_DTYPES[dtype]
    stored = row_dtype.from_torch(torch.from_numpy(distant(20_000, mean)))
    exact = row_dtype.to_torch(stored).double().numpy()
    found = statistics.compute(stored, row_dtype)
    np.testing.assert_allclose(found.variance, exact.var(axis=0).sum(), rtol=1e-6)
    np.testing.assert_allclose(found.mean, exact.mean(axis=0), rtol=1e-7, atol=1e-7)


def test_a_few_massive_rows_cost_the_variance_no_precision() -> None:
    """Put massive rows at position 0 of each sequence; the first is in the centre's sample."""
    x = rows(8192, width=8)
    x[::64] *= 1e4
    exact = x.astype(np.float64)
    np.testing.assert_allclose(compute(x, FLOAT32).variance, exact.var(axis=0).sum(), rtol=1e-6)


def test_dimensions_that_never_change_have_no_variance() -> None:
    x = np.broadcast_to(np.float32([0.1, -3e4, 0.0, 7.0]), (5000, 4)).copy()
    found = compute(x, FLOAT32)
    assert abs(found.variance) < 1e-6
    np.testing.assert_allclose(found.mean, x[0])


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_values_whose_squares_overflow_float32_are_summed_correctly(
    dtype: str, scale: float
) -> None:
    row_dtype = ROW_DTYPES[dtype]
    tensor = (torch.from_numpy(rows(1000)) * scale).to(getattr(torch, dtype))
    exact = tensor.double().numpy()
    found = statistics.compute(row_dtype.from_torch(tensor), row_dtype)
    np.testing.assert_allclose(found.total_squares, (exact**2).sum(axis=0), rtol=1e-9)
    np.testing.assert_allclose(found.norm_max, np.linalg.norm(exact, axis=1).max(), rtol=1e-9)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_finite_value_of_a_type_is_converted_exactly(dtype: str) -> None:
    row_dtype = ROW_DTYPES[dtype]
    bits = np.arange(1 << 16, dtype="<u2")
    if dtype == "float32":
        bits = (bits.astype("<u4") << 16) | 0x1234
    numbers = bits.view(row_dtype.storage)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        exact = row_dtype.to_float32(StoredRows({"activations": numbers})).astype(np.float64)
    finite = np.isfinite(exact)
    kept = numbers[finite].reshape(1, -1)  # one row: the largest values are the values
    np.testing.assert_array_equal(compute(kept, row_dtype).abs_max, np.abs(exact[finite]))
    np.testing.assert_array_equal(compute(kept, row_dtype).total, exact[finite])
    each = compute(np.repeat(numbers[:, None], 2, axis=1), row_dtype)
    assert each.non_finite == (~finite).sum()
    assert each.near_overflow == (np.abs(exact[finite]) >= 32_752).sum()


def test_rows_near_float16s_largest_are_counted_once_each_and_only_if_finite() -> None:
    x = rows(5000)
    x[7, :3], x[8, 0], x[4999, 4], x[9, 1] = 32_752, -40_000, 1e6, 32_751
    x[10, :2] = 60_000, np.inf
    assert compute(x, FLOAT32).near_overflow == 3


def test_the_bits_do_not_depend_on_the_number_of_threads() -> None:
    x = rows(3 * BLOCK_ROWS + 5, width=40)
    alone = compute(x, FLOAT32)
    for threads in (1, 2, 5):
        with ThreadPoolExecutor(threads) as pool:
            found = compute(x, FLOAT32, pool.map)
        for field in Statistics.__dataclass_fields__:
            expected = np.asarray(getattr(alone, field)).tobytes()
            assert np.asarray(getattr(found, field)).tobytes() == expected, field


def test_means_and_variance_follow_their_formulas() -> None:
    x = rows(1500)
    exact = x.astype(np.float64)
    found = compute(x, FLOAT32)
    np.testing.assert_allclose(found.mean, exact.mean(axis=0), rtol=1e-7)
    variance = ((exact - exact.mean(axis=0)) ** 2).sum(axis=1).mean()
    np.testing.assert_allclose(found.variance, variance, rtol=1e-7)
    norms = np.linalg.norm(exact, axis=1)
    np.testing.assert_allclose(found.rms_norm, np.sqrt((norms**2).mean()), rtol=1e-7)
    np.testing.assert_allclose(found.mean_norm, norms.mean(), rtol=1e-7)


def test_the_squared_error_of_a_constant_is_that_of_predicting_it_for_every_row() -> None:
    x, constant = rows(300), np.linspace(-2, 2, 5)
    error = ((x.astype(np.float64) - constant) ** 2).sum()
    np.testing.assert_allclose(compute(x, FLOAT32).squared_error_of(constant), error, rtol=1e-7)


def test_non_finite_rows_are_counted_and_excluded_from_all_sums() -> None:
    x = rows(2000)
    x[3, 0], x[1500, 4], x[1501] = np.nan, np.inf, -np.inf
    found, clean = compute(x, FLOAT32), np.delete(x, [3, 1500, 1501], axis=0)
    assert (found.count, found.non_finite) == (1997, 3)
    np.testing.assert_allclose(found.total, clean.sum(axis=0, dtype=np.float64), rtol=1e-7)
    np.testing.assert_array_equal(found.abs_max, np.abs(clean).max(axis=0))
    assert found.norm_histogram.sum() == 1997
    assert np.isfinite([found.variance, found.rms_norm, found.mean_norm, found.norm_max]).all()


def test_shards_without_a_finite_row_do_not_divide_by_zero() -> None:
    found = compute(np.full((4, 5), np.nan, dtype="<f4"), FLOAT32)
    assert (found.count, found.non_finite, found.norm_max) == (0, 4, 0.0)
    assert (found.mean == 0).all()
    assert (found.abs_max == 0).all()
    assert found.variance == found.rms_norm == found.mean_norm == 0.0


def test_float16s_largest_rows_do_not_overflow() -> None:
    x = np.full((3, 5), 65504.0, dtype="<f2")
    assert compute(x, ROW_DTYPES["float16"]).norm_max == pytest.approx(65504 * 5**0.5)


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
        np.testing.assert_allclose(getattr(merged, field), getattr(whole, field), rtol=1e-6)
    np.testing.assert_allclose(merged.variance, whole.variance, rtol=1e-6)


def test_merging_does_not_change_its_inputs() -> None:
    part = compute(rows(10), FLOAT32)
    before = part.total.copy()
    merge([part, part])
    np.testing.assert_array_equal(part.total, before)


def test_the_bits_of_a_block_do_not_depend_on_later_blocks() -> None:
    """Compare the sums of a shard with those of its blocks, computed one by one."""
    x = rows(2 * BLOCK_ROWS)
    blocks = merge(compute(block, FLOAT32) for block in (x[:BLOCK_ROWS], x[BLOCK_ROWS:]))
    assert compute(x, FLOAT32).total.tobytes() == blocks.total.tobytes()
