from __future__ import annotations

import contextlib
import io
import sys
import threading
import weakref

import pytest

from actcache.core import progress
from actcache.core.progress import (
    Progress,
    format_bytes,
    format_duration,
    heartbeat,
    print_heartbeat,
)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No work of an earlier test, such as one that was interrupted, is open."""
    monkeypatch.setattr(progress, "_open", weakref.WeakValueDictionary())


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1234, "1.23 kB"),
        (99_940, "99.9 kB"),
        (99_960, "100 kB"),
        (999_499, "999 kB"),
        (999_501, "1 MB"),
        (235e6, "235 MB"),
        (4.2e9, "4.2 GB"),
        (3e12, "3 TB"),
        (1.5e18, "1.5e+03 PB"),
    ],
)
def test_sizes_have_three_digits_and_a_decimal_unit(size: float, text: str) -> None:
    assert format_bytes(size) == text


def test_a_bar_is_not_drawn_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Progress("harvest", 10, "tok")
    bar.advance(10, 100)
    bar.close()
    assert capsys.readouterr() == ("", "")


def test_a_bar_shows_the_amount_the_rate_and_the_disk(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Progress("harvest", 4000, "tok", initial=1000, show=True)
    bar.advance(1000, 5_000_000, loss=1)
    bar.close()
    err = capsys.readouterr().err
    assert "harvest" in err
    assert "2.00k/4.00k" in err
    assert "loss=1" in err
    assert "disk=" in err


def test_a_wait_is_shown_in_the_bar_or_printed_once_without_a_bar(
    capsys: pytest.CaptureFixture[str],
) -> None:
    silent = Progress("fit", 10, "rows")
    for shard in range(3):
        silent.wait(f"waiting for shard {shard}", begins=shard == 0)
    silent.print_line("warning: cold")
    assert capsys.readouterr() == ("", "fit: waiting for shard 0\nwarning: cold\n")
    shown = Progress("fit", 10, "rows", show=True)
    shown.wait("waiting for shard 0", begins=False)
    shown.close()
    assert "waiting for shard 0" in capsys.readouterr().err


def test_a_long_wait_without_a_bar_is_printed_again(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actcache.core.progress.MINUTE", 0.0)
    silent = Progress("fit", 10, "rows")
    silent.wait("waiting for shard 0", begins=True)
    silent.wait("waiting for shard 0", begins=False)
    assert capsys.readouterr().err == 2 * "fit: waiting for shard 0\n"


def test_what_a_bar_shows_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    bar = Progress("fit", 10, "rows", show=True)
    bar.wait("\x1b[2J", begins=True)
    bar.print_line("\x1b]0;title\x07")
    bar.close()
    printed = capsys.readouterr().err
    assert r"\x1b[2J" in printed
    assert "\x1b]0;" not in printed


class Clock:
    """Time that passes only when a test advances it."""

    def __init__(self) -> None:
        self.now = 5000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("actcache.core.progress.time.monotonic", clock)
    monkeypatch.setattr("actcache.core.progress._last_line", 0.0)
    return clock


def lines_of(
    capsys: pytest.CaptureFixture[str],
    clock: Clock,
    total: int | None,
    steps: list[tuple[int, float]],
) -> list[tuple[float, str]]:
    """Report progress without a terminal; return the lines with their times."""
    bar, lines, began = Progress("harvest", total, "tok"), [], clock.now
    for units, seconds in steps:
        clock.now += seconds
        bar.advance(units)
        lines += [(clock.now - began, line) for line in capsys.readouterr().err.splitlines()]
    bar.close()
    return lines


def test_short_work_prints_no_line(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    assert lines_of(capsys, clock, 100, [(1, 0.099)] * 100) == []


def test_a_line_gives_what_is_done_the_total_the_rate_and_the_time_left(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    lines = lines_of(capsys, clock, 12_000_000, [(400_000, 11.75)] * 3)
    assert lines == [
        (11.75, "harvest: 400k of 12M tok (3%), 34k tok/s, 5.7 min left"),
        (35.25, "harvest: 1.2M of 12M tok (10%), 34k tok/s, 5.3 min left"),
    ]


def test_long_work_prints_a_line_each_tenth(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    times = [at for at, _ in lines_of(capsys, clock, 200, [(1, 1.0)] * 200)]
    assert times == [10, *range(20, 201, 20)]


def test_no_two_lines_are_closer_than_ten_seconds_or_further_apart_than_a_minute(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    times = [at for at, _ in lines_of(capsys, clock, 40, [(1, 1.0)] * 40)]
    assert times == [10, 20, 30, 40]
    times = [at for at, _ in lines_of(capsys, clock, 10_000, [(1, 1.0)] * 600)]
    assert times == [10, *range(70, 600, 60)]


def test_work_of_unknown_length_prints_a_line_each_minute(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    lines = lines_of(capsys, clock, None, [(1, 1.0)] * 140)
    assert lines == [
        (10, "harvest: 10 tok, 1 tok/s"),
        (70, "harvest: 70 tok, 1 tok/s"),
        (130, "harvest: 130 tok, 1 tok/s"),
    ]


def test_lines_of_resumed_work_give_the_rate_of_this_call_and_the_last_notes(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    bar = Progress("fit", 1000, "rows", initial=500)
    clock.now += 10
    bar.advance(100, 2_000_000, fvu="0.1")
    bar.close()
    line = "fit: 600 of 1k rows (60%), 10 rows/s, 40 s left, fvu 0.1\n"
    assert capsys.readouterr().err == line


def test_bytes_are_formatted_as_such(capsys: pytest.CaptureFixture[str], clock: Clock) -> None:
    bar = Progress("verify", 4_000_000_000, "B")
    clock.now += 10
    bar.advance(1_000_000_000)
    bar.close()
    line = "verify: 1 GB of 4 GB (25%), 100 MB/s, 30 s left\n"
    assert capsys.readouterr().err == line


def test_work_that_is_not_shown_prints_no_line(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    bar = Progress("harvest", 10, "tok", show=False)
    clock.now += 1000
    bar.advance(5)
    print_heartbeat("harvest", 0.0, sys.stderr)
    assert capsys.readouterr().err == "harvest: at work for 1.7 h\n"


def test_a_heartbeat_prints_the_innermost_work_once_a_minute(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    began = clock.now
    outer, inner = Progress("harvest", 100, "tok"), Progress("count", None, "tok")

    def line_after(seconds: float) -> str:
        clock.now += seconds
        print_heartbeat("harvest", began, sys.stderr)
        return capsys.readouterr().err

    assert line_after(59) == ""
    assert line_after(1) == "count: 0 tok, nothing yet after 60 s\n"
    inner.close()
    assert line_after(59) == ""
    assert line_after(1) == "harvest: 0 of 100 tok (0%), nothing yet after 2 min\n"
    clock.now += 30
    outer.advance(10)  # prints a line of its own
    assert capsys.readouterr().err == "harvest: 10 of 100 tok (10%), 0.0667 tok/s, 22 min left\n"
    assert line_after(59) == ""
    outer.close()
    assert line_after(1) == "harvest: at work for 3.5 min\n"


def test_a_heartbeat_shows_what_is_waited_for_until_work_continues(
    capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    bar = Progress("fit", None, "rows")
    bar.wait("waiting for shard 3", begins=True)
    clock.now += 60
    print_heartbeat("fit", 0.0, sys.stderr)
    bar.wait("waiting for shard 3", begins=False)
    bar.advance(30)
    clock.now += 60
    print_heartbeat("fit", 0.0, sys.stderr)
    bar.close()
    waits = 2 * ["fit: waiting for shard 3"]
    assert capsys.readouterr().err.splitlines() == [*waits, "fit: 30 rows, 0.25 rows/s"]


def test_a_heartbeat_beats_without_a_terminal_on_rank_0_only_and_ends_with_the_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("actcache.core.progress.MINUTE", 0.0)
    monkeypatch.setattr("actcache.core.progress._last_line", 0.0)

    class Pipe(io.StringIO):
        beaten = threading.Event()

        def write(self, text: str) -> int:
            self.beaten.set()
            return super().write(text)

    monkeypatch.setattr(sys, "stderr", Pipe())
    with heartbeat("fit"), contextlib.redirect_stderr(io.StringIO()):  # as libraries are silenced
        assert Pipe.beaten.wait(60)
    assert sys.stderr.getvalue().startswith("fit: at work for 0 s\n")
    assert all(thread.name != "heartbeat" for thread in threading.enumerate())
    monkeypatch.setenv("RANK", "1")
    with heartbeat("fit"):
        assert all(thread.name != "heartbeat" for thread in threading.enumerate())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89, "89 s"), (90, "1.5 min"), (300, "5 min"), (3599, "60 min"), (9e4, "25 h")],
)
def test_durations_are_given_in_their_largest_unit(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text
