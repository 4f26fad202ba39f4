"""The rows of every batch, fixed for all versions by a table.

A run on disk is resumed with its plan, so no version that reads runs of earlier ones may change a
line of the table. `python tests/test_actcache/test_stream/test_order_table.py` rewrites it: only if
the format of runs changes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actcache.cache.reader import Cache
from actcache.stream.activation_stream import ActivationStream
from actcache.stream.order import OrderPlan, batch_rows, make_plan, split_shards
from actcache.stream.segments import Segmentation

TABLE = Path(__file__).parent / "order_table.json"
ANY_CACHE = Path(__file__).parents[2] / "golden" / "v1"

UNEVEN = [(0, 40), (1, 40), (2, 0), (3, 33), (5, 40), (6, 7)]
CUT = Segmentation(3, 8, 16, 2**32 - 1, 64, 0.34)

SMALL = {
    "two lanes": OrderPlan(((0, 10), (2, 7)), 4, batch_size=4, lanes=2, window=3, seed=3),
    "one lane, a row a batch": OrderPlan(
        ((0, 9), (1, 5)), 2, batch_size=1, lanes=1, window=5, seed=0
    ),
    "windows longer than lanes": OrderPlan(((4, 30),), 7, batch_size=6, lanes=6, window=90, seed=1),
    "by formula": make_plan(UNEVEN, 8, 12, 1, pool_rows=60),
    "by formula, a prime batch, the largest seed": make_plan(UNEVEN, 16, 37, 2**32 - 1),
    "second segment of a cache": CUT.plan(1, {3: 24, 4: 24, 5: 11}),
}
"""Plans whose table has every row of some epochs."""

LARGE = {
    "defaults, a million rows": make_plan([(s, 8176) for s in range(127)], 512, 8192, 0),
    "defaults, fewer rows than the pool": make_plan([(s, 2040) for s in range(9)], 1024, 2048, 7),
    "defaults, wide rows, uneven shards": make_plan(
        [(s, 65_472 - 999 * s) for s in range(10)], 128, 4096, 42
    ),
}
"""Plans whose table has the first rows of some batches, and a digest of whole epochs."""

EPOCHS = (0, 1, 5)
SPLITS = [(2, 0.05, 0), (7, 0.5, 1), (20, 0.1, 0), (20, 0.1, 3), (128, 0.05, 2**32 - 1)]
"""Number of shards, share held out, seed."""


def line(pairs: Iterable[Iterable[int]]) -> str:
    """Rows of a batch, [n, 2], as shard/row; shards of a plan as shard/rows."""
    return " ".join(f"{shard}/{number}" for shard, number in pairs)


def streamed(plan: OrderPlan, epoch: int) -> Iterable[np.ndarray]:
    """Return an epoch's batches of a stream that reads no hookpoint."""
    cache = Cache.open(ANY_CACHE)
    with ActivationStream(cache, [], plan, epoch=epoch, epochs=epoch + 1) as stream:
        yield from (batch.addresses for batch in stream)


def every_row(plan: OrderPlan) -> dict[str, Any]:
    steps = range(plan.steps_per_epoch)
    return {str(e): [line(batch_rows(plan, e, step)) for step in steps] for e in EPOCHS}


def digests(plan: OrderPlan) -> dict[str, Any]:
    """First and last batch's first rows; SHA-256 over all addresses as little-endian int64."""
    found = {}
    for epoch in EPOCHS:
        batches = list(streamed(plan, epoch))
        found[str(epoch)] = {
            "first batch": line(batches[0][:6]),
            "last batch": line(batches[-1][:6]),
            "sha256": hashlib.sha256(np.concatenate(batches).astype("<i8").tobytes()).hexdigest(),
        }
    return found


def plain(plan: OrderPlan) -> dict[str, Any]:
    fields = dataclasses.asdict(plan) | {"shards": line(plan.shards)}
    assert fields.pop("left_out") == {}
    return fields


def entry(plan: OrderPlan) -> dict[str, Any]:
    epochs = every_row(plan) if plan.rows < 1000 else digests(plan)
    return {"plan": plain(plan), "epochs": epochs}


def held_out(split: tuple[int, float, int]) -> dict[str, Any]:
    count, fraction, seed = split
    return {"of": list(split), "held out": split_shards(range(count), fraction, seed)[1]}


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    return json.loads(TABLE.read_text())


@pytest.mark.parametrize("name", [*SMALL, *LARGE])
def test_the_rows_of_every_batch_are_those_of_the_table(name: str, table: dict[str, Any]) -> None:
    assert entry((SMALL | LARGE)[name]) == table["orders"][name]


@pytest.mark.parametrize("name", SMALL)
def test_the_stream_returns_the_rows_of_the_table(name: str, table: dict[str, Any]) -> None:
    for epoch in EPOCHS:
        found = [line(batch) for batch in streamed(SMALL[name], epoch)]
        assert found == table["orders"][name]["epochs"][str(epoch)]


def test_the_held_out_shards_are_those_of_the_table(table: dict[str, Any]) -> None:
    assert [held_out(split) for split in SPLITS] == table["splits"]


def test_the_table_has_exactly_these_plans(table: dict[str, Any]) -> None:
    assert list(table["orders"]) == [*SMALL, *LARGE]


if __name__ == "__main__":
    contents = {
        "orders": {name: entry(plan) for name, plan in (SMALL | LARGE).items()},
        "splits": [held_out(split) for split in SPLITS],
    }
    TABLE.write_text(json.dumps(contents, indent=1) + "\n")
