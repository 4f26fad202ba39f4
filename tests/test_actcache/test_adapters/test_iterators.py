from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from actcache.adapters import (
    DictionaryLearningBuffer,
    Feed,
    HookpointBatches,
    NumpyBatches,
    SaeLensBatches,
    open_feed,
)
from actcache.errors import ConfigError, CorruptShardError, RunError
from actcache.storage import ROW_DTYPES

KINDS = [NumpyBatches, HookpointBatches, SaeLensBatches, DictionaryLearningBuffer]


@pytest.fixture
def feed(make_cache: Callable[..., Path]) -> Feed:
    return open_feed(make_cache(), "layers.0", batch_size=64, val_fraction=0, pool_rows=128)


def rows_of(batch: object) -> np.ndarray:
    (rows,) = batch.values() if isinstance(batch, dict) else [batch]
    return np.asarray(rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ROW_DTYPES)
def test_rows_of_every_type_are_float32_in_the_order_of_the_stream(
    dtype: str, kind: type, make_cache: Callable[..., Path]
) -> None:
    feed = open_feed(make_cache(dtype=dtype), "layers.0", batch_size=64, val_fraction=0, epochs=1)
    cache = feed.cache
    with feed.stream() as stream:
        addresses = [batch.addresses for batch in stream]
    with kind(feed) as batches:
        found = [rows_of(batch) for batch in batches]
    assert len(found) == len(addresses) == feed.plan.steps_per_epoch
    for rows, places in zip(found, addresses, strict=True):
        assert rows.dtype == np.float32
        truth = [cache.row_dtype.to_float32(cache.read("layers.0", s, r, 1)) for s, r in places]
        np.testing.assert_array_equal(rows, np.concatenate(truth))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("taken", [0, 3, 8, 11])  # 8 steps an epoch
def test_resumed_batches_continue_exactly_from_a_state(kind: type, taken: int, feed: Feed) -> None:
    with kind(feed) as whole, kind(feed) as stopped, kind(feed) as resumed:
        expected = [rows_of(next(whole)) for _ in range(taken + 3)]
        for _ in range(taken):
            next(stopped)
        resumed.load_state_dict(stopped.state_dict())
        for rows in expected[taken:]:
            np.testing.assert_array_equal(rows_of(next(resumed)), rows)
        with pytest.raises(RunError, match="already begun"):
            resumed.load_state_dict(stopped.state_dict())


def test_row_i_is_the_same_token_at_every_hookpoint(make_cache: Callable[..., Path]) -> None:
    names = ("layers.1", "layers.0")
    feed = open_feed(make_cache(), names, batch_size=64, val_fraction=0)
    with feed.stream() as stream:
        addresses = next(stream).addresses
    with HookpointBatches(feed) as batches:
        batch = next(batches)
    assert tuple(batch) == names
    for name in names:
        truth = [feed.cache.read(name, s, r, 1).values for s, r in addresses]
        np.testing.assert_array_equal(batch[name].numpy(), np.concatenate(truth))


@pytest.mark.parametrize("kind", [NumpyBatches, SaeLensBatches, DictionaryLearningBuffer])
def test_an_iterator_of_one_hookpoint_rejects_two(
    kind: type, make_cache: Callable[..., Path]
) -> None:
    feed = open_feed(make_cache(), ("layers.0", "layers.1"), batch_size=64)
    with pytest.raises(ConfigError, match="of one hookpoint"):
        kind(feed)


def test_rows_are_placed_on_the_given_device(feed: Feed) -> None:
    with SaeLensBatches(feed, device="meta") as batches:
        batch = next(batches)
    assert batch.device.type == "meta"
    assert batch.dtype == torch.float32


def readers() -> set[threading.Thread]:
    return {t for t in threading.enumerate() if t.name == "actcache-reader"}


def test_garbage_collected_batches_stop_the_prefetch(feed: Feed) -> None:
    before = readers()
    batches = NumpyBatches(feed)
    next(batches)
    (reader,) = readers() - before
    del batches
    gc.collect()
    reader.join(60)
    assert not reader.is_alive()


def test_a_read_error_is_raised_in_the_trainer(feed: Feed) -> None:
    for path in (feed.cache.root / "activations" / "layers.0").iterdir():
        path.unlink()
    with SaeLensBatches(feed) as batches, pytest.raises(CorruptShardError):
        next(batches)


def test_closed_batches_raise(feed: Feed) -> None:
    batches = NumpyBatches(feed)
    next(batches)
    batches.close()
    with pytest.raises(RunError, match="closed"):
        next(batches)
