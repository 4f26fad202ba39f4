"""Time to open a cache of many shards.

Receipts are synthetic, but complete: `Cache.open` reads, parses and checks every one of them. The
time to read the bytes of the same files, without parsing, is printed for comparison.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from common import synthetic_manifest
from report import machine, print_table

from actcache.cache.reader import Cache
from actcache.core.json_codec import to_json
from actcache.filesystem.atomic import FileDigest
from actcache.format.manifest import FILTERS, Hookpoint
from actcache.format.receipts import FOLDER, ShardReceipt, receipt_path


def main() -> None:
    """Print a row for each number of shards and hookpoints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shards", type=int, nargs="*", default=[100, 1000, 10_000])
    parser.add_argument("--hookpoints", type=int, nargs="*", default=[1, 4, 32])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    rows = []
    for shards in arguments.shards:
        for hookpoints in arguments.hookpoints:
            with tempfile.TemporaryDirectory() as folder:
                rows.append(_measure(Path(folder), shards, hookpoints, arguments.repeats))
    print(f"median of {arguments.repeats}, files in the page cache; {machine()}")
    header = ["shards", "hookpoints", "receipt, B", "bytes alone, s", "Cache.open, s"]
    print_table(header, rows)


def _measure(root: Path, shards: int, hookpoints: int, repeats: int) -> list[str]:
    size = _write(root, shards, hookpoints)

    def read_bytes() -> None:
        for path in (root / FOLDER).iterdir():
            path.read_bytes()

    def open_cache() -> None:
        assert len(Cache.open(root).shards) == shards

    seconds = [f"{_seconds(act, repeats):.3f}" for act in (read_bytes, open_cache)]
    return [f"{shards:,}", str(hookpoints), f"{size:,}", *seconds]


def _seconds(act: Callable[[], None], repeats: int) -> float:
    times = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        act()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


def _write(root: Path, shards: int, hookpoints: int) -> int:
    """A manifest and receipts, without data; returns the bytes of a receipt."""
    names = [f"layers.{layer}" for layer in range(hookpoints)]
    points = tuple(Hookpoint(name, 4096) for name in names)
    manifest = synthetic_manifest(points, sequences_per_shard=64, shards=shards)
    (root / FOLDER).mkdir(parents=True)
    (root / "manifest.json").write_bytes(to_json(manifest, sealed=True))
    file = FileDigest(64 * 1023 * 8192 + 4096, "ab" * 16)
    receipt = ShardReceipt(
        cache_id=manifest.cache_id,
        shard=0,
        first_sequence=0,
        sequences=64,
        rows=64 * 1023,
        dropped=dict.fromkeys(FILTERS, 0) | {"skip_positions": 64},
        non_finite=dict.fromkeys(names, 0),
        near_overflow=dict.fromkeys(names, 0),
        files={"tokens": file, "stats": file} | {f"activations/{name}": file for name in names},
    )
    for shard in range(shards):
        here = dataclasses.replace(receipt, shard=shard, first_sequence=shard * 64)
        receipt_path(root, shard).write_bytes(to_json(here, sealed=True))
    return len(to_json(receipt, sealed=True))


if __name__ == "__main__":
    main()
