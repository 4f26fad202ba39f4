"""`actcache bench`, in a process of its own."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def bench(fork_server: Any) -> Callable[..., Any]:
    def run(*arguments: str) -> Any:
        command = fork_server.start("actcache", "bench", *arguments)
        command.communicate()
        return command

    return run


def test_speeds_are_shown_as_a_table_and_as_json(
    bench: Callable[..., Any], make_cache: Callable[..., Path]
) -> None:
    root = str(make_cache())
    shown = bench(root, "--hookpoint", "layers.1", "--threads", "2")
    assert shown.returncode == 0, shown.stderr
    for text in ("batches mixed, from disk", "rows/s", "512 rows of layers.1 (32.8 kB)"):
        assert text in shown.stdout
    found = json.loads(bench(root, "--json").stdout)
    assert found["hookpoints"] == ["layers.0", "layers.1"]
    assert len(found["speeds"]) == 6
    assert set(found["reading"]) == {"threads", "piece", "ahead"}


def test_a_folder_without_a_cache_is_rejected_with_its_exit_code(
    bench: Callable[..., Any], tmp_path: Path
) -> None:
    assert bench(str(tmp_path)).returncode == 9
