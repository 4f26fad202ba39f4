from __future__ import annotations

import errno
import itertools
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actcache.cache.folder import data_paths
from actcache.cache.reader import Cache
from actcache.cache.writer import ShardData, ShardText, WriterPool, publish_shard
from actcache.core.json_codec import to_json
from actcache.errors import DiskFullError
from actcache.format.dtypes import RowBuffers
from actcache.format.manifest import read_manifest
from actcache.format.receipts import receipt_path
from actcache.storage import ROW_DTYPES, StoredRows

Tree = Callable[[Path], dict[str, str]]
HOOKPOINTS = {"layers.0": 16, "layers.1": 40, "layers.1.mlp": 8}


@pytest.fixture
def filled(make_cache: Callable[..., Path]) -> tuple[Path, ShardData]:
    """Create a cache with one shard, and the data of another."""
    root = make_cache(shards=2, sequences=4, hookpoints=HOOKPOINTS, end=False)
    unpublish(root)
    kept = np.ones((4, 17), dtype=bool)
    kept[:, 0] = False
    state = np.random.RandomState(0)
    numbers = np.arange(4, dtype=np.int64)
    text = ShardText(np.zeros((4, 17), np.int32), np.full(4, 17, np.int32), numbers, numbers)
    drawn = {name: state.standard_normal((64, D)).astype("<f4") for name, D in HOOKPOINTS.items()}
    rows = {name: StoredRows({"activations": x}) for name, x in drawn.items()}
    dropped = {"padding": 0, "skip_positions": 4, "exclude_special": 0, "exclude_tokens": 0}
    return root, ShardData(1, text, kept, dropped, rows, {})


def unpublish(root: Path) -> None:
    receipt_path(root, 1).unlink(missing_ok=True)
    for path in data_paths(root, read_manifest(root), 1).values():
        path.unlink(missing_ok=True)


def test_threads_publish_the_same_bytes_as_one_thread(
    filled: tuple[Path, ShardData], tree: Tree
) -> None:
    root, shard = filled
    manifest = read_manifest(root)
    receipt = publish_shard(root, manifest, shard)
    alone = tree(root)
    with WriterPool.threads(len(HOOKPOINTS)) as workers:
        for _ in range(3):  # in memory that held other rows
            unpublish(root)
            again = publish_shard(root, manifest, shard, workers)
            assert to_json(again) == to_json(receipt)
            assert tree(root) == alone


def test_a_full_disk_in_any_thread_leaves_no_shard_and_no_partial_file(
    filled: tuple[Path, ShardData], faults: Any
) -> None:
    root, shard = filled
    manifest = read_manifest(root)
    for number in itertools.count():
        unpublish(root)
        with WriterPool.threads(len(HOOKPOINTS)) as workers:
            try:
                with faults.at(number, OSError(errno.ENOSPC, "No space left on device")):
                    publish_shard(root, manifest, shard, workers)
            except DiskFullError:
                assert not list(root.rglob("*.partial-*"))
                published = receipt_path(root, 1).exists()
                assert Cache.open(root).shards == ([0, 1] if published else [0])
            else:
                break
    assert number > 30


def test_after_an_error_running_tasks_finish_and_no_other_starts() -> None:
    began, release = threading.Event(), threading.Event()
    done = []

    def fail() -> None:
        assert began.wait(10)
        raise OSError("full")

    def slow() -> None:
        began.set()
        assert release.wait(10)
        done.append("slow")

    def later() -> None:
        time.sleep(0.01)
        done.append("later")

    threading.Timer(0.2, release.set).start()
    with WriterPool.threads(2) as workers:
        with pytest.raises(OSError, match="full"):
            workers.do([slow, fail, *[later] * 1000])
        at_once = list(done)
    assert "slow" in at_once
    assert len(at_once) < 1001
    assert done == at_once


@pytest.mark.parametrize("dtype", ROW_DTYPES)
def test_rows_are_gathered_into_reused_memory(dtype: str) -> None:
    workers, row_dtype, state = WriterPool(), ROW_DTYPES[dtype], np.random.RandomState(0)
    memories = set()
    for count in (50, 20, 0, 50):
        drawn = torch.from_numpy(state.standard_normal((50, 7)))
        rows, source = row_dtype.from_torch(drawn), state.permutation(50)[:count]
        found = workers.gather(rows, source, row_dtype)
        assert found.parts.keys() == rows.parts.keys()
        for name, part in found.parts.items():
            np.testing.assert_array_equal(part, rows.parts[name][source])
            assert part.flags.c_contiguous
        memories.add(found.values.__array_interface__["data"][0])
    assert len(memories) == 1


def test_buffers_of_different_owners_are_separate() -> None:
    memory, row_dtype = RowBuffers(), ROW_DTYPES["float32"]
    first = memory.rows("layers.0", 4, 3, row_dtype)
    first.values[:] = 1
    memory.rows("layers.1", 4, 3, row_dtype).values[:] = 2
    assert (first.values == 1).all()
    assert memory.rows("layers.0", 2, 3, row_dtype).values.shape == (2, 3)
    assert memory.rows("layers.0", 9, 3, row_dtype).values.shape == (9, 3)
