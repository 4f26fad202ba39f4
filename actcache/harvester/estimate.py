"""Predict rows, bytes, memory and time of a harvest without running it.

With --measure, a short harvest into a temporary folder gives speed, compression and the norm
filter's share of rows.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from actcache.cache.folder import other_files, require_chunks, shard_bytes
from actcache.cache.reader import Cache
from actcache.cache.writer import files_at_once
from actcache.config import HarvestConfig, PlanConfig
from actcache.core.process import (
    World,
    captured_warnings,
    choose_device,
    library_memory,
    peak_memory,
)
from actcache.core.progress import Progress
from actcache.data.sequences import NumberedSequences, Sequence, iter_sequences
from actcache.format.manifest import FILTERS, Identity, Manifest, kept_positions
from actcache.harvester.job import prepare_job
from actcache.harvester.resolve import (
    COUNTED_TOKENS,
    ResolvedHarvest,
    build_identity,
    build_manifest,
    is_assumed_long_enough,
    planned_sequences,
    resolve,
)
from actcache.harvester.run import run_job
from actcache.model.loading import dtype_name, load_model
from actcache.storage import ROW_DTYPES

Certainty = Literal["exact", "estimated", "at most"]
_LIVE = 6  # tensors of the widest output that a forward pass holds at once, approximately
_BATCH = 256  # sequences filtered at once


@dataclass(frozen=True)
class Memory:
    """Bytes that one process needs. `weights` and `shards` are computed, `forward` is estimated."""

    libraries: int
    """Python, torch, transformers and all else that this process has loaded, as measured; with a
    GPU, also about the context of CUDA on it."""
    weights: int
    """Weights, on the model's device."""
    shards: int
    """Row buffers in main memory: of the shard that is captured, of the shard that is written, and
    of the hookpoints that are permuted for writing."""
    forward: int
    """Activations of one forward pass, on the model's device."""

    @property
    def total(self) -> int:
        """Sum of the four."""
        return self.libraries + self.weights + self.shards + self.forward


@dataclass(frozen=True)
class HarvestEstimate:
    """Result of `actcache plan`."""

    model: str
    dataset: str
    dtype: str
    """Dtype of the activations on disk."""
    backend: str
    sequences: int
    tokens: int
    """Tokens run through the model, padding included."""
    rows: int
    """Rows of each hookpoint."""
    rows_known: Certainty
    """exact; estimated, from the first sequences or a trial; at most, before the norm filter."""
    dropped: dict[str, int]
    """Positions without a row, by filter."""
    shards: int
    sequences_per_shard: int
    hookpoints: dict[str, int]
    """Bytes by hookpoint."""
    bytes: int
    """Bytes of all files; an upper bound with compression, unless a trial measured it."""
    files: int
    free: int
    """Free bytes on the disk of OUT."""
    memory: Memory
    trial: Trial | None
    """Measurements of --measure."""
    seconds: float | None
    """Duration of the harvest by the trial's speed, with one process and without loading."""
    warnings: tuple[str, ...] = ()

    @property
    def fits(self) -> bool:
        """True if the disk has room."""
        return self.bytes <= self.free


def estimate_harvest(config: PlanConfig) -> HarvestEstimate:
    """Predict a harvest from its options, and with --measure from a short trial.

    Raises:
        ActcacheError: the harvest itself would raise it.
    """
    with captured_warnings() as captured:
        resolved = resolve(config)
        libraries = _library_memory(config, resolved)  # before texts are read and weights loaded
        planned = planned_sequences(config, resolved)
        model_dtype = _model_dtype(config, resolved)
    identity = build_identity(config, resolved, "not loaded", model_dtype)
    manifest = build_manifest(config, resolved, identity, planned, "")
    require_chunks(manifest)
    counted = count_rows(resolved, identity, planned)
    trial = run_trial(config, config.measure_seconds) if config.measure else None
    if trial is not None:
        counted = counted.after_norm_filter(identity, trial.norm_share)
    sizes = _sizes(manifest, counted)
    shards = manifest.plan.shards_of(planned)
    ratio = trial.compression if trial is not None else 1.0
    points = {
        h.name: int(sum(n for key, n in sizes.items() if key.partition("/")[2] == h.name) * ratio)
        for h in identity.hookpoints
    }
    others = other_files(manifest)
    rest = sum(n for key, n in sizes.items() if "/" not in key)
    return HarvestEstimate(
        model=manifest.model,
        dataset=manifest.dataset,
        dtype=identity.dtype,
        backend=config.backend + (f", {config.compress}" if config.compress != "none" else ""),
        sequences=planned,
        tokens=planned * config.ctx_len,
        rows=counted.total,
        rows_known=counted.known,
        dropped=counted.dropped,
        shards=shards,
        sequences_per_shard=manifest.sequences_per_shard,
        hookpoints=points,
        bytes=sum(points.values()) + rest + sum(others.values()),
        files=shards * len(sizes) + len(others),
        free=shutil.disk_usage(_existing_folder(config.out)).free,
        memory=_memory(config, resolved, manifest, libraries),
        trial=trial,
        seconds=None if trial is None else planned * config.ctx_len / trial.tokens_per_second,
        warnings=(
            *captured.lines,
            *resolved.warnings,
            *resolved.text_warnings(),
            *_warnings(config, trial),
        ),
    )


def _sizes(manifest: Manifest, counted: RowCount) -> dict[str, int]:
    """Sum the bytes of the files over all shards, by name in the receipt."""
    plan = manifest.plan
    totals: dict[str, int] = {}
    known: dict[tuple[int, int], dict[str, int]] = {}
    for shard in range(plan.shards_of(counted.planned)):
        count = plan.max_sequences(shard)
        rows = counted.of_shard(plan.first_sequence(shard), count)
        if (count, rows) not in known:
            known[count, rows] = shard_bytes(manifest, shard, count, rows)
        for name, n in known[count, rows].items():
            totals[name] = totals.get(name, 0) + n
    return totals


def _model_dtype(config: PlanConfig, resolved: ResolvedHarvest) -> str:
    """Return the dtype of the model's arithmetic; load weights only if nothing else defines it."""
    if resolved.has_weights:
        return dtype_name(resolved.model)
    if config.model_dtype != "auto":
        return config.model_dtype
    dtype = getattr(resolved.model_config, "dtype", None)
    return dtype_name(load_model(config)) if dtype is None else str(dtype).removeprefix("torch.")


def _library_memory(config: PlanConfig, resolved: ResolvedHarvest) -> int:
    own = [p.nbytes for p in resolved.model.parameters() if p.device.type == "cpu"]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if config.device_map == "none":
        device = choose_device(config.device)
    return library_memory(device, sum(own))


def _memory(
    config: PlanConfig, resolved: ResolvedHarvest, manifest: Manifest, libraries: int
) -> Memory:
    identity = manifest.identity
    row_dtype, model_dtype = ROW_DTYPES[identity.dtype], identity.model_dtype
    number = ROW_DTYPES[model_dtype].itemsize if model_dtype in ROW_DTYPES else 4
    bits = {"8bit": 1.0, "4bit": 0.5}.get(config.load_in, float(number))
    weights = sum(parameter.numel() for parameter in resolved.model.parameters())
    captured = [h.width for h in identity.hookpoints]
    row = sum(map(row_dtype.row_bytes, captured))
    widest = max(map(row_dtype.row_bytes, captured))
    tokens = identity.batch_size * identity.ctx_len
    inner = max([*captured, *_widths(resolved.model_config)])
    return Memory(
        libraries=libraries,
        weights=int(weights * bits),
        shards=manifest.shard_rows * (2 * row + files_at_once(len(captured)) * widest),
        forward=tokens * number * (sum(captured) + _LIVE * inner),
    )


def _widths(model_config: Any) -> list[int]:
    text = model_config.get_text_config()
    names = ("hidden_size", "intermediate_size", "ffn_dim", "n_inner", "n_embd")
    values = (getattr(text, name, None) for name in names)
    return [width for width in values if isinstance(width, int)]


def _existing_folder(path: str) -> Path:
    """Return the path, or its nearest ancestor that is a folder."""
    folder = Path(path).resolve()
    while not folder.is_dir():
        folder = folder.parent
    return folder


def _warnings(config: PlanConfig, trial: Trial | None) -> tuple[str, ...]:
    warnings = []
    if config.compress != "none" and trial is None:
        warnings.append("bytes are those before compression; --measure measures the ratio")
    if config.max_norm_ratio is not None and trial is None:
        warnings.append("rows are those before --max-norm-ratio; --measure measures its share")
    return tuple(warnings)


@dataclass(frozen=True)
class RowCount:
    """Rows per sequence after the filters on tokens."""

    rows: NDArray[np.float64]
    """Rows of the sequences that were read; their mean stands for the rest. [n]"""
    planned: int
    """Sequences of the harvest."""
    known: Certainty
    """exact; estimated, from the first sequences or a trial; at most, before the norm filter."""
    shares: dict[str, float]
    """Mean number of positions dropped per sequence, by filter."""

    @property
    def total(self) -> int:
        """Rows of each hookpoint."""
        return round(float(self.rows.mean()) * self.planned)

    @property
    def dropped(self) -> dict[str, int]:
        """Positions without a row, by filter."""
        return {name: round(share * self.planned) for name, share in self.shares.items()}

    def of_shard(self, first: int, count: int) -> int:
        """Return the rows of `count` sequences from sequence `first` on."""
        if len(self.rows) == self.planned:
            return round(float(self.rows[first : first + count].sum()))
        return round(float(self.rows.mean()) * count)

    def after_norm_filter(self, identity: Identity, share: float) -> RowCount:
        """Subtract the share of rows that the norm filter dropped in a trial."""
        if identity.max_norm_ratio is None:
            return self
        left_out = self.shares | {"max_norm_ratio": share * float(self.rows.mean())}
        return RowCount(self.rows * (1 - share), self.planned, "estimated", left_out)


def count_rows(resolved: ResolvedHarvest, identity: Identity, planned: int) -> RowCount:
    """Count the rows of `planned` sequences, beyond 16M tokens by extrapolation."""
    assumed = is_assumed_long_enough(planned, resolved.source, resolved.pipeline)
    known: Certainty = "at most" if assumed or identity.max_norm_ratio is not None else "exact"
    if identity.pipeline == "pack" and not identity.exclude_special + identity.exclude_tokens:
        shares = dict.fromkeys(FILTERS, 0.0) | {"skip_positions": float(identity.skip_positions)}
        return RowCount(np.array([identity.rows_per_sequence * 1.0]), planned, known, shares)
    wanted = min(planned, max(1, COUNTED_TOKENS // identity.ctx_len))
    sequences = islice(
        iter_sequences(resolved.source, resolved.tokenizer, resolved.pipeline), wanted
    )
    bar = Progress("count rows", wanted, "seq")
    rows, dropped = [], dict.fromkeys(FILTERS, 0)
    while group := list(islice(sequences, _BATCH)):
        tokens = np.stack([sequence.tokens for sequence in group])
        lengths = np.array([sequence.length for sequence in group], dtype=np.int32)
        kept, left_out = kept_positions(identity, tokens, lengths)
        rows.append(kept.sum(axis=1))
        dropped = {name: dropped[name] + left_out[name] for name in FILTERS}
        bar.advance(len(group))
    bar.close()
    counts = np.concatenate(rows).astype(np.float64)
    shares = {name: n / len(counts) for name, n in dropped.items()}
    return RowCount(counts, planned, known if len(counts) == planned else "estimated", shares)


@dataclass(frozen=True)
class Trial:
    """Measurements of a short harvest with one process."""

    tokens: int
    """Tokens run through the model."""
    seconds: float
    tokens_per_second: float
    """Speed with writing, hashing and statistics, as in the harvest."""
    peak_memory: int
    """Largest main memory of the process in bytes, loading included."""
    peak_device_memory: int
    """Largest memory of torch on the CUDA device in bytes; 0 on the CPU."""
    compression: float
    """Bytes of the row files over their bytes without compression."""
    norm_share: float
    """Share of the rows that --max-norm-ratio dropped."""


def run_trial(config: HarvestConfig, seconds: float) -> Trial:
    """Harvest for some seconds into a temporary folder beside OUT, and delete it.

    Raises:
        ActcacheError: the harvest itself would raise it.
    """
    folder = Path(tempfile.mkdtemp(prefix=".actcache-trial-", dir=_existing_folder(config.out)))
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
        summary = run_job(dataclasses.replace(job, sequences=_Until(job.sequences, seconds)))
    finally:
        job.lock.release()
    cache = Cache.open(job.root)
    receipts = list(cache.receipts.values())
    plain = [shard_bytes(cache.manifest, r.shard, r.sequences, r.rows) for r in receipts]
    files = [name for name in plain[0] if "/" in name]
    written = sum(receipt.files[name].bytes for receipt in receipts for name in files)
    left_out = sum(receipt.dropped["max_norm_ratio"] for receipt in receipts)
    on_device = job.device.type == "cuda"
    return Trial(
        tokens=sum(receipt.sequences for receipt in receipts) * config.ctx_len,
        seconds=summary.seconds,
        tokens_per_second=summary.tokens_per_second,
        peak_memory=peak_memory(),
        peak_device_memory=torch.cuda.max_memory_allocated(job.device) if on_device else 0,
        compression=written / sum(sizes[name] for sizes in plain for name in files),
        norm_share=left_out / max(1, cache.rows + left_out),
    )


class _Until:
    """Sequences of a text that ends after some time, but not before the first are read."""

    def __init__(self, sequences: NumberedSequences, seconds: float) -> None:
        self._sequences, self._seconds, self._end = sequences, seconds, 0.0

    def read(self, first: int, most: int) -> list[Sequence]:
        if not self._end:
            self._end = time.monotonic() + self._seconds
        elif time.monotonic() > self._end:
            return []
        return self._sequences.read(first, most)

    def count(self, first: int, most: int) -> int:
        return self._sequences.count(first, most)

    def close(self) -> None:
        self._sequences.close()
