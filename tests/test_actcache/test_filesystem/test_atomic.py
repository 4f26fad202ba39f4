from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from actcache.errors import DiskFullError
from actcache.filesystem import atomic
from actcache.filesystem.atomic import digest_file, open_log, remove_partials, write_atomic
from actcache.filesystem.rooted import (
    rooted,
)

CALLS = ("posix_fallocate", "pwrite", "fsync", "replace")


class Crash(BaseException):
    """Simulates a killed process: no handler catches it."""


def test_a_written_file_holds_the_parts_and_the_digest_is_its_own(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file"
    numbers = np.arange(6, dtype="<i4").reshape(2, 3)
    receipt = write_atomic(path, [b"head", b"", numbers.data])
    data = b"head" + numbers.tobytes()
    assert path.read_bytes() == data
    assert receipt.bytes == len(data)
    assert receipt.xxh3_128 == xxhash.xxh3_128(data).hexdigest()
    assert digest_file(path) == receipt


def test_parts_larger_than_a_chunk_are_written_completely(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic, "_CHUNK", 7)
    data = bytes(range(50))
    receipt = write_atomic(tmp_path / "x", [data, data[:3]])
    assert (tmp_path / "x").read_bytes() == data + data[:3]
    assert digest_file(tmp_path / "x") == receipt


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:3], offset))
    write_atomic(tmp_path / "x", [b"0123456789", b"abcd"])
    assert (tmp_path / "x").read_bytes() == b"0123456789abcd"


def test_an_empty_file_can_be_published(tmp_path: Path) -> None:
    assert write_atomic(tmp_path / "x", []).bytes == 0
    assert (tmp_path / "x").read_bytes() == b""


def test_data_is_synced_before_the_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in CALLS:
        real = getattr(os, name)

        def record(*args: Any, name: str = name, real: Any = real, **named: Any) -> Any:
            is_folder = name == "fsync" and os.path.isdir(f"/proc/self/fd/{args[0]}")  # noqa: PTH112
            calls.append(f"{name} folder" if is_folder else name)
            return real(*args, **named)

        monkeypatch.setattr(os, name, record)
    write_atomic(tmp_path / "x", [b"data"])
    assert calls == ["posix_fallocate", "pwrite", "fsync", "replace", "fsync folder"]


@pytest.mark.parametrize("root", [Path, rooted])
def test_a_new_folder_is_synced_too(
    root: Callable[[Path], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: set[Path] = set()
    monkeypatch.setattr(os, "fsync", lambda fd: synced.add(Path(f"/proc/self/fd/{fd}").resolve()))
    write_atomic(root(tmp_path) / "a" / "b" / "x", [b"1"])
    folders = {path for path in synced if path.is_dir()}
    assert folders == {tmp_path, tmp_path / "a", tmp_path / "a" / "b"}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_raises_disk_full_error_and_leaves_no_file(
    call: str, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def fail(*_: Any, **named: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(DiskFullError, match=r"(?s)no room to write .*x\n.*4 bytes free.*remedy"):
        write_atomic(path, [b"data"])
    assert os.listdir(tmp_path) == ["x"]  # noqa: PTH208
    assert path.read_bytes() == b"old"


def test_another_disk_error_propagates_and_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(OSError, match="broken"):
        write_atomic(tmp_path / "x", [b"data"])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("call", CALLS[:3])
def test_a_killed_writer_leaves_the_old_file_and_a_partial_one(
    call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "sub" / "x"
    write_atomic(path, [b"old"])

    def crash(*_: Any, **named: Any) -> None:
        raise Crash

    with monkeypatch.context() as patched:
        patched.setattr(os, call, crash)
        with pytest.raises(Crash):
            write_atomic(path, [b"new"])
    assert path.read_bytes() == b"old"
    assert remove_partials(tmp_path) == 1
    assert list(tmp_path.rglob("*")) == [tmp_path / "sub", path]


def test_remove_partials_deletes_partial_files_only(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("")
    root = tmp_path / "cache"
    root.mkdir()
    for name in ("x.partial-1", ".x", ".x.safetensors", "x"):
        (root / name).write_text("")
    (root / ".x.partial-2").symlink_to(outside)
    (root / ".x.partial-3").mkdir()
    assert remove_partials(root) == 0
    (root / ".x.partial-1").write_text("")
    assert remove_partials(root) == 1
    assert outside.exists()


def test_hidden_folders_are_not_searched_for_partial_files(tmp_path: Path) -> None:
    foreign = tmp_path / ".ipynb_checkpoints" / ".notes.partial-1"
    foreign.parent.mkdir()
    foreign.write_text("")
    assert remove_partials(tmp_path) == 0
    assert foreign.exists()


def test_partial_names_cannot_be_foreseen(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: set[str] = set()

    def fail(source: str, *_: Any, **named: Any) -> None:
        names.add(source)
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "replace", fail)
    for _ in range(10):
        with pytest.raises(OSError, match="broken"):
            write_atomic(root / "x", [b"1"])
    assert len(names) == 10
    assert all(re.fullmatch(r"\.x\.partial-[0-9a-f]{16}", name) for name in names)


def test_a_taken_partial_name_is_not_opened(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda _: "0")
    (root / ".x.partial-0").symlink_to(tmp_path / "outside" / "b")
    with pytest.raises(FileExistsError):
        write_atomic(root / "x", [b"1"])
    assert (root / ".x.partial-0").is_symlink()
    assert (tmp_path / "outside" / "b").read_bytes() == b"precious"


def test_a_log_with_several_names_is_copied_before_it_grows(root: Path, tmp_path: Path) -> None:
    os.link(tmp_path / "outside" / "b", root / "log")
    with open_log(root / "log") as file:
        file.write(b" line")
    assert (root / "log").read_bytes() == b"precious line"
    assert (tmp_path / "outside" / "b").read_bytes() == b"precious"


def test_partial_files_behind_a_root_that_is_a_link_are_deleted(root: Path) -> None:
    (root / "a" / ".b.partial-1").write_text("")
    assert remove_partials(Path(root)) == 1
    assert [path.name for path in (root / "a").iterdir()] == ["b"]
