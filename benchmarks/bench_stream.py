"""Throughput of batches, against the disk and against other streaming libraries.

    python benchmarks/bench_stream.py [--smoke] [--work FOLDER]

Three tables. (1) `ActivationStream` to batches on the CPU over `preadv` of the same files from
front to back, 4 MiB at a time: into one buffer, which stays in the processor's cache, and into as
much memory as the batches take. In order (a buffer of one row: no shuffling in memory) and shuffled
(a buffer of 1/8 of the rows, filled within the measured time); both backends; from the page
cache and, after `posix_fadvise`, from the disk. (2) Against the readers of SAELens, litdata and
MosaicML streaming, by the row. (3) Where there is a GPU: batches on it over the larger of the time
to read the files and the time to copy as much from pinned memory, which an ideal stream would
take. Files are freshly written for each table, alternatives are timed in turns, and the tables show
medians of one epoch, its start included.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from report import machine, print_table
from synthetic import CTX, HOOKPOINT, write_cache

from actcache.cache.reader import Cache
from actcache.stream.activation_stream import ActivationStream
from actcache.stream.order import make_plan
from actcache.stream.verified_reads import ReadSettings

BATCH = 4096
_PIECE = 4 << 20


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurement."""

    rows: int
    peer_rows: int
    rounds: int


FULL = Sizes(2**21, 2**20, 5)
PEERS = ("SAELens", "litdata", "streaming")
SMOKE = Sizes(2**18, 2**16, 3)


def main() -> None:
    """Measure, then print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="small sizes: does it run at all?")
    parser.add_argument("--work", type=Path, help="folder on the disk to measure; default: /tmp")
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--threads", type=int, default=2, help="of the stream and of preadv")
    parser.add_argument("--only", type=int, choices=(1, 2, 3), help="one table alone")
    parser.add_argument("--peer", choices=PEERS, action="append", help="in table 2; all of them")
    parser.add_argument("--peer-rows", type=int, help="of table 2; by default 2**20")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    sizes = SMOKE if options.smoke else FULL
    sizes = replace(sizes, peer_rows=options.peer_rows or sizes.peer_rows)
    packages = ("sae-lens", "litdata", "mosaicml-streaming")
    print(f"{machine(*packages)}; width {options.width}, bfloat16, batch {BATCH}\n")
    with tempfile.TemporaryDirectory(dir=options.work, prefix="bench-stream-") as name:
        work = Path(name)
        if options.only in (None, 1):
            against_disk(work, sizes, options.width, options.threads)
        if options.only in (None, 2):
            against_peers(work, sizes, options.width, options.threads, options.peer or PEERS)
        if options.only in (None, 3) and torch.cuda.is_available():
            on_a_gpu(work, sizes, options.width, options.threads)


# 1. The disk.


def against_disk(work: Path, sizes: Sizes, width: int, threads: int) -> None:
    """Bytes per second, and the stream's share of what preadv reads."""
    rows = []
    for backend in ("memmap", "zarr"):
        root = work / backend
        write_cache(root, backend, sizes.rows, width)
        cache = Cache.open(root)
        files = [Path(str(p)) for s in cache.shards for p in cache.files_of(HOOKPOINT, s).values()]
        acts: dict[str, Callable[[], float]] = {
            "preadv, one buffer": lambda files=files: raw(files, threads, _PIECE),  # type: ignore[misc]
            "preadv, memory of batches": lambda files=files: raw(files, threads, 64 << 20),  # type: ignore[misc]
            "in order": lambda cache=cache: stream(cache, 1, threads),  # type: ignore[misc]
            "mixed": lambda cache=cache: stream(cache, cache.rows // 8, threads),  # type: ignore[misc]
        }
        for state in ("warm", "cold"):
            speeds = take_turns(acts, sizes.rounds, files if state == "cold" else None)
            bases = list(speeds.values())[:2]
            for act, found in speeds.items():
                over = [_ratio(found, base) if found is not base else "" for base in bases]
                rows.append([backend, state, act, f"{statistics.median(found):.2f}", *over])
        shutil.rmtree(root)
    print(f"{sizes.rows:,} rows, {threads} threads, median of {sizes.rounds}\n")
    print_table(["backend", "files", "", "GB/s", "over one buffer", "over memory"], rows)
    print()


def raw(files: Sequence[Path], threads: int, room: int) -> float:
    """GB/s of every file front to back; each thread has `room` bytes, which it fills in turn."""
    memory = [np.ones(room, dtype=np.uint8).data for _ in range(threads)]

    def read(number: int) -> int:
        total, at = 0, 0
        for path in files[number::threads]:
            fd, offset = os.open(path, os.O_RDONLY), 0
            while n := os.preadv(fd, [memory[number][at : at + _PIECE]], offset):
                offset, at = offset + n, (at + _PIECE) % room
            os.close(fd)
            total += offset
        return total

    with ThreadPoolExecutor(threads) as pool:
        began = time.perf_counter()
        total = sum(pool.map(read, range(threads)))
        return total / (time.perf_counter() - began) / 1e9


def stream(
    cache: Cache,
    pool_rows: int,
    threads: int,
    rows_per_second: bool = False,
    device: str | None = None,
) -> float:
    """GB/s, or rows/s, of one epoch."""
    shards = [(shard, receipt.rows) for shard, receipt in cache.receipts.items()]
    plan = make_plan(shards, cache.manifest.block_rows, BATCH, 0, pool_rows)
    began = time.perf_counter()
    with ActivationStream(
        cache, [HOOKPOINT], plan, verify="never", reading=ReadSettings(threads), device=device
    ) as batches:
        for _ in range(plan.steps_per_epoch):
            next(batches)
        if device is not None:
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        rows = plan.steps_per_epoch * BATCH / seconds
        return rows if rows_per_second else rows * batches.row_bytes / 1e9


def take_turns(
    acts: dict[str, Callable[[], float]], rounds: int, cold: Sequence[Path] | None = None
) -> dict[str, list[float]]:
    """Run all in turns; return their results without the first round. Uncaches `cold` files."""
    found: dict[str, list[float]] = {name: [] for name in acts}
    for number in range(rounds + 1):
        for name, act in acts.items():
            for path in cold or ():
                fd = os.open(path, os.O_RDONLY)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(fd)
            speed = act()
            if number:
                found[name].append(speed)
    return found


# 2. Peers.


def against_peers(work: Path, sizes: Sizes, width: int, threads: int, peers: Sequence[str]) -> None:
    """Rows per second of each library from files that it wrote itself."""
    root = work / "ours"
    write_cache(root, "memmap", sizes.peer_rows, width, shards=16)
    cache = Cache.open(root)
    rows = np.concatenate([cache.read(HOOKPOINT, shard).values for shard in cache.shards])
    acts = {"actcache": lambda: stream(cache, cache.rows // 8, threads, rows_per_second=True)}
    writers = dict(zip(PEERS, (saelens, litdata, mosaic), strict=True))
    for name, prepare in ((name, writers[name]) for name in peers):
        try:
            acts[name] = prepare(work / name, rows)
        except (ImportError, AttributeError, TypeError, OSError) as error:
            print(f"{name} is left out: {type(error).__name__}: {str(error).splitlines()[0]}\n")
    found = take_turns(acts, max(1, sizes.rounds // 2))
    ours = found["actcache"]
    table = [[name, f"{statistics.median(s):,.0f}", _ratio(ours, s)] for name, s in found.items()]
    print(f"{len(rows):,} rows, warm, median of {len(ours)}\n")
    print_table(["", "rows/s", "actcache is faster by"], table)


def saelens(work: Path, rows: np.ndarray) -> Callable[[], float]:
    """ActivationsStore over a cache as its CacheActivationsRunner writes it, with its mixing."""
    from datasets import Array2D, Dataset, Features
    from sae_lens.training import activations_store
    from sae_lens.training.mixing_buffer import mixing_buffer

    width = rows.shape[1]
    # Arrow has no bfloat16: the same bytes as float16.
    data = rows.view(np.float16).reshape(-1, CTX, width)
    features = Features({HOOKPOINT: Array2D((CTX, width), "float16")})
    Dataset.from_dict({HOOKPOINT: data}, features=features).save_to_disk(work)

    def read() -> float:
        from datasets import load_from_disk

        began, count = time.perf_counter(), 0
        holder: Any = SimpleNamespace(
            cached_activation_dataset=load_from_disk(work).with_format("torch"),
            context_size=CTX,
            store_batch_size_prompts=8,
            d_in=width,
            hook_name=HOOKPOINT,
            current_row_idx=0,
        )
        load = activations_store.ActivationsStore._load_raw_llm_batch_from_cached

        def batches() -> Any:
            while True:
                try:
                    yield load(holder, raise_on_epoch_end=True)[0]
                except StopIteration:
                    return

        for batch in mixing_buffer(len(rows) // 8, BATCH, batches()):
            count += len(batch)
        return count / (time.perf_counter() - began)

    return read


def litdata(work: Path, rows: np.ndarray) -> Callable[[], float]:
    """StreamingDataset of single rows, shuffled, through its own loader."""
    library = import_module("litdata")
    work.mkdir()
    writer = import_module("litdata.streaming.writer").BinaryWriter(str(work), chunk_bytes=64 << 20)
    for number, row in enumerate(rows):
        writer[number] = torch.from_numpy(row.view(np.int16))
    writer.done()
    writer.merge(1)

    def read() -> float:
        began = time.perf_counter()
        data = library.StreamingDataset(str(work), shuffle=True)
        loader = library.StreamingDataLoader(data, batch_size=BATCH, num_workers=0)
        count = sum(len(batch) for batch in loader)
        return count / (time.perf_counter() - began)

    return read


def mosaic(work: Path, rows: np.ndarray) -> Callable[[], float]:
    """StreamingDataset of single rows, shuffled, through torch's loader."""
    from torch.utils.data import DataLoader

    library = import_module("streaming")
    columns = {"x": f"ndarray:int16:{rows.shape[1]}"}
    with library.MDSWriter(out=str(work), columns=columns, size_limit=64 << 20) as writer:
        for row in rows:
            writer.write({"x": row.view(np.int16)})

    def read() -> float:
        began = time.perf_counter()
        data = library.StreamingDataset(local=str(work), shuffle=True, batch_size=BATCH)
        count = sum(len(batch["x"]) for batch in DataLoader(data, batch_size=BATCH))
        return count / (time.perf_counter() - began)

    return read


# 3. A GPU.


def on_a_gpu(work: Path, sizes: Sizes, width: int, threads: int) -> None:
    """Bytes per second to batches on the GPU, and the time over that of the slower limit."""
    root = work / "gpu"
    write_cache(root, "memmap", sizes.rows, width)
    cache = Cache.open(root)
    files = [Path(str(p)) for s in cache.shards for p in cache.files_of(HOOKPOINT, s).values()]
    acts: dict[str, Callable[[], float]] = {
        "preadv, memory of batches": lambda: raw(files, threads, 64 << 20),
        "copy from pinned memory": host_to_device,
        "in order": lambda: stream(cache, 1, threads, device="cuda"),
        "mixed on the GPU": lambda: stream(cache, cache.rows // 8, threads, device="cuda"),
    }
    rows = []
    for state in ("warm", "cold"):
        speeds = take_turns(acts, sizes.rounds, files if state == "cold" else None)
        disk, copy = list(speeds.values())[:2]
        limit = [min(pair) for pair in zip(disk, copy, strict=True)]
        for act, found in speeds.items():
            over = "" if found is disk or found is copy else _ratio(limit, found)
            rows.append([state, act, f"{statistics.median(found):.2f}", over])
    shutil.rmtree(root)
    print(f"{torch.cuda.get_device_name()}, {sizes.rows:,} rows, {threads} threads\n")
    print_table(["files", "", "GB/s", "time over the limit's"], rows)
    print()


def host_to_device() -> float:
    """GB/s of copies from pinned memory."""
    source = torch.empty(256 << 20, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(source, device="cuda")
    target.copy_(source)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(8):
        target.copy_(source, non_blocking=True)
    torch.cuda.synchronize()
    return 8 * source.nbytes / (time.perf_counter() - began) / 1e9


def _ratio(ours: list[float], theirs: list[float]) -> str:
    """Median of the ratios of neighbours."""
    return f"{statistics.median(a / b for a, b in zip(ours, theirs, strict=True)):.2f}"


if __name__ == "__main__":
    main()
