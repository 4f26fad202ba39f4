"""Files below a root are reached without following links."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from actcache.errors import FormatError
from actcache.filesystem.atomic import digest_file, open_log, write_atomic
from actcache.filesystem.lock import DirectoryLock
from actcache.filesystem.rooted import (
    open_file,
    open_to_read,
    remove_tree,
    remove_trees,
    require_plain,
    rooted,
    walk,
)


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
