"""A thread that makes items ahead of whoever takes them, and always ends.

It knows nothing of its consumer, so that one who is forgotten can be collected, and the thread with
it. At the interpreter's exit it is ended before Python takes its threads down: one that is in
torch's code by then would take the process down with it.
"""

from __future__ import annotations

import atexit
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Make = Callable[[Executor, threading.Event], Iterator[T]]
"""Items, with threads to help; ends early when the event is set."""


class BackgroundIterator(Generic[T]):
    """Items of an iterator, made ahead in a thread of its own.

    Args:
        make: gives the iterator, in that thread.
        ahead: items that may wait to be taken.
        helpers: more threads, which `make` is given.
    """

    def __init__(self, make: Make[T], ahead: int, helpers: int) -> None:
        self._make, self._helpers = make, helpers
        self._items: queue.Queue[T | BaseException | None] = queue.Queue(ahead)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="actcache-reader", daemon=True)
        self._thread.start()
        _running.add(self)

    def get(self, seconds: float) -> T | BaseException | None:
        """The next item; None after the last; an error, whole, instead of the item that it hit.

        Raises:
            queue.Empty: there is none after so many seconds.
        """
        return self._items.get(timeout=seconds)

    def is_alive(self) -> bool:
        """Whether there is or may come an item; not in a process that forked."""
        return self._thread.is_alive() or not self._items.empty()

    def stop(self) -> None:
        """Ask it to end, and do not wait: this may be called while anything is collected."""
        self._stop.set()

    def close(self) -> None:
        """End it."""
        self.stop()
        self._thread.join()

    def _run(self) -> None:
        try:
            with ThreadPoolExecutor(self._helpers, "actcache-loader") as threads:
                try:
                    for item in self._make(threads, self._stop):
                        if not self._put(item):
                            return
                finally:
                    threads.shutdown(cancel_futures=True)
            self._put(None)
        except BaseException as error:  # handed over whole: whoever takes the item raises it
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
def _end_all() -> None:
    running = list(_running)
    for producer in running:
        producer.stop()
    for producer in running:
        producer.close()
