"""Rows on the device that trains: copied there once, from pinned memory, and mixed there.

All copies and gathers are put on one stream of their own, so that they run beside the training and
in the order in which they were asked for: a slot is filled again only after the gathers before it.
A batch comes with an event, for which the training's stream waits; the host waits for nothing but
its own pinned memory. On the CPU, for tests, the same happens at once.

Letters: S slots of W rows, N rows of a batch.
"""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from actcache.cache.reader import Cache
from actcache.errors import ConfigError
from actcache.storage import RowDtype, StoredRows
from actcache.stream.order import Rows
from actcache.stream.shuffle_buffer import BufferSlots, Load

Parts = dict[str, torch.Tensor]


class CopyStream:
    """A stream of a device, beside the one that trains; nothing on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextmanager
    def use(self) -> Iterator[None]:
        """What is begun within is put on this stream."""
        with torch.cuda.stream(self._stream):  # None: changes nothing
            yield

    def mark(self) -> CopyEvent:
        """The work that is on the stream by now."""
        if self._stream is None:
            return CopyEvent(None)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return CopyEvent(event)


@dataclass(frozen=True)
class CopyEvent:
    """Work of a side stream, done or not."""

    event: torch.cuda.Event | None

    def done(self) -> bool:
        """Whether it is done."""
        return self.event is None or bool(self.event.query())  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Let the host wait for it."""
        if self.event is not None:
            self.event.synchronize()

    def join(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Let the current stream wait for it, and the tensors live until that is done with them."""
        if self.event is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self.event)
            for tensor in tensors.values():
                tensor.record_stream(stream)


def pinned_rows(device: torch.device, row_dtype: RowDtype, rows: int, width: int) -> StoredRows:
    """Memory for rows, from which the device copies by itself."""
    pin = device.type == "cuda"
    return StoredRows(
        {
            name: torch.empty(rows * part.bytes, dtype=torch.uint8, pin_memory=pin)
            .numpy()
            .view(part.storage)
            .reshape(rows, *part.shape)
            for name, part in row_dtype.parts(width).items()
        }
    )


class BatchUploader:
    """Copies whole batches to the device, and holds their memory until that is done."""

    def __init__(self, row_dtype: RowDtype, stream: CopyStream) -> None:
        self._codec, self._stream = row_dtype, stream
        self._under_way: deque[tuple[CopyEvent, Mapping[str, StoredRows]]] = deque()

    def put(self, batch: Mapping[str, StoredRows]) -> dict[str, torch.Tensor]:
        """A batch on the device, once the side stream has come so far."""
        while self._under_way and self._under_way[0][0].done():
            self._under_way.popleft()
        found = {}
        with self._stream.use():
            for name, rows in batch.items():
                parts = {
                    part: tensor.to(self._stream.device, non_blocking=True, copy=True)
                    for part, tensor in self._codec.tensors(rows).items()
                }
                found[name] = self._codec.decode(parts)
        self._under_way.append((self._stream.mark(), batch))
        return found


class DeviceShuffleBuffer:
    """A pool on the device.

    Args:
        cache: where the rows come from.
        hookpoints: which rows.
        places: for how many.
        stream: of the device.
        staging: windows that are on their way there at once: one more than threads that read.

    Raises:
        ConfigError: the device has no room for it.
    """

    def __init__(
        self,
        cache: Cache,
        hookpoints: Sequence[str],
        places: BufferSlots,
        stream: CopyStream,
        staging: int,
    ) -> None:
        self.places, self._codec, self._stream = places, cache.row_dtype, stream
        self._widths = {name: cache.manifest.width(name) for name in hookpoints}
        slots, capacity = places.shape
        try:
            self._rows = self._empty(slots * capacity)
        except torch.cuda.OutOfMemoryError as error:
            raise ConfigError(
                f"{stream.device} has no room for the rows that are mixed there",
                expected=f"{slots * capacity:,} rows",
                got=str(error).splitlines()[0],
                remedy="a smaller --buffer-bytes",
            ) from error
        self._staging: queue.Queue[tuple[CopyEvent, dict[str, StoredRows]]] = queue.Queue()
        for _ in range(staging):
            memory = {
                name: pinned_rows(stream.device, self._codec, capacity, width)
                for name, width in self._widths.items()
            }
            self._staging.put((CopyEvent(None), memory))

    def _empty(self, rows: int) -> dict[str, Parts]:
        """Memory on the device for the parts of rows, by hookpoint."""
        with self._stream.use():
            return {
                name: {
                    part: torch.empty(
                        (rows, *tensor.shape[1:]), dtype=tensor.dtype, device=self._stream.device
                    )
                    for part, tensor in self._codec.tensors(self._codec.empty(1, width)).items()
                }
                for name, width in self._widths.items()
            }

    def fill(self, place: slice, load: Load) -> None:
        """Read into pinned memory, and have it copied."""
        mark, memory = self._staging.get()
        try:
            mark.wait()
            count = place.stop - place.start
            rows = {name: staged[:count] for name, staged in memory.items()}
            load(rows)
            with self._stream.use():
                for name, staged in rows.items():
                    for part, tensor in self._codec.tensors(staged).items():
                        self._rows[name][part][place].copy_(tensor, non_blocking=True)
                mark = self._stream.mark()
        finally:
            self._staging.put((mark, memory))

    def batch(self, rows: int) -> dict[str, Parts]:
        """Fresh memory: the device's allocator knows when it is free again."""
        return self._empty(rows)

    def gather(self, chosen: Rows, out: dict[str, Parts], at: int) -> None:
        """On the device, with numbers that were made here."""
        with self._stream.use():
            numbers = torch.from_numpy(chosen).to(self._stream.device)  # [N]
            for name, parts in self._rows.items():
                for part, rows in parts.items():
                    place = out[name][part][at : at + len(chosen)]
                    torch.index_select(rows, 0, numbers, out=place)

    def tensors(self, batch: dict[str, Parts]) -> dict[str, torch.Tensor]:
        """Decoded where they lie."""
        with self._stream.use():
            return {name: self._codec.decode(parts) for name, parts in batch.items()}
