"""What a harvest will make and take, told before it begins."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from actcache.cache.folder import other_files, require_chunks, shard_bytes
from actcache.cache.writer import files_at_once, kept_positions
from actcache.config import PlanConfig
from actcache.core.progress import Progress
from actcache.data.sequences import Sequence, iter_sequences
from actcache.format.manifest import Identity, Manifest
from actcache.format.receipts import FILTERS
from actcache.harvester.build_manifest import build_identity, build_manifest
from actcache.harvester.resolve import (
    COUNTED_TOKENS,
    ResolvedHarvest,
    assume_enough_text,
    planned_sequences,
    resolve,
    stored_dtype,
)
from actcache.harvester.trial import Trial, run_trial
from actcache.model.loading import dtype_name, load_model
from actcache.storage import ROW_DTYPES

_LIVE = 6  # tensors of the widest output that a forward pass holds at once, about


@dataclass(frozen=True)
class Memory:
    """What one process needs, bytes. The first two are computed, the last is an estimate."""

    weights: int
    """On the model's device."""
    shards: int
    """In main memory: a shard that is being filled, one that is being published, and the hookpoints
    of that one that are being permuted."""
    forward: int
    """On the model's device, about: activations of one forward pass."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.shards + self.forward


@dataclass(frozen=True)
class HarvestEstimate:
    """What `actcache plan` shows."""

    model: str
    dataset: str
    dtype: str
    """Of the activations on disk."""
    backend: str
    sequences: int
    tokens: int
    """That the model runs on, padding included."""
    rows: int
    """At each hookpoint; an upper bound if `rows_known` says so."""
    rows_known: Certainty
    """exact; estimated, from the first sequences or a trial; at most, before the norm filter."""
    dropped: dict[str, int]
    """Positions without a row, by filter."""
    shards: int
    sequences_per_shard: int
    hookpoints: dict[str, int]
    """Bytes by hookpoint."""
    bytes: int
    """Of all files; with compression an upper bound, unless a trial has measured it."""
    files: int
    free: int
    """Bytes free on the disk of OUT."""
    memory: Memory
    trial: Trial | None
    """What a short trial measured."""
    seconds: float | None
    """The trial's estimate for one process like it, without loading."""
    warnings: tuple[str, ...] = field(default=())

    @property
    def fits(self) -> bool:
        """Whether the disk has room."""
        return self.bytes <= self.free


def estimate_harvest(config: PlanConfig) -> HarvestEstimate:
    """Everything that can be told of a harvest before it begins.

    Raises:
        ActcacheError: what the harvest itself would refuse.
    """
    resolved = resolve(config)
    planned = planned_sequences(config, resolved.source, resolved.tokenizer, resolved.pipeline)
    model_dtype = _model_dtype(config, resolved)
    dtype = stored_dtype(config, model_dtype)
    identity = build_identity(config, resolved, "not loaded", model_dtype, dtype)
    manifest = build_manifest(config, resolved, identity, planned, "")
    require_chunks(manifest)
    counted = count_rows(resolved, identity, planned)
    trial = run_trial(config, config.measure_seconds) if config.measure else None
    if trial is not None:
        counted = counted.after_norm_filter(identity, trial.norm_share)
    sizes = _sizes(manifest, planned, counted)
    names = [h.name for h in identity.hookpoints]
    ratio = trial.compression if trial is not None else 1.0
    points = {
        name: int(sum(n for key, n in sizes.items() if key.partition("/")[2] == name) * ratio)
        for name in names
    }
    others = other_files(manifest)
    rest = sum(n for key, n in sizes.items() if "/" not in key)
    total = sum(points.values()) + rest + sum(others.values())
    return HarvestEstimate(
        model=manifest.model,
        dataset=manifest.dataset,
        dtype=dtype,
        backend=config.backend + (f", {config.compress}" if config.compress != "none" else ""),
        sequences=planned,
        tokens=planned * config.ctx_len,
        rows=counted.total,
        rows_known=counted.known,
        dropped=counted.dropped,
        shards=_shards(manifest, planned),
        sequences_per_shard=manifest.sequences_per_shard,
        hookpoints=points,
        bytes=total,
        files=_shards(manifest, planned) * len(sizes) + len(others),
        free=shutil.disk_usage(_existing(Path(config.out))).free,
        memory=_memory(config, resolved, manifest, model_dtype),
        trial=trial,
        seconds=None if trial is None else planned * config.ctx_len / trial.tokens_per_second,
        warnings=_warnings(config, trial),
    )


def _shards(manifest: Manifest, planned: int) -> int:
    return -(-planned // manifest.sequences_per_shard)


def _sizes(manifest: Manifest, planned: int, counted: RowCount) -> dict[str, int]:
    """Bytes of all files of a kind, over the shards."""
    size = manifest.sequences_per_shard
    totals: dict[str, int] = {}
    known: dict[tuple[int, int], dict[str, int]] = {}
    for shard in range(_shards(manifest, planned)):
        count = min(size, planned - shard * size)
        rows = counted.of_shard(shard * size, count)
        if (count, rows) not in known:
            known[count, rows] = shard_bytes(manifest, shard, count, rows)
        for name, n in known[count, rows].items():
            totals[name] = totals.get(name, 0) + n
    return totals


def _model_dtype(config: PlanConfig, resolved: ResolvedHarvest) -> str:
    """Type of the model's arithmetic, from its weights only if nothing else tells."""
    if next(resolved.surveyed.parameters()).device.type != "meta":
        return dtype_name(resolved.surveyed)
    if config.model_dtype != "auto":
        return config.model_dtype
    told = getattr(resolved.model_config, "dtype", None)
    if told is not None:
        return str(told).removeprefix("torch.")
    return dtype_name(load_model(config))


def _memory(
    config: PlanConfig, resolved: ResolvedHarvest, manifest: Manifest, model_dtype: str
) -> Memory:
    row_dtype, identity = ROW_DTYPES[manifest.identity.dtype], manifest.identity
    number = ROW_DTYPES[model_dtype].itemsize if model_dtype in ROW_DTYPES else 4
    bits = {"8bit": 1.0, "4bit": 0.5}.get(config.load_in, float(number))
    weights = sum(parameter.numel() for parameter in resolved.surveyed.parameters())
    row = sum(row_dtype.row_bytes(h.width) for h in identity.hookpoints)
    widest = max(row_dtype.row_bytes(h.width) for h in identity.hookpoints)
    tokens = identity.batch_size * identity.ctx_len
    captured = [h.width for h in identity.hookpoints]
    inner = max([*captured, *_widths(resolved.model_config)])
    return Memory(
        weights=int(weights * bits),
        shards=manifest.shard_rows * (2 * row + files_at_once(len(captured)) * widest),
        forward=tokens * number * (sum(captured) + _LIVE * inner),
    )


def _widths(model_config: Any) -> list[int]:
    text = model_config.get_text_config()
    names = ("hidden_size", "intermediate_size", "ffn_dim", "n_inner", "n_embd")
    found = (getattr(text, name, None) for name in names)
    return [width for width in found if isinstance(width, int)]


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def _warnings(config: PlanConfig, trial: Trial | None) -> tuple[str, ...]:
    found = []
    if config.compress != "none" and trial is None:
        found.append("bytes are those before compression; --measure tells what it saves")
    if config.max_norm_ratio is not None and trial is None:
        found.append("rows are those before --max-norm-ratio; --measure tells what it leaves")
    return tuple(found)


Certainty = Literal["exact", "estimated", "at most"]
_AT_ONCE = 256  # sequences that the filters look at together


@dataclass(frozen=True)
class RowCount:
    """Rows that filters by text leave of each sequence."""

    rows: NDArray[np.float64]
    """Of the sequences that were looked at; their mean stands for the others. [n]"""
    planned: int
    """Sequences of the harvest."""
    known: Certainty
    """exact; estimated, from the first sequences or a trial; at most, before the norm filter."""
    shares: dict[str, float]
    """Positions dropped of each sequence, by filter, on average."""

    @property
    def total(self) -> int:
        """Rows at each hookpoint."""
        return round(float(self.rows.mean()) * self.planned)

    @property
    def dropped(self) -> dict[str, int]:
        """Positions without a row, by filter."""
        return {name: round(share * self.planned) for name, share in self.shares.items()}

    def of_shard(self, first: int, count: int) -> int:
        """Rows of the `count` sequences from `first` on."""
        if len(self.rows) == self.planned:
            return round(float(self.rows[first : first + count].sum()))
        return round(float(self.rows.mean()) * count)

    def after_norm_filter(self, identity: Identity, share: float) -> RowCount:
        """The same less the share of rows that a trial saw the norm filter leave out."""
        if identity.max_norm_ratio is None:
            return self
        left_out = self.shares | {"max_norm_ratio": share * float(self.rows.mean())}
        return RowCount(self.rows * (1 - share), self.planned, "estimated", left_out)


def count_rows(resolved: ResolvedHarvest, identity: Identity, planned: int) -> RowCount:
    """Rows of `planned` sequences; text beyond 16M tokens is taken to be as that before it."""
    believed = assume_enough_text(
        planned, resolved.source, resolved.pipeline
    )  # the text may end before
    known: Certainty = "at most" if believed or identity.max_norm_ratio is not None else "exact"
    looks = identity.exclude_special or identity.exclude_tokens or identity.pipeline != "pack"
    if not looks:
        shares = dict.fromkeys(FILTERS, 0.0) | {"skip_positions": float(identity.skip_positions)}
        return RowCount(np.array([identity.rows_per_sequence * 1.0]), planned, known, shares)
    wanted = min(planned, max(1, COUNTED_TOKENS // identity.ctx_len))
    found = iter_sequences(resolved.source, resolved.tokenizer, resolved.pipeline)
    bar = Progress("count rows", wanted, "seq")
    rows, dropped = [], dict.fromkeys(FILTERS, 0)
    for group in _groups(islice(found, wanted)):
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


def _groups(found: Iterator[Sequence]) -> Iterator[list[Sequence]]:
    while group := list(islice(found, _AT_ONCE)):
        yield group
