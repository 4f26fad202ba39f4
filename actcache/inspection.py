"""What a cache holds, as facts: the command prints them, `--json` hands them on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from actcache import rng
from actcache.manifest import Identity, Manifest
from actcache.reader import Cache


@dataclass(frozen=True)
class HookpointSummary:
    """One hookpoint over all published shards. Norms are Euclidean, of finite rows."""

    hookpoint: str
    rows: int
    width: int
    dtype: str
    bytes: int
    """Of its files."""
    mean_norm: float
    rms_norm: float
    max_norm: float
    non_finite: int
    """Rows that hold an infinity or NaN."""


@dataclass(frozen=True)
class CacheSummary:
    """A cache, for people and programs."""

    cache: str
    cache_id: str
    model: str
    dataset: str
    text: str
    """How text became sequences."""
    filters: str
    """Which rows were left out."""
    backend: str
    """How the rows lie on disk."""
    state: str
    """complete, or what is missing."""
    complete: bool
    shards: int
    sequences: int
    tokens: int
    rows: int
    bytes: int
    """Of all published files."""
    hookpoints: tuple[HookpointSummary, ...]


@dataclass(frozen=True)
class Sample:
    """One row in its text."""

    shard: int
    row: int
    sequence: int
    """Within the shard."""
    position: int
    before: str
    token: str
    after: str
    norms: dict[str, float]
    """Norm of the row by hookpoint."""


def summarise(cache: Cache) -> CacheSummary:
    """All that `actcache inspect` shows; raises `EmptyCacheError` when no shard is complete."""
    cache.require_shards()
    manifest, receipts = cache.manifest, list(cache.receipts.values())
    identity = manifest.identity
    sequences = sum(receipt.sequences for receipt in receipts)
    missing = len(cache.missing_files())
    hookpoints = []
    for hookpoint in identity.hookpoints:
        statistics = cache.statistics(hookpoint.name)
        hookpoints.append(
            HookpointSummary(
                hookpoint=hookpoint.name,
                rows=cache.rows,
                width=hookpoint.width,
                dtype=identity.dtype,
                bytes=sum(r.files[f"activations/{hookpoint.name}"].bytes for r in receipts),
                mean_norm=statistics.mean_norm,
                rms_norm=statistics.rms_norm,
                max_norm=statistics.norm_max,
                non_finite=statistics.non_finite,
            )
        )
    revision = f" at {manifest.revision}" if manifest.revision else ""
    return CacheSummary(
        cache=str(cache.root),
        cache_id=manifest.cache_id,
        model=f"{manifest.model}{revision} ({manifest.architecture}, {identity.model_dtype})",
        dataset=manifest.dataset + (f", split {manifest.split}" if manifest.split else ""),
        text=_pipeline(manifest),
        filters=_filters(identity),
        backend=manifest.backend
        + (f", {manifest.compression}" if manifest.compression != "none" else ""),
        state=_state(cache, missing),
        complete=cache.complete and not missing,
        shards=len(receipts),
        sequences=sequences,
        tokens=sequences * identity.ctx_len,
        rows=cache.rows,
        bytes=sum(file.bytes for receipt in receipts for file in receipt.files.values()),
        hookpoints=tuple(hookpoints),
    )


def _pipeline(manifest: Manifest) -> str:
    identity = manifest.identity
    documents = {"text": "documents", "chat": "conversations", "ids": "documents of token ids"}
    what = documents[identity.documents] if identity.column or identity.documents == "text" else ""
    if len(identity.weights) > 1:
        shares = " : ".join(f"{weight:g}" for weight in identity.weights)
        what = f"{what} mixed {shares}"
    how = {
        "pack": f"{what} joined by EOS, cut to" if what else "token ids as they are, cut to",
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


def _state(cache: Cache, missing: int) -> str:
    broken = f"; {missing} files are missing or cut: see actcache verify" if missing else ""
    return _progress(cache) + _extended(cache.manifest) + broken


def _extended(manifest: Manifest) -> str:
    """Where earlier parts of an extended harvest ended."""
    ctx_len = manifest.identity.ctx_len
    places = [f"{e.first_sequence * ctx_len:,}" for e in manifest.extensions]
    return f"; extended after {', '.join(places)} tokens" if places else ""


def _progress(cache: Cache) -> str:
    if cache.end is not None:
        missing = cache.end.last_shard + 1 - len(cache.receipts)
        ended = "goal reached" if cache.end.reason == "goal" else "the text ended"
        return f"complete ({ended})" if cache.complete else f"{missing} shards are missing"
    total = cache.manifest.plan.shards
    if total is None:
        return "incomplete: the harvest has not reached the end of the text"
    return f"incomplete: {total - len(cache.receipts)} of {total} shards are missing"


def sample_rows(cache: Cache, count: int, tokenizer: Any, context: int = 12) -> list[Sample]:
    """Random rows with the tokens around them.

    Args:
        cache: an open cache.
        count: how many rows.
        tokenizer: anything with `decode`; None shows token ids.
        context: tokens to show before and after.
    """
    import numpy as np

    cache.require_shards()
    state = rng.stream("inspect", 0)

    def text(ids: Any) -> str:
        if tokenizer is None:
            return " ".join(str(int(i)) for i in ids)
        decoded: str = tokenizer.decode([int(i) for i in ids])
        return decoded

    samples = []
    for _ in range(count):
        shard = cache.shards[state.randint(len(cache.shards))]
        row = int(state.randint(cache.receipts[shard].rows))
        words = cache.tokens(shard)
        sequence, position = int(words.row_sequence[row]), int(words.row_position[row])
        ids = words.tokens[sequence]
        norms = {
            name: float(np.linalg.norm(cache.codec.to_float32(cache.read(name, shard, row, 1))))
            for name in cache.hookpoints
        }
        samples.append(
            Sample(
                shard,
                row,
                sequence,
                position,
                before=text(ids[max(0, position - context) : position]),
                token=text(ids[position : position + 1]),
                after=text(ids[position + 1 : position + 1 + context]),
                norms=norms,
            )
        )
    return samples
