"""Shuffling on a device: on the CPU, where operations are synchronous, and on a GPU at the end."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from actcache.cache.reader import Cache
from actcache.errors import ConfigError, CorruptShardError
from actcache.storage import ROW_DTYPES
from actcache.stream.activation_stream import ActivationStream
from actcache.stream.device_buffer import CopyStream
from actcache.stream.order import OrderPlan, make_plan
from actcache.stream.verified_reads import ReadSettings

HOOKPOINTS = {"layers.0": 6, "layers.1:in": 10}


@pytest.fixture
def open_cache(make_cache: Callable[..., Path]) -> Callable[..., Cache]:
    def make(dtype: str = "bfloat16") -> Cache:
        return Cache.open(make_cache(hookpoints=HOOKPOINTS, sequences=4, dtype=dtype))

    return make


def a_plan(pool_rows: int = 128) -> OrderPlan:
    return make_plan([(shard, 64) for shard in range(4)], 16, 32, seed=1, pool_rows=pool_rows)


def require_same(cache: Cache, plan: OrderPlan, device: str, hold: bool) -> None:
    """Check that batches on a device equal those in main memory bit for bit for two epochs."""
    reading = ReadSettings(3, max_read_bytes=100, readahead=True)
    with (
        ActivationStream(cache, cache.hookpoints, plan) as host,
        ActivationStream(cache, cache.hookpoints, plan, device=device, reading=reading) as there,
    ):
        held = []
        for _ in range(2 * plan.steps_per_epoch + 3):
            expected, found = next(host), next(there)
            if hold:
                held.append((expected, found))
            assert (found.step, found.epoch) == (expected.step, expected.epoch)
            assert (found.addresses == expected.addresses).all()
            for name in HOOKPOINTS:
                rows = found.activations[name]
                assert rows.device.type == device
                assert rows.dtype == expected.activations[name].dtype
                assert torch.equal(rows.cpu(), expected.activations[name])
        for expected, found in held:  # memory that is referenced is not recycled
            for name in HOOKPOINTS:
                assert torch.equal(found.activations[name].cpu(), expected.activations[name])


@pytest.mark.parametrize("pool_rows", [1, 20, 128])
@pytest.mark.parametrize("dtype", ROW_DTYPES)
def test_batches_on_a_device_equal_those_in_main_memory(
    dtype: str, pool_rows: int, open_cache: Callable[..., Cache]
) -> None:
    require_same(open_cache(dtype), a_plan(pool_rows), "cpu", hold=True)


def test_a_read_error_ends_the_stream_without_a_deadlock_on_staging_memory(
    open_cache: Callable[..., Cache],
) -> None:
    cache, plan = open_cache(), a_plan()
    with ActivationStream(
        cache, ["layers.0"], plan, device="cpu", reading=ReadSettings(1)
    ) as stream:
        next(stream)
        for path in (cache.root / "activations" / "layers.0").iterdir():
            path.unlink()
        with pytest.raises(CorruptShardError, match="is gone"):
            list(stream)  # endless without the error


def test_a_device_out_of_memory_raises_an_error_that_names_the_option(
    open_cache: Callable[..., Cache], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> object:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate much")

    cache = open_cache()
    monkeypatch.setattr(torch, "empty", full)
    with (
        ActivationStream(cache, ["layers.0"], a_plan(), device="cpu") as stream,
        pytest.raises(ConfigError, match=r"(?s)no room.*--buffer-bytes"),
    ):
        next(stream)


class FakeGpus:
    """Stand-in for torch.cuda with two devices; a stream is a list of its operations."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = [self.Stream("cuda:0"), self.Stream("cuda:1")]
        monkeypatch.setattr(torch.cuda, "Stream", self.Stream)
        monkeypatch.setattr(torch.cuda, "Event", self.Event)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(torch.cuda, "current_stream", self.current_stream)

    def current_stream(self, device: torch.device | None = None) -> FakeGpus.Stream:
        """Return the stream of a device; without one that of the current device, GPU 0."""
        return self.current[0 if device is None else device.index]

    class Stream:
        def __init__(self, device: object) -> None:
            self.device, self.operations = str(device), list[str]()

        def wait_event(self, event: FakeGpus.Event) -> None:
            self.operations.append(f"waits for {event.of}")

    class Event:
        of = ""

        def record(self, stream: FakeGpus.Stream) -> None:
            self.of = f"{stream.device} after {len(stream.operations)} operations"


class GatheredTensor:
    """Stand-in for a tensor on a GPU: records the streams that use its memory."""

    def __init__(self) -> None:
        self.used_by: list[FakeGpus.Stream] = []

    def record_stream(self, stream: FakeGpus.Stream) -> None:
        self.used_by.append(stream)


@pytest.mark.parametrize("index", [0, 1])
def test_a_batch_is_waited_for_by_the_stream_of_its_own_device(
    index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = FakeGpus(monkeypatch)
    copies = CopyStream(torch.device("cuda", index))
    copies._stream.operations.append("gather")  # type: ignore[union-attr]
    rows = GatheredTensor()
    copies.mark().join({"layers.0": rows})  # type: ignore[dict-item]
    waiting = [stream.operations for stream in gpus.current]
    assert waiting[index] == [f"waits for cuda:{index} after 1 operations"]
    assert waiting[1 - index] == []
    assert rows.used_by == [gpus.current[index]]


@pytest.mark.gpu
@pytest.mark.parametrize("pool_rows", [1, 20, 128])
@pytest.mark.parametrize("dtype", ROW_DTYPES)
def test_batches_on_a_gpu_equal_those_in_main_memory(
    dtype: str, pool_rows: int, open_cache: Callable[..., Cache]
) -> None:
    for hold in (True, False):
        require_same(open_cache(dtype), a_plan(pool_rows), "cuda", hold)
