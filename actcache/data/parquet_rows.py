"""Rows of Parquet files: one column of one row group after another, by pyarrow."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Generator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import IO, Any

from actcache.data.plain_bytes import decoded, raw_pieces
from actcache.data.table_rows import Columns, NoColumnError, Row, joined, without_nulls
from actcache.errors import DatasetError, DiskFullError, shortage_of

_AT_ONCE = 256  # rows converted at once


def parquet_rows(path: Path, compression: str, column: Columns) -> Generator[Row]:
    """Yield the rows of a file. It is read, not mapped: a file that is cut raises an error.

    Args:
        path: the file.
        compression: suffix of the compression around it; it is decompressed to a temporary file.
        column: the column, or a field of a nested one by its path with dots; or several.

    Raises:
        DatasetError: the file is damaged.
        DiskFullError: there is no room to decompress it.
        NoColumnError: the file lacks the column.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    first, *others = (column,) if isinstance(column, str) else column
    number = 0
    with ExitStack() as stack:
        if compression:
            file = stack.enter_context(_decompressed(path, compression))
            source = pa.PythonFile(file, mode="r")
        else:
            source = stack.enter_context(pa.OSFile(os.fspath(path)))
        try:
            table = pq.ParquetFile(source)
            keys = _keys(table.schema_arrow, first)
            if keys is None:
                raise NoColumnError(table.schema_arrow.names)
            if (same := table.schema_arrow.names.count(keys[0])) > 1:
                raise DatasetError(f"{path} has {same} columns {keys[0]!r}")
            others = [name for name in others if name in table.schema_arrow.names]
            for batch in table.iter_batches(_AT_ONCE, columns=[first, *others]):
                array = batch.column(keys[0])
                for key in keys[1:]:
                    array = pc.struct_field(array, key)
                values = _values(array)
                if not isinstance(column, str):
                    rows = zip(
                        values, *(_values(batch.column(name)) for name in others), strict=True
                    )
                    values = [_joined((first, *others), row) for row in rows]
                for value, replaced in values:
                    number += 1
                    yield Row(value, number, replaced)
        except (pa.ArrowException, OSError) as error:
            if (shortage := shortage_of(error)) is not None:
                raise shortage from None
            raise DatasetError(
                f"{path} cannot be read beyond row {number}",
                expected="a whole Parquet file",
                got=str(error),
                remedy="it is cut or damaged: copy or download it again",
            ) from error


def _decompressed(path: Path, compression: str) -> IO[bytes]:
    """Decompress a file to a temporary one, which has no name; raises `DiskFullError`."""
    file = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    try:
        file.writelines(raw_pieces(path, compression))
        file.seek(0)
    except OSError as error:
        with suppress(OSError):
            file.close()
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DiskFullError(
            f"no room to decompress {path} to {tempfile.gettempdir()}",
            got=os.strerror(error.errno),
            remedy="free space, or name a folder on another disk with TMPDIR",
        ) from error
    return file


def _keys(schema: Any, column: str) -> list[str] | None:
    """Return the column and the fields within it that lead to what is asked; None: not there."""
    if column in schema.names:
        return [column]
    first, *others = column.split(".")
    if first not in schema.names or not others:
        return None
    kind = schema.field(first).type
    for key in others:
        fields = {field.name: field.type for field in kind} if _is_struct(kind) else {}
        if key not in fields:
            return None
        kind = fields[key]
    return [first, *others]


def _is_struct(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_struct(kind))


def _values(array: Any) -> list[tuple[object, bool]]:
    """Return values as Python objects without null keys, and whether bytes were no UTF-8."""
    import pyarrow as pa

    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    try:
        values = array.to_pylist()
    except UnicodeDecodeError:
        values = array.cast(_as_bytes(array.type)).to_pylist()
        return [_texts(without_nulls(value)) for value in values]
    kind = array.type
    while pa.types.is_list(kind) or pa.types.is_large_list(kind):
        kind = kind.value_type
    if _is_struct(kind):
        values = without_nulls(values)
    return [(value, False) for value in values]


def _joined(names: tuple[str, ...], found: Sequence[tuple[object, bool]]) -> tuple[object, bool]:
    values = [value for value, _ in found]
    return joined(names, values), any(replaced for _, replaced in found)


def _as_bytes(kind: Any) -> Any:
    """Return an Arrow type with binary values in place of texts, at any depth."""
    import pyarrow as pa

    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return pa.large_binary()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return pa.large_list(_as_bytes(kind.value_type))
    if pa.types.is_struct(kind):
        return pa.struct([(field.name, _as_bytes(field.type)) for field in kind])
    return kind


def _texts(value: Any) -> tuple[Any, bool]:
    if isinstance(value, bytes):
        return decoded(value)
    if isinstance(value, list):
        pairs = [_texts(item) for item in value]
        return [item for item, _ in pairs], any(found for _, found in pairs)
    if isinstance(value, dict):
        items = {key: _texts(item) for key, item in value.items()}
        return {key: item for key, (item, _) in items.items()}, any(f for _, f in items.values())
    return value, False
