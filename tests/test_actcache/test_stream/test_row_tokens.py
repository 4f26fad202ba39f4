from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from actcache.cache.folder import tokens_path
from actcache.cache.reader import Cache
from actcache.errors import CorruptShardError
from actcache.stream.activation_stream import ActivationStream, Batch
from actcache.stream.order import make_plan
from actcache.stream.row_tokens import RowTokenReader
from actcache.stream.segments import Segmentation, SegmentFollower


def check_text(cache: Cache, batch: Batch) -> None:
    """Compare a batch's tokens, row by row, with the tokens files at its addresses."""
    text = batch.text
    assert text is not None
    for i, (shard, row) in enumerate(batch.addresses):
        words = cache.tokens(int(shard))
        sequence, position = words.row_sequence[row], words.row_position[row]
        assert text.tokens[i] == words.tokens[sequence, position]
        assert text.sequences[i] == cache.receipts[int(shard)].first_sequence + sequence
        assert text.positions[i] == position
    assert len(text.tokens) == len(text.sequences) == len(text.positions) == len(batch.addresses)


@pytest.mark.parametrize("shape", [{}, {"last_sequences": 3}, {"extended_by": 5}])
@pytest.mark.parametrize("backend", ["memmap", "zarr"])
def test_a_batch_has_the_tokens_of_its_rows(
    backend: str, shape: dict[str, int], make_cache: Callable[..., Path]
) -> None:
    cache = Cache.open(make_cache(backend=backend, **shape))
    plan = make_plan([(s, cache.receipts[s].rows) for s in cache.shards], 16, 24, 3, 100)
    with ActivationStream(cache, ["layers.0"], plan, text=True) as stream:
        batches = [next(stream) for _ in range(plan.steps_per_epoch + 2)]
    for batch in batches:
        check_text(cache, batch)
    numbers = {int(n) for batch in batches for n in batch.text.sequences}
    # Every one, but for what the end of an epoch leaves out.
    assert max(numbers) == sum(receipt.sequences for receipt in cache.receipts.values()) - 1


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rank_has_the_text_of_its_own_rows(
    world_size: int, make_cache: Callable[..., Path]
) -> None:
    cache = Cache.open(make_cache())
    plan = make_plan([(s, 128) for s in cache.shards], 16, 24, 3, 100)
    for rank in range(world_size):
        place = {"rank": rank, "world_size": world_size, "epoch": 1, "step": 2}
        with ActivationStream(cache, ["layers.0"], plan, text=True, **place) as stream:
            check_text(cache, next(stream))


def test_segments_of_a_growing_cache_have_their_text(make_cache: Callable[..., Path]) -> None:
    cache = Cache.open(make_cache(shards=5, sequences=4, last_sequences=2))
    cut = Segmentation(2, block_rows=16, batch_size=24, seed=3, pool_rows=60, val_fraction=0.0)
    receipts, cache.receipts = cache.receipts, {}  # opened before anything was published
    plans = SegmentFollower(cache, cut)
    with ActivationStream(cache, ["layers.0"], plans, epochs=2, text=True) as stream:
        batches = list(stream)
    assert {batch.segment for batch in batches} == {0, 1, 2}
    assert cache.receipts == receipts
    for batch in batches:
        check_text(cache, batch)


def test_batches_are_the_same_with_and_without_text(make_cache: Callable[..., Path]) -> None:
    cache = Cache.open(make_cache())
    plan = make_plan([(s, 128) for s in cache.shards], 16, 24, 3, 100)
    with (
        ActivationStream(cache, ["layers.0"], plan, text=True) as with_tokens,
        ActivationStream(cache, ["layers.0"], plan) as plain,
    ):
        for _ in range(plan.steps_per_epoch):
            with_text, without = next(with_tokens), next(plain)
            assert without.text is None
            np.testing.assert_array_equal(with_text.addresses, without.addresses)
            assert with_text.activations["layers.0"].equal(without.activations["layers.0"])


def test_a_damaged_tokens_file_stops_only_a_stream_with_text(
    make_cache: Callable[..., Path],
) -> None:
    cache = Cache.open(make_cache())
    path = tokens_path(cache.root, 1)
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    plan = make_plan([(1, 128)], 16, 24, 3, 100)
    with ActivationStream(cache, ["layers.0"], plan) as plain:
        next(plain)
    with (
        ActivationStream(cache, ["layers.0"], plan, text=True) as with_tokens,
        pytest.raises(CorruptShardError, match="differs from the receipt of shard 1"),
    ):
        next(with_tokens)


@pytest.mark.parametrize(("shards_kept", "read"), [(0, 6), (1, 6), (2, 4), (4, 4)])
def test_text_in_memory_is_bounded_and_the_least_recently_used_shard_is_dropped(
    shards_kept: int, read: int, make_cache: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache.open(make_cache())
    shard_bytes = 128 * 12  # rows, int32 x 3
    reader, taken = RowTokenReader(cache, shards_kept * shard_bytes), []
    tokens = cache.tokens
    monkeypatch.setattr(cache, "tokens", lambda shard: taken.append(shard) or tokens(shard))
    for shard in (0, 1, 0, 2, 0, 3):
        addresses = np.stack([np.full(20, shard), np.arange(5, 25)], axis=1)
        assert reader.of(addresses).tokens.shape == (20,)
        assert sum(table.nbytes for table in reader._kept.values()) <= max(
            reader._limit, shard_bytes
        )
    assert len(taken) == read
