"""A short harvest into a temporary folder: how fast one process is here, and what it needs."""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from actcache.cache.folder import shard_bytes
from actcache.cache.reader import Cache
from actcache.config import HarvestConfig
from actcache.core.device import peak_memory
from actcache.core.distributed import World
from actcache.data.sequences import Sequence
from actcache.harvester.job import prepare_job
from actcache.harvester.run import run_job


@dataclass(frozen=True)
class Trial:
    """What a trial measured, on one process."""

    tokens: int
    """That the model ran on."""
    seconds: float
    tokens_per_second: float
    """With writing, hashing and statistics, as in the harvest."""
    peak_memory: int
    """Of the process in main memory, bytes, loading included."""
    peak_device_memory: int
    """Of torch on a CUDA device, bytes; 0 on the CPU."""
    compression: float
    """Bytes of the rows' files over those without compression."""
    norm_share: float
    """Share of the rows that --max-norm-ratio left out."""


def run_trial(config: HarvestConfig, seconds: float) -> Trial:
    """Harvest for some seconds beside OUT, and remove what was written.

    Raises:
        ActcacheError: what the harvest itself would refuse.
    """
    beside = Path(config.out).resolve()
    while not beside.is_dir():
        beside = beside.parent
    folder = Path(tempfile.mkdtemp(prefix=".actcache-trial-", dir=beside))
    try:
        # Shards of one batch: the end of a short trial must not be one half of a large shard.
        small = dataclasses.replace(config, out=str(folder / "cache"), shard_size=config.batch_size)
        return _measure(small, seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _measure(config: HarvestConfig, seconds: float) -> Trial:
    job = prepare_job(config, World(0, 1))
    try:
        if job.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(job.device)
        found = run_job(dataclasses.replace(job, sequences=_until(job.sequences, seconds)))
    finally:
        job.lock.release()
    cache = Cache.open(job.root)
    receipts = list(cache.receipts.values())
    plain = [shard_bytes(cache.manifest, r.shard, r.sequences, r.rows) for r in receipts]
    files = [name for name in plain[0] if "/" in name]
    written = sum(receipt.files[name].bytes for receipt in receipts for name in files)
    left_out = sum(receipt.dropped["max_norm_ratio"] for receipt in receipts)
    tokens = sum(receipt.sequences for receipt in receipts) * config.ctx_len
    on_device = job.device.type == "cuda"
    return Trial(
        tokens=tokens,
        seconds=found.seconds,
        tokens_per_second=found.tokens_per_second,
        peak_memory=peak_memory(),
        peak_device_memory=torch.cuda.max_memory_allocated(job.device) if on_device else 0,
        compression=written / sum(sizes[name] for sizes in plain for name in files),
        norm_share=left_out / max(1, cache.rows + left_out),
    )


def _until(found: Iterator[Sequence], seconds: float) -> Iterator[Sequence]:
    """Sequences, at least one, for some seconds from the first on."""
    end = time.monotonic() + seconds
    for sequence in found:
        yield sequence
        if time.monotonic() > end:
            return
