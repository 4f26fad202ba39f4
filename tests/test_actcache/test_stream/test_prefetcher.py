from __future__ import annotations

import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor

import pytest

from actcache.stream.prefetcher import BackgroundIterator


def counting(executor: Executor, stop: threading.Event) -> Iterator[int]:
    del stop
    for number in range(5):
        yield executor.submit(lambda n=number: n * n).result()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_items_come_in_order_and_then_none() -> None:
    items = BackgroundIterator(counting, 2, 1)
    assert [items.get(60) for _ in range(6)] == [0, 1, 4, 9, 16, None]
    items.close()
    assert not items.is_alive()


def test_an_error_arrives_with_its_traceback_after_the_items_before_it() -> None:
    def failing(executor: Executor, stop: threading.Event) -> Iterator[int]:
        yield from counting(executor, stop)
        raise ZeroDivisionError("the cause")

    items = BackgroundIterator(failing, 10, 1)
    found = [items.get(60) for _ in range(6)]
    assert isinstance(found[-1], ZeroDivisionError)
    assert found[-1].__traceback__ is not None
    items.close()


def test_no_more_items_are_made_than_fit_into_the_queue() -> None:
    made: list[int] = []

    def make(executor: Executor, stop: threading.Event) -> Iterator[int]:
        for number in counting(executor, stop):
            made.append(number)
            yield number

    items = BackgroundIterator(make, 2, 1)
    until(lambda: len(made) == 3)  # two are queued, one is held
    assert len(made) == 3
    items.close()


def test_get_raises_after_its_timeout() -> None:
    def make(executor: Executor, stop: threading.Event) -> Iterator[int]:
        del executor
        stop.wait()
        yield 0

    items = BackgroundIterator(make, 1, 1)
    with pytest.raises(queue.Empty):
        items.get(0.01)
    assert items.is_alive()
    items.close()


def test_close_ends_the_threads_while_items_are_queued() -> None:
    before = threading.active_count()
    items = BackgroundIterator(counting, 1, 3)
    items.close()
    assert threading.active_count() == before


NEVER_CLOSED = """
from actcache.stream.prefetcher import BackgroundIterator

def make(threads, stop):
    try:
        while True:
            yield threads.submit(int).result()
    finally:
        print("ended")

items = BackgroundIterator(make, 1, 1)
items.get(60)
"""


def test_threads_end_cleanly_at_exit() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NEVER_CLOSED], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")


def test_a_stopped_iterator_ends_by_itself() -> None:
    before = threading.active_count()
    items = BackgroundIterator(counting, 1, 1)
    items.stop()
    until(lambda: threading.active_count() == before)
