"""Streams that escape untrusted text and that survive closed files and full disks."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from actcache.core.terminal import OutputClosedError, SafeStream, escape_controls

HOSTILE = "\x1b[2J\x1b]0;title\x07\x9b1A\x7f\r\u202e\u2066\u200f\u2028\ud800\U000e0041"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_controls_marks_of_direction_and_surrogates_are_escaped() -> None:
    escaped = escape_controls(f"a {HOSTILE} ü 漢\n\tb")
    assert escaped == (
        r"a \x1b[2J\x1b]0;title\x07\x9b1A\x7f\r\u202e\u2066\u200f\u2028\ud800\U000e0041 ü 漢"
        "\n\tb"
    )


@pytest.mark.parametrize("is_result", [True, False])
def test_a_stream_escapes_whatever_is_written_to_it(is_result: bool) -> None:
    file = io.StringIO()
    print(HOSTILE, file=SafeStream(file, is_result=is_result))
    assert file.getvalue() == escape_controls(HOSTILE) + "\n"


def test_progress_bars_may_move_the_cursor_of_a_terminal() -> None:
    file = Terminal()
    SafeStream(file, is_result=False).write("\r 5%\x1b[A\x1b[2J")
    assert file.getvalue() == "\r 5%\x1b[A\\x1b[2J"


def test_characters_that_the_encoding_lacks_are_escaped() -> None:
    raw = io.BytesIO()
    file = io.TextIOWrapper(raw, encoding="ascii")
    stream = SafeStream(file, is_result=True)
    stream.write("ü漢")
    stream.flush()
    assert raw.getvalue() == rb"\xfc\u6f22"


class Failing(io.StringIO):
    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        raise self.error

    def flush(self) -> None:
        raise self.error


@pytest.mark.parametrize("error", [OSError(28, "full"), BrokenPipeError(), ValueError("closed")])
def test_messages_are_dropped_where_stderr_fails(error: Exception) -> None:
    stream = SafeStream(Failing(error), is_result=False)
    assert stream.write("message") == 7
    stream.flush()


def test_a_result_that_cannot_be_written_raises() -> None:
    with pytest.raises(OSError, match=r"full.*standard output"):
        SafeStream(Failing(OSError(28, "full")), is_result=True).write("result")
    with pytest.raises(OutputClosedError):
        SafeStream(Failing(BrokenPipeError()), is_result=True).flush()


def test_a_stream_without_a_file_takes_and_drops_text() -> None:
    stream = SafeStream(None, is_result=True)
    print("text", file=stream, flush=True)
    assert not stream.isatty()


def test_closed_standard_files_are_taken_by_dev_null_before_files_are_opened() -> None:
    code = (
        "from actcache.core.terminal import reserve_standard_files; reserve_standard_files();"
        "import os; raise SystemExit(os.open('/dev/zero', os.O_RDONLY))"
    )
    for closed in ("0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"):
        done = subprocess.run(
            ["sh", "-c", f'"$0" -c "$1" {closed}', sys.executable, code], check=False
        )
        assert done.returncode > 2
