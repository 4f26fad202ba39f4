"""The lock admits one harvest at a time in a folder."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actcache.errors import ActcacheError, CacheBusyError, FileSystemError
from actcache.filesystem.lock import LOCK, DirectoryLock, is_unlocked
from actcache.harvester.run import harvest


def test_a_second_harvest_is_refused_and_the_holder_named(tmp_path: Path) -> None:
    first, second = DirectoryLock(tmp_path), DirectoryLock(tmp_path)
    first.acquire()
    with pytest.raises(CacheBusyError) as caught:
        second.acquire()
    assert f"process {os.getpid()} on " in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_the_lock_is_free_once_every_rank_has_released_it(tmp_path: Path) -> None:
    zero, one, other = DirectoryLock(tmp_path), DirectoryLock(tmp_path), DirectoryLock(tmp_path)
    zero.acquire()
    one.acquire_shared()
    zero.release()
    with pytest.raises(CacheBusyError):
        other.acquire()
    one.release()
    other.acquire()


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, sys; from actcache.filesystem.lock import DirectoryLock; "
        "DirectoryLock(pathlib.Path(sys.argv[1])).acquire(); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -9
    assert (tmp_path / LOCK).exists()
    DirectoryLock(tmp_path).acquire()


def test_is_unlocked_does_not_take_the_lock(tmp_path: Path) -> None:
    assert is_unlocked(tmp_path)
    lock = DirectoryLock(tmp_path)
    lock.acquire()
    assert not is_unlocked(tmp_path)
    lock.release()
    assert is_unlocked(tmp_path)
    DirectoryLock(tmp_path).acquire()


def test_is_unlocked_does_not_make_acquire_fail(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock, looker = DirectoryLock(tmp_path), DirectoryLock(tmp_path)
    looker.acquire()
    monkeypatch.setattr("actcache.filesystem.lock.time.sleep", lambda _: looker.release())
    lock.acquire()
    assert not is_unlocked(tmp_path)


def test_releasing_a_lock_that_is_not_held_does_nothing(tmp_path: Path) -> None:
    DirectoryLock(tmp_path).release()


def test_a_harvest_does_not_change_a_locked_folder(
    options: Callable[..., Any], tree: Callable[[Path], dict[str, str]], tmp_path: Path
) -> None:
    config = options(out=str(tmp_path / "cache"))
    holder = DirectoryLock(tmp_path / "cache")
    holder.acquire()
    with pytest.raises(CacheBusyError):
        harvest(config)
    assert tree(tmp_path / "cache") == {}
    holder.release()
    assert harvest(config).complete


def test_a_finished_harvest_releases_its_lock(options: Callable[..., Any], tmp_path: Path) -> None:
    config = options(out=str(tmp_path / "cache"))
    harvest(config)
    DirectoryLock(tmp_path / "cache").acquire()


def test_a_lock_file_with_several_names_keeps_its_content(root: Path, tmp_path: Path) -> None:
    (root / "logs").mkdir()
    os.link(tmp_path / "outside" / "b", root / LOCK)
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
