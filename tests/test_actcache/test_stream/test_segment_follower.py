"""`actcache.stream.segments` and the stream over segments: order, waiting, state."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import actcache.stream.activation_stream
import actcache.stream.segments
from actcache.cache.reader import Cache
from actcache.errors import FormatError
from actcache.stream.activation_stream import ActivationStream, Batch
from actcache.stream.order import batch_rows
from actcache.stream.segments import Segmentation, SegmentFollower

CUT = Segmentation(
    shards_each=2, block_rows=16, batch_size=24, seed=3, pool_rows=60, val_fraction=0.0
)
STEPS = (5, 5, 1)  # 2 shards of 64 rows, 2 more, and one of 32


@pytest.fixture(autouse=True)
def _hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(actcache.stream.segments, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(actcache.stream.activation_stream, "_TIMEOUT", 0.01)


@pytest.fixture(scope="module")
def whole(make_cache: Callable[..., Path]) -> Path:
    return make_cache(shards=5, sequences=4, last_sequences=2, hookpoints={"layers.0": 6})


@pytest.fixture
def growing(whole: Path, tmp_path: Path) -> Path:
    """Copy of the cache without receipts and completion marker."""
    root = shutil.copytree(whole, tmp_path / "cache")
    for path in (root / "shards").iterdir():
        path.unlink()
    return root


def publish(growing: Path, whole: Path, *names: int | str) -> None:
    for name in names:
        file = "END.json" if name == "END" else f"{name:05d}.json"
        (growing / "shards").mkdir(exist_ok=True)
        shutil.copy(whole / "shards" / file, growing / "shards" / f".{file}")
        (growing / "shards" / f".{file}").rename(growing / "shards" / file)


@pytest.fixture
def open_stream() -> Iterator[Callable[..., ActivationStream]]:
    streams = []

    def make(root: Path, **arguments: int) -> ActivationStream:
        cache = Cache.open(root)
        stream = ActivationStream(cache, ["layers.0"], SegmentFollower(cache, CUT), **arguments)
        streams.append(stream)
        return stream

    yield make
    for stream in streams:
        stream.close()


def place(batch: Batch) -> tuple[int, int, int]:
    return batch.epoch, batch.segment, batch.step


def epoch(number: int) -> list[tuple[int, int, int]]:
    return [(number, n, step) for n, count in enumerate(STEPS) for step in range(count)]


def test_segments_follow_in_turn_in_the_order_of_their_plans_and_epochs_differ(
    whole: Path, open_stream: Callable[..., ActivationStream]
) -> None:
    stream, cache = open_stream(whole), Cache.open(whole)
    following = SegmentFollower(cache, CUT)
    assert [following.poll(n) for n in range(4)] == [None] * 4
    batches = [next(stream) for _ in range(2 * sum(STEPS) + 1)]
    assert [place(batch) for batch in batches] == [*epoch(0), *epoch(1), (2, 0, 0)]
    for batch in batches:
        plan = following.plan(batch.segment)
        assert plan is not None
        expected = batch_rows(plan, batch.epoch, batch.step)
        np.testing.assert_array_equal(batch.addresses, expected)
        truth = np.concatenate([cache.read("layers.0", s, r, 1).values for s, r in expected])
        assert torch.equal(batch.activations["layers.0"], torch.from_numpy(truth))
        assert not batch.last
    assert not np.array_equal(batches[0].addresses, batches[sum(STEPS)].addresses)


def test_a_stream_resumes_exactly_from_any_state(
    whole: Path, open_stream: Callable[..., ActivationStream]
) -> None:
    straight = open_stream(whole)
    batches = [next(straight) for _ in range(2 * sum(STEPS))]
    stopped = open_stream(whole)
    for taken in range(sum(STEPS) + 2):
        resumed = open_stream(whole, **stopped.state_dict())
        for expected in batches[taken : taken + 3]:
            found = next(resumed)
            assert place(found) == place(expected)
            np.testing.assert_array_equal(found.addresses, expected.addresses)
        resumed.close()
        next(stopped)


def test_the_state_after_a_segment_does_not_depend_on_later_segments(
    whole: Path, open_stream: Callable[..., ActivationStream]
) -> None:
    stream = open_stream(whole)
    for count, segment in zip((5, 5, 1), (1, 2, 3), strict=True):
        for _ in range(count):
            next(stream)
        assert stream.state_dict() == {"epoch": 0, "segment": segment, "step": 0}
    next(stream)
    assert stream.state_dict() == {"epoch": 1, "segment": 0, "step": 1}


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_ranks_share_the_lanes_of_every_segment(
    world_size: int, whole: Path, open_stream: Callable[..., ActivationStream]
) -> None:
    alone = open_stream(whole)
    ranks = [open_stream(whole, rank=r, world_size=world_size) for r in range(world_size)]
    for _ in range(sum(STEPS)):
        lanes = next(alone).addresses.reshape(24, -1, 2)
        for rank, stream in enumerate(ranks):
            part = next(stream).addresses.reshape(24 // world_size, -1, 2)
            np.testing.assert_array_equal(part, lanes[rank::world_size])


def test_a_stream_with_limited_epochs_marks_its_last_batch_and_ends(
    whole: Path, open_stream: Callable[..., ActivationStream]
) -> None:
    batches = list(open_stream(whole, epochs=2))
    assert [place(batch) for batch in batches] == [*epoch(0), *epoch(1)]
    assert [batch.last for batch in batches] == [False] * (len(batches) - 1) + [True]
    stream = open_stream(whole, epochs=1)
    for _ in range(sum(STEPS)):
        next(stream)
    assert stream.state_dict() == {"epoch": 1, "segment": 0, "step": 0}
    assert list(open_stream(whole, epochs=1, **stream.state_dict())) == []


def test_a_segment_starts_when_all_its_shards_are_published(
    whole: Path, growing: Path, open_stream: Callable[..., ActivationStream]
) -> None:
    stream, waited_for = open_stream(growing), []
    pending: dict[int, list[int | str]] = {0: [1, 0], 2: [4, 3, 2], 5: ["END"]}

    def wait(shard: int) -> None:
        if not waited_for or waited_for[-1] != shard:
            waited_for.append(shard)
        if pending[shard]:  # may be called again for the same shard after it was published
            publish(growing, whole, pending[shard].pop(0))

    stream.on_wait = wait
    assert [place(next(stream)) for _ in range(2 * sum(STEPS))] == [*epoch(0), *epoch(1)]
    assert waited_for[0] == 0
    assert 2 in waited_for
    assert waited_for[-1] == 5
    assert sorted(waited_for) == waited_for
    assert stream.seconds_waited > 0.03


def test_the_last_batch_of_a_segment_is_delayed_until_its_mark_is_known(
    whole: Path, growing: Path, open_stream: Callable[..., ActivationStream]
) -> None:
    publish(growing, whole, 0, 1)
    endless, ending = open_stream(growing), open_stream(growing, epochs=1)
    assert [place(next(endless)) for _ in range(5)] == epoch(0)[:5]
    assert [place(next(ending)) for _ in range(4)] == epoch(0)[:4]
    waited_for = []

    def wait(shard: int) -> None:
        waited_for.append(shard)
        publish(growing, whole, 2, 3)

    ending.on_wait = wait
    assert place(next(ending)) == (0, 0, 4)
    assert 2 in waited_for


def test_closing_a_waiting_stream_ends_its_thread(
    growing: Path, open_stream: Callable[..., ActivationStream]
) -> None:
    before = threading.active_count()
    stream = open_stream(growing)

    def stop(shard: int) -> None:
        raise KeyboardInterrupt

    stream.on_wait = stop
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    stream.close()
    assert threading.active_count() == before


def test_a_damaged_receipt_raises_in_the_consumer(
    whole: Path, growing: Path, open_stream: Callable[..., ActivationStream]
) -> None:
    publish(growing, whole, 0)
    (growing / "shards" / "00001.json").write_text("{}")
    with pytest.raises(FormatError, match=r"00001\.json"):
        next(open_stream(growing))


def test_segments_with_fewer_rows_than_a_batch_are_skipped(
    make_cache: Callable[..., Path],
) -> None:
    cache = Cache.open(
        make_cache(shards=3, sequences=4, last_sequences=1, hookpoints={"layers.0": 6})
    )
    with ActivationStream(cache, ["layers.0"], SegmentFollower(cache, CUT), epochs=2) as stream:
        assert {batch.segment for batch in stream} == {0}


def test_refresh_adds_published_shards_in_order(whole: Path, growing: Path) -> None:
    cache = Cache.open(growing)
    assert cache.refresh(range(3)) == 0
    publish(growing, whole, 2, 0)
    assert cache.refresh(range(3)) == 1
    assert cache.shards == [0, 2]
    publish(growing, whole, 1, 3, "END")
    assert cache.refresh(range(3)) is None
    assert cache.shards == [0, 1, 2]
    assert cache.end == Cache.open(whole).end
    assert cache.digest([0, 1, 2]) == Cache.open(whole).digest([0, 1, 2])
