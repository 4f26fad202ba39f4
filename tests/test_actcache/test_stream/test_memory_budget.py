"""Rows that a budget holds, and the peak memory of a stream with that budget."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from actcache.cache.reader import Cache
from actcache.errors import ConfigError
from actcache.format.manifest import Manifest
from actcache.stream.memory_budget import DEFAULT_BYTES, PREFETCH_BATCHES, SCRATCH, plan_memory
from actcache.stream.order import POOL_ROWS

MIB = 1 << 20


@pytest.fixture(scope="module")
def manifest_of(make_cache: Callable[..., Path]) -> Callable[..., Manifest]:
    """Factory of manifests of some hookpoints of one width."""

    def make(width: int, hookpoints: int = 1, dtype: str = "bfloat16") -> Manifest:
        names = {f"layers.{n}": width for n in range(hookpoints)}
        root = make_cache(hookpoints=names, shards=1, sequences=1, ctx_len=3, dtype=dtype)
        return Cache.open(root).manifest

    return make


def names(manifest: Manifest) -> list[str]:
    return [hookpoint.name for hookpoint in manifest.identity.hookpoints]


@pytest.mark.parametrize(("width", "hookpoints"), [(576, 2), (768, 1), (2048, 1), (3072, 1)])
def test_common_widths_have_the_default_pool(
    width: int, hookpoints: int, manifest_of: Callable[..., Manifest]
) -> None:
    manifest = manifest_of(width, hookpoints)
    assert plan_memory(None, manifest, names(manifest), 4096).pool_rows == POOL_ROWS == 2**19


def test_wide_rows_and_many_hookpoints_have_a_smaller_pool(
    manifest_of: Callable[..., Manifest],
) -> None:
    wide, many = manifest_of(8192), manifest_of(4096, 32)
    half = plan_memory(None, wide, names(wide), 4096)
    assert half.prefetch == PREFETCH_BATCHES
    assert 200_000 < half.pool_rows < DEFAULT_BYTES / 16384
    batch = 4096 * 32 * 8192
    found = plan_memory(None, many, names(many), 4096)
    assert 3 * 4096 < found.pool_rows < 8 * 4096  # 4 GiB would not hold the batches themselves
    assert found.prefetch == 1
    assert plan_memory(16 * batch, many, names(many), 4096).pool_rows > 2 * found.pool_rows


def test_the_pool_grows_with_the_budget_without_an_upper_bound(
    manifest_of: Callable[..., Manifest],
) -> None:
    manifest = manifest_of(64)
    pools = [plan_memory(n * MIB, manifest, names(manifest), 256).pool_rows for n in (72, 96, 4096)]
    assert pools[0] < pools[1] < POOL_ROWS < pools[2]
    assert all(pool % 64 == 0 for pool in pools)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_the_error_names_the_least_budget_and_that_is_enough(
    dtype: str, manifest_of: Callable[..., Manifest]
) -> None:
    manifest = manifest_of(512, 2, dtype)
    with pytest.raises(ConfigError, match="--buffer-bytes is too small") as caught:
        plan_memory(1, manifest, names(manifest), 4096)
    assert caught.value.expected is not None
    least = int(caught.value.expected.split()[1].replace(",", ""))
    assert least > SCRATCH
    assert plan_memory(least, manifest, names(manifest), 4096).pool_rows >= 4096
    with pytest.raises(ConfigError):
        plan_memory(least - 64 * 512, manifest, names(manifest), 4096)


_CHILD = """
import sys
from pathlib import Path
import torch
from actcache.stream.memory_budget import plan_memory
from actcache.stream.order import make_plan
from actcache.cache.reader import Cache
from actcache.stream.activation_stream import ActivationStream

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))

cache, budget = Cache.open(sys.argv[1]), int(sys.argv[2])
found = plan_memory(budget, cache.manifest, cache.hookpoints, 1024)
shards = [(s, r.rows) for s, r in cache.receipts.items()]
plan = make_plan(shards, cache.manifest.block_rows, 1024, 0, found.pool_rows)
small_plan = make_plan(shards, cache.manifest.block_rows, 16, 0, 16)
with ActivationStream(cache, cache.hookpoints, small_plan, verify="never") as small:
    next(small)  # memory that libraries allocate on first use
with ActivationStream(cache, cache.hookpoints, plan, prefetch=found.prefetch) as stream:
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = status("VmRSS")
    for _ in range(plan.steps_per_epoch + 5):
        batch = next(stream)
    print(status("VmHWM") - before, plan.window * plan.lanes)
"""


@pytest.fixture(scope="module", params=[("bfloat16", "memmap", "none"), ("int8", "zarr", "zstd")])
def large_cache(request: pytest.FixtureRequest, make_cache: Callable[..., Path]) -> Path:
    """32,768 rows of two hookpoints of width 512: 67 MB, or 34 MB."""

    def rows(_hookpoint: str, shard: int, count: int, width: int) -> np.ndarray:
        return np.random.RandomState(shard).standard_normal((count, width)).astype(np.float32)

    dtype, backend, compression = request.param
    return make_cache(
        hookpoints={"layers.0": 512, "layers.1": 512},
        shards=8,
        sequences=4,
        ctx_len=1025,
        block_rows=512,
        rows=rows,
        dtype=dtype,
        backend=backend,
        compression=compression,
    )


def test_a_streams_peak_memory_stays_within_its_budget(large_cache: Path) -> None:
    """Measured as the growth of resident memory of a separate process."""
    budget = SCRATCH + 30 * MIB
    command = [sys.executable, "-c", _CHILD, str(large_cache), str(budget)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    peak, pool_rows = map(int, done.stdout.split())
    assert pool_rows >= 1024
    assert peak <= budget
