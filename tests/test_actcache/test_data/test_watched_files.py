"""Source texts that change while rows are made of them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from actcache.config import HarvestConfig
from actcache.data.datasets import DocumentStream, IndexedDocuments, TokenFile, open_dataset
from actcache.data.sequences import DocumentOrder, SequencePipeline, iter_sequences
from actcache.data.watched_files import WatchedFile
from actcache.errors import DatasetError

CHANGED = "has changed since this command opened it"


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    path = tmp_path / "text.bin"
    np.arange(1 << 18, dtype="<u2").tofile(path)
    return path


def opened(path: Path, **options: Any) -> Any:
    return open_dataset(HarvestConfig("model", str(path), "out", **options))


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(b"other")


def overwrite_and_restore_the_time(path: Path) -> None:
    before = path.stat()
    overwrite(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def truncate(path: Path) -> None:
    os.truncate(path, 4096)


def append(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more text")


CHANGES = pytest.mark.parametrize(
    "change", [overwrite, overwrite_and_restore_the_time, truncate, append]
)


@CHANGES
def test_a_bin_file_that_changes_ends_the_reading_of_it(
    change: Callable[[Path], None], ids: Path
) -> None:
    source = opened(ids)
    assert isinstance(source, TokenFile)
    order = DocumentOrder(0, True, 100)
    pipeline = SequencePipeline("pack", 64, None, None, None, order, 1 << 16)
    sequences = iter_sequences(source, None, pipeline)
    first = next(sequences)
    np.testing.assert_array_equal(first.tokens, np.arange(64))
    change(ids)
    with pytest.raises(DatasetError, match=CHANGED):
        list(sequences)


def test_a_bin_file_that_is_replaced_under_its_name_is_read_on_as_it_was(ids: Path) -> None:
    source = opened(ids)
    other = ids.with_name("other.bin")
    other.write_bytes(bytes(64))
    other.replace(ids)
    np.testing.assert_array_equal(source.read(100_000, 5), np.arange(100_000, 100_005) % 65536)


def test_a_file_that_is_only_touched_is_read_on(ids: Path) -> None:
    source = opened(ids)
    ids.touch()
    assert len(source.read(0, 10)) == 10


@CHANGES
def test_a_streamed_table_that_changes_ends_the_stream(
    change: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {n}"}) + "\n" for n in range(5000)))
    source = opened(path, streaming=True, max_tokens=2048)
    assert isinstance(source, DocumentStream)
    documents = source.walk()
    next(documents)
    change(path)
    with pytest.raises(DatasetError, match=CHANGED):
        list(documents)


@pytest.mark.parametrize("change", [overwrite, truncate, append])
def test_a_saved_dataset_whose_files_change_is_not_read_on(
    change: Callable[[Path], None], tmp_path: Path
) -> None:
    datasets.Dataset.from_dict({"text": ["some text"] * 1000}).save_to_disk(tmp_path / "saved")
    source = opened(tmp_path / "saved")
    assert isinstance(source, IndexedDocuments)
    assert source.batch([999]) == ["some text"]
    (arrow,) = (tmp_path / "saved").glob("*.arrow")
    change(arrow)
    with pytest.raises(DatasetError, match=CHANGED):
        source.batch([0])


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_table_that_changes_while_it_is_opened_is_refused(
    suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tmp_path / f"a.{suffix}", WatchedFile.__init__
    first, other = ["text\nfirst\n", "text\nother\n"]
    if suffix == "jsonl":
        first, other = ['{"text": "first"}\n', '{"text": "other"}\n']
    path.write_text(first)

    def change_after(*arguments: Any, **options: Any) -> None:
        real(*arguments, **options)
        path.write_text(other)

    with monkeypatch.context() as patch:
        patch.setattr(WatchedFile, "__init__", change_after)
        with pytest.raises(DatasetError, match=CHANGED):
            opened(path).batch([0])
    path.write_text(first)
    assert opened(path).batch([0]) == ["first"]


def test_a_text_file_is_digested_in_the_bytes_that_are_used(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\rthree\n")
    assert opened(path).batch([0]) == ["one\ntwo\nthree\n"]
