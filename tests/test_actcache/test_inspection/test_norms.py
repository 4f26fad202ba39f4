"""Norm histograms as facts."""

import math

import numpy as np
import pytest

from actcache.format.statistics import NORM_BINS
from actcache.inspection.norms import norm_histogram


@pytest.fixture
def histogram_of(statistics_of):
    def build(norms):
        rows = np.zeros((len(norms), 3))
        rows[:, 1] = norms
        return norm_histogram(statistics_of(rows).norm_histogram)

    return build


def test_only_bins_with_rows_are_kept_and_their_edges_enclose_the_norms(histogram_of):
    found = histogram_of([1.1, 1.1, 1.3, 5.0])
    assert sum(found.counts) == 4
    assert found.counts[0] == 2
    assert found.counts[-1] == 1
    assert found.edges[0] == 1.0
    assert found.edges[-2] <= 5.0 < found.edges[-1]
    assert len(found.edges) == len(found.counts) + 1


def test_quantiles_are_within_a_bin_of_the_true_ones(histogram_of):
    norms = np.exp(np.random.RandomState(0).standard_normal(5000))
    found = histogram_of(norms)
    for q in (0.01, 0.25, 0.5, 0.99):
        assert found.quantile(q) / np.quantile(norms, q) == pytest.approx(1, abs=0.1)


def test_an_empty_histogram_has_no_bins_and_no_quantile():
    empty = norm_histogram(np.zeros(NORM_BINS, dtype=np.int64))
    assert empty.counts == ()
    assert math.isnan(empty.quantile(0.5))


def test_negative_counts_are_ignored():
    counts = np.zeros(NORM_BINS, dtype=np.int64)
    counts[3], counts[200] = -(2**63), 2**63 - 1
    found = norm_histogram(counts)
    assert found.first_bin == 200
    assert found.counts == (2**63 - 1,)
    assert math.isfinite(found.quantile(0.5))
