"""The block cache never exceeds its capacity, with concurrent and with killed writers."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from actcache.errors import ConfigError
from actcache.filesystem import block_cache
from actcache.filesystem.block_cache import BlockCache, open_blocks

OVERHEAD = 16  # bytes of a block's digest

WRITER = """
import sys
from pathlib import Path
from actcache.filesystem import block_cache
from actcache.filesystem.block_cache import BlockCache
cache = BlockCache(Path(sys.argv[1]), int(sys.argv[2]))
print("begun", flush=True)
for i in range(int(sys.argv[4])):
    cache.put(f"{(i * 7) % 50:02x}{sys.argv[3]}-{i}", bytes([i % 256]) * 1000)
"""


def kept(folder: Path) -> int:
    """Bytes of all blocks and partial files at one instant."""
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return sum(path.stat().st_size for path in folder.glob("??/*"))


def writer(folder: Path, most: int, name: str, count: int) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", WRITER, str(folder), str(most), name, str(count)]
    process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()  # it has begun
    process.stdout.close()
    return process


def test_get_returns_the_bytes_that_were_put(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path / "a" / "b", 10_000)
    cache.put("aa-0", b"some bytes")
    assert cache.get("aa-0", 10) == b"some bytes"
    assert cache.get("aa-0", 9) is None  # of another size: no block of this file
    assert cache.get("aa-1", 10) is None
    cache.put("ab-0", b"x" * 10_001)
    assert not cache.holds("ab-0")


def test_the_least_recently_used_blocks_are_evicted_first(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 10 * (100 + OVERHEAD))
    for i in range(10):
        cache.put(f"aa-{i}", bytes(100))
    for i in range(10):
        os.utime(tmp_path / "aa" / f"aa-{i}", ns=(i, i))
    assert cache.get("aa-0", 100) is not None
    cache.put("aa-10", bytes(100))
    assert [i for i in range(11) if cache.holds(f"aa-{i}")] == [0, *range(2, 11)]
    assert kept(tmp_path) <= cache.most_bytes


def test_a_smaller_capacity_evicts_existing_blocks(tmp_path: Path) -> None:
    large = BlockCache(tmp_path, 100_000)
    for i in range(50):
        large.put(f"aa-{i}", bytes(1000))
    small = BlockCache(tmp_path, 5_000)
    small.put("aa-50", bytes(1000))
    assert small.holds("aa-50")
    assert kept(tmp_path) <= 5_000


def test_two_processes_never_exceed_the_capacity_together(tmp_path: Path) -> None:
    most = 20 * (1000 + OVERHEAD)
    processes = [writer(tmp_path, most, name, 600) for name in ("a", "b")]
    seen = []
    while any(process.poll() is None for process in processes):
        seen.append(kept(tmp_path))
    assert max(seen) <= most
    assert max(seen) > most // 2
    assert [process.wait() for process in processes] == [0, 0]


def test_killed_writers_leave_whole_blocks_within_the_capacity(tmp_path: Path) -> None:
    most = 20 * (1000 + OVERHEAD)
    for number in range(4):
        process = writer(tmp_path, most, f"k{number}", 100_000)
        time.sleep(0.02 + 0.02 * number)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert kept(tmp_path) <= most
    cache = BlockCache(tmp_path, most)
    blocks = [path for path in tmp_path.glob("??/*") if not path.name.startswith(".partial-")]
    assert blocks
    for path in blocks:
        assert cache.get(path.name, 1000) is not None
    for i in range(40):  # reservations of killed processes do not keep others out
        cache.put(f"zz-{i}", bytes(1000))
    assert cache.holds("zz-39")
    assert kept(tmp_path) <= most


def test_processes_of_different_capacities_share_a_folder_even_if_one_is_killed(
    tmp_path: Path,
) -> None:
    large, small = 60 * (1000 + OVERHEAD), 20 * (1000 + OVERHEAD)
    processes = [writer(tmp_path, most, name, 500) for most, name in ((large, "l"), (small, "s"))]
    dying = writer(tmp_path, small, "d", 100_000)
    reader, read = BlockCache(tmp_path, large), 0
    while any(process.poll() is None for process in processes):
        assert kept(tmp_path) <= large
        for path in tmp_path.glob("??/*"):  # another process evicts meanwhile
            number = path.name.rpartition("-")[2]
            if not path.name.startswith(".") and (data := reader.get(path.name, 1000)) is not None:
                assert data == bytes([int(number) % 256]) * 1000
                read += 1
        if read > 20:
            dying.send_signal(signal.SIGKILL)
    assert [process.wait() for process in processes] == [0, 0]
    dying.kill()
    assert dying.wait() == -signal.SIGKILL
    assert read > 20
    last = BlockCache(tmp_path, small)
    last.put("zz-0", bytes(1000))
    assert last.holds("zz-0")
    assert kept(tmp_path) <= small


def test_partial_files_of_killed_processes_are_deleted_later(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 5_000)
    cache.put("aa-0", bytes(1000))
    dead = tmp_path / "aa" / ".partial-aa-1-elsewhere-1-1"
    dead.write_bytes(bytes(3_900))
    cache = BlockCache(tmp_path, 5_000)
    cache.put("aa-2", bytes(4_000))  # no room beside it
    assert not cache.holds("aa-2")
    os.utime(dead, (1, 1))
    cache.put("aa-2", bytes(4_000))
    assert cache.holds("aa-2")
    assert not dead.exists()


def test_a_damaged_byte_count_is_computed_again(tmp_path: Path) -> None:
    cache = BlockCache(tmp_path, 5_000)
    cache.put("aa-0", bytes(1000))
    (tmp_path / "lock").write_bytes(b"-7 rubbish")
    for i in range(10):
        cache.put(f"aa-{i}", bytes(1000))
    assert kept(tmp_path) <= 5_000


def test_an_unwritable_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be cached"):
        BlockCache(tmp_path / "file" / "blocks", 10)
    BlockCache(tmp_path / "file" / "blocks", 0)  # nothing to keep, no folder


def test_the_environment_sets_folder_and_capacity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACTCACHE_BLOCK_CACHE_BYTES", "1234")
    chosen = open_blocks(None, None)
    assert chosen.most_bytes == 1234
    assert chosen.folder == tmp_path / "blocks"  # of this folder's fixture
    assert open_blocks(str(tmp_path / "other"), 99).most_bytes == 99
    monkeypatch.setenv("ACTCACHE_BLOCK_CACHE_BYTES", "many")
    with pytest.raises(ConfigError, match="ACTCACHE_BLOCK_CACHE_BYTES"):
        open_blocks(None, None)


@pytest.mark.parametrize("make", [Path.symlink_to, Path.hardlink_to])
def test_a_lock_that_is_another_file_is_refused(
    make: Callable[[Path, Path], None], tmp_path: Path
) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "blocks").mkdir()
    make(tmp_path / "blocks" / "lock", tmp_path / "victim")
    with pytest.raises(ConfigError, match=r"(?s)cannot be cached.*remedy.*another folder"):
        BlockCache(tmp_path / "blocks", 10_000)
    assert (tmp_path / "victim").read_text() == "precious"


def test_a_lock_that_stays_taken_ends_the_use_of_the_folder_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(block_cache, "_LOCK_WAIT", 0.05)
    cache = BlockCache(tmp_path, 10_000)
    cache.put("aa-0", b"kept")
    with (tmp_path / "lock").open("a") as holder:
        fcntl.flock(holder, fcntl.LOCK_EX)
        cache.put("aa-1", b"not kept")
        cache.put("aa-2", b"not kept")
        assert cache.get("aa-0", 4) is None
        warning = capsys.readouterr().err
        assert warning.count("lock has been locked by another process") == 1
        late = BlockCache(tmp_path, 10_000)
        late.put("aa-1", b"not kept")
        assert "continuing without the block cache" in capsys.readouterr().err
    assert BlockCache(tmp_path, 10_000).get("aa-0", 4) == b"kept"
    assert [path.name for path in (tmp_path / "aa").iterdir()] == ["aa-0"]


def test_links_and_foreign_files_are_neither_read_nor_evicted(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    blocks = tmp_path / "blocks"
    cache = BlockCache(blocks, 300)
    cache.put("aa-0", bytes(100))
    for name in ("aa-1", "aa", "go", ".partial-aa-1-x"):
        (blocks / "aa" / name).symlink_to(tmp_path / "victim")
    (blocks / "go").mkdir()
    (blocks / "go" / "notes").write_text("theirs")
    (blocks / "bb").symlink_to(tmp_path)
    assert cache.get("aa-1", 8) is None
    cache.put("aa-1", bytes(100))
    cache.put("bb-1", bytes(100))
    for i in range(5):
        cache.put(f"cc-{i}", bytes(100))
    assert (blocks / "aa" / "aa-1").is_symlink()
    assert (blocks / "go" / "notes").exists()
    assert (tmp_path / "victim").read_text() == "precious"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["blocks", "victim"]
    assert not (blocks / "aa" / "aa-0").exists()  # evicted
