"""Outlier dimensions, and cosines of means."""

import dataclasses

import numpy as np
import pytest

from actcache.inspection.dimensions import COMPARED, LISTED, PROFILE_POINTS, describe, mean_cosines


def normal_rows(width=20, count=500):
    return np.random.RandomState(0).standard_normal((count, width))


def test_a_dimension_of_large_rms_is_an_outlier_with_its_share_of_the_variance(statistics_of):
    rows = normal_rows()
    rows[:, 7] *= 30
    rows[:, 3] += 9  # a constant: large, and no variance
    found = describe(statistics_of(rows))
    assert found.outliers == 2
    assert [d.dimension for d in found.largest[:2]] == [7, 3]
    assert [d.outlier for d in found.largest] == [True, True] + [False] * (LISTED - 2)
    variances = rows.var(axis=0)
    for d in found.largest:
        column = rows[:, d.dimension]
        assert d.rms == pytest.approx(np.sqrt((column**2).mean()), rel=1e-5)
        assert d.mean == pytest.approx(column.mean(), rel=1e-4)
        assert d.abs_max == pytest.approx(np.abs(column).max(), rel=1e-6)
        assert d.variance_share == pytest.approx(variances[d.dimension] / variances.sum(), rel=1e-3)
        assert d.ratio == pytest.approx(d.rms / found.median_rms)
    assert found.largest[1].variance_share < 0.01


def test_a_dimension_with_one_huge_value_is_an_outlier_at_any_rms(statistics_of):
    rows = normal_rows()
    rows[0, 5] = 40
    found = describe(statistics_of(rows))
    assert found.outliers == 1
    assert next(d for d in found.largest if d.outlier).dimension == 5


def test_the_profile_keeps_the_peak_of_every_point_and_is_bounded(statistics_of):
    rows = normal_rows(width=3 * PROFILE_POINTS - 1, count=10)
    rows[:, 1000] *= 100
    found = describe(statistics_of(rows))
    assert found.profile_step == 3
    assert len(found.profile) == PROFILE_POINTS
    assert found.profile[1000 // 3] == found.largest[0].rms == max(found.profile)
    assert describe(statistics_of(normal_rows(width=5))).profile_step == 1


def test_rows_of_zeros_have_no_outliers_and_one_value_among_them_is_one(statistics_of):
    rows = np.zeros((4, 6))
    assert describe(statistics_of(rows)).outliers == 0
    rows[0, 2] = 1
    found = describe(statistics_of(rows))
    assert (found.outliers, found.largest[0].dimension) == (1, 2)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e308, -1e308])
def test_invalid_statistics_are_described_without_an_error(value, statistics_of):
    whole = statistics_of(normal_rows())
    broken = dataclasses.replace(whole, total=np.full(20, value), total_squares=np.full(20, value))
    assert len(describe(broken).largest) == LISTED
    assert mean_cosines([broken.mean, whole.mean])[0][1] is None or abs(value) == 1e308


def test_cosines_compare_means_of_equal_width():
    a, b, other = np.array([1.0, 0.0]), np.array([3.0, 3.0]), np.array([1.0, 2.0, 3.0])
    found = mean_cosines([a, b, other, np.zeros(2)])
    assert found[0][1] == found[1][0] == pytest.approx(np.sqrt(0.5))
    assert found[1][1] == pytest.approx(1)
    assert found[0][2] is None
    assert found[0][3] is found[3][3] is None


def test_the_matrix_of_cosines_is_bounded():
    assert len(mean_cosines([np.ones(2)] * (COMPARED + 5))) == COMPARED
