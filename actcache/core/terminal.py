"""Streams that are safe to write untrusted text to, and that never end a run. Standard library."""

from __future__ import annotations

import errno
import os
import re
import sys
from typing import Any, TextIO, cast

_CONTROLS = "\x00-\x08\x0b-\x1f\x7f-\x9f"
_INVISIBLE = "\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff"
"""Marks of direction, separators that end a line, characters without width, lone surrogates."""
_UNSAFE = re.compile(f"[{_CONTROLS}{_INVISIBLE}\U000e0000-\U000e007f]")
_OF_BARS = re.compile("(\r|\x1b\\[A)")
"""How a progress bar returns to the start of its line, and to the line above."""


class OutputClosedError(BrokenPipeError):
    """The reader of stdout has gone, as in `| head`."""


def escape_controls(text: str) -> str:
    r"""Escape control characters and marks of direction, such as `\x1b`; keep \n and \t."""
    if text.isprintable():
        return text
    return _UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class SafeStream:
    """Text stream that escapes what is written to it, and drops what its file cannot encode.

    Args:
        stream: where text is written; None: nowhere, since the file was closed at the start.
        is_result: whether a failed write raises. Messages are dropped instead: a full disk or a
            closed pipe behind stderr must not end a run.
    """

    def __init__(self, stream: TextIO | None, *, is_result: bool) -> None:
        self._stream, self._is_result = stream, is_result

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write escaped text. On a terminal, bars may move the cursor."""
        if self._stream is None:
            return len(text)
        parts = _OF_BARS.split(text) if self.isatty() and not self._is_result else [text]
        safe = "".join(p if _OF_BARS.fullmatch(p) else escape_controls(p) for p in parts)
        try:
            try:
                self._stream.write(safe)
            except UnicodeEncodeError:
                encoding = self._stream.encoding or "ascii"
                self._stream.write(safe.encode(encoding, "backslashreplace").decode(encoding))
        except (OSError, ValueError) as error:  # ValueError: the file has been closed
            self._fail(error)
        return len(text)

    def flush(self) -> None:
        """Flush the stream."""
        try:
            if self._stream is not None:
                self._stream.flush()
        except (OSError, ValueError) as error:
            self._fail(error)

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return self._stream is not None and not self._stream.closed and self._stream.isatty()

    @property
    def encoding(self) -> str:
        """Encoding of the file."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def _fail(self, error: OSError | ValueError) -> None:
        stream, self._stream = self._stream, None  # Python would fail again when it exits
        if stream is sys.__stdout__ or stream is sys.__stderr__:
            _discard(cast("TextIO", stream))
        if isinstance(error, BrokenPipeError) and self._is_result:
            raise OutputClosedError(*error.args) from error
        if self._is_result:
            number = error.errno if isinstance(error, OSError) else None
            raise OSError(number or errno.EIO, str(error), "standard output") from error


def _discard(stream: TextIO) -> None:
    """Connect the file of a stream with /dev/null, where what it still buffers goes."""
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
    except (OSError, ValueError):  # the file has been closed
        return


def reserve_standard_files() -> None:
    """Open /dev/null in place of standard files that are closed.

    Otherwise the next files to be opened would take their numbers, and messages that native code
    writes to stderr would end up in a file of the cache.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number


def make_streams_safe() -> tuple[Any, Any]:
    """Replace `sys.stdout` and `sys.stderr` by safe streams; return what they were."""
    before = sys.stdout, sys.stderr
    if not isinstance(sys.stdout, SafeStream):
        sys.stdout = cast("TextIO", SafeStream(sys.stdout, is_result=True))
    if not isinstance(sys.stderr, SafeStream):
        sys.stderr = cast("TextIO", SafeStream(sys.stderr, is_result=False))
    return before
