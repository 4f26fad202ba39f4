"""Local files of text: which there are, of which kind, and their documents.

A table (JSON lines, JSON, CSV, TSV, Parquet) holds one document a row, in one column; a .txt or .md
file is one document. JSON lines that are not compressed, and texts, are read in place; of the
others, the column is copied first (`extracts`), or with --streaming read from first to last.
"""

from __future__ import annotations

import codecs
import glob
import io
import itertools
import json
import os
import re
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, Protocol, cast

import numpy as np

from actcache.data.csv_rows import csv_rows
from actcache.data.extracts import Check, Extract
from actcache.data.json_lines import IndexedLines, json_lines
from actcache.data.json_objects import json_objects
from actcache.data.parquet_rows import parquet_rows
from actcache.data.plain_bytes import compression_of, decoded_pieces, encoding_of, utf8_pieces
from actcache.data.records import LongText
from actcache.data.table_rows import Columns, NoColumnError, Row
from actcache.data.watched_files import WatchedFile
from actcache.errors import DatasetError

Format = Literal["json lines", "json", "csv", "tsv", "parquet", "text"]

FORMATS: dict[str, Format] = {
    ".jsonl": "json lines",
    ".ndjson": "json lines",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "text",
    ".md": "text",
}
COMPRESSIONS = (".gz", ".zst", ".xz")
KNOWN = f"a {', '.join(FORMATS)} file, each also {', '.join(COMPRESSIONS)}"

_READ_BEFORE = {".jsonl", ".json", ".csv", ".parquet"}
"""Suffixes that earlier versions read in folders as this one does."""
_JSON = ("json lines", "json")
"""Formats of which `datasets` gave messages of a conversation with nulls for keys they lack."""
_SPLIT = re.compile("(?<![a-zA-Z])(?:train|test|dev|eval|val|valid|validation)(?![a-zA-Z])")
_WORD_OF_SPLIT = re.compile("train|test|dev|val", re.IGNORECASE)
_HEAD = 4096  # bytes that show the encoding, and whether a file begins with an array
_SHORT = 1 << 16  # bytes of a text that is read as a whole
_NAMED = 3  # files that a warning names
_AT_ONCE = 256  # rows between two looks at whether a file has changed


@dataclass(frozen=True)
class PlainFile:
    """A file of a known kind."""

    path: Path
    format: Format
    compression: str
    """Suffix of the compression, or empty."""


def plain_file(path: Path) -> PlainFile | None:
    """Return what the suffixes of a name say; None if they are not known."""
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else ""
    if suffixes and suffixes[-1] in FORMATS:
        return PlainFile(path, FORMATS[suffixes[-1]], compression)
    return None


def is_pattern(name: str) -> bool:
    """Return whether a name that is no file is a pattern of names."""
    return glob.has_magic(name) and "://" not in name


def list_files(name: str) -> dict[str, Path]:
    """List the files of a folder or of a pattern, hidden ones left out, sorted by name.

    Returns:
        Paths by their names below the folder, or below the part of a pattern that is no pattern.
    """
    if not is_pattern(name) or Path(name).is_dir():
        folder = Path(name)
        return dict(sorted((str(path.relative_to(name)), path) for path in _walk(folder, folder)))
    parts = Path(name).parts
    fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), parts))
    matches = glob.glob(name, recursive=True)  # noqa: PTH207 (a pattern may be absolute)
    if not matches:  # the folder itself may have brackets in its name
        fixed = next((above for above in Path(name).parents if above.is_dir()), fixed)
        rest = str(Path(name).relative_to(fixed))
        matches = [str(fixed / m) for m in glob.glob(rest, root_dir=fixed, recursive=True)]  # noqa: PTH207
    found: dict[str, Path] = {}
    for path in map(Path, matches):
        if _is_within_itself(path if path.is_dir() else path.parent, fixed):
            continue
        for file in _walk(path, fixed) if path.is_dir() else [path] * path.is_file():
            found[str(file.relative_to(fixed))] = file
    return dict(sorted(found.items()))


def _is_within_itself(folder: Path, above: Path) -> bool:
    """Return whether links lead from a folder to one that holds it, as far as `above`."""
    if not any(part.is_symlink() for part in (folder, *folder.parents)):
        return False
    parts = [part for part in (folder, *folder.parents) if part == above or above in part.parents]
    return len({part.resolve() for part in parts}) < len(parts)


def _walk(folder: Path, above: Path) -> Iterator[Path]:
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".") and not _is_within_itself(Path(place, name), above)
        ]
        for name in names:
            path = Path(place, name)
            if not name.startswith(".") and path.is_file():
                yield path


class IndexedPart(Protocol):
    """Documents of one file that can be read in any order."""

    file: WatchedFile
    count: int
    replaced: int
    """Documents in which something was no text."""
    differs: bool
    """Whether earlier versions read other documents."""
    bytes: int
    """Upper bound of the documents' tokens."""

    def fetch(self, indices: Sequence[int]) -> list[object]:
        """Read documents of ascending indices; raises `DatasetError` if the file has changed."""

    def place(self, index: int) -> str:
        """Describe where a document is."""


class TextFile:
    """A file that is one document, with line ends as text tools give them.

    It is read once when it is opened, for its digest and to count what is no text; beyond `_SHORT`
    bytes, its document is read while it is tokenised, and never held as a whole.
    """

    count = 1

    def __init__(self, found: PlainFile) -> None:
        self._found = found
        with found.path.open("rb") as file:
            encoding, mark = encoding_of(file.read(_HEAD))
        self.differs = mark > 0  # it was part of the text
        self.replaced, self.bytes = 0, 0
        if found.compression or encoding != "utf-8":
            self.file = WatchedFile(found.path, held=False)
            for text, damaged in self._decoded():
                self.bytes += len(text)
                self.replaced = int(self.replaced or damaged)
        else:
            decoder = codecs.getincrementaldecoder("utf-8")()
            self.file = WatchedFile(found.path, held=False, observe=partial(self._observe, decoder))
            self._observe(decoder, b"", final=True)
        if not found.compression:
            self.bytes = self.file.bytes

    def _observe(
        self, decoder: codecs.IncrementalDecoder, piece: bytes, *, final: bool = False
    ) -> None:
        """Note whether bytes are not UTF-8."""
        in_character = bool(decoder.getstate()[0])
        if not self.replaced and (in_character or final or not piece.isascii()):
            try:
                decoder.decode(piece, final)
            except UnicodeDecodeError:
                self.replaced = 1

    def _decoded(self) -> Iterator[tuple[str, bool]]:
        return decoded_pieces(utf8_pieces(self._found.path, self._found.compression))

    def _pieces(self) -> Iterator[str]:
        lines = io.IncrementalNewlineDecoder(None, translate=True)
        for piece, _ in self._decoded():
            self.file.check()
            yield lines.decode(piece)
        yield lines.decode("", final=True)
        self.file.check()

    def fetch(self, indices: Sequence[int]) -> list[object]:
        """Return the document as often as it is asked for."""
        text = LongText(self._pieces) if self.bytes > _SHORT else "".join(self._pieces())
        return [text for _ in indices]

    def place(self, index: int) -> str:  # noqa: ARG002
        """Return the path."""
        return str(self.file.path)


class StreamedTable:
    """Documents of a file that is read from first to last, without a copy.

    Args:
        file: the file.
        rows: function that reads its rows.
    """

    def __init__(self, file: WatchedFile, rows: Callable[[], Generator[Row]]) -> None:
        self.file, self._rows = file, rows
        self.replaced, self.differs = 0, False
        with closing(rows()) as first:
            next(first, None)  # raises `NoColumnError`

    def walk(self) -> Iterator[object]:
        """Yield all documents in order; raises `DatasetError` if the file has changed."""
        replaced = 0
        with closing(self._rows()) as rows:
            while batch := list(itertools.islice(rows, _AT_ONCE)):
                self.file.check()
                for row in batch:
                    replaced += row.replaced
                    self.replaced = max(self.replaced, replaced)
                    yield row.value
        self.file.check()

    def place(self, index: int) -> str:
        """Describe where a document is."""
        return f"{self.file.path}, document {index}"


@dataclass(frozen=True)
class Wanted:
    """The column that is asked for."""

    name: str
    kind: Literal["text", "chat", "ids"]
    check: Check
    """Function that returns a value of the column's type, or `Unusable`."""
    others: tuple[str, ...] = ()
    """Further columns, which not every file and row has."""

    @property
    def columns(self) -> Columns:
        """All columns."""
        return (self.name, *self.others) if self.others else self.name


class PlainText:
    """Documents of one or more files, in the order of the files' names.

    Args:
        parts: the files by name, in that order.
        notes: warnings about the choice of files.
        reads_as_before: whether earlier versions read the same documents.
    """

    def __init__(
        self,
        parts: Mapping[str, IndexedPart | StreamedTable],
        notes: Sequence[str],
        reads_as_before: bool,
    ) -> None:
        self._parts, self._notes = list(parts.values()), notes
        self.is_text = all(isinstance(part, TextFile) for part in self._parts)
        """Whether the files have no columns."""
        self.digests = {name: part.file.digest for name, part in parts.items()}
        """Digest of each file."""
        self.reads_as_before = reads_as_before
        counts = [getattr(part, "count", 0) for part in self._parts]
        self._firsts = np.cumsum([0, *counts])
        self.count = int(self._firsts[-1])
        """Number of documents; 0 for streams."""
        self.bytes = getattr(self._parts[0], "bytes", None) if len(parts) == 1 else None
        """Upper bound of the tokens of a single file; None for several."""

    def fetch(self, indices: Sequence[int]) -> list[object]:
        """Read the documents at these indices; raises `DatasetError` if a file has changed."""
        asked = np.asarray(indices, dtype=np.int64)
        order = np.argsort(asked, kind="stable")
        found: list[object] = [None] * len(asked)
        owners = np.searchsorted(self._firsts, asked[order], side="right") - 1
        for owner, group in itertools.groupby(range(len(order)), owners.__getitem__):
            places = order[list(group)]
            part = cast("IndexedPart", self._parts[owner])
            values = part.fetch((asked[places] - self._firsts[owner]).tolist())
            for place, value in zip(places.tolist(), values, strict=True):
                found[place] = value
        return found

    def walk(self, first: int = 0) -> Iterator[object]:
        """Yield the documents in order from index `first`; raises `DatasetError` as `fetch`."""
        for part in self._parts:
            if isinstance(part, StreamedTable):
                for value in part.walk():
                    if first:
                        first -= 1
                    else:
                        yield value
                continue
            skipped = min(first, part.count)
            first -= skipped
            for start in range(skipped, part.count, _AT_ONCE):
                yield from part.fetch(range(start, min(start + _AT_ONCE, part.count)))

    def place(self, index: int) -> str:
        """Describe where a document is."""
        if len(self._parts) > 1 and not self.count:  # of streams, the numbers are not known
            return f"document {index}"
        owner = int(np.searchsorted(self._firsts, index, side="right")) - 1 if self.count else 0
        return self._parts[owner].place(index - int(self._firsts[owner]))

    def warnings(self) -> tuple[str, ...]:
        """Return what was left out, and how many documents held what is no text."""
        damaged = [part for part in self._parts if part.replaced]
        replaced = [
            f"{n:,} document{'s' if n > 1 else ''} of {part.file.path} hold{'s' if n == 1 else ''} "
            f"bytes that are not UTF-8; they were replaced"
            for part in damaged[:_NAMED]
            for n in [part.replaced]
        ]
        if rest := damaged[_NAMED:]:
            total = sum(part.replaced for part in rest)
            replaced.append(f"so do {total:,} documents of {len(rest):,} other files")
        return (*self._notes, *replaced)


def open_plain(
    name: str, files: Mapping[str, Path], wanted: Wanted, *, streaming: bool
) -> PlainText:
    """Open the files that a name stands for.

    Beside tables, texts are not read. Of several tables, those with the column are read.

    Args:
        name: the file, folder or pattern, for messages.
        files: paths by name, sorted.
        wanted: the column.
        streaming: read files from first to last, and copy none.

    Raises:
        DatasetError: no file can be read, or one is damaged.
        NoColumnError: no table has the column.
    """
    known = {key: found for key, path in files.items() if (found := plain_file(path))}
    tables = {key: found for key, found in known.items() if found.format != "text"}
    texts = {key: found for key, found in known.items() if key not in tables}
    parts: dict[str, IndexedPart | StreamedTable] = {}
    lacking: dict[str, NoColumnError] = {}
    for key, found in tables.items():
        try:
            parts[key] = _open_part(found, wanted, streaming=streaming)
        except NoColumnError as error:
            lacking[key] = error
    if not parts and wanted.kind == "text":
        parts = {key: TextFile(found) for key, found in texts.items()}
    if not parts and lacking:
        raise next(iter(lacking.values()))
    if not parts:
        raise DatasetError(
            f"{name} holds no {'table' if known else 'file of a known kind'}",
            expected=KNOWN,
            got=_some(list(files)) or "no file",
        )
    notes = [
        f"{_files(len(keys))} of {name} left unread, {why}: {_some(keys)}"
        for why, keys in {
            "of an unknown kind": [key for key in files if key not in known],
            "as texts beside tables": [key for key in texts if key not in parts],
            f"without column {wanted.name!r}": list(lacking),
        }.items()
        if keys
    ]
    splits = sorted({word for key in parts for word in _SPLIT.findall(key)})
    if len(splits) > 1:
        notes.append(
            f"all files of {name} are read: {' and '.join(splits)} in their names mean no splits; "
            "a pattern such as 'folder/train-*' reads some of them"
        )
    before = {key: known[key].path.suffix.lower() in {*_READ_BEFORE, ".txt"} for key in parts}
    same = not any(
        before[key] and (part.differs or (wanted.kind == "chat" and known[key].format in _JSON))
        for key, part in parts.items()
    )
    if len(files) > 1 or not Path(name).is_file():
        same = same and not notes and not is_pattern(name) and _were_one_split(known)
        if empty := [key for key, part in parts.items() if part.file.bytes == 0]:
            verb = "is" if len(empty) == 1 else "are"
            notes.append(f"{_files(len(empty))} of {name} {verb} empty: {_some(empty)}")
    return PlainText(parts, notes, same)


def _files(count: int) -> str:
    return f"{count:,} file{'s' if count > 1 else ''}"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED:,} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _were_one_split(files: Mapping[str, PlainFile]) -> bool:
    """Return whether `datasets` reads a folder of these files as one split, in the same order."""
    suffixes = {found.path.suffix.lower() for found in files.values()}
    named = any(_WORD_OF_SPLIT.search(key) for key in files)
    return len(suffixes) == 1 and suffixes <= _READ_BEFORE and not named


def _open_part(found: PlainFile, wanted: Wanted, *, streaming: bool) -> IndexedPart | StreamedTable:
    if found.format == "json lines" and _can_be_indexed(found):
        return IndexedLines(found.path, wanted.columns)
    file = WatchedFile(found.path, held=False)

    def rows() -> Generator[Row]:
        return _rows(found, wanted.columns)

    try:
        if streaming:
            table = StreamedTable(file, rows)
            if found.format == "csv" and not found.compression:
                table.differs = any(row.differs for row in rows())
            return table
        name = [found.format, found.compression, wanted.name, *wanted.others, wanted.kind]
        return Extract(file, name, rows, wanted.check)
    except (DatasetError, NoColumnError):
        file.check()
        raise


def _can_be_indexed(found: PlainFile) -> bool:
    with found.path.open("rb") as file:
        head = file.read(_HEAD)
    encoding, size = encoding_of(head)
    if encoding != "utf-8" or found.compression or compression_of(head):
        return False
    return not _is_array(head[size:])


def _is_array(head: bytes) -> bool:
    return head.lstrip().startswith(b"[")


def columns_in(files: Iterable[Path], names: frozenset[str]) -> tuple[str, ...]:
    """Return those of the named columns that tables have, CSV and TSV left out, sorted."""
    present: set[str] = set()
    for path in files:
        found = plain_file(path)
        if found is None or found.format in ("csv", "tsv", "text"):
            continue
        present |= {name for name in names - present if _has_column(found, name)}
    return tuple(sorted(present))


def _has_column(found: PlainFile, name: str) -> bool:
    if found.format != "parquet":
        key, tail = json.dumps(name).encode(), b""
        for piece in utf8_pieces(found.path, found.compression):
            if key in tail + piece:
                break
            tail = piece[-len(key) :]
        else:
            return False
    try:
        with closing(_rows(found, name)) as rows:
            return next(rows, None) is not None
    except NoColumnError:
        return False


def _rows(found: PlainFile, column: Columns) -> Generator[Row]:
    if found.format == "parquet":
        return parquet_rows(found.path, found.compression, column)
    pieces = utf8_pieces(found.path, found.compression)
    if found.format in ("csv", "tsv"):
        name = column if isinstance(column, str) else column[0]
        return csv_rows(pieces, name, found.path, "," if found.format == "csv" else "\t")
    first = next(pieces, b"")
    pieces = itertools.chain([first], pieces)
    if found.format == "json" or _is_array(first):
        return json_objects(pieces, column, found.path)
    return json_lines(pieces, column, found.path)
