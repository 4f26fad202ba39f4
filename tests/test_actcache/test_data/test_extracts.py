"""Copies of one column."""

from __future__ import annotations

import errno
import multiprocessing
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actcache.data import extracts
from actcache.data.extracts import Extract, extracts_folder
from actcache.data.table_rows import Row
from actcache.data.watched_files import WatchedFile
from actcache.errors import DatasetError, DiskFullError, FileSystemError

VALUES = ["one", "", None, "naïve 🦊\n", *(f"text {n}" for n in range(2000))]
TEXTS = ["" if value is None else value for value in VALUES]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return extracts_folder()


@pytest.fixture
def source(tmp_path: Path) -> WatchedFile:
    (tmp_path / "a").write_text("the file itself")
    return WatchedFile(tmp_path / "a", held=False)


def rows() -> Iterator[Row]:
    for number, value in enumerate(VALUES):
        yield Row(value, number + 1, replaced=number % 1000 == 7)


def broken() -> Iterator[Row]:
    yield Row("one", 1)
    raise DatasetError("line 2 is broken")


def never() -> Iterator[Row]:
    raise AssertionError("made again")
    yield


def check(value: object, index: int, place: Callable[[int], str]) -> object:
    if isinstance(value, int):
        raise DatasetError(f"int in {place(index)}")
    return "" if value is None else value


def extract(source: WatchedFile, rows: Callable[[], Iterator[Row]], kind: str = "text") -> Extract:
    return Extract(source, ["csv", "", "text", kind], rows, check)


def test_documents_are_read_in_any_order_and_the_copy_is_made_once(
    source: WatchedFile, folder: Path
) -> None:
    for made in (rows, never):
        found = extract(source, made)
        assert (found.count, found.replaced, found.differs) == (2004, 2, False)
        assert found.bytes == len("".join(TEXTS).encode())
        assert found.fetch(range(2004)) == TEXTS
        assert found.fetch([1, 3, 2003]) == [TEXTS[1], TEXTS[3], TEXTS[2003]]
    assert len(list(folder.glob("*.column"))) == 1
    assert folder.stat().st_mode & 0o777 == 0o700


def test_another_file_column_or_kind_has_its_own_copy(source: WatchedFile, tmp_path: Path) -> None:
    extract(source, rows)
    other = Extract(source, ["csv", "", "body", "text"], lambda: iter([Row("body", 1)]), check)
    assert other.fetch([0]) == ["body"]
    (tmp_path / "a").write_text("another file")
    changed = WatchedFile(tmp_path / "a", held=False)
    assert extract(changed, lambda: iter([Row("changed", 1)])).fetch([0]) == ["changed"]


def test_lists_are_kept_as_they_are(source: WatchedFile) -> None:
    values = [[1, 2, 3], [], [{"role": "user", "content": "naïve", "n": None}]]
    found = extract(source, lambda: (Row(value, 1) for value in values), "chat")
    assert found.fetch([0, 1, 2]) == values


@pytest.mark.parametrize("damage", ["cut", "empty", "longer", "other numbers"])
def test_a_damaged_copy_is_made_again(damage: str, source: WatchedFile, folder: Path) -> None:
    extract(source, rows)
    (copy,) = folder.glob("*.column")
    data = copy.read_bytes()
    copy.write_bytes(
        {
            "cut": data[:-100],
            "empty": b"",
            "longer": data + b"more",
            "other numbers": data.replace(b'"count": 2004', b'"count": 2003'),
        }[damage]
    )
    assert extract(source, rows).fetch(range(2004)) == TEXTS


def test_nothing_is_kept_of_a_file_that_is_broken_or_changes(
    source: WatchedFile, folder: Path, tmp_path: Path
) -> None:
    def changing() -> Iterator[Row]:
        yield from rows()
        (tmp_path / "a").write_text("another text")

    for made, message in ((broken, "line 2 is broken"), (changing, "has changed")):
        with pytest.raises(DatasetError, match=message):
            extract(source, made)
    with pytest.raises(DatasetError, match=r"int in .*, line 5"):
        extract(source, lambda: iter([Row(3, 5)]))
    assert [path.suffix for path in folder.iterdir()] == [".lock"]


def test_a_file_that_changes_later_is_not_read_on(source: WatchedFile, tmp_path: Path) -> None:
    found = extract(source, rows)
    (tmp_path / "a").write_text("another text")
    with pytest.raises(DatasetError, match="has changed"):
        found.fetch([0])


def test_a_copy_that_is_deleted_meanwhile_is_reported(source: WatchedFile, folder: Path) -> None:
    found = extract(source, rows)
    shutil.rmtree(folder)
    with pytest.raises(DatasetError, match=r"(?s)is gone.*same command again"):
        found.fetch([0])


def test_what_a_killed_process_left_is_removed(source: WatchedFile, folder: Path) -> None:
    extract(source, rows)
    (copy,) = folder.glob("*.column")
    left = folder / f".{copy.stem}.0123"
    copy.rename(left)
    extract(source, rows)
    assert not left.exists()


def test_too_little_room_is_reported_with_the_folder(
    source: WatchedFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extracts.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(9, 9, 0))
    with pytest.raises(DiskFullError, match=r"(?s)actcache-columns.*HF_DATASETS_CACHE"):
        extract(source, rows)


def test_a_disk_that_fills_up_is_reported_with_the_folder(
    source: WatchedFile, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(extracts, "_write", full)
    with pytest.raises(DiskFullError, match=r"(?s)actcache-columns.*HF_DATASETS_CACHE"):
        extract(source, rows)
    assert not list(folder.glob(".*"))


def test_a_folder_that_cannot_be_written_is_reported(
    source: WatchedFile, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "file"))
    with pytest.raises(FileSystemError, match=r"(?s)cannot be written.*HF_DATASETS_CACHE"):
        extract(source, rows)


def _in_a_process(path: Path, counter: Any, results: Any) -> None:
    def counted() -> Iterator[Row]:
        with counter.get_lock():
            counter.value += 1
        yield from rows()

    found = extract(WatchedFile(path, held=False), counted)
    results.put(found.fetch(range(found.count)) == TEXTS)


def test_processes_that_need_a_copy_at_once_make_one(source: WatchedFile) -> None:
    context = multiprocessing.get_context("fork")
    counter, results = context.Value("i", 0), context.Queue()
    arguments = (source.path, counter, results)
    processes = [context.Process(target=_in_a_process, args=arguments) for _ in range(4)]
    for process in processes:
        process.start()
    assert [results.get(timeout=60) for _ in processes] == [True] * 4
    for process in processes:
        process.join()
    assert counter.value == 1


def test_starts_are_stored_in_little_endian_order(source: WatchedFile, folder: Path) -> None:
    extract(source, rows)
    (copy,) = folder.glob("*.column")
    data = copy.read_bytes()
    end = len("".join(TEXTS).encode())
    starts = np.frombuffer(data[end : end + 8 * 2005], "<u8")
    assert starts[:4].tolist() == [0, 3, 3, 3]
    assert starts[-1] == end
