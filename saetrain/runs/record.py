"""`run.json`: the record of a run, written at its start and checked whenever it is resumed.

Format 2 seals run.json and segments.json, and its checkpoints cover cfg.json and metrics.jsonl. A
run of format 1 is resumed and finished in format 1, in which a changed value may go unnoticed.
Format 3 has the defaults of version 2 (see `saetrain.config.fit_config.Defaults`); a run of an
earlier format is resumed with those of version 1.

It is written again only when a run resumes with a cache that was moved, other libraries, or options
changed by `--force-config`; `history` then records the step.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from actcache.cache.reader import Cache
from actcache.core.json_codec import (
    NOT_SERIALIZED,
    OMITTED_BY_DEFAULT,
    parse_dataclass,
    read_json,
    to_json,
)
from actcache.core.options import names_on_resume
from actcache.errors import CacheMismatchError, ConfigError, FormatError, RunError
from actcache.filesystem.atomic import FileDigest, write_atomic
from actcache.filesystem.paths import is_url
from actcache.format.manifest import MAX_SHARDS
from actcache.format.statistics import Statistics
from actcache.stream.massive_rows import MassiveRows, find_massive_rows
from actcache.stream.order import OrderPlan, default_lanes, make_plan, split_shards
from saetrain.config.fit_config import (
    DEFAULTS,
    Defaults,
    FitConfig,
    Precision,
    with_defaults,
)
from saetrain.config.grid import values_of
from saetrain.config.sae import SaeEntry, flag, hookpoints_of, require_entry

RUN = "run.json"
LOCK = Path("fit.lock")
"""Lock file in a run's folder, held by the processes that train it."""
FORMAT_VERSION = 3
"""Format of new runs; a run keeps the one that it began with."""

FREE_ON_RESUME = frozenset(names_on_resume(FitConfig, "free"))
"""Options that may change when a run is resumed: they do not affect its results."""


@dataclass(frozen=True)
class PretrainedSource:
    """Pretrained weights from which an SAE started (--finetune)."""

    path: str
    """Absolute path of a folder, or USER/REPO[/FOLDER] on the Hub."""
    revision: str | None
    """Commit of the repository; null for a local folder."""
    file: FileDigest
    """Digest of sae.safetensors."""

    def __post_init__(self) -> None:
        """Refuse a path from which `..` or another name could lead elsewhere."""
        parts, path = self.path.split("/"), Path(self.path)
        if self.revision is not None:
            names = all(_HUB_NAME.fullmatch(part) and part not in (".", "..") for part in parts)
            commit = _COMMIT.fullmatch(self.revision) is not None
            fits = 2 <= len(parts) <= 4 and names and commit
        else:
            fits = path.is_absolute() and ".." not in parts and "\0" not in self.path
        if not fits:
            raise FormatError(
                "pretrained weights of an impossible path",
                expected="USER/REPO[/FOLDER[/FOLDER]] of a commit, or an absolute path",
                got=f"{self.path!r}, revision {self.revision!r}",
            )


_HUB_NAME = re.compile(r"[\w.-]+", re.ASCII)
_COMMIT = re.compile("[0-9a-f]{40}")


@dataclass(frozen=True)
class OptionChange:
    """Options and libraries that changed when a run was resumed."""

    step: int
    """Steps done at the change."""
    changes: tuple[str, ...]
    """Changes in the form "--lr: 0.01 then, 0.02 now"."""
    versions: dict[str, str]
    """Library versions from this step on."""


@dataclass(frozen=True)
class RunRecord:
    """Settings and data that determine a run's results: the contents of run.json."""

    format_version: int
    cache: str
    """Absolute path or URL of the cache when the run was last started."""
    cache_id: str
    """Id of the cache."""
    receipts_digest: str
    """Digest over the receipts of training and held-out shards. With --follow, only of the first
    segment; segments.json pins the others when they are first used."""
    held_out: tuple[int, ...]
    """Shards that are never trained on; with --follow, those of the first segment."""
    plan: OrderPlan
    """Training shards and the order of their rows; with --follow, those of the first segment."""
    steps: int
    """Steps of the whole run. With --follow an upper bound: the text may end before its goal."""
    dead_after: int
    """Rows without firing after which a latent is dead."""
    saes: tuple[SaeEntry, ...]
    """The SAEs; an index of an SAE refers to this order."""
    options: FitConfig
    """The options as given by the user."""
    versions: dict[str, str]
    """Library versions at the start of the run."""
    segment_shards: int | None = None
    """With --follow, shards per segment; null: the run uses only the shards of `plan`."""
    extensions: int | None = None
    """With --follow, number of extensions of the cache at the start; later ones are not used."""
    pool_rows: int | None = None
    """Rows of the shuffle buffer; null in runs from before --buffer-bytes."""
    wandb_id: str | None = None
    """Run id at Weights & Biases; null until it is first logged there."""
    origins: tuple[PretrainedSource, ...] = ()
    """With --finetune, the pretrained weights of each SAE."""
    history: tuple[OptionChange, ...] = ()
    """Changes when it was resumed. `options`, `saes`, `steps` and `dead_after` are current."""
    batch_parts: int = 1
    """Processes that share each batch (--parallel ddp). Another number rounds sums differently."""
    precision: Precision | None = field(default=None, metadata=OMITTED_BY_DEFAULT)
    """Precision of matrix products, as --precision or the device at the start determined it; null
    in runs from before the option."""
    norm_limits: dict[str, float] = field(default_factory=dict, metadata=OMITTED_BY_DEFAULT)
    """With --max-norm-ratio, the largest norm of a row that is trained on, by hookpoint."""
    left_out_digest: str = field(default="", metadata=OMITTED_BY_DEFAULT)
    """With --max-norm-ratio, the digest of the rows that are left out."""
    massive: MassiveRows | None = field(
        default=None, metadata=NOT_SERIALIZED, compare=False, repr=False
    )
    """The rows that are left out, if any are: `with_massive_rows` finds them by `norm_limits`."""

    def __post_init__(self) -> None:
        """Raise `FormatError` for a record of another format version."""
        if not 1 <= self.format_version <= FORMAT_VERSION:
            raise FormatError(
                "the run has another format version",
                expected=f"1 to {FORMAT_VERSION}",
                got=self.format_version,
                remedy="install the version of actcache that started it",
            )
        _require_ranges(self)

    @property
    def training_shards(self) -> list[int]:
        """Shards that are trained on and give the mean and variance of the loss.

        With --follow, those of the first segment, so that later shards do not change the loss.
        """
        return [shard for shard, _ in self.plan.shards]

    def statistics(self, cache: Cache, hookpoint: str) -> Statistics:
        """Return the statistics of the rows that are trained on, without those left out."""
        if self.massive is not None:
            return self.massive.training.statistics[hookpoint]
        return cache.statistics(hookpoint, self.training_shards)

    @property
    def defaults(self) -> Defaults:
        """Defaults with which the run was started."""
        return DEFAULTS[self.defaults_version]

    @property
    def defaults_version(self) -> int:
        """Version of the defaults: that of the options, else that of the format."""
        return self.options.defaults or self.unnamed_defaults

    @property
    def unnamed_defaults(self) -> int:
        """Version of the defaults of a run whose options name none."""
        return 1 if self.format_version < 3 else 2

    @property
    def epochs(self) -> int | None:
        """Epochs after which the run ends; None if --max-tokens gives its length."""
        return self.options.epochs if self.options.max_tokens is None else None


_MOST = 2**53
_WANDB_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def _require_ranges(record: RunRecord) -> None:
    """Raise `FormatError` for numbers and names of a record that cannot be."""
    for name, value, least, most in (
        ("steps", record.steps, 1, _MOST),
        ("dead_after", record.dead_after, 1, _MOST),
        ("segment_shards", record.segment_shards, 1, MAX_SHARDS),
        ("extensions", record.extensions, 0, MAX_SHARDS),
        ("pool_rows", record.pool_rows, 1, _MOST),
        ("batch_parts", record.batch_parts, 1, _MOST),
    ):
        if value is not None and not least <= value <= most:
            raise FormatError(f"{name} is out of range", expected=f"{least} to {most}", got=value)
    used = Counter([*record.training_shards, *record.held_out])
    if not used or max(used.values()) > 1 or not 0 <= min(used) <= max(used) < MAX_SHARDS:
        raise FormatError(
            "shards occur twice, or are out of range", got=f"{used.most_common(3)} of {len(used)}"
        )
    for name, limit in record.norm_limits.items():
        if not 0 < limit < math.inf:
            raise FormatError(f"the norm limit of {name} is out of range", got=limit)
    names = Counter[str]()
    for sae in record.saes:
        names[sae.name] += 1
        require_entry(sae)
    if not names or max(names.values()) > 1:
        raise FormatError("a run needs SAEs of different names", got=names.most_common(3))
    if record.wandb_id is not None and not _WANDB_ID.fullmatch(record.wandb_id):
        raise FormatError("wandb_id is no id", expected=_WANDB_ID.pattern, got=record.wandb_id)


def write_run(root: Path, record: RunRecord) -> None:
    """Write run.json atomically, sealed from format 2 on."""
    write_atomic(root / RUN, [to_json(record, sealed=record.format_version > 1)])


def read_run(root: Path) -> RunRecord:
    """Read the record of the run in a folder.

    Raises:
        RunError: the folder holds no run.
        FormatError: its record is damaged.
    """
    path = root / RUN
    try:
        obj = read_json(path, links=False, sealed=_has_seal)
        record = _parse(obj, path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise RunError(
            f"{root} is not a run: it holds no {RUN}", remedy=f"saetrain fit CACHE --out {root}"
        ) from error
    except ConfigError as error:
        raise FormatError(
            f"{path} holds options that cannot be: {error.what}",
            expected=error.expected,
            got=error.got,
            remedy="restore it from a copy",
        ) from error
    shards = record.segment_shards
    if (shards is not None) != record.options.follow or (shards is not None and shards < 1):
        raise FormatError(
            f"{path} holds segments that cannot be",
            expected="segment_shards >= 1 with --follow, null without",
            got=shards,
        )
    origins = 0 if record.options.finetune is None else len(record.saes)
    if len(record.origins) != origins:
        raise FormatError(
            f"{path} holds pretrained weights of other SAEs",
            expected=f"{origins} origins: one for each SAE with --finetune, none without",
            got=len(record.origins),
        )
    return record


def _has_seal(obj: object) -> bool:
    """Return whether run.json must have a seal: unless it is an object of format 1."""
    return not isinstance(obj, dict) or obj.get("format_version") != 1


def _parse(obj: object, path: Path) -> RunRecord:
    record = parse_dataclass(RunRecord, obj, str(path))
    assert isinstance(obj, dict)
    if all("options" in sae for sae in obj["saes"]):
        return record
    # Records from before grids: every SAE has the options of the run.
    saes = tuple(dataclasses.replace(sae, options=record.options.sae) for sae in record.saes)
    return dataclasses.replace(record, saes=saes)


def absolute_cache(cache: str) -> str:
    """Return a cache's path independent of the working directory; a URL is unchanged."""
    return cache if is_url(cache) else str(Path(cache).resolve())


def receipts_digest(cache: Cache, training: list[int], held_out: list[int]) -> str:
    """Return one digest over the receipts of all shards that a run uses.

    Raises:
        CacheMismatchError: the cache no longer holds one of them.
    """
    shards = [*training, *held_out]
    if missing := sorted(set(shards) - set(cache.shards)):
        raise CacheMismatchError(
            f"{cache.root} no longer holds all shards of this run",
            expected=f"{len(shards)} shards",
            got=f"without {missing[:8]}",
            remedy="harvest again: the same command restores them",
        )
    return cache.digest(shards)


def with_massive_rows(record: RunRecord, cache: Cache) -> RunRecord:
    """Return the record with the rows that it leaves out, found in its cache by its limits.

    Raises:
        CacheMismatchError: it is another cache, its shards have changed, or it has other such rows.
        CorruptShardError: rows or statistics differ from their receipts.
    """
    if not record.norm_limits:
        return record
    _check_id(record, cache)
    _check_receipts(record, cache)
    if more := record.norm_limits.keys() - hookpoints_of(record.saes):
        raise contradiction("norm_limits", "hookpoints of its SAEs", sorted(more))
    massive = find_massive_rows(
        cache,
        hookpoints_of(record.saes),
        record.training_shards,
        record.held_out,
        record.norm_limits,
        record.options.verify,
    )
    if massive.digest != record.left_out_digest:
        raise CacheMismatchError(
            f"the rows of {cache.root} that --max-norm-ratio leaves out are not those of this run",
            expected=f"left_out_digest {record.left_out_digest}",
            got=massive.digest,
            remedy="restore run.json from a copy, or start another run",
        )
    plan = dataclasses.replace(record.plan, left_out=massive.training.left_out)
    return dataclasses.replace(record, plan=plan, massive=massive)


def check_same_cache(record: RunRecord, cache: Cache) -> None:
    """Raise `CacheMismatchError` for another cache, or if the run's shards have changed."""
    _check_id(record, cache)
    _require_derived(record, cache)
    _check_receipts(record, cache)


def _check_id(record: RunRecord, cache: Cache) -> None:
    if record.cache_id != cache.manifest.cache_id:
        raise CacheMismatchError(
            f"{cache.root} is not the cache of this run",
            expected=f"cache id {record.cache_id}",
            got=cache.manifest.cache_id,
            remedy="give the path of this run's cache",
        )


def _check_receipts(record: RunRecord, cache: Cache) -> None:
    digest = receipts_digest(cache, record.training_shards, list(record.held_out))
    if digest != record.receipts_digest:
        raise CacheMismatchError(
            f"the shards of {cache.root} have changed since this run began",
            expected=f"receipts digest {record.receipts_digest}",
            got=digest,
            remedy="restore the cache, or start another run",
        )


def _require_derived(record: RunRecord, cache: Cache) -> None:
    """Raise `FormatError` if values of a record contradict its options or its cache."""
    plan, options, width = record.plan, record.options, cache.manifest.width
    shards = {shard: rows for shard, rows in plan.shards if shard in cache.receipts}
    found = {
        "plan.batch_size": (plan.batch_size, options.batch_size),
        "plan.seed": (plan.seed, options.order_seed),
        "plan.block_rows": (plan.block_rows, cache.manifest.block_rows),
        "plan.lanes": (plan.lanes, default_lanes(plan.batch_size)),
        "rows of shards": (shards, {shard: cache.receipts[shard].rows for shard in shards}),
    }
    pool_rows = record.pool_rows or options.pool_rows
    if pool_rows is not None:
        rows = [(shard, rows) for shard, rows in plan.shards]
        sizes = plan.block_rows, plan.batch_size, plan.seed, pool_rows
        made = make_plan(rows, *sizes, plan.left_out)
        found["plan.window"] = (plan.window, made.window)
    if record.segment_shards is None:
        used = sorted([*record.training_shards, *record.held_out])
        split = split_shards(used, options.val_fraction, options.order_seed)
        found["held_out"] = ((record.training_shards, list(record.held_out)), split)
    for sae in record.saes:
        for name in sae.hookpoints:
            cache.require_hookpoint(name)
        widths = sum(map(width, sae.sources)), sum(map(width, sae.targets))
        found[f"widths of {sae.name}"] = ((sae.config.d_in, sae.config.width_out), widths)
    if record.norm_limits:
        ratio = with_defaults(options, record.unnamed_defaults).max_norm_ratio
        found["norm_limits without --max-norm-ratio"] = (not ratio, False)
    if options.dead_after is not None:
        found["dead_after"] = (record.dead_after, options.dead_after)
    for name, (recorded, expected) in found.items():
        if recorded != expected:
            raise contradiction(name, expected, recorded)


def contradiction(name: str, expected: object, got: object) -> FormatError:
    """Return the error for a value of run.json that its options or its cache contradict."""
    return FormatError(
        f"{RUN} contradicts its own options or its cache: {name}",
        expected=expected,
        got=got,
        remedy="it was edited or damaged: restore it from a copy",
    )


def changed_options(record: RunRecord, now: FitConfig) -> dict[str, str]:
    """Return the options that affect results and differ, described by field: old and new value."""
    version = record.unnamed_defaults
    then, now = with_defaults(record.options, version), with_defaults(now, version)
    return _differences(then, now, FREE_ON_RESUME, ("then", "now"))


def require_same_options(of_rank_zero: FitConfig, own: FitConfig) -> None:
    """Raise `RunError` if a process of a run was started with other options than rank 0."""
    if differ := _differences(of_rank_zero, own, _OF_ONE_PROCESS, ("on rank 0", "here")):
        raise RunError(
            "the options differ between the processes of this run",
            got="\n            ".join(differ.values()),
            remedy="give all processes the same command line",
        )


_OF_ONE_PROCESS = frozenset(
    ("cache", "out", "device", "block_cache", "block_cache_bytes", "parallel", "force_config")
)
"""Options that may differ between processes: paths and devices of their machines, and what the
record of a run leaves out."""


def _differences(
    old: FitConfig, new: FitConfig, free: frozenset[str], words: tuple[str, str]
) -> dict[str, str]:
    """Describe the options that differ, by field, except those that may."""
    before, after = values_of(old), values_of(new)
    found = {
        name: f"{flag(name)}: {before[name]!r} {words[0]}, {after[name]!r} {words[1]}"
        for name in before
        if name not in free and before[name] != after[name]
    }
    if not found and old.saes != new.saes:
        found = {"saes": "saes: the same values in other combinations"}
    return found


def check_same_run(record: RunRecord, now: RunRecord) -> None:
    """Raise `RunError` if options that affect a run's results have changed."""
    if changed := changed_options(record, now.options):
        raise RunError(
            f"{now.options.out} was started with other options",
            got="\n            ".join(changed.values()),
            remedy="repeat the options of its start (run.json lists them), or choose another "
            "--out; --force-config allows some changes, see --help",
        )
