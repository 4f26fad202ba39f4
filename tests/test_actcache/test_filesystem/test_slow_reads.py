"""Reports of reads that wait for a disk."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actcache.cache.reader import Cache
from actcache.cache.verify import verify
from actcache.config import HarvestConfig
from actcache.data.datasets import open_dataset
from actcache.filesystem import atomic, slow_reads
from actcache.filesystem.slow_reads import READING, report_slow_reads

SECONDS = 60


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Report each read, however short."""
    monkeypatch.setattr(slow_reads, "FIRST_NOTICE", 0.0)
    monkeypatch.setattr(slow_reads, "NEXT_NOTICE", 0.0)
    monkeypatch.setattr(slow_reads, "_next_report", 0.0)
    yield
    assert READING == {}


def test_the_oldest_read_is_reported_once_in_a_while(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(slow_reads, "NEXT_NOTICE", 60.0)
    report_slow_reads()
    for number in range(3):
        READING[number] = slow_reads.time.monotonic() - 9 + number, Path(f"{number}\n.safetensors")
    try:
        report_slow_reads()
        report_slow_reads()
    finally:
        READING.clear()
    (line,) = capsys.readouterr().err.splitlines()
    assert line == r"waiting for the disk: 0\n.safetensors and 2 more since 9 s"


def read_rows(root: Path, _: Path) -> None:
    Cache.open(root).read("layers.0", 1)


def verify_all(root: Path, _: Path) -> None:
    assert verify(root, threads=2).is_sound


def read_text(_: Path, text: Path) -> None:
    open_dataset(HarvestConfig("model", str(text), "out"))


@pytest.mark.parametrize(
    ("work", "call", "name"),
    [
        (read_rows, "preadv", "00001.safetensors"),
        (verify_all, "_read_piece", ".safetensors"),
        (read_text, "pread", "text.bin"),
    ],
)
def test_a_read_that_hangs_names_its_file(
    work: Callable[[Path, Path], None],
    call: str,
    name: str,
    make_cache: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    root, text = make_cache(), tmp_path / "text.bin"
    np.arange(1 << 12, dtype="<u2").tofile(text)
    hangs, goes_on = threading.Event(), threading.Event()

    def hang(owner: Any, method: str) -> None:
        real = getattr(owner, method)

        def slow(*args: Any) -> Any:
            found = real(*args)
            hangs.set()
            assert goes_on.wait(SECONDS)
            return found

        monkeypatch.setattr(owner, method, slow)

    hang(atomic if call == "_read_piece" else os, call)
    thread = threading.Thread(target=work, args=(root, text))
    thread.start()
    assert hangs.wait(SECONDS)
    report_slow_reads()
    goes_on.set()
    thread.join(SECONDS)
    assert not thread.is_alive()
    err = capsys.readouterr().err
    assert err.startswith("waiting for the disk: ")
    assert name in err


COMMAND = """
import sys, time
from actcache.filesystem import atomic, slow_reads
from actcache_cli.main import actcache

slow_reads.FIRST_NOTICE, read = 0.3, atomic._read_piece

def read_slowly(*args):
    found = read(*args)
    time.sleep(1)
    return found

atomic._read_piece = read_slowly
sys.argv = ["actcache", "verify", sys.argv[1]]
actcache()
"""


def test_a_command_reports_its_slow_reads(make_cache: Callable[..., Path]) -> None:
    command = [sys.executable, "-c", COMMAND, str(make_cache(shards=2))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert "waiting for the disk: " in done.stderr
