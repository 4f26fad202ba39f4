"""The files under `shards/`: receipts, retractions and the seal; see docs/format.md."""

from __future__ import annotations

import gc
import re
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import xxhash

from actcache.core.json_codec import OMITTED_BY_DEFAULT, parse_dataclass, read_json, to_json
from actcache.errors import FormatError
from actcache.filesystem.atomic import FileDigest, write_atomic
from actcache.filesystem.paths import CachePath, CachePathT, prefetch_files
from actcache.format.manifest import (
    FILTERS,
    SEALED_FROM,
    Manifest,
    read_manifest,
)

FOLDER = "shards"
END = "END.json"
LEFT_OUT_FROM = 3
"""First version whose receipts may count documents that were left out."""
_MAX_BYTES = 4 << 20
_MAX_RETRACTION_BYTES = 8 << 20
_RECEIPT_NAME = re.compile(r"([0-9]{5,9})\.json")
_RETRACTION_NAME = re.compile(r"([0-9]{5,9})\.retracted\.json")


@dataclass(frozen=True)
class ShardReceipt:
    """Contents of a published shard. A shard exists if and only if its receipt does."""

    cache_id: str
    shard: int
    first_sequence: int
    """Number of the shard's first sequence, counted from the start of the cache."""
    sequences: int
    rows: int
    """Rows at every hookpoint."""
    dropped: dict[str, int]
    """Rows dropped, by filter."""
    non_finite: dict[str, int]
    """Rows that hold an infinity or NaN, by hookpoint. They are kept."""
    near_overflow: dict[str, int]
    """Finite rows with an absolute value of 32,752 or more, by hookpoint: beyond half of float16's
    range."""
    files: dict[str, FileDigest]
    """Size and digest by logical name: 'tokens', 'stats', 'activations/HOOKPOINT', and with zarr
    'scales/HOOKPOINT' of 8-bit rows."""
    left_out: dict[str, int] = field(default_factory=dict, metadata=OMITTED_BY_DEFAULT)
    """Documents left out, by reason: those since the last sequence of the shard before, and behind
    the last sequence of the text. Without entries, the key is omitted."""


@dataclass(frozen=True)
class CompletionMarker:
    """The seal `END.json`: the harvest is complete."""

    cache_id: str
    last_shard: int
    sequences: int
    reason: Literal["goal", "text"]
    """goal: the planned number was reached; text: the dataset ended first."""
    extensions: int
    """Number of extensions when it was written. A later extension makes the seal void."""


def receipt_path(root: CachePathT, shard: int) -> CachePathT:
    """Return the path of a shard's receipt."""
    return root / FOLDER / f"{shard:05d}.json"


def publish_receipt(root: Path, manifest: Manifest, receipt: ShardReceipt) -> None:
    """Publish a shard by writing its receipt, after all its files are in place."""
    # A harvest of an earlier version ends with the first document that cannot be used.
    assert not receipt.left_out or manifest.format_version >= LEFT_OUT_FROM
    text = to_json(receipt, sealed=manifest.format_version >= SEALED_FROM)
    write_atomic(receipt_path(root, receipt.shard), [text])


def write_completion_marker(root: Path, manifest: Manifest, end: CompletionMarker) -> None:
    """Write END.json, which completes a harvest."""
    write_atomic(root / FOLDER / END, [to_json(end, sealed=manifest.format_version >= SEALED_FROM)])


def read_end(root: CachePath, manifest: Manifest) -> CompletionMarker | None:
    """Read the seal; return None while the harvest, with all its extensions, is not complete.

    Raises:
        FormatError: it is damaged, belongs to another cache, or contradicts the manifest's plan.
    """
    path = root / FOLDER / END
    if not path.exists() and not path.is_symlink():
        return None
    try:
        obj = read_json(
            path, _MAX_BYTES, links=False, sealed=manifest.format_version >= SEALED_FROM
        )
    except (FileNotFoundError, NotADirectoryError):
        return None
    end = parse_dataclass(CompletionMarker, obj, str(path))
    if min(end.last_shard, end.extensions) < 0 or end.sequences <= end.last_shard:
        raise FormatError(
            f"{path}: the seal has impossible counts",
            expected="at least one shard, and a sequence in each",
            got=f"last shard {end.last_shard}, {end.sequences} sequences, "
            f"{end.extensions} extensions",
        )
    _check_owner(path, end.cache_id, manifest.cache_id)
    if end.extensions > len(manifest.extensions):
        raise FormatError(
            f"{path} counts extensions that do not exist",
            expected=f"<= {len(manifest.extensions)}",
            got=end.extensions,
            remedy="restore the files of extensions/ from a copy",
        )
    is_current = end.extensions == len(manifest.extensions)
    plan = manifest.truncated_to(end.extensions).plan
    if not is_current and end.reason != "goal":  # only a harvest at its goal is extended
        raise FormatError(
            f"{path} was extended, but does not record that the goal was reached",
            expected="goal",
            got=end.reason,
        )
    goal = end.sequences if plan.goal is None else plan.goal
    if end.sequences > goal or (end.reason == "goal" and end.sequences != goal):
        raise FormatError(
            f"{path} does not agree with the goal of the harvest",
            expected=f"{goal} sequences",
            got=f"{end.sequences} sequences, reason {end.reason}",
            remedy="the manifest or the seal was edited or damaged; restore it from a copy",
        )
    if not is_current and end.last_shard + 1 != plan.shards:
        raise FormatError(
            f"{path} does not agree with the plan before extension {end.extensions + 1}",
            expected=f"{plan.shards} shards",
            got=f"{end.last_shard + 1} shards",
        )
    return end if is_current else None


def read_completion_marker(root: CachePath, manifest: Manifest) -> CompletionMarker | None:
    """Read the seal, or derive it if extensions newer than `manifest` made it void.

    Raises:
        FormatError: the seal or an extension is damaged.
    """
    try:
        end = read_end(root, manifest)
    except FormatError:
        if not _is_extended(root, manifest):
            raise
        end = None
    goal, shards = manifest.plan.goal, manifest.plan.shards
    if end is None and goal is not None and shards is not None and _is_extended(root, manifest):
        # A harvest is extended only after it has reached its goal.
        return CompletionMarker(
            manifest.cache_id, shards - 1, goal, "goal", len(manifest.extensions)
        )
    return end


def _is_extended(root: CachePath, manifest: Manifest) -> bool:
    return len(read_manifest(root).extensions) > len(manifest.extensions)


CacheState = tuple[Manifest, dict[int, ShardReceipt], CompletionMarker | None]
"""Manifest of a cache, receipts by shard, and the seal, if the harvest is complete."""


def read_cache_state(root: CachePath, manifest: Manifest | None = None) -> CacheState:
    """Read a consistent manifest, receipts and seal, even while a harvest extends the cache.

    Args:
        root: folder of the cache.
        manifest: its manifest, if it has just been read.

    Raises:
        EmptyCacheError: there is no manifest.
        FormatError: the manifest, a receipt or the seal is damaged.
    """
    manifest = manifest or read_manifest(root)
    while True:
        try:
            end = read_end(root, manifest)  # first: its shards were published before it
            return manifest, read_receipts(root, manifest), end
        except FormatError:
            later = read_manifest(root)
            if later == manifest:
                raise
            manifest = later


def read_receipts(root: CachePath, manifest: Manifest) -> dict[int, ShardReceipt]:
    """Read the receipts of all published shards, by number, ascending; raises `FormatError`."""
    # Ten thousand receipts are a million live objects; repeated garbage collections over them
    # would take a third of the time.
    collecting = gc.isenabled()
    gc.disable()
    try:
        files: Iterable[CachePath] = [path for _, path in receipt_files(root)]
        if not isinstance(root, Path):
            files = prefetch_files(files)
        receipts = {}
        for path in files:
            with suppress(FileNotFoundError):  # retracted since it was listed
                receipt = read_receipt(path, manifest)
                receipts[receipt.shard] = receipt
        return receipts
    finally:
        if collecting:
            gc.enable()


def receipt_files(root: CachePathT) -> list[tuple[int, CachePathT]]:
    """List (number in the name, path) of files named like receipts, ascending."""
    folder = root / FOLDER
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = sorted((int(name[:-5]), name) for name in names if _RECEIPT_NAME.fullmatch(name))
    return [(number, folder / name) for number, name in found]


def read_receipt(path: CachePath, manifest: Manifest) -> ShardReceipt:
    """Read one receipt and check it against its file name and the manifest.

    Raises:
        FormatError: it is damaged, belongs to another cache or shard, or contradicts the manifest.
    """
    obj = read_json(path, _MAX_BYTES, links=False, sealed=manifest.format_version >= SEALED_FROM)
    receipt = parse_dataclass(ShardReceipt, obj, str(path))
    _check_receipt(path, receipt, manifest)
    return receipt


def _check_receipt(path: CachePath, receipt: ShardReceipt, manifest: Manifest) -> None:
    """Check a receipt against the name of its file and the manifest; raises `FormatError`."""
    counts = [receipt.shard, receipt.first_sequence, receipt.sequences - 1, receipt.rows]
    for of_names in (
        receipt.dropped,
        receipt.non_finite,
        receipt.near_overflow,
        receipt.left_out,
    ):
        counts += of_names.values()
    counts += [file.bytes for file in receipt.files.values()]
    if min(counts) < 0:
        raise FormatError(f"{path}: the receipt of shard {receipt.shard} holds a negative count")
    _check_owner(path, receipt.cache_id, manifest.cache_id)
    if path.name != f"{receipt.shard:05d}.json":
        raise FormatError(
            f"{path} is the receipt of another shard", expected=path.name, got=receipt.shard
        )
    if receipt.left_out and manifest.format_version < LEFT_OUT_FROM:
        raise FormatError(
            f"{path} has a key that format version {manifest.format_version} does not have",
            expected=f"format version {LEFT_OUT_FROM}, or no such key",
            got="left_out",
            remedy="it was edited or damaged; restore it from a copy",
        )
    _check_against(manifest, receipt, path)


def digest(receipts: list[ShardReceipt]) -> str:
    """Compute one digest over the receipts of some shards; a training run records it."""
    hasher = xxhash.xxh3_128()
    for receipt in receipts:
        hasher.update(to_json(receipt))
    return hasher.hexdigest()


def _check_against(manifest: Manifest, receipt: ShardReceipt, path: CachePath) -> None:
    """Require that a receipt fits the hookpoints, files, plan and filters of a manifest."""
    names = {hookpoint.name for hookpoint in manifest.identity.hookpoints}
    tokens = receipt.sequences * manifest.identity.ctx_len
    plan = manifest.plan
    most, short = plan.max_sequences(receipt.shard), plan.is_in_last_range(receipt.shard)
    facts = {
        "hookpoints of non_finite": (names, set(receipt.non_finite)),
        "hookpoints of near_overflow": (names, set(receipt.near_overflow)),
        "files": (manifest.file_names, receipt.files.keys()),
        "first_sequence": (plan.first_sequence(receipt.shard), receipt.first_sequence),
        "sequences": (min(receipt.sequences, most) if short else most, receipt.sequences),
        "filters of dropped": (set(FILTERS), set(receipt.dropped)),
        "rows and dropped rows": (tokens, receipt.rows + sum(receipt.dropped.values())),
    }
    for fact, (expected, got) in facts.items():
        if got != expected:
            raise FormatError(
                f"{path} does not agree with the manifest: {fact}", expected=expected, got=got
            )
    for name, broken in receipt.non_finite.items():
        if broken + receipt.near_overflow[name] > receipt.rows:
            raise FormatError(
                f"{path} counts more non-finite and large rows of {name} than the shard has rows",
                expected=f"non_finite and near_overflow together <= {receipt.rows}",
                got=f"{broken} and {receipt.near_overflow[name]}",
            )


def count_left_out(receipts: Iterable[ShardReceipt]) -> dict[str, int]:
    """Count the documents that were left out of some shards, by reason, most first."""
    counts: Counter[str] = Counter()
    for receipt in receipts:
        counts.update(receipt.left_out)
    return {reason: count for reason, count in counts.most_common() if count}


def _check_owner(path: CachePath, got: str, expected: str) -> None:
    if got != expected:
        raise FormatError(
            f"{path} belongs to another cache",
            expected=expected,
            got=got,
            remedy="remove the files that were copied in from another cache",
        )


@dataclass(frozen=True)
class Retraction:
    """Record `shards/NNNNN.retracted.json` of a damaged shard whose receipt was withdrawn.

    It keeps the digests that the shard must have when it is harvested again, so that a repair
    cannot change a cache that runs are pinned to. The shard's files stay in place.
    """

    cache_id: str
    shard: int
    promised: dict[str, FileDigest]
    """Digests by the shard's receipt; empty if the receipt could not be read."""
    found: dict[str, FileDigest]
    """Digests of the files on disk: the right ones if only the receipt was damaged."""
    receipt: ShardReceipt | None = None
    """The receipt; null if it could not be read, and in records of earlier versions."""
    seal_found: str | None = None
    """What was found as the seal of a receipt that could not be read."""


def retraction_path(root: CachePathT, shard: int) -> CachePathT:
    """Return the path of the record of a retracted shard."""
    return root / FOLDER / f"{shard:05d}.retracted.json"


def retracted_shards(root: CachePath) -> list[int]:
    """List the retracted shards that have not been harvested again, ascending."""
    return [s for s in _recorded(root) if not receipt_path(root, s).exists()]


def _recorded(root: CachePath) -> list[int]:
    folder = root / FOLDER
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return sorted(int(name[1]) for name in map(_RETRACTION_NAME.fullmatch, names) if name)


def read_retraction(root: Path, manifest: Manifest, shard: int) -> Retraction | None:
    """Read the record of a retracted shard; return None if there is none.

    Raises:
        FormatError: the record is damaged, or belongs to another shard.
    """
    path = retraction_path(root, shard)
    try:
        obj = read_json(
            path, _MAX_RETRACTION_BYTES, links=False, sealed=manifest.format_version >= SEALED_FROM
        )
    except FileNotFoundError:
        return None
    record = parse_dataclass(Retraction, obj, str(path))
    if (record.cache_id, record.shard) != (manifest.cache_id, shard):
        raise FormatError(
            f"{path} belongs to another shard",
            expected=f"shard {shard} of {manifest.cache_id}",
            got=f"shard {record.shard} of {record.cache_id}",
        )
    if record.receipt is not None:
        _check_receipt(receipt_path(root, shard), record.receipt, manifest)
    return record


def forget(root: Path, shard: int) -> None:
    """Delete the retraction record of a shard."""
    retraction_path(root, shard).unlink(missing_ok=True)


def drop_restored_records(root: Path, published: Iterable[int]) -> None:
    """Delete retraction records that a killed process left beside receipts of the same shards."""
    for shard in set(published) & set(_recorded(root)):
        forget(root, shard)
