from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from actcache.cache.reader import Cache
from actcache.cache.writer import RowLayout
from actcache.errors import ConfigError, CorruptShardError, HookpointError, RunError
from actcache.storage import ROW_DTYPES
from actcache.storage.preadv import WHOLE
from actcache.stream.activation_stream import ActivationStream, Batch
from actcache.stream.memory_budget import PREFETCH_BATCHES
from actcache.stream.order import OrderPlan, batch_rows, make_plan, split_shards
from actcache.stream.prefetcher import BackgroundIterator
from actcache.stream.verified_reads import ReadSettings, Verify

SHARDS = ((0, 64), (1, 0), (2, 64), (3, 37), (4, 64), (5, 32))
HOOKPOINTS = {"layers.0": 6, "layers.1:in": 10}
SHAPE = {
    "shards": 6,
    "hookpoints": HOOKPOINTS,
    "sequences": 4,
    "last_sequences": 2,
    "most_rows": {1: 0, 3: 37},  # filters may leave a shard without rows
    "dtype": "bfloat16",
}
PLAN = OrderPlan(SHARDS, block_rows=16, batch_size=24, lanes=12, window=7, seed=4)


@pytest.fixture(scope="module")
def root(make_cache: Callable[..., Path]) -> Path:
    return make_cache(**SHAPE)


@pytest.fixture
def cache(root: Path) -> Cache:
    return Cache.open(root)


@pytest.fixture
def open_stream(cache: Cache) -> Iterator[Callable[..., ActivationStream]]:
    """Factory of streams that are closed after the test."""
    streams = []

    def make(
        plan: OrderPlan = PLAN, hookpoints: object = None, **position: int
    ) -> ActivationStream:
        stream = ActivationStream(cache, hookpoints or cache.hookpoints, plan, **position)
        streams.append(stream)
        return stream

    yield make
    for stream in streams:
        stream.close()


def test_leaving_a_streams_context_ends_its_threads(cache: Cache) -> None:
    before = threading.active_count()
    with ActivationStream(cache, ["layers.0"], PLAN) as stream:
        assert next(stream).step == 0
        assert threading.active_count() > before
    assert threading.active_count() == before


def test_a_garbage_collected_stream_ends_its_threads(cache: Cache) -> None:
    before = threading.active_count()
    stream: ActivationStream | None = ActivationStream(cache, ["layers.0"], PLAN)
    assert stream is not None
    assert next(stream).step == 0
    stream = None
    deadline = time.monotonic() + 60
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def take(stream: ActivationStream, count: int) -> list[Batch]:
    return [next(stream) for _ in range(count)]


@st.composite
def plans(draw: st.DrawFn) -> OrderPlan:
    chosen = st.sets(st.sampled_from(SHARDS), min_size=1)
    shards = tuple(sorted(draw(chosen.filter(lambda shards: shards != {SHARDS[1]}))))
    lanes = draw(st.sampled_from([1, 2, 3, 4, 6, 12]))
    return OrderPlan(
        shards,
        block_rows=draw(st.integers(1, 40)),
        batch_size=lanes * draw(st.integers(1, sum(n for _, n in shards) // lanes)),
        lanes=lanes,
        window=draw(st.integers(1, 40)),
        seed=draw(st.integers(0, 2**32 - 1)),
    )


@settings(max_examples=25, deadline=None)
@given(plans(), st.integers(0, 2), st.data())
def test_the_rows_of_any_plan_follow_the_rule(
    root: Path, plan: OrderPlan, epoch: int, data: st.DataObject
) -> None:
    cache = Cache.open(root)
    step = data.draw(st.integers(0, plan.steps_per_epoch - 1))
    stream = ActivationStream(cache, ["layers.1:in"], plan, epoch=epoch, step=step)
    rows = {shard: cache.read("layers.1:in", shard) for shard, _ in plan.shards}
    for _ in range(3):
        batch, expected = next(stream), batch_rows(plan, epoch, step)
        assert (batch.epoch, batch.step) == (epoch, step)
        np.testing.assert_array_equal(batch.addresses, expected)
        truth = [cache.row_dtype.to_torch(rows[shard][row : row + 1]) for shard, row in expected]
        assert torch.equal(batch.activations["layers.1:in"], torch.cat(truth))
        step += 1
        if step == plan.steps_per_epoch:
            epoch, step = epoch + 1, 0
        assert stream.state_dict() == {"epoch": epoch, "step": step}
    stream.close()


@pytest.mark.parametrize("window", [1, 7])
def test_a_stream_that_leaves_rows_out_follows_the_rule_from_every_step_on_any_number_of_ranks(
    window: int, cache: Cache
) -> None:
    left_out = {0: np.array([3, 15, 16, 63]), 3: np.arange(16, 37), 5: np.array([0])}
    plan = dataclasses.replace(PLAN, window=window, left_out=left_out)
    rows = {shard: cache.read("layers.0", shard) for shard, _ in plan.shards}
    for world_size in (1, 2, 4):
        for step in range(plan.steps_per_epoch):
            expected = batch_rows(plan, 0, step).reshape(12, -1, 2)  # [L, b, 2]
            for rank in range(world_size):
                with ActivationStream(
                    cache, ["layers.0"], plan, step=step, rank=rank, world_size=world_size
                ) as stream:
                    batch = next(stream)
                own = expected[rank::world_size].reshape(-1, 2)
                np.testing.assert_array_equal(batch.addresses, own)
                truth = [cache.row_dtype.to_torch(rows[s][row : row + 1]) for s, row in own]
                assert torch.equal(batch.activations["layers.0"], torch.cat(truth))


@pytest.mark.parametrize("dtype", ROW_DTYPES)
def test_activations_are_the_rows_at_the_addresses_for_every_hookpoint(
    dtype: str, make_cache: Callable[..., Path]
) -> None:
    cache = Cache.open(make_cache(hookpoints=HOOKPOINTS, sequences=4, dtype=dtype))
    plan = make_plan([(s, 64) for s in range(4)], 16, 32, seed=1, pool_rows=128)
    stream = ActivationStream(cache, cache.hookpoints, plan)
    for batch in take(stream, plan.steps_per_epoch + 2):
        for name, width in HOOKPOINTS.items():
            found = batch.activations[name]
            assert found.shape == (32, width)
            truth = [
                cache.row_dtype.to_torch(cache.read(name, s, r, 1)) for s, r in batch.addresses
            ]
            assert found.dtype == truth[0].dtype
            assert torch.equal(found, torch.cat(truth))
    stream.close()


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_batches_from_zarr_equal_those_from_memmap(
    compression: str, make_cache: Callable[..., Path], open_stream: Callable[..., ActivationStream]
) -> None:
    zarr = Cache.open(make_cache(backend="zarr", compression=compression, **SHAPE))
    stream, steps = ActivationStream(zarr, zarr.hookpoints, PLAN), 2 * PLAN.steps_per_epoch + 1
    for expected, found in zip(take(open_stream(), steps), take(stream, steps), strict=True):
        assert (found.epoch, found.step) == (expected.epoch, expected.step)
        np.testing.assert_array_equal(found.addresses, expected.addresses)
        for name in HOOKPOINTS:
            assert torch.equal(found.activations[name], expected.activations[name])
    stream.close()


def join_ranks(ranks: list[Batch], lanes: int) -> tuple[np.ndarray, torch.Tensor]:
    """Join the ranks' rows to a global batch: lane l belongs to rank l mod W. [B, ...]"""
    per_lane = len(ranks[0].addresses) * len(ranks) // lanes
    places = [(ranks[lane % len(ranks)], lane // len(ranks) * per_lane) for lane in range(lanes)]
    addresses = [rank.addresses[at : at + per_lane] for rank, at in places]
    rows = [rank.activations["layers.0"][at : at + per_lane] for rank, at in places]
    return np.concatenate(addresses), torch.cat(rows)


@settings(max_examples=15, deadline=None)
@given(plans(), st.integers(0, 2), st.data())
def test_any_number_of_ranks_resumes_with_the_batches_of_one_process(
    root: Path, plan: OrderPlan, epoch: int, data: st.DataObject
) -> None:
    cache, divisors = Cache.open(root), [n for n in range(1, 13) if plan.lanes % n == 0]
    before, after = (data.draw(st.sampled_from(divisors)) for _ in range(2))
    place = {"epoch": epoch, "step": data.draw(st.integers(0, plan.steps_per_epoch - 1))}
    with contextlib.ExitStack() as opened:

        def streams(world_size: int, state: dict[str, int]) -> list[ActivationStream]:
            ranks = []
            for rank in range(world_size):
                at = {"rank": rank, "world_size": world_size}
                stream = ActivationStream(cache, ["layers.0"], plan, **at)
                stream.load_state_dict(state)
                ranks.append(opened.enter_context(stream))
            return ranks

        (alone,), ranks = streams(1, place), streams(before, place)
        for taken in range(4):
            if taken == 2:  # stopped, and resumed with another number of ranks
                states = [stream.state_dict() for stream in ranks]
                assert states == [alone.state_dict()] * before
                ranks = streams(after, states[-1])
            whole = next(alone)
            addresses, rows = join_ranks([next(stream) for stream in ranks], plan.lanes)
            np.testing.assert_array_equal(addresses, whole.addresses)
            assert torch.equal(rows, whole.activations["layers.0"])


def test_ranks_that_cannot_share_the_lanes_are_rejected(
    open_stream: Callable[..., ActivationStream],
) -> None:
    with pytest.raises(ConfigError, match="12 lanes cannot be divided among 5 processes"):
        open_stream(rank=0, world_size=5)


@pytest.mark.parametrize("taken", [0, 1, 5, PLAN.steps_per_epoch, PLAN.steps_per_epoch + 2])
def test_a_stream_resumes_exactly_at_any_world_size(
    taken: int, open_stream: Callable[..., ActivationStream]
) -> None:
    whole = take(open_stream(), taken + 4)
    stopped = open_stream()
    take(stopped, taken)
    for world_size in (1, 2):
        resumed = open_stream(rank=world_size - 1, world_size=world_size)
        resumed.load_state_dict(stopped.state_dict())
        for expected, found in zip(whole[taken:], take(resumed, 4), strict=True):
            assert (found.epoch, found.step) == (expected.epoch, expected.step)
            lanes = expected.addresses.reshape(PLAN.lanes, -1, 2)[world_size - 1 :: world_size]
            np.testing.assert_array_equal(found.addresses, lanes.reshape(-1, 2))


ELSEWHERE = """
import dataclasses, hashlib, json, sys
from actcache import ActivationStream, Cache
from actcache.stream.order import OrderPlan

root, plan, state, world_size, count = json.loads(sys.argv[1])
plan["shards"] = tuple(map(tuple, plan["shards"]))
for rank in range(world_size):
    place = {"rank": rank, "world_size": world_size}
    stream = ActivationStream(Cache.open(root), ["layers.0"], OrderPlan(**plan), **place)
    stream.load_state_dict(state)
    for _ in range(count):
        batch = next(stream)
        bits = batch.activations["layers.0"].float().numpy().tobytes()
        print(json.dumps([batch.addresses.tolist(), hashlib.sha256(bits).hexdigest()]))
    print(json.dumps(stream.state_dict()))
"""


def test_another_number_of_other_processes_resumes_exactly_in_every_run(
    root: Path, open_stream: Callable[..., ActivationStream]
) -> None:
    stopped, count, world_size = open_stream(), PLAN.steps_per_epoch, 3  # over the epoch's end
    take(stopped, 3)
    state = stopped.state_dict()
    task = json.dumps([str(root), dataclasses.asdict(PLAN), state, world_size, count])

    def elsewhere(seed: str, threads: str) -> list[object]:
        """Run in a subprocess with another hash seed and number of threads."""
        environment = os.environ | {"PYTHONHASHSEED": seed, "OMP_NUM_THREADS": threads}
        command = [sys.executable, "-c", ELSEWHERE, task]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return [json.loads(line) for line in done.stdout.splitlines()]

    expected = []
    ranks = [open_stream(rank=r, world_size=world_size, **state) for r in range(world_size)]
    whole = take(stopped, count)
    parts = [take(stream, count) for stream in ranks]
    for batch, *shares in zip(whole, *parts, strict=True):
        np.testing.assert_array_equal(join_ranks(shares, PLAN.lanes)[0], batch.addresses)
    for part in parts:
        for batch in part:
            bits = batch.activations["layers.0"].float().numpy().tobytes()
            expected.append([batch.addresses.tolist(), hashlib.sha256(bits).hexdigest()])
        expected.append(stopped.state_dict())
    assert elsewhere("1", "1") == expected
    assert elsewhere("2", "2") == expected


def test_the_state_counts_batches_taken_and_not_prefetched(
    open_stream: Callable[..., ActivationStream],
) -> None:
    stream = open_stream()
    assert stream.state_dict() == {"epoch": 0, "step": 0}
    take(stream, 1)
    assert stream.state_dict() == {"epoch": 0, "step": 1}


def test_a_state_cannot_be_loaded_after_the_first_batch(
    open_stream: Callable[..., ActivationStream],
) -> None:
    stream = open_stream()
    take(stream, 1)
    with pytest.raises(RunError, match="already begun"):
        stream.load_state_dict({"epoch": 0, "step": 0})


def test_held_out_shards_never_appear(
    cache: Cache, open_stream: Callable[..., ActivationStream]
) -> None:
    training, held_out = split_shards(cache.shards, 0.25, seed=0)
    plan = make_plan([(s, cache.receipts[s].rows) for s in training], 16, 24, seed=0)
    batches = take(open_stream(plan), 3 * plan.steps_per_epoch)
    seen = {int(shard) for batch in batches for shard in batch.addresses[:, 0]}
    assert seen == {shard for shard in training if cache.receipts[shard].rows}
    assert seen.isdisjoint(held_out)


def test_only_the_given_hookpoints_are_read(
    make_cache: Callable[..., Path],
) -> None:
    root = make_cache(hookpoints=HOOKPOINTS, sequences=4)
    for path in (root / "activations" / "layers.1:in").iterdir():
        path.unlink()
    cache = Cache.open(root)
    plan = make_plan([(s, 64) for s in range(4)], 16, 32, seed=0)
    stream = ActivationStream(cache, ["layers.0"], plan)
    for batch in take(stream, 10):
        assert list(batch.activations) == ["layers.0"]
    stream.close()


@pytest.mark.parametrize("backend", ["memmap", "zarr"])
def test_aligned_hookpoints_read_each_of_their_bytes_once_and_no_others(
    backend: str, make_cache: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    widths = {"layers.0": 6, "layers.1:in": 10, "layers.2": 8}
    cache = Cache.open(make_cache(hookpoints=widths, sequences=4, backend=backend))
    asked = ["layers.2", "layers.0"]
    plan = make_plan([(s, 64) for s in range(4)], 16, 32, seed=0)
    opened: dict[int, str] = {}
    read: dict[str, int] = {}
    open_file, preadv = os.open, os.preadv

    def watched_open(path: str, *rest: Any, **named: Any) -> int:
        fd = open_file(path, *rest, **named)
        opened[fd] = str(Path(f"/proc/self/fd/{fd}").resolve())
        return fd

    def watched_preadv(fd: int, buffers: list[memoryview], offset: int) -> int:
        count = preadv(fd, buffers, offset)
        read[opened[fd]] = read.get(opened[fd], 0) + count
        return count

    monkeypatch.setattr(os, "open", watched_open)
    monkeypatch.setattr(os, "preadv", watched_preadv)
    stream = ActivationStream(cache, asked, plan, epochs=1, verify="never")
    batches = list(stream)
    monkeypatch.undo()  # reads of the test itself are not counted
    assert sum(len(batch.addresses) for batch in batches) == 4 * 64
    for batch in batches:
        assert list(batch.activations) == asked
        for name in asked:  # row i is the same token at each
            truth = [
                cache.row_dtype.to_torch(cache.read(name, s, r, 1)) for s, r in batch.addresses
            ]
            assert torch.equal(batch.activations[name], torch.cat(truth))
    by_hookpoint = dict.fromkeys(widths, 0)
    for path, count in read.items():
        folder, name = Path(path).relative_to(Path(cache.root).resolve()).parts[:2]
        assert folder == "activations"
        by_hookpoint[name] += count
    assert by_hookpoint == {"layers.0": 256 * 6 * 4, "layers.1:in": 0, "layers.2": 256 * 8 * 4}


def test_an_unknown_hookpoint_is_rejected_immediately(
    open_stream: Callable[..., ActivationStream],
) -> None:
    with pytest.raises(HookpointError, match=r"layers\.7"):
        open_stream(hookpoints=["layers.7"])


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_read_error_is_raised_once_and_closes_the_stream(
    when: str, make_cache: Callable[..., Path]
) -> None:
    root = make_cache(hookpoints=HOOKPOINTS, sequences=4)
    plan = make_plan([(s, 64) for s in range(4)], 16, 32, seed=0, pool_rows=32)
    stream = ActivationStream(Cache.open(root), ["layers.0"], plan)
    if when == "after":
        take(stream, 1)
    for path in (root / "activations" / "layers.0").iterdir():
        path.unlink()
    with pytest.raises(CorruptShardError, match=r"layers\.0"):
        take(stream, plan.steps_per_epoch + PREFETCH_BATCHES + 1)
    with pytest.raises(RunError, match="stream is closed"):
        next(stream)


def test_next_after_close_raises_and_the_thread_has_ended(
    open_stream: Callable[..., ActivationStream],
) -> None:
    def readers() -> set[threading.Thread]:
        return {t for t in threading.enumerate() if t.name == "actcache-reader"}

    before = readers()
    begun, unused = open_stream(), open_stream()
    take(begun, 1)
    assert len(readers() - before) == 1
    for stream in (begun, unused):
        stream.close()
        stream.close()
        with pytest.raises(RunError, match="stream is closed"):
            next(stream)
    assert readers() == before


def test_writing_to_a_batch_does_not_change_later_batches(
    open_stream: Callable[..., ActivationStream],
) -> None:
    first, again = take(open_stream(), 8), take(open_stream(), 8)
    for batch in first:
        batch.activations["layers.0"].zero_()
    stream = open_stream()
    for expected, found in zip(again, take(stream, 8), strict=True):
        assert torch.equal(expected.activations["layers.0"], found.activations["layers.0"])


@pytest.mark.parametrize(
    ("row_order", "least", "most"), [("shuffled", 1, 1.25), ("sequence", 2, 9)]
)
def test_rows_of_a_sequence_share_a_batch_little_more_often_than_by_chance(
    row_order: str, least: float, most: float, cache: Cache
) -> None:
    """Small bench_shuffle.py: 128 shards of 8 sequences of 32 rows, a pool of an eighth."""
    identity = dataclasses.replace(cache.manifest.identity, row_order=row_order)
    kept, outliers = np.ones((8, 32), dtype=bool), np.zeros(256, dtype=bool)
    sequence_of = np.stack(
        [8 * s + RowLayout.of(identity, s, kept, outliers).sequence for s in range(128)]
    )
    plan = make_plan([(s, 256) for s in range(128)], 8, 1024, seed=0, pool_rows=4096)
    pairs = []
    with ActivationStream(cache, [], plan, epochs=1) as stream:
        for batch in stream:
            held = np.bincount(sequence_of[tuple(batch.addresses.T)])
            pairs.append((held * (held - 1) // 2).sum())
    by_chance = 1024 * 1023 / 2 * 31 / (128 * 256 - 1)
    assert least < np.mean(pairs) / by_chance < most


def test_waiting_time_is_counted(open_stream: Callable[..., ActivationStream]) -> None:
    stream = open_stream()
    take(stream, 1)
    assert stream.seconds_waited > 0


def test_a_stream_without_its_thread_raises_instead_of_waiting(
    open_stream: Callable[..., ActivationStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Simulates a forked child process, in which the thread does not exist."""
    monkeypatch.setattr(BackgroundIterator, "_run", lambda _: None)
    monkeypatch.setattr("actcache.stream.activation_stream._TIMEOUT", 0.01)
    with pytest.raises(RunError, match="thread is gone"):
        next(open_stream())


@pytest.mark.parametrize("window", [1, 7])
@pytest.mark.parametrize("verify", ["first-read", "never"])
def test_batches_are_the_same_for_all_read_settings(
    window: int, verify: Verify, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, real = replace(PLAN, window=window), os.preadv
    state = np.random.RandomState(0)

    def preadv(*args: Any) -> int:
        time.sleep(float(state.random_sample()) * 0.002)  # threads finish in random order
        return real(*args)

    runs = []
    for reading in (
        ReadSettings(1),
        ReadSettings(2, max_read_bytes=7),
        ReadSettings(4, WHOLE),
        ReadSettings(2, readahead=True),
    ):
        with ActivationStream(
            cache, cache.hookpoints, plan, reading=reading, verify=verify
        ) as stream:
            runs.append(take(stream, plan.steps_per_epoch + 1))
        monkeypatch.setattr(os, "preadv", preadv)
    for run in runs[1:]:
        for expected, found in zip(runs[0], run, strict=True):
            np.testing.assert_array_equal(expected.addresses, found.addresses)
            for name in HOOKPOINTS:
                assert torch.equal(expected.activations[name], found.activations[name])


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize("window", [1, 7])
def test_a_batch_buffer_is_not_recycled_while_it_is_referenced(
    window: int, dtype: str, make_cache: Callable[..., Path]
) -> None:
    root = make_cache(**(SHAPE | {"hookpoints": {"layers.0": 6}, "dtype": dtype}))
    plan, cache = replace(PLAN, window=window), Cache.open(root)
    rows = {shard: cache.read("layers.0", shard) for shard in cache.shards}
    with ActivationStream(cache, ["layers.0"], plan) as stream:
        views = []
        for batch in take(stream, 4 * plan.steps_per_epoch):
            whole = batch.activations["layers.0"]
            # Keep a view of one row, in one of three ways.
            kept = [whole[3], whole.numpy()[3], whole.view(-1)[18:24].detach()][batch.step % 3]
            views.append((batch.addresses[3], kept))
    for (shard, row), kept in views:
        truth = cache.row_dtype.to_torch(rows[shard][row : row + 1])[0]
        np.testing.assert_array_equal(np.asarray(kept), truth.numpy())


def test_batch_buffers_are_recycled(cache: Cache) -> None:
    with ActivationStream(cache, ["layers.0"], PLAN) as stream:
        places = {next(stream).activations["layers.0"].data_ptr() for _ in range(100)}
    assert len(places) <= PREFETCH_BATCHES + 4


def test_unshuffled_batches_from_zarr_equal_those_from_memmap(
    make_cache: Callable[..., Path], cache: Cache
) -> None:
    zarr = Cache.open(make_cache(backend="zarr", compression="zstd", **SHAPE))
    plan = replace(PLAN, window=1)
    with (
        ActivationStream(zarr, zarr.hookpoints, plan) as one,
        ActivationStream(cache, cache.hookpoints, plan) as other,
    ):
        for found, expected in zip(take(one, 9), take(other, 9), strict=True):
            np.testing.assert_array_equal(found.addresses, expected.addresses)
            for name in HOOKPOINTS:
                assert torch.equal(found.activations[name], expected.activations[name])
