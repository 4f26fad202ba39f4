"""Mapped files that are truncated while they are read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from actcache.core.bus_errors import explained_bus_errors
from actcache.errors import ActcacheError, DatasetError

SECONDS = 60

MAP = """
import mmap, os, sys
from actcache.core.bus_errors import explained_bus_errors
with open(sys.argv[1], "r+b") as file, explained_bus_errors():
    mapped = mmap.mmap(file.fileno(), 0)
    os.truncate(sys.argv[1], 0)
    print(mapped[5000])
"""

ARROW = """
import os, sys
from pathlib import Path
from actcache.config import HarvestConfig
from actcache.data import datasets
from actcache_cli.error_handling import report_errors

@report_errors
def read():
    source = datasets.open_dataset(HarvestConfig("model", sys.argv[1], "out"))
    kind, (arrow,) = datasets.MappedFiles, Path(sys.argv[1]).glob("*.arrow")
    check = kind.check
    def check_and_truncate(files):
        check(files)
        os.truncate(arrow, 4096)  # between the check and the read
    kind.check = check_and_truncate
    print(len(source.batch(range(source.count))))

read()
"""


def run(code: str, path: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)


def test_a_map_of_a_truncated_file_ends_the_process_with_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "map"
    path.write_bytes(bytes(9999))
    done = run(MAP, path)
    assert done.returncode == ActcacheError.exit_code, done.stderr
    assert "error: a file that is mapped into memory cannot be read" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_saved_dataset_that_is_truncated_during_a_read_is_named(tmp_path: Path) -> None:
    texts = [f"document {number} " * 99 for number in range(999)]
    datasets.Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "saved"))
    done = run(ARROW, tmp_path / "saved")
    assert done.returncode == DatasetError.exit_code, done.stderr
    assert ".arrow has changed since this command opened it" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_handler_is_restored(tmp_path: Path) -> None:
    code = "import signal\nfrom actcache.core.bus_errors import explained_bus_errors\n"
    code += "with explained_bus_errors():\n    pass\nsignal.raise_signal(signal.SIGBUS)"
    assert run(code, tmp_path).returncode == -7


@pytest.mark.parametrize("number", [1, 2])
def test_contexts_may_be_entered_again(number: int) -> None:
    with explained_bus_errors(), explained_bus_errors():
        assert number
