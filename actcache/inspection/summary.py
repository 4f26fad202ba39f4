"""Summary of a cache, or of some of its shards."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from actcache.cache.reader import Cache
from actcache.cache.sinks import SinkRows, find_sinks
from actcache.core.arguments import checked
from actcache.core.progress import Progress
from actcache.errors import ConfigError, CorruptShardError
from actcache.format.manifest import Identity, Manifest
from actcache.format.receipts import count_left_out
from actcache.format.statistics import Statistics, merge
from actcache.inspection.dimensions import Dimensions, describe, mean_cosines
from actcache.inspection.harvest_speed import RankSpeed, speed_by_rank
from actcache.inspection.norms import NormHistogram, norm_histogram
from actcache.inspection.printable import printable
from actcache.inspection.shards import BadRows, Excluded, bad_rows, excluded


@dataclass(frozen=True)
class HookpointSummary:
    """One hookpoint over the chosen shards. Norms are Euclidean, of finite rows."""

    hookpoint: str
    rows: int
    width: int
    dtype: str
    bytes: int
    """Bytes of its files."""
    mean_norm: float
    rms_norm: float
    max_norm: float
    abs_max: float
    """Largest |x|."""
    non_finite: int
    """Rows with an infinity or NaN."""
    near_overflow: int
    """Finite rows with an |x| of half of float16's largest or more."""
    norms: NormHistogram
    dimensions: Dimensions


@dataclass(frozen=True)
class CacheSummary:
    """Facts about a cache. Fields are the keys of `actcache inspect --json`."""

    cache: str
    cache_id: str
    model: str
    dataset: str
    text: str
    """Description of how text became sequences."""
    filters: str
    """Description of the rows that were left out."""
    backend: str
    """Description of the storage on disk."""
    state: str
    """complete, or a description of the missing shards and files."""
    complete: bool
    shards: int
    sequences: int
    tokens: int
    rows: int
    bytes: int
    """Bytes of all published files."""
    without_statistics: int
    """Number of shards with missing or damaged statistics, which norms and dimensions omit."""
    hookpoints: tuple[HookpointSummary, ...]
    mean_cosines: tuple[tuple[float | None, ...], ...]
    """Cosine between the mean rows of every two of the first COMPARED hookpoints."""
    sinks: tuple[SinkRows, ...]
    """Hookpoints where a few rows of large norm hold much of the variance, the worst first."""
    excluded: tuple[Excluded, ...]
    """Token positions without a row, by filter."""
    left_out: dict[str, int]
    """Documents that could not be used, by reason."""
    afflictions: BadRows
    """Non-finite and near-overflow rows by shard."""
    speed: tuple[RankSpeed, ...]
    """Speed of the harvest by rank, as far as logs/ has entries."""


@checked()
def inspect(cache: str | os.PathLike[str], shards: Sequence[int] | None = None) -> CacheSummary:
    """Summarize a cache: what `actcache inspect` shows, as frozen dataclasses.

    Args:
        cache: folder or URL of the cache.
        shards: shards to summarize; None: all.

    Raises:
        EmptyCacheError: no shard is complete.
        ConfigError: a requested shard does not exist, or no shard is requested.
        CorruptShardError: no shard has statistics that can be read.
    """
    return summarize(Cache.open(cache), shards)


@np.errstate(all="ignore")  # statistics of an untrusted cache may hold any value
def summarize(cache: Cache, shards: Sequence[int] | None = None) -> CacheSummary:
    """Collect the facts that `actcache inspect` shows.

    Args:
        cache: an open cache.
        shards: numbers of the shards; None: all. `complete` and `state` always cover all shards.

    Raises:
        EmptyCacheError: no shard is complete.
        ConfigError: a given shard is not published.
        CorruptShardError: no shard has readable statistics.
    """
    cache.require_shards()
    shards = cache.shards if shards is None else shards
    _require_published(cache, shards)
    manifest = cache.manifest
    identity, receipts = manifest.identity, [cache.receipts[shard] for shard in shards]
    sequences = sum(receipt.sequences for receipt in receipts)
    missing = len(cache.missing_files())
    cache.fetch_statistics(shards)
    statistics, unread = _statistics(cache, shards)
    rows = sum(receipt.rows for receipt in receipts)
    sizes: Counter[str] = Counter()  # of activations/HOOKPOINT and scales/HOOKPOINT together
    for receipt in receipts:
        for logical, file in receipt.files.items():
            sizes[logical.partition("/")[2]] += file.bytes
    hookpoints = []
    for hookpoint in identity.hookpoints:
        name, found = hookpoint.name, statistics[hookpoint.name]
        hookpoints.append(
            HookpointSummary(
                hookpoint=name,
                rows=rows,
                width=hookpoint.width,
                dtype=identity.dtype,
                bytes=sizes[name],
                mean_norm=found.mean_norm,
                rms_norm=found.rms_norm,
                max_norm=found.norm_max,
                abs_max=float(found.abs_max.max()),
                non_finite=sum(r.non_finite[name] for r in receipts),
                near_overflow=sum(r.near_overflow[name] for r in receipts),
                norms=norm_histogram(found.norm_histogram),
                dimensions=describe(found),
            )
        )
    revision = f" at {manifest.revision}" if manifest.revision else ""
    return CacheSummary(
        cache=str(cache.root),
        cache_id=manifest.cache_id,
        model=printable(
            f"{manifest.model}{revision} ({manifest.architecture}, {identity.model_dtype})"
        ),
        dataset=printable(
            manifest.dataset + (f", split {manifest.split}" if manifest.split else "")
        ),
        text=printable(_pipeline(manifest)),
        filters=printable(_filters(identity)),
        backend=_storage(manifest),
        state=_state(cache, missing),
        complete=cache.complete and not missing,
        shards=len(receipts),
        sequences=sequences,
        tokens=sequences * identity.ctx_len,
        rows=rows,
        bytes=sum(file.bytes for receipt in receipts for file in receipt.files.values()),
        without_statistics=unread,
        hookpoints=tuple(hookpoints),
        mean_cosines=mean_cosines([found.mean for found in statistics.values()]),
        sinks=find_sinks(cache, shards=shards, statistics=statistics),
        left_out={printable(k, 40): n for k, n in count_left_out(receipts).items()},
        excluded=excluded(receipts, sequences * identity.ctx_len),
        afflictions=bad_rows(receipts),
        speed=speed_by_rank(cache.root, {r.shard: r for r in receipts}, identity.ctx_len),
    )


def _require_published(cache: Cache, shards: Sequence[int]) -> None:
    """Raise `ConfigError` unless all these shards, at least one, are published."""
    if not shards:
        raise ConfigError("no shard is requested", expected="shard numbers", got="none")
    for shard in shards:
        if shard not in cache.receipts:
            raise ConfigError(
                f"{cache.root} has no shard {shard}",
                expected=f"one of the {len(cache.shards)} published ones, "
                f"{cache.shards[0]} to {cache.shards[-1]}",
                got=shard,
                remedy="it is not harvested yet, or was retracted: run the harvest again",
            )


def _statistics(cache: Cache, shards: Sequence[int]) -> tuple[dict[str, Statistics], int]:
    """Merge statistics by hookpoint, and count the shards whose statistics cannot be read."""
    merged: dict[str, Statistics] = {}
    failure: CorruptShardError | None = None
    unread = 0
    bar = Progress("statistics", len(shards), "shards", show=None if len(shards) > 100 else False)
    for shard in shards:
        try:
            found = cache.shard_statistics(shard)
        except CorruptShardError as error:  # reported in the summary
            failure, unread = error, unread + 1
        else:
            for name, part in found.items():
                merged[name] = merge([merged[name], part]) if name in merged else part
        bar.advance(1)
    bar.close()
    if failure is not None and not merged:
        raise failure
    return merged, unread


def _pipeline(manifest: Manifest) -> str:
    identity = manifest.identity
    documents = {"text": "documents", "chat": "conversations", "ids": "documents of token ids"}
    what = documents[identity.documents] if identity.column or identity.documents == "text" else ""
    if len(identity.weights) > 1:
        shares = " : ".join(f"{weight:g}" for weight in identity.weights)
        what = f"{what} mixed {shares}"
    joined = "joined" if identity.eos_id is None else f"joined by token {identity.eos_id}"
    if identity.whole_rows:
        what = "rows of token ids that are whole sequences"
    how = {
        "pack": f"{what} {joined}, cut to" if what else "token ids as they are, cut to",
        "crop": f"{what}, a random window of each, of",
        "truncate": f"{what}, the beginning of each, to",
    }
    order = (
        "in the dataset's order" if identity.keep_order else f"in the order of seed {identity.seed}"
    )
    if identity.shuffle_buffer is not None:
        order += f" (a stream, {identity.shuffle_buffer:,} held)"
    bos = "no BOS" if identity.bos_id is None else "BOS first"
    length = f"{how[identity.pipeline]} {identity.ctx_len} tokens"
    return f"{length}, {order}, {bos}; rows {identity.row_order}"


def _filters(identity: Identity) -> str:
    found = []
    if identity.skip_positions:
        found.append(f"positions below {identity.skip_positions}")
    if identity.exclude_special:
        found.append(f"{len(identity.exclude_special)} special tokens")
    if identity.exclude_tokens:
        found.append(f"tokens {', '.join(map(str, identity.exclude_tokens))}")
    if identity.max_norm_ratio is not None:
        found.append(f"norms over {identity.max_norm_ratio:g} times their shard's median")
    return f"left out: {'; '.join(found)}" if found else "none"


def _storage(manifest: Manifest) -> str:
    packed = f", {manifest.compression}" if manifest.compression != "none" else ""
    via = manifest.identity.via
    rounded = f"; rows were rounded to {', '.join(via)} before" if via else ""
    return manifest.backend + packed + rounded


def _state(cache: Cache, missing: int) -> str:
    """Describe whether a cache is complete, and where earlier harvests of it ended."""
    manifest = cache.manifest
    ends = [f"{e.first_sequence * manifest.identity.ctx_len:,}" for e in manifest.extensions]
    extended = f"; extended after {', '.join(ends)} tokens" if ends else ""
    broken = f"; {missing} files are missing or cut: see actcache verify" if missing else ""
    return _progress(cache) + extended + broken


def _progress(cache: Cache) -> str:
    if cache.end is not None:
        missing = cache.end.last_shard + 1 - len(cache.receipts)
        ended = "goal reached" if cache.end.reason == "goal" else "the text ended"
        return f"complete ({ended})" if cache.complete else f"{missing} shards are missing"
    total = cache.manifest.plan.shards
    if total is None:
        return "incomplete: the harvest has not reached the end of the text"
    return f"incomplete: {total - len(cache.receipts)} of {total} shards are missing"
