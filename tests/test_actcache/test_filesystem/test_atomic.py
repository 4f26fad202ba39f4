from __future__ import annotations

import errno
import fcntl
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xxhash

from actcache.errors import ActcacheError, DiskFullError, FileSystemError, FormatError
from actcache.filesystem import atomic
from actcache.filesystem.atomic import (
    DirectoryLock,
    digest_file,
    is_unlocked,
    open_file,
    open_log,
    open_to_read,
    remove_partials,
    remove_tree,
    remove_trees,
    require_plain,
    rooted,
    walk,
    write_atomic,
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


# Files below a root.


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder with the file a/b, behind a link, beside the file victim."""
    (tmp_path / "real" / "a").mkdir(parents=True)
    (tmp_path / "real" / "a" / "b").write_bytes(b"inside")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "b").write_bytes(b"precious")
    (tmp_path / "root").symlink_to("real")
    return rooted(tmp_path / "root")


def test_paths_keep_their_root_through_pathlib_and_pickle(root: Path) -> None:
    path = root / "a" / "b"
    same = (root.joinpath("a", "b"), path.with_name("b"), pickle.loads(pickle.dumps(path)))
    for each in (*same, path.parent / "b", next((root / "a").iterdir())):
        assert each == path
        assert type(each) is type(rooted(each)) is type(root)
    assert path == Path(path)
    assert hash(path) == hash(Path(path))


def test_the_root_itself_may_be_a_link(root: Path) -> None:
    path = root / "a" / "b"
    assert path.read_bytes() == b"inside"
    assert path.read_text() == "inside"
    assert write_atomic(root / "a" / "c" / "d", [b"new"]) == digest_file(root / "a" / "c" / "d")
    assert sorted(each.name for each in (root / "a").iterdir()) == ["b", "c"]
    (root / "a" / "c" / "d").unlink()
    (root / "a" / "c").rmdir()
    assert [each.name for each in root.iterdir()] == ["a"]


def made_link(path: Path, outside: Path) -> None:
    path.symlink_to(outside)


def made_pipe(path: Path, _: Path) -> None:
    os.mkfifo(path)


OPERATIONS: dict[str, Callable[[Path], object]] = {
    "read": lambda path: path.read_bytes(),
    "digest": digest_file,
    "publish": lambda path: write_atomic(path, [b"x"]),
    "log": open_log,
    "delete": lambda path: path.unlink(),
    "delete if there": lambda path: path.unlink(missing_ok=True),
    "rows": open_to_read,
    "descriptor": lambda path: open_file(path, os.O_RDWR | os.O_CREAT),
    "write": lambda path: path.write_bytes(b"x"),
    "lock": lambda path: DirectoryLock(
        path.parents[1], path.relative_to(path.parents[1])
    ).acquire(),
}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_operation_follows_a_link_in_place_of_a_folder(
    operation: str, root: Path, tmp_path: Path
) -> None:
    (root / "linked").symlink_to(tmp_path / "outside")
    with pytest.raises(FormatError, match=r"(?s)linked is a symbolic link.*remedy.*mount --bind"):
        OPERATIONS[operation](root / "linked" / "b")
    assert (tmp_path / "outside" / "b").read_bytes() == b"precious"
    assert os.listdir(tmp_path / "outside") == ["b"]  # noqa: PTH208


@pytest.mark.parametrize("make", [made_link, made_pipe])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_operation_touches_a_link_or_pipe_in_place_of_a_file(
    operation: str, make: Callable[[Path, Path], None], root: Path, tmp_path: Path
) -> None:
    path = root / "a" / "special"
    make(path, tmp_path / "outside" / "b")
    before = path.lstat()
    with pytest.raises(FormatError, match=r"special is a (symbolic link|pipe)"):
        OPERATIONS[operation](path)
    assert path.lstat() == before
    assert (tmp_path / "outside" / "b").read_bytes() == b"precious"
    assert sorted(os.listdir(root / "a")) == ["b", "special"]  # noqa: PTH208


def test_a_folder_that_is_exchanged_is_opened_anew(root: Path, tmp_path: Path) -> None:
    def read(path: Path) -> bytes:
        with os.fdopen(open_to_read(path), "rb") as file:
            return file.read()

    folder, path = Path(root) / "a", root / "a" / "b"
    assert read(path) == read(Path(path)) == read(path) == b"inside"
    folder.rename(tmp_path / "moved")
    with pytest.raises(FileNotFoundError):
        read(path)
    folder.symlink_to(tmp_path / "moved")
    with pytest.raises(FormatError, match="a is a symbolic link"):
        read(path)
    assert read(Path(path)) == b"inside"
    folder.unlink()
    folder.mkdir()
    (folder / "b").write_bytes(b"new")
    assert read(path) == b"new"


def test_a_folder_that_is_a_link_is_not_listed(root: Path, tmp_path: Path) -> None:
    (root / "linked").symlink_to(tmp_path / "outside")
    with pytest.raises(FormatError, match="linked is a symbolic link"):
        (root / "linked").iterdir()


def test_errors_of_the_system_name_the_whole_path(root: Path) -> None:
    for path in (root / "a" / "none", root / "none" / "b"):
        with pytest.raises(FileNotFoundError, match=re.escape(str(root))):
            path.read_bytes()
    with pytest.raises(NotADirectoryError, match="a/b"):
        (root / "a" / "b" / "c").read_bytes()


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


def test_require_plain_names_the_first_link_of_a_path(root: Path, tmp_path: Path) -> None:
    require_plain(root, ["a/b", "none", "none/at/all"], ["a"])
    (root / "linked").symlink_to(tmp_path / "outside")
    with pytest.raises(FormatError, match="linked is a symbolic link"):
        require_plain(root, ["a/b", "linked/b"])


def test_require_plain_refuses_a_folder_in_place_of_a_file_and_the_reverse(root: Path) -> None:
    for files, folders, words in (
        (["a"], [], r"a is a folder\n  expected: a file"),
        ([], ["a/b"], r"b is a file\n  expected: a folder"),
        (["a/b/c"], [], r"b is a file\n  expected: a folder"),
    ):
        with pytest.raises(FormatError, match=words):
            require_plain(root, files, folders)


def test_a_log_with_several_names_is_copied_before_it_grows(root: Path, tmp_path: Path) -> None:
    os.link(tmp_path / "outside" / "b", root / "log")
    with open_log(root / "log") as file:
        file.write(b" line")
    assert (root / "log").read_bytes() == b"precious line"
    assert (tmp_path / "outside" / "b").read_bytes() == b"precious"


def test_a_lock_file_with_several_names_keeps_its_content(root: Path, tmp_path: Path) -> None:
    (root / "logs").mkdir()
    os.link(tmp_path / "outside" / "b", root / atomic.LOCK)
    lock = DirectoryLock(root)
    lock.acquire()
    assert not is_unlocked(root)
    lock.release()
    assert (tmp_path / "outside" / "b").read_bytes() == b"precious"


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_named(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with pytest.raises(
        FileSystemError, match=r"(?s)has no locks.* at /.*remedy.*local disk"
    ) as got:
        DirectoryLock(tmp_path).acquire()
    assert str(tmp_path) in str(got.value)
    assert got.value.exit_code not in (0, ActcacheError.exit_code)
    assert not is_unlocked(tmp_path)


def test_partial_files_behind_a_root_that_is_a_link_are_deleted(root: Path) -> None:
    (root / "a" / ".b.partial-1").write_text("")
    assert remove_partials(Path(root)) == 1
    assert [path.name for path in (root / "a").iterdir()] == ["b"]


def test_walk_lists_links_and_does_not_follow_them(root: Path, tmp_path: Path) -> None:
    (root / "linked").symlink_to(tmp_path / "outside")
    (root / "a" / "link").symlink_to("b")
    (root / "a" / ".hidden").write_text("")
    found = {str(path.relative_to(root)): plain for path, plain in walk(root)}
    assert found == {"a/b": True, "a/.hidden": True, "a/link": False, "linked": False}


def test_temporary_folders_are_deleted_and_links_in_their_place_stay(
    root: Path, tmp_path: Path
) -> None:
    (root / ".restored-1" / "inner").mkdir(parents=True)
    (root / ".restored-1" / "inner" / "link").symlink_to(tmp_path / "outside")
    (root / ".restored-2").symlink_to(tmp_path / "outside")
    remove_trees(root, ".restored-")
    remove_tree(root / ".restored-none")
    assert sorted(path.name for path in root.iterdir()) == [".restored-2", "a"]
    assert (tmp_path / "outside" / "b").read_bytes() == b"precious"


@pytest.mark.parametrize("outside", ["../victim", "a/../../victim", "/etc/hostname"])
def test_a_rooted_path_that_leads_out_of_its_root_is_not_opened(
    tmp_path: Path, outside: str
) -> None:
    root = rooted(tmp_path / "root")
    (tmp_path / "root" / "a").mkdir(parents=True)
    (tmp_path / "victim").write_text("precious")
    path = root / outside
    for use in (path.read_bytes, path.unlink, lambda: write_atomic(path, [b"other"])):
        with pytest.raises(FormatError, match="leads out of its folder"):
            use()
    assert (tmp_path / "victim").read_text() == "precious"
