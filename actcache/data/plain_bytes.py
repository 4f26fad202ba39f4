"""The bytes of a plain file as UTF-8: decompressed, without byte order mark, in pieces and lines.

UTF-16 and UTF-32 with a byte order mark become UTF-8. Bytes that are no character become U+FFFD,
one for each maximal invalid part, as in the Unicode standard and in Rust's `from_utf8_lossy`.
"""

from __future__ import annotations

import codecs
import gzip
import lzma
import re
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from actcache.errors import DatasetError, shortage_of

_PIECE = 1 << 20  # bytes read at a time
_MARKS = {  # those that begin with another one first
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF32_LE: "utf-32-le",
    codecs.BOM_UTF32_BE: "utf-32-be",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
_LONGEST_MARK = 4
_HEAD = 256  # bytes that show whether a file is text
_FIRST = {".gz": b"\x1f\x8b\x08", ".xz": b"\xfd7zX", ".zst": b"(\xb5/\xfd"}
"""First bytes of compressed files."""
_SURROGATE = re.compile("[\ud800-\udfff]")


def encoding_of(head: bytes) -> tuple[str, int]:
    """Return the encoding that a byte order mark names, UTF-8 without one, and the mark's size."""
    for mark, encoding in _MARKS.items():
        if head.startswith(mark):
            return encoding, len(mark)
    return "utf-8", 0


def compression_of(head: bytes) -> str:
    """Return the suffix of the compression that the first bytes of a file show; else empty."""
    return next((suffix for suffix, first in _FIRST.items() if head.startswith(first)), "")


def utf8_pieces(path: Path, compression: str = "") -> Iterator[bytes]:
    """Yield the text of a file in pieces of about 1 MB.

    Args:
        path: the file.
        compression: its last suffix if it is compressed, such as .gz.

    Raises:
        DatasetError: a compressed file is damaged or cut, or its suffix does not say so.
    """
    pieces = raw_pieces(path, compression)
    head = b""
    for piece in pieces:
        head += piece
        if len(head) >= _LONGEST_MARK:
            break
    if suffix := compression_of(head):
        raise DatasetError(
            f"{path} is no text",
            expected="text" if not compression else f"text in the {compression} file",
            got=f"a {suffix} file",
            remedy=f"decompress it, or add {suffix} to its name",
        )
    encoding, size = encoding_of(head)
    if encoding == "utf-8":
        yield head[size:]
        yield from pieces
    else:
        yield from _transcoded(encoding, head[size:], pieces)


def raw_pieces(path: Path, compression: str) -> Iterator[bytes]:
    """Yield the decompressed bytes of a file; raises `DatasetError` if it is damaged."""
    lines = 0
    with path.open("rb") as file, _decompressed(file, compression) as stream:
        while True:
            try:
                piece = bytes(stream.read(_PIECE))
            except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
                if (shortage := shortage_of(error)) is not None or not compression:
                    raise shortage or error from None
                raise DatasetError(
                    f"{path} cannot be decompressed beyond line {lines + 1}",
                    expected=f"a whole {compression} file",
                    got=str(error) or type(error).__name__,
                    remedy=_remedy(path, compression, str(error)),
                ) from error
            if not piece:
                return
            lines += piece.count(b"\n")
            yield piece


def _remedy(path: Path, compression: str, error: str) -> str:
    if "requires too much memory" in error:  # a window of more than 128 MiB, as of zstd --long=31
        short = path.with_name(f"short-{path.name}")
        return f"compress it with a shorter window: zstd -dc --long=31 {path} | zstd -o {short}"
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if (suffix := compression_of(head)) not in ("", compression):
        return f"it is a {suffix} file: give its name that suffix"
    if not suffix and b"\0" not in head and not decoded(head[:-3])[1]:
        return f"it is not compressed: remove {compression} from its name"
    return "it is cut or damaged: copy or download it again"


def _decompressed(file: IO[bytes], compression: str) -> Any:
    if compression == ".gz":
        return gzip.GzipFile(fileobj=file)
    if compression == ".xz":
        return lzma.LZMAFile(file)
    if compression == ".zst":
        import pyarrow as pa

        return pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd")
    return file


def _transcoded(encoding: str, head: bytes, pieces: Iterator[bytes]) -> Iterator[bytes]:
    decoder = codecs.getincrementaldecoder(encoding)("surrogatepass")
    try:
        yield _encoded(decoder.decode(head))
        for piece in pieces:
            yield _encoded(decoder.decode(piece))
        yield _encoded(decoder.decode(b"", final=True))
    except UnicodeDecodeError:  # a cut last character
        yield b"\xff"


def _encoded(text: str) -> bytes:
    """Encode as UTF-8, a lone surrogate as a byte that is no UTF-8, so that it is counted."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return _SURROGATE.sub("\udcff", text).encode("utf-8", "surrogateescape")


def lines(pieces: Iterable[bytes]) -> Iterator[bytes]:
    r"""Yield lines with their \n; memory is that of the longest line."""
    tail: list[bytes] = []
    for piece in pieces:
        *whole, rest = piece.split(b"\n")
        if whole:
            whole[0] = b"".join([*tail, whole[0]])
            tail = []
            for line in whole:
                yield line + b"\n"
        tail.append(rest)
    if last := b"".join(tail):
        yield last


def decoded(data: bytes) -> tuple[str, bool]:
    """Return the text of UTF-8 bytes, and whether some were replaced by U+FFFD."""
    try:
        return data.decode(), False
    except UnicodeDecodeError:
        return data.decode(errors="replace"), True


def decoded_pieces(pieces: Iterable[bytes]) -> Iterator[tuple[str, bool]]:
    """Decode pieces that may end within a character."""
    tail = b""
    for piece in pieces:
        data = tail + piece
        end = _end_of_characters(data)
        yield decoded(data[:end])
        tail = data[end:]
    if tail:
        yield decoded(tail)


def _end_of_characters(data: bytes) -> int:
    """Return the index after the last character that cannot continue in the next piece."""
    for back in range(1, min(4, len(data)) + 1):
        byte = data[-back]
        if byte < 0x80:
            return len(data) - back + 1
        if byte >= 0xC0:  # the first byte of a character
            return len(data) - back
    return len(data)


def without_surrogates(value: Any) -> tuple[Any, bool]:
    """Replace lone surrogates by U+FFFD in texts at any depth; return whether there were any."""
    if isinstance(value, str):
        if value.isascii():
            return value, False
        fixed = _SURROGATE.sub("\ufffd", value)
        return fixed, fixed != value
    if isinstance(value, list):
        pairs = [without_surrogates(item) for item in value]
        return [item for item, _ in pairs], any(found for _, found in pairs)
    if isinstance(value, dict):
        keys, found = without_surrogates(list(value))
        values, also = without_surrogates(list(value.values()))
        return dict(zip(keys, values, strict=True)), found or also
    return value, False


def holds_replacement(value: Any) -> bool:
    """Return whether a text at any depth holds U+FFFD."""
    if isinstance(value, str):
        return "\ufffd" in value
    if isinstance(value, dict):
        return any(map(holds_replacement, (*value, *value.values())))
    return isinstance(value, list) and any(map(holds_replacement, value))
