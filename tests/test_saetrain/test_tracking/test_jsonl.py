"""metrics.jsonl and timings.jsonl: contents, truncation on resume, damage."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from actcache.errors import DiskFullError, FormatError
from saetrain.tracking.jsonl import METRICS, TIMINGS, JsonlTracker, last_line, truncate_after

SAES = {"layers.0": {"fvu": 0.5, "l0": 3.0}, "layers.1": {"fvu": 0.25, "l0": 2.0}}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def text(*steps: int) -> str:
    return "".join(f'{{"step": {step}}}\n' for step in steps)


def test_metrics_are_reproducible_and_timings_hold_the_rest(tmp_path: Path) -> None:
    tracker = JsonlTracker(tmp_path, step=0, steps=8, batch_size=32)
    tracker.log(4, SAES, waited=0.0)
    tracker.log(8, SAES, waited=0.0)
    tracker.close()
    assert lines(tmp_path / METRICS) == [
        {"step": 4, "rows": 128, "saes": SAES},
        {"step": 8, "rows": 256, "saes": SAES},
    ]
    assert [line["step"] for line in lines(tmp_path / TIMINGS)] == [4, 8]
    for line in lines(tmp_path / TIMINGS):
        assert line["rows_per_second"] > 0
        assert line["peak_memory_bytes"] > 1 << 20


def test_a_small_process_of_a_large_parent_logs_its_own_peak_memory(tmp_path: Path) -> None:
    """ru_maxrss of the child would be the parent's 1.5 GB."""
    child = f"""
from pathlib import Path
from saetrain.tracking.jsonl import JsonlTracker
tracker = JsonlTracker(Path({str(tmp_path)!r}), step=0, steps=8, batch_size=32)
tracker.log(8, {SAES!r}, waited=0.0)
"""
    parent = f"""
import subprocess, sys
held = b"x" * 1_500_000_000
subprocess.run([sys.executable, "-c", {child!r}], check=True)
"""
    subprocess.run([sys.executable, "-c", parent], check=True)
    (line,) = lines(tmp_path / TIMINGS)
    assert 1 << 20 < line["peak_memory_bytes"] < 1_200_000_000


def test_data_wait_is_the_share_of_the_time_since_the_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("saetrain.tracking.jsonl.time.monotonic", lambda: now[0])
    tracker = JsonlTracker(tmp_path, step=10, steps=40, batch_size=32)
    now[0] = 102.0
    tracker.log(20, SAES, waited=1.0)
    now[0] = 112.0
    tracker.log(40, SAES, waited=6.0)
    tracker.close()
    assert tracker.rows_per_second == pytest.approx(30 * 32 / 12)
    first, second = lines(tmp_path / TIMINGS)
    assert (first["rows_per_second"], first["data_wait"]) == (160.0, 0.5)
    assert (second["rows_per_second"], second["data_wait"]) == (64.0, 0.5)


def test_bytes_per_second_are_of_the_rows_since_the_last_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("saetrain.tracking.jsonl.time.monotonic", lambda: now[0])
    tracker = JsonlTracker(tmp_path, step=10, steps=40, batch_size=32, row_bytes=100)
    for step, then in ((20, 102.0), (40, 112.0)):
        now[0] = then
        tracker.log(step, SAES, waited=0.0)
    assert tracker.seconds == 12
    tracker.close()
    found = [line["bytes_per_second"] for line in lines(tmp_path / TIMINGS)]
    assert found == [16_000.0, 6_400.0]


def test_the_bar_shows_loss_rows_bytes_waiting_and_time_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    tracker = JsonlTracker(tmp_path, step=0, steps=4, batch_size=32, row_bytes=100)
    tracker.log(4, SAES, waited=0.0)
    tracker.close()
    shown = capsys.readouterr().err
    assert "rows/s" in shown
    assert "data_wait=0%" in shown
    assert "fvu=0.2500 to 0.5000" in shown
    assert "128/128 [00:00<00:00" in shown  # elapsed and remaining time
    assert "disk=" in shown


def test_a_resumed_run_appends_after_the_lines_of_its_checkpoint(tmp_path: Path) -> None:
    for name in (METRICS, TIMINGS):
        (tmp_path / name).write_text(text(4, 8, 12).replace("}", ', "saes": {}}'))
    tracker = JsonlTracker(tmp_path, step=10, steps=20, batch_size=32)
    tracker.log(12, SAES, waited=0.0)
    tracker.close()
    for name in (METRICS, TIMINGS):
        assert [line["step"] for line in lines(tmp_path / name)] == [4, 8, 12]
    assert lines(tmp_path / METRICS)[-1]["saes"] == SAES


@pytest.mark.parametrize(
    ("before", "step", "after"),
    [
        (text(4, 8, 12), 8, text(4, 8)),
        (text(4, 8, 12), 12, text(4, 8, 12)),
        (text(4, 8, 12), 0, ""),
        ("", 8, ""),
        (text(4) + '{"step": 8', 8, text(4)),
        (text(4) + '{"step": 8}', 8, text(4)),  # no newline: incomplete
        (text(4, 12) + '{"ste', 8, text(4)),
    ],
)
def test_lines_after_the_step_and_incomplete_lines_are_removed(
    tmp_path: Path, before: str, step: int, after: str
) -> None:
    path = tmp_path / METRICS
    path.write_text(before)
    truncate_after(path, step)
    assert path.read_text() == after
    assert [p.name for p in tmp_path.iterdir()] == [METRICS]


def test_truncating_a_missing_file_creates_nothing(tmp_path: Path) -> None:
    truncate_after(tmp_path / METRICS, 8)
    assert not (tmp_path / METRICS).exists()


def test_the_last_complete_line_is_returned(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    assert last_line(path) is None
    for before, step in (("", None), ('{"st', None), (text(4), 4), (text(4, 8) + '{"step": 1', 8)):
        path.write_text(before)
        line = last_line(path)
        assert (line and line["step"]) == step


@pytest.mark.parametrize("line", ["\0\0\0", "[1]", '{"rows": 3}', '{"step": "4"}'])
def test_a_damaged_complete_line_raises_an_error(tmp_path: Path, line: str) -> None:
    path = tmp_path / METRICS
    path.write_text(text(4) + line + "\n")
    with pytest.raises(FormatError, match=r"metrics\.jsonl"):
        truncate_after(path, 8)
    with pytest.raises(FormatError, match=r"metrics\.jsonl"):
        last_line(path)


def test_the_last_line_at_or_before_a_step_is_returned(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    path.write_text(text(4, 8, 12))
    for step, found in ((3, None), (4, 4), (11, 8), (12, 12), (99, 12)):
        line = last_line(path, step)
        assert (line and line["step"]) == found


def test_a_line_with_nan_raises_an_error(tmp_path: Path) -> None:
    (tmp_path / METRICS).write_text('{"step": 4, "rows": NaN}\n')
    with pytest.raises(FormatError, match=r"metrics\.jsonl"):
        last_line(tmp_path / METRICS)


def test_truncating_on_a_full_disk_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / METRICS).write_text(text(4, 8, 12))
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskFullError):
        truncate_after(tmp_path / METRICS, 8)
    assert (tmp_path / METRICS).read_text() == text(4, 8, 12)
    assert [p.name for p in tmp_path.iterdir()] == [METRICS]
