"""Prefetch: a thread that produces the items of an iterator ahead of their use, and always ends.

The thread holds no reference to its consumer, so that a consumer without references is collected
and its finalizer stops the thread. At the interpreter's exit all threads are stopped first: a
daemon thread that is in torch's code during the shutdown would crash the process.
"""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

from actcache.core.watchdog import end_after_command

_ABANDONED_SECONDS = 2.0

T = TypeVar("T")
Make = Callable[[Executor, threading.Event], Iterator[T]]
"""Creates the iterator, given an executor; the iterator ends early when the event is set."""


class BackgroundIterator(Generic[T]):
    """Items of an iterator that runs in a thread of its own.

    Args:
        make: creates the iterator, in that thread.
        prefetch: number of items that are queued.
        workers: number of threads of the executor that `make` is given.
    """

    def __init__(self, make: Make[T], prefetch: int, workers: int) -> None:
        self._make, self._workers = make, workers
        self._items: queue.Queue[T | BaseException | None] = queue.Queue(prefetch)
        self._stop = threading.Event()
        self._join_seconds: float | None = None
        self._thread = threading.Thread(target=self._run, name="actcache-reader", daemon=True)
        self._thread.start()
        _running.add(self)

    def get(self, seconds: float) -> T | BaseException | None:
        """Return the next item, None after the last one, or the exception that ended the iterator.

        Raises:
            queue.Empty: there is none after so many seconds.
        """
        return self._items.get(timeout=seconds)

    def is_alive(self) -> bool:
        """Return whether an item is queued or may follow; False in a forked child process."""
        return self._thread.is_alive() or not self._items.empty()

    def stop(self) -> None:
        """Request the end of the thread without waiting: safe to call from a finalizer."""
        self._stop.set()

    def abandon(self) -> None:
        """Limit the wait of `close` to two seconds: the wait for the next item was interrupted."""
        self._join_seconds = _ABANDONED_SECONDS
        end_after_command()

    def close(self) -> None:
        """Stop the thread and join it."""
        self.stop()
        self._thread.join(self._join_seconds)

    def _run(self) -> None:
        try:
            with ThreadPoolExecutor(self._workers, "actcache-loader") as threads:
                try:
                    for item in self._make(threads, self._stop):
                        if not self._put(item):
                            return
                finally:
                    threads.shutdown(cancel_futures=True)
            self._put(None)
        except BaseException as error:  # queued with its traceback: the consumer raises it
            self._put(error)

    def _put(self, item: T | BaseException | None) -> bool:
        while not self._stop.is_set():
            try:
                self._items.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False


_running: weakref.WeakSet[BackgroundIterator[Any]] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    running = list(_running)
    for iterator in running:
        iterator.stop()
    for iterator in running:
        iterator.close()
