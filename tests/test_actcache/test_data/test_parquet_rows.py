"""Rows of Parquet files."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actcache.data.parquet_rows import parquet_rows
from actcache.data.table_rows import NoColumnError
from actcache.errors import DatasetError, DiskFullError

TEXTS = ["one", "", None, "naïve 🦊", *(f"text {n}" for n in range(1000))]


def invalid(values: list[bytes]) -> Any:
    """Return an array of strings whose bytes nobody has checked."""
    array = pa.array(values, pa.binary())
    return pa.StringArray.from_buffers(len(array), array.buffers()[1], array.buffers()[2])


def values(path: Path, column: str = "text", compression: str = "") -> list[object]:
    return [row.value for row in parquet_rows(path, compression, column)]


@pytest.mark.parametrize(
    "kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())]
)
def test_texts_of_any_type_are_read_over_row_groups(kind: Any, tmp_path: Path) -> None:
    table = pa.table({"n": range(len(TEXTS)), "text": pa.array(TEXTS).cast(kind)})
    pq.write_table(table, tmp_path / "a", row_group_size=100)
    assert values(tmp_path / "a") == TEXTS


def test_a_file_that_is_compressed_as_a_whole_is_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a")
    (tmp_path / "a.gz").write_bytes(gzip.compress((tmp_path / "a").read_bytes()))
    assert values(tmp_path / "a.gz", compression=".gz") == TEXTS


def test_too_little_room_to_decompress_a_file_is_reported_with_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(pa.table({"text": TEXTS}), tmp_path / "a")
    (tmp_path / "a.gz").write_bytes(gzip.compress((tmp_path / "a").read_bytes()))
    full = Path("/dev/full").open("wb", buffering=0)  # noqa: SIM115 (closed by the reader)
    monkeypatch.setattr("tempfile.TemporaryFile", lambda: full)
    with pytest.raises(DiskFullError, match=r"(?s)a\.gz to .*TMPDIR"):
        values(tmp_path / "a.gz", compression=".gz")
    assert full.closed


def test_a_nested_column_is_named_by_its_path_and_a_name_with_dots_comes_first(
    tmp_path: Path,
) -> None:
    nested = pa.array([{"text": "a", "n": 1}, {"text": None, "n": 2}, None])
    pq.write_table(pa.table({"doc": nested}), tmp_path / "a")
    assert values(tmp_path / "a", "doc.text") == ["a", None, None]
    pq.write_table(pa.table({"doc": nested, "doc.text": ["x", "y", "z"]}), tmp_path / "b")
    assert values(tmp_path / "b", "doc.text") == ["x", "y", "z"]


@pytest.mark.parametrize("column", ["body", "doc.body", "doc.text.more", "n.text"])
def test_a_missing_column_is_refused_with_the_existing_ones(column: str, tmp_path: Path) -> None:
    pq.write_table(pa.table({"doc": [{"text": "a"}], "n": [1]}), tmp_path / "a")
    with pytest.raises(NoColumnError) as error:
        values(tmp_path / "a", column)
    assert error.value.names == ("doc", "n")


def test_what_is_no_text_is_replaced_and_counted(tmp_path: Path) -> None:
    texts = invalid([b"fine", b"caf\xe9", b"cut \xe2\x82 here", "naïve".encode()])
    pq.write_table(pa.table({"text": texts}), tmp_path / "a")
    assert [(row.value, row.replaced) for row in parquet_rows(tmp_path / "a", "", "text")] == [
        ("fine", False),
        ("caf\ufffd", True),
        ("cut \ufffd here", True),
        ("naïve", False),
    ]


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, ["text"] * 2), tmp_path / "a")
    with pytest.raises(DatasetError, match="has 2 columns 'text'"):
        values(tmp_path / "a")


def test_what_is_no_text_is_replaced_within_messages(tmp_path: Path) -> None:
    message = pa.StructArray.from_arrays([invalid([b"user", b"caf\xe9"])], ["role"])
    chat = pa.ListArray.from_arrays([0, 1, 2], message)
    pq.write_table(pa.table({"chat": chat}), tmp_path / "a")
    found = [(row.value, row.replaced) for row in parquet_rows(tmp_path / "a", "", "chat")]
    assert found == [([{"role": "user"}], False), ([{"role": "caf\ufffd"}], True)]


@pytest.mark.parametrize("damage", ["cut", "flipped", "no footer"])
def test_a_damaged_file_is_refused_with_its_path(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": TEXTS}), path)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        data = data[: len(data) // 2]
    elif damage == "flipped":
        data[8:200] = bytes(192)
    else:
        data = bytearray(b"PAR1 is how it begins")
    path.write_bytes(data)
    with pytest.raises(DatasetError, match=r"(?s)a\.parquet cannot be read beyond row 0.*remedy"):
        values(path)
