"""Threads beside the model: files written side by side, statistics taken while they are written.

Nothing here decides a byte: every thread does whole hookpoints or whole blocks of rows, and what
they find is put together in order.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Executor, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from actcache.storage import Codec, StoredRows

Mapper = Callable[..., Iterable[Any]]
"""`map`, or something like it."""


class Workers:
    """How the parts of a shard are done: by default one after the other, in the caller's thread."""

    def __init__(self, files: Executor | None = None, blocks: Mapper = map) -> None:
        self._files = files
        self.blocks = blocks
        """For blocks of rows, whose statistics are taken while the hookpoint is written."""
        self._scratch = threading.local()

    @classmethod
    @contextmanager
    def threads(cls, hookpoints: int) -> Iterator[Workers]:
        """As many as are of use to this many hookpoints on this machine."""
        with (
            ThreadPoolExecutor(files_at_once(hookpoints), "files") as files,
            ThreadPoolExecutor(_most(), "blocks") as blocks,
        ):
            yield cls(files, blocks.map)

    def do(self, tasks: Iterable[Callable[[], None]]) -> None:
        """Write files. After an error no other is begun; then, as ever, all have ended."""
        if self._files is None:
            for task in tasks:
                task()
            return
        futures = [self._files.submit(task) for task in tasks]
        wait(futures, return_when=FIRST_EXCEPTION)
        begun = [future for future in futures if not future.cancel()]
        wait(begun)
        for future in begun:
            future.result()

    def gather(self, rows: StoredRows, source: NDArray[np.int64], codec: Codec) -> StoredRows:
        """`rows[source]`, which is valid until this thread gathers again."""
        if not hasattr(self._scratch, "memory"):
            self._scratch.memory = Memory()
        memory: Memory = self._scratch.memory
        width = rows.values.shape[1]
        out = memory.rows(width, len(source), width, codec)
        rows.take(source, out)
        return out


def files_at_once(hookpoints: int) -> int:
    """Hookpoints that are permuted and written side by side, each in memory of its own."""
    return min(hookpoints, _most())


def _most() -> int:
    return max(2, min(4, len(os.sched_getaffinity(0)) // 2))


class Memory:
    """Memory for rows, used again and again: fresh pages cost as much as filling them."""

    def __init__(self) -> None:
        self._rows: dict[Hashable, StoredRows] = {}

    def rows(self, owner: Hashable, count: int, width: int, codec: Codec) -> StoredRows:
        """Room for `count` rows; what the owner had there before is lost.

        Args:
            owner: whose they are; always of this width and type.
            count: how many rows.
            width: numbers of a row.
            codec: their type.
        """
        found = self._rows.get(owner)
        if found is None or len(found) < count:
            found = self._rows[owner] = codec.empty(count, width)
        return found[:count]
