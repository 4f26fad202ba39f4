"""`run.json`: what a run is, written once at its start and checked whenever it goes on.

It is written again only when a run goes on with a cache that was moved, with other libraries, or
with options that `--force-config` lets through; `history` then says since when.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from actcache.cache.reader import Cache
from actcache.core.json_codec import parse_dataclass, read_json, to_json
from actcache.core.options import names_on_resume
from actcache.errors import CacheMismatchError, FormatError, RunError
from actcache.filesystem.atomic import FileDigest, write_atomic
from actcache.filesystem.paths import is_url
from actcache.stream.order import OrderPlan
from saetrain.config.fit_config import FitConfig
from saetrain.config.grid import values_of
from saetrain.config.sae import SaeEntry, flag

RUN = "run.json"
LOCK = Path("fit.lock")
"""Held by the processes that are at work in a run, within its folder."""
FORMAT_VERSION = 1

FREE_ON_RESUME = frozenset(names_on_resume(FitConfig, "free"))
"""Options that may change between a run and its resumption: they do not affect its results."""


@dataclass(frozen=True)
class PretrainedSource:
    """Weights that an SAE began with."""

    path: str
    """Folder, absolute, or USER/REPO/FOLDER of the Hub."""
    revision: str | None
    """Commit of the repository; null of a folder."""
    file: FileDigest
    """Of sae.safetensors."""


@dataclass(frozen=True)
class OptionChange:
    """What has changed in a run since it began."""

    step: int
    """Steps done by then."""
    changes: tuple[str, ...]
    """Options and libraries, as "--lr: 0.01 then, 0.02 now"."""
    versions: dict[str, str]
    """Libraries from then on."""


@dataclass(frozen=True)
class RunRecord:
    """All that decides a run's results, and what it was made with."""

    format_version: int
    cache: str
    """Folder of the cache when the run was last started, absolute, or its URL."""
    cache_id: str
    """Id of the cache."""
    receipts_digest: str
    """Digest over the receipts of the training shards and the held-out ones (with --follow: of the
    first segment; the others are pinned in segments.json as they are used)."""
    held_out: tuple[int, ...]
    """Shards that are never trained on (with --follow: those of the first segment)."""
    plan: OrderPlan
    """Training shards and the order of their rows (with --follow: those of the first segment)."""
    steps: int
    """Steps of the whole run; with --follow at most: the text may end before its goal."""
    dead_after: int
    """Rows without firing after which a latent is dead."""
    saes: tuple[SaeEntry, ...]
    """The SAEs, in order."""
    options: FitConfig
    """The options as given."""
    versions: dict[str, str]
    """Libraries that the run began with."""
    segment_shards: int | None = None
    """Shards of a segment, with --follow; null: the run uses the shards of `plan` alone."""
    extensions: int | None = None
    """Extensions that the cache had, with --follow: the run goes to the goal of then."""
    pool_rows: int | None = None
    """Rows that are mixed in memory; null in a run from before --buffer-bytes."""
    wandb_id: str | None = None
    """Its id at Weights & Biases; null until it is first logged there."""
    origins: tuple[PretrainedSource, ...] = ()
    """With --finetune, what each SAE began with."""
    history: tuple[OptionChange, ...] = ()
    """What changed when it went on. `options`, `saes`, `steps`, `dead_after` are those of now."""
    batch_parts: int = 1
    """Processes that share each batch (--parallel ddp): sums are rounded otherwise by another
    number of them."""

    def __post_init__(self) -> None:
        """Refuse a record of another version."""
        if self.format_version != FORMAT_VERSION:
            raise FormatError(
                "the run has another format version",
                expected=FORMAT_VERSION,
                got=self.format_version,
                remedy="install the version of actcache that began it",
            )

    @property
    def training_shards(self) -> list[int]:
        """Numbers of the shards that are trained on, and give mean and variance.

        With --follow, those of the first segment: what comes later must not change the loss.
        """
        return [shard for shard, _ in self.plan.shards]

    @property
    def epochs(self) -> int | None:
        """Epochs after which it ends; None where its steps alone say it."""
        return self.options.epochs if self.options.max_tokens is None else None


def write_run(root: Path, record: RunRecord) -> None:
    """Lay down what the run is."""
    write_atomic(root / RUN, [to_json(record)])


def read_run(root: Path) -> RunRecord:
    """The record of the run in a folder.

    Raises:
        RunError: there is no run.
        FormatError: its record is damaged.
    """
    path = root / RUN
    try:
        record = _parse(read_json(path), path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RunError(
            f"{root} is not a run: it holds no {RUN}", remedy=f"saetrain fit CACHE --out {root}"
        ) from error
    shards = record.segment_shards
    if (shards is not None) != record.options.follow or (shards is not None and shards < 1):
        raise FormatError(
            f"{path} holds segments that cannot be",
            expected="segment_shards >= 1 with --follow, null without",
            got=shards,
        )
    return record


def _parse(obj: object, path: Path) -> RunRecord:
    record = parse_dataclass(RunRecord, obj, str(path))
    assert isinstance(obj, dict)
    if all("options" in sae for sae in obj["saes"]):
        return record
    # From before a run could have several SAEs of a hookpoint: they have the run's own options.
    saes = tuple(dataclasses.replace(sae, options=record.options.sae) for sae in record.saes)
    return dataclasses.replace(record, saes=saes)


def absolute_cache(cache: str) -> str:
    """Where a cache is, whatever the working directory."""
    if is_url(cache):
        return cache
    return str(Path(cache).resolve())


def receipts_digest(cache: Cache, training: list[int], held_out: list[int]) -> str:
    """One digest over all shards that a run uses.

    Raises:
        CacheMismatchError: the cache no longer holds one of them.
    """
    shards = [*training, *held_out]
    if missing := sorted(set(shards) - set(cache.shards)):
        raise CacheMismatchError(
            f"{cache.root} no longer holds all the shards of this run",
            expected=f"{len(shards)} shards",
            got=f"without {missing[:8]}",
            remedy="harvest them again: the same command restores them",
        )
    return cache.digest(shards)


def check_same_cache(record: RunRecord, cache: Cache) -> None:
    """Refuse another cache, or one whose shards have changed; raises `CacheMismatchError`."""
    if record.cache_id != cache.manifest.cache_id:
        raise CacheMismatchError(
            f"{cache.root} is not the cache of this run",
            expected=f"cache id {record.cache_id}",
            got=cache.manifest.cache_id,
            remedy="name the right folder",
        )
    digest = receipts_digest(cache, record.training_shards, list(record.held_out))
    if digest != record.receipts_digest:
        raise CacheMismatchError(
            f"the shards of {cache.root} have changed since this run began",
            expected=f"receipts digest {record.receipts_digest}",
            got=digest,
            remedy="restore the cache, or begin another run",
        )


def changed_options(record: RunRecord, now: FitConfig) -> dict[str, str]:
    """Options that touch a run's results and are others now: both values in words, by field."""
    old, new = values_of(record.options), values_of(now)
    changed = {
        name: f"{flag(name)}: {old[name]!r} then, {new[name]!r} now"
        for name in old
        if name not in FREE_ON_RESUME and old[name] != new[name]
    }
    if not changed and record.options.saes != now.saes:
        changed = {"saes": "saes: the same values in other combinations"}
    return changed


def check_same_run(record: RunRecord, now: RunRecord) -> None:
    """Refuse to go on with options that would give other results; raises `RunError`."""
    if changed := changed_options(record, now.options):
        raise RunError(
            f"{now.options.out} was begun with other options",
            got="\n            ".join(changed.values()),
            remedy="repeat the options of its start (they stand in run.json), or choose another "
            "--out; --force-config lets some of them through, see --help",
        )
