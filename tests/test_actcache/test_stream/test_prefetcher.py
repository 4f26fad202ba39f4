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


def test_items_come_in_their_order_and_none_after_the_last() -> None:
    producer = BackgroundIterator(counting, 2, 1)
    assert [producer.get(60) for _ in range(6)] == [0, 1, 4, 9, 16, None]
    producer.close()
    assert not producer.is_alive()


def test_an_error_comes_whole_after_the_items_before_it() -> None:
    def failing(executor: Executor, stop: threading.Event) -> Iterator[int]:
        yield from counting(executor, stop)
        raise ZeroDivisionError("the cause")

    producer = BackgroundIterator(failing, 10, 1)
    found = [producer.get(60) for _ in range(6)]
    assert isinstance(found[-1], ZeroDivisionError)
    assert found[-1].__traceback__ is not None
    producer.close()


def test_no_more_is_made_than_may_wait() -> None:
    made: list[int] = []

    def make(executor: Executor, stop: threading.Event) -> Iterator[int]:
        for number in counting(executor, stop):
            made.append(number)
            yield number

    producer = BackgroundIterator(make, 2, 1)
    until(lambda: len(made) == 3)  # two wait, one is held
    assert len(made) == 3
    producer.close()


def test_whoever_waits_in_vain_is_told() -> None:
    def make(executor: Executor, stop: threading.Event) -> Iterator[int]:
        del executor
        stop.wait()
        yield 0

    producer = BackgroundIterator(make, 1, 1)
    with pytest.raises(queue.Empty):
        producer.get(0.01)
    assert producer.is_alive()
    producer.close()


def test_closing_ends_one_whose_items_nobody_takes() -> None:
    before = threading.active_count()
    producer = BackgroundIterator(counting, 1, 3)
    producer.close()
    assert threading.active_count() == before


NEVER_CLOSED = """
from actcache.stream.prefetcher import BackgroundIterator

def make(threads, stop):
    try:
        while True:
            yield threads.submit(int).result()
    finally:
        print("ended")

producer = BackgroundIterator(make, 1, 1)
producer.take(60)
"""


def test_at_exit_threads_are_ended_and_not_cut_off() -> None:
    done = subprocess.run(
        [sys.executable, "-c", NEVER_CLOSED], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "ended\n", "")


def test_a_stopped_one_ends_by_itself() -> None:
    before = threading.active_count()
    producer = BackgroundIterator(counting, 1, 1)
    producer.stop()
    until(lambda: threading.active_count() == before)
