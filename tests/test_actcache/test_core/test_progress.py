from __future__ import annotations

import pytest

from actcache.core.progress import Progress, format_bytes


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
