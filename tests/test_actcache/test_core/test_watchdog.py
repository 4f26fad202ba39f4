"""Signals that reach a process whose main thread waits in native code."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from actcache.core import watchdog
from actcache.core.watchdog import Terminated, handled_signals

SECONDS = 60

STUCK = """
import ctypes, signal, sys, threading
from actcache.core import watchdog

watchdog.GRACE_SECONDS = 0.5
with watchdog.handled_signals():
    if sys.argv[1] == "handled":
        signal.signal(signal.SIGTERM, lambda *_: watchdog.mark_handled())
    threading.Timer(0.5, print, ["ready"], {"flush": True}).start()  # the lock is taken by then
    lock, mutex = ctypes.CDLL(None).pthread_mutex_lock, ctypes.create_string_buffer(128)
    lock(mutex)
    lock(mutex)  # for ever: no signal ends it
"""


def stuck(kind: str, code: str = STUCK) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, kind],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_process_that_waits_in_native_code_is_ended_with_a_sentence(
    number: signal.Signals, code: int
) -> None:
    process = stuck("impatient")
    process.send_signal(number)
    _, stderr = process.communicate(timeout=SECONDS)
    assert process.returncode == code
    assert "waiting in native code" in stderr
    assert "the same command resumes" in stderr


READS = """
import os, signal, threading, time
from pathlib import Path
from actcache.core import watchdog
from actcache.filesystem.slow_reads import READING

watchdog.READ_SECONDS = 0.5
with watchdog.handled_signals():
    signal.signal(signal.SIGTERM, lambda *_: watchdog.mark_handled())  # saves at the next step
    reader, writer = os.pipe()
    READING[threading.get_ident()] = time.monotonic(), Path("rows.safetensors")
    print("ready", flush=True)
    os.read(reader, 1)  # for ever: the call is repeated after a signal
"""


def test_a_read_that_hangs_ends_after_the_first_signal_even_if_a_checkpoint_was_to_come() -> None:
    process = stuck("handled", READS)
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=SECONDS)
    assert process.returncode == 143
    assert "terminated: the process was waiting to read rows.safetensors" in stderr


WORKERS = """
import sys, threading, time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from actcache.core import watchdog

watchdog.CLEAN_UP_SECONDS = 0.5
pool = ThreadPoolExecutor(1)
try:
    with watchdog.handled_signals():
        reading = pool.submit(time.sleep, 600)
        with pool if sys.argv[1] == "joined" else nullcontext():
            print("ready", flush=True)
            reading.result()
except BaseException as stop:
    print("ended by", type(stop).__name__, flush=True)
    sys.exit(getattr(stop, "exit_code", 130))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("when", ["joined", "at exit"])
def test_a_command_whose_threads_wait_is_ended_when_they_are_joined_too(
    when: str, number: signal.Signals, code: int
) -> None:
    process = stuck(when, WORKERS)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=SECONDS)
    assert process.returncode == code
    if when == "joined":
        assert "waiting for a disk or store" in stderr
        assert "the same command resumes" in stderr
    else:
        assert "ended by" in stdout


def test_a_handler_that_saves_first_is_given_time_until_a_second_signal() -> None:
    process = stuck("handled")
    process.send_signal(signal.SIGTERM)
    time.sleep(1.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=SECONDS)
    assert process.returncode == 143


@pytest.mark.parametrize(
    ("number", "kind"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)]
)
def test_a_signal_raises_in_the_main_thread_and_handlers_are_restored(
    number: signal.Signals, kind: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "GRACE_SECONDS", 0.1)
    before = signal.getsignal(number)

    def run() -> None:
        with handled_signals():
            try:
                os.kill(os.getpid(), number)
            finally:
                time.sleep(0.5)  # clean-up may take longer than the grace

    with pytest.raises(kind):
        run()
    assert signal.getsignal(number) is before


def test_a_signal_that_was_ignored_at_the_start_stays_ignored() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with handled_signals():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
