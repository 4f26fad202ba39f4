"""Shuffling on the training device: rows are copied there once, from pinned memory.

All copies and gathers run on one CUDA stream of their own, beside the training and in the order of
their calls: a slot is refilled only after the gathers from it. A batch carries an event that the
training's stream waits for. The host waits only for its pinned memory. On the CPU, for tests, the
same operations run synchronously.

Letters: S slots of W rows, N rows of a batch.
"""

from __future__ import annotations

import queue
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from actcache.cache.reader import Cache
from actcache.errors import ConfigError
from actcache.storage import RowDtype, StoredRows
from actcache.stream.order import Rows
from actcache.stream.shuffle_buffer import BufferSlots, Load

Components = dict[str, torch.Tensor]
"""Tensors of the components of rows in one type on disk: values, and scales if it has any."""


class CopyStream:
    """A CUDA stream for copies and gathers, beside the training; without effect on the CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @contextmanager
    def use(self) -> Iterator[None]:
        """Enqueue the operations of the block on this stream."""
        with torch.cuda.stream(self._stream):  # None: changes nothing
            yield

    def mark(self) -> CopyEvent:
        """Record an event after the operations enqueued so far."""
        if self._stream is None:
            return CopyEvent(None, self.device)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self._stream)
        return CopyEvent(event, self.device)


@dataclass(frozen=True)
class CopyEvent:
    """Completion of operations on a `CopyStream`."""

    event: torch.cuda.Event | None
    device: torch.device
    """Device of the stream."""

    def wait(self) -> None:
        """Block the host until the operations are complete."""
        if self.event is not None:
            self.event.synchronize()

    def join(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Make the device's current stream wait, and keep the tensors until it is done with them.

        The device is named: the current one of the calling thread may be another.
        """
        if self.event is not None:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(self.event)
            for tensor in tensors.values():
                tensor.record_stream(stream)


def pinned_rows(device: torch.device, row_dtype: RowDtype, rows: int, width: int) -> StoredRows:
    """Allocate pinned memory for rows, from which the device copies asynchronously."""
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


class DeviceShuffleBuffer:
    """A shuffle buffer on the device.

    Args:
        cache: source of the rows.
        hookpoints: hookpoints that are read.
        slots: number and capacity of the windows.
        stream: CUDA stream of all operations.
        staging: number of windows in pinned memory: one more than the reading threads.

    Raises:
        ConfigError: the device has too little memory.
    """

    def __init__(
        self,
        cache: Cache,
        hookpoints: Sequence[str],
        slots: BufferSlots,
        stream: CopyStream,
        staging: int,
    ) -> None:
        self.slots, self._row_dtype, self._stream = slots, cache.row_dtype, stream
        self._widths = {name: cache.manifest.width(name) for name in hookpoints}
        count, capacity = slots.shape
        try:
            self._rows = self.batch(count * capacity)
        except torch.cuda.OutOfMemoryError as error:
            raise ConfigError(
                f"{stream.device} has no room for the rows that are shuffled there",
                expected=f"{count * capacity:,} rows",
                got=str(error).splitlines()[0],
                remedy="a smaller --buffer-bytes",
            ) from error
        self._staging: queue.Queue[tuple[CopyEvent, dict[str, StoredRows]]] = queue.Queue()
        for _ in range(staging):
            memory = {
                name: pinned_rows(stream.device, self._row_dtype, capacity, width)
                for name, width in self._widths.items()
            }
            self._staging.put((CopyEvent(None, stream.device), memory))

    def fill(self, position: slice, load: Load) -> None:
        """Read files into pinned memory, and enqueue the copy to the device."""
        event, memory = self._staging.get()
        try:
            event.wait()
            count = position.stop - position.start
            rows = {name: staged[:count] for name, staged in memory.items()}
            load(rows)
            with self._stream.use():
                for name, staged in rows.items():
                    for part, tensor in self._row_dtype.tensors(staged).items():
                        self._rows[name][part][position].copy_(tensor, non_blocking=True)
                event = self._stream.mark()
        finally:
            self._staging.put((event, memory))

    def batch(self, rows: int) -> dict[str, Components]:
        """Allocate memory on the device; its allocator recycles it in stream order."""
        with self._stream.use():
            return {
                name: {
                    part: torch.empty(
                        (rows, *tensor.shape[1:]), dtype=tensor.dtype, device=self._stream.device
                    )
                    for part, tensor in self._row_dtype.tensors(
                        self._row_dtype.empty(1, width)
                    ).items()
                }
                for name, width in self._widths.items()
            }

    def gather(self, chosen: Rows, out: dict[str, Components], at: int) -> None:
        """Gather on the device, by indices that are computed on the host."""
        with self._stream.use():
            indices = torch.from_numpy(chosen).to(self._stream.device)  # [N]
            for name, components in self._rows.items():
                for part, rows in components.items():
                    position = out[name][part][at : at + len(chosen)]
                    torch.index_select(rows, 0, indices, out=position)

    def tensors(self, batch: dict[str, Components]) -> dict[str, torch.Tensor]:
        """Decode the rows on the device."""
        with self._stream.use():
            return {name: self._row_dtype.decode(parts) for name, parts in batch.items()}
