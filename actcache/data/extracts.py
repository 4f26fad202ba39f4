"""Copies of one column of a file whose documents cannot be read in place, in any order.

These are compressed files, Parquet, CSV, and arrays of JSON. Their column is written once below the
cache folder of `datasets`, under the digest of the file and the column's name: all processes of a
harvest, and all later harvests of the column, read the same copy. It may be deleted at any time; a
command that needs it makes it again.

A copy is: the documents one behind another; where each begins, and the last one ends, as uint64 in
little-endian order; a JSON object; and the length of that object as uint64. A document that cannot
be used is the byte FF, which is no UTF-8, and what is known of it as JSON.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import secrets
import shutil
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from actcache.data.records import Unusable
from actcache.data.table_rows import Row
from actcache.data.watched_files import WatchedFile, read_at
from actcache.errors import DatasetError, DiskFullError, FileSystemError
from actcache.filesystem.atomic import as_disk_full_error
from actcache.filesystem.rooted import RootedPath, fsync_dir, rooted

Check = Callable[[object, int, Callable[[int], str]], object]
"""Function of a value, its index, and a function from an index to its place."""

_VERSION = 2
_LENGTH = 8  # bytes of one number
_BUFFER = 1 << 20  # bytes written at once
_ENOUGH = 1000  # documents of which one must have the column's type
_UNUSABLE = b"\xff"


class Extract:
    """Documents of one column of a file, read from its copy.

    Args:
        file: the file.
        name: what decides the copy besides the file: format, column and kind of documents.
        rows: function that reads the file's rows.
        check: function that returns a value of the column's type, or `Unusable`; `Column.check`.

    Raises:
        DatasetError: the file is damaged, or changes meanwhile, or its first documents all have
            another type.
        DiskFullError: there is no room for the copy.
    """

    def __init__(
        self,
        file: WatchedFile,
        name: Sequence[str],
        rows: Callable[[], Iterator[Row]],
        check: Check,
    ) -> None:
        self.file = file
        self._is_text = name[-1] == "text"
        key = xxhash.xxh3_128(json.dumps([_VERSION, file.digest, *name]).encode()).hexdigest()
        self._path = extracts_folder() / f"{key}.column"
        found = _Found.read(self._path)
        if found is None:
            with _locked(self._path) as alone:
                found = _Found.read(self._path)  # another process may have made it meanwhile
                if found is None:
                    if alone:
                        _remove_partials(self._path)
                    _make(self._path, file, rows, check)
                    found = _Found.read(self._path)
        if found is None:
            raise DatasetError(f"{self._path} was deleted or damaged as soon as it was written")
        self._starts = found.starts
        self.count, self.replaced, self.differs = found.count, found.replaced, found.differs
        self.bytes = int(found.starts[-1])

    def fetch(self, indices: Sequence[int]) -> list[object]:
        """Read documents of ascending indices; raises `DatasetError` if the file has changed."""
        try:
            with self._path.open("rb") as copy:
                spans = [self._starts[index : index + 2].tolist() for index in indices]
                found = [read_at(copy.fileno(), start, end - start) for start, end in spans]
        except FileNotFoundError as error:
            raise DatasetError(
                f"{self._path}, the copy of a column of {self.file.path}, is gone",
                remedy="run the same command again: it makes the copy anew",
            ) from error
        self.file.check()
        return [self._decoded(data) for data in found]

    def _decoded(self, data: bytes) -> object:
        if data[:1] == _UNUSABLE:
            return Unusable.from_values(json.loads(data[1:]))
        return data.decode() if self._is_text else json.loads(data)

    def place(self, index: int) -> str:
        """Describe where a document is."""
        return f"{self.file.path}, document {index}"


class _Found:
    """A copy that is there."""

    def __init__(self, starts: NDArray[np.uint64], facts: dict[str, Any]) -> None:
        self.starts = starts
        self.count = len(starts) - 1
        self.replaced, self.differs = int(facts["replaced"]), bool(facts["differs"])

    @staticmethod
    def read(path: RootedPath) -> _Found | None:
        """Read all but the documents; None if it is not there, or damaged."""
        try:
            with path.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(size - _LENGTH)
                length = int.from_bytes(file.read(), "little")
                file.seek(size - _LENGTH - length)
                facts = json.loads(file.read(length))
                end, count = int(facts["bytes"]), int(facts["count"])
                if end + _LENGTH * (count + 1) + length + _LENGTH != size:
                    return None
                file.seek(end)
                starts = np.frombuffer(file.read(_LENGTH * (count + 1)), "<u8")
                return _Found(starts, facts) if int(starts[-1]) == end else None
        except (FileNotFoundError, ValueError, KeyError, TypeError, OSError):
            return None


def extracts_folder() -> RootedPath:
    """Return the folder of this user's copies; it may not exist."""
    home = os.environ.get("HF_HOME") or os.path.join(  # noqa: PTH118
        os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface"
    )
    base = os.environ.get("HF_DATASETS_CACHE") or Path(home, "datasets")
    return rooted(Path(base).expanduser() / f"actcache-columns-{os.getuid()}")


@contextmanager
def _locked(path: RootedPath) -> Iterator[bool]:
    """Wait until no other process makes the copy; False where the file system has no locks."""
    try:
        Path(path.parent.parent).mkdir(parents=True, exist_ok=True)
        path.parent.mkdir(0o700, exist_ok=True)
        lock = path.with_suffix(".lock").open("ab")
    except OSError as error:
        if isinstance(full := as_disk_full_error(error, path, 1), DiskFullError):
            raise full from error
        raise FileSystemError(
            f"{path.parent} cannot be written: columns of text files are copied there",
            got=str(error),
            remedy="name another folder with HF_DATASETS_CACHE",
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            yield False
        else:
            yield True


def _remove_partials(path: RootedPath) -> None:
    """Delete what a killed process has left of a copy; only with the lock."""
    for other in list(path.parent.iterdir()):
        if other.name.startswith(f".{path.stem}."):
            other.unlink(missing_ok=True)


def _make(
    path: RootedPath, file: WatchedFile, rows: Callable[[], Iterator[Row]], check: Check
) -> None:
    full = DiskFullError(
        f"no room to copy a column of {file.path} to {path.parent}",
        expected="room for all texts of the column, uncompressed",
        got=f"{shutil.disk_usage(path.parent).free:,} bytes free",
        remedy="free space, or name a folder on another disk with HF_DATASETS_CACHE",
    )
    if shutil.disk_usage(path.parent).free < file.bytes:
        raise full
    partial = path.parent / f".{path.stem}.{secrets.token_hex(8)}"
    try:
        with partial.open("xb") as out:
            _write(out, file, rows, check)
            out.flush()
            os.fsync(out.fileno())
        file.check()
        partial.replace(path)
        fsync_dir(path.parent)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise full from error
        raise


def _write(
    out: IO[bytes], file: WatchedFile, rows: Callable[[], Iterator[Row]], check: Check
) -> None:
    starts, end, replaced, differs = array("Q", [0]), 0, 0, False
    held: list[bytes] = []
    size = 0
    line = 0

    def place(_: int) -> str:
        return f"{file.path}, line {line}"

    usable = False
    for index, row in enumerate(rows()):
        line = row.line
        value = check(row.value, index, place)
        usable = usable or not isinstance(value, Unusable)
        if not usable and index >= _ENOUGH:
            assert isinstance(value, Unusable)
            raise value.error  # another column was meant
        data = _encoded(value)
        held.append(data)
        size += len(data)
        end += len(data)
        starts.append(end)
        replaced += row.replaced
        differs = differs or row.differs
        if size >= _BUFFER:
            out.writelines(held)
            held, size = [], 0
    facts = {"bytes": end, "count": len(starts) - 1, "replaced": replaced, "differs": differs}
    text = json.dumps(facts).encode()
    out.writelines(held)
    out.write(np.frombuffer(starts, np.uint64).astype("<u8").tobytes())
    out.write(text + len(text).to_bytes(_LENGTH, "little"))


def _encoded(value: object) -> bytes:
    if isinstance(value, Unusable):
        return _UNUSABLE + json.dumps(value.to_values()).encode()
    return (value if isinstance(value, str) else json.dumps(value, default=str)).encode()
