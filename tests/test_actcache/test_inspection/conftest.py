"""Builders for inspection."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from actcache.format.dtypes import ROW_DTYPES, VALUES, StoredRows
from actcache.format.statistics import Statistics, compute


@pytest.fixture(scope="session")
def statistics_of() -> Callable[[np.ndarray], Statistics]:
    """Statistics of rows [N, D] as a shard in float32 has them."""

    def build(rows: np.ndarray) -> Statistics:
        return compute(StoredRows({VALUES: rows.astype("<f4")}), ROW_DTYPES["float32"])

    return build
