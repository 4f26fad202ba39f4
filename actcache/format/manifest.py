"""The manifest of a cache, its extensions and its shard plan; see docs/format.md.

`Identity` holds every setting that decides which numbers the cache contains; the cache id is its
digest. Settings that may differ between two copies of the same numbers (backend, shard size,
library versions, names) are fields of `Manifest`.

From version 2 on, every JSON file of a cache is sealed (`actcache.core.json_codec`). From version 3
on, the identity covers all that decides the rows; harvests of earlier versions are finished under
their own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import platform
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count, islice, pairwise
from typing import TYPE_CHECKING, Literal, TypeVar

from actcache.core.json_codec import (
    NOT_SERIALIZED,
    OMITTED_BY_DEFAULT,
    is_omitted,
    parse_dataclass,
    read_json,
    sealed_unless,
    to_json,
)
from actcache.errors import EmptyCacheError, FormatError
from actcache.filesystem.paths import CachePath, CachePathT

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

T = TypeVar("T")

FORMAT_VERSION = 3
"""Version of new caches. Those of earlier versions are resumed and extended in their own."""
SEALED_FROM = 2
"""First version whose JSON files are sealed."""
IDENTIFIED_FROM = 3
"""First version whose identity covers the whole tokenizer, the clock and the commits."""
MANIFEST = "manifest.json"
MAX_SHARDS = 1 << 22
"""Bound on the memory that per-shard records take."""
EXTENSIONS = "extensions"
INPUT = ":in"
FILTERS = ("padding", "skip_positions", "exclude_special", "exclude_tokens", "max_norm_ratio")
"""Every row filter, in order of application: a dropped row counts under the first that matches."""
_UNLESS_VERSION_1 = sealed_unless("format_version", 1)
_EXTENSION_NAME = re.compile(r"[0-9]{5,9}\.json")
_MAX_EXTENSION_BYTES = 4096

_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*(:in)?")
"""Module path with an optional ':in': no separators, no '..', so it cannot leave a folder."""

DiskDtype = Literal["bfloat16", "float16", "float32", "int8", "float8_e4m3"]


@dataclass(frozen=True)
class Hookpoint:
    """One module output or input whose activations the cache holds."""

    name: str
    """Module path below the model's base, with ':in' for the module's input."""
    width: int
    """Length of one activation, d_in."""

    def __post_init__(self) -> None:
        """Refuse names that, as folder names, could leave the cache."""
        if not _NAME.fullmatch(self.name) or len(self.name) > 200:
            raise FormatError("not a hookpoint name", expected=_NAME.pattern, got=repr(self.name))
        _at_least("width", self.width, 1, 2**24)


@dataclass(frozen=True)
class Identity:
    """Every setting that decides the numbers in the cache."""

    model_fingerprint: str
    """Digest of the model's configuration and weights as loaded."""
    model_dtype: str
    tokenizer_fingerprint: str
    """Digest of the tokenizer as loaded; empty if the dataset consists of token ids."""
    dataset_fingerprint: str
    """Digest of the text; docs/format.md lists what it covers for each kind of dataset."""
    weights: tuple[float, ...]
    """Sampling shares of the datasets, in their order; empty for one dataset."""
    documents: Literal["text", "chat", "ids"]
    """Kind of a document: text, a conversation rendered by the chat template, or token ids."""
    column: str
    """Column that holds the documents; empty for files without columns."""
    shuffle_buffer: int | None
    """Buffer size, in documents, of a shuffled stream; null: the whole dataset was shuffled."""
    pipeline: Literal["pack", "crop", "truncate"]
    """Splitting of documents. pack: joined, cut to ctx_len; crop: a random window of each;
    truncate: the beginning of each."""
    ctx_len: int
    """Tokens in a sequence."""
    bos_id: int | None
    """Token put first in every sequence; null: none."""
    eos_id: int | None
    """Token put after every document that does not end with it; null: none."""
    pad_id: int | None
    """Token that fills sequences up to ctx_len; null: all sequences are full."""
    keep_order: bool
    """Documents are taken in the dataset's own order."""
    skip_positions: int
    """Rows at positions below this are dropped."""
    exclude_special: tuple[int, ...]
    """Special tokens whose rows are dropped, ascending."""
    exclude_tokens: tuple[int, ...]
    """Other tokens whose rows are dropped, ascending."""
    max_norm_ratio: float | None
    """Rows whose norm exceeds this multiple of their shard's median are dropped; null: none."""
    hookpoints: tuple[Hookpoint, ...]
    """Hookpoints of the cache, in the order of the command line."""
    dtype: DiskDtype
    """Type of the activations on disk, little-endian."""
    via: tuple[DiskDtype, ...]
    """Types to which the rows were rounded earlier, in this order; empty for a harvest."""
    batch_size: int
    """Sequences in a forward pass; every pass has [batch_size, ctx_len] tokens."""
    row_order: Literal["shuffled", "sequence"]
    """Order of rows within a shard."""
    seed: int
    """Seed of the order of documents and rows."""
    whole_rows: bool = field(default=False, metadata=OMITTED_BY_DEFAULT)
    """Documents are rows of token ids that were taken for whole sequences; pipeline is truncate."""
    template_columns: tuple[str, ...] = field(default=(), metadata=OMITTED_BY_DEFAULT)
    """What the chat template was given: messages, then further columns such as tools; of token ids,
    attention_mask if it marks padding. Empty for other documents, and in versions 1 and 2."""
    date: str | None = field(default=None, metadata=OMITTED_BY_DEFAULT)
    """Moment that the chat template reads from the clock, ISO 8601; null: it reads none."""
    model_commit: str | None = field(default=None, metadata=OMITTED_BY_DEFAULT)
    """Commit of the model's repository; null: a local folder."""
    dataset_commits: tuple[str, ...] = field(default=(), metadata=OMITTED_BY_DEFAULT)
    """Commits of the datasets' repositories, in their order; empty for local ones."""

    def __post_init__(self) -> None:
        """Check ranges and relations."""
        _at_least("ctx_len", self.ctx_len, 2, 2**31 - 1)
        _at_least("skip_positions", self.skip_positions, 0, self.ctx_len - 1)
        _at_least("batch_size", self.batch_size, 1, 2**31 - 1)
        _at_least("seed", self.seed, 0, 2**32 - 1)
        if self.shuffle_buffer is not None:
            _at_least("shuffle_buffer", self.shuffle_buffer, 1, 2**31 - 1)
        if self.max_norm_ratio is not None and not self.max_norm_ratio > 0:
            raise FormatError("max_norm_ratio is not above 0", got=self.max_norm_ratio)
        if self.weights and not min(self.weights) > 0:
            raise FormatError("a dataset's weight is not above 0", got=self.weights)
        if (self.pad_id is None) != (self.pipeline == "pack"):
            raise FormatError(
                "pad_id does not agree with the pipeline",
                expected="null with pack, a token with crop and truncate",
                got=f"{self.pad_id} with {self.pipeline}",
            )
        for ids in (self.exclude_special, self.exclude_tokens):
            if list(ids) != sorted(set(ids)):
                raise FormatError("excluded tokens are not in ascending order", got=ids)
        if not self.hookpoints:
            raise FormatError("a cache without hookpoints", expected="at least one", got="none")
        names = [hookpoint.name for hookpoint in self.hookpoints]
        if len(set(names)) != len(names):
            raise FormatError("a hookpoint occurs twice", got=names)

    @property
    def rows_per_sequence(self) -> int:
        """Largest number of rows of one sequence: the positions that are not skipped."""
        return self.ctx_len - self.skip_positions

    @cached_property
    def _digest(self) -> str:
        return hashlib.blake2b(to_json(self), digest_size=16).hexdigest()

    def digest(self) -> str:
        """Return the cache id: 128 bits of BLAKE2b over this identity's JSON."""
        return self._digest


def kept_positions(
    identity: Identity, tokens: NDArray[np.int32], lengths: NDArray[np.int32]
) -> tuple[NDArray[np.bool_], dict[str, int]]:
    """Apply the filters that depend on the text alone.

    A dropped position has no row at any hookpoint.

    Args:
        identity: holds the filters.
        tokens: token ids. [S, C]
        lengths: tokens of each sequence before its padding. [S]

    Returns:
        A mask of the kept positions [S, C], and the number of dropped positions by filter
        (0 for the norm filter).
    """
    import numpy as np  # --help reads this module

    positions = np.arange(tokens.shape[1])
    filters = {
        "padding": positions >= lengths[:, None],
        "skip_positions": np.broadcast_to(positions < identity.skip_positions, tokens.shape),
        "exclude_special": np.isin(tokens, np.asarray(identity.exclude_special, np.int32)),
        "exclude_tokens": np.isin(tokens, np.asarray(identity.exclude_tokens, np.int32)),
    }
    kept = np.ones(tokens.shape, dtype=bool)
    dropped = dict.fromkeys(FILTERS, 0)
    for name, out in filters.items():
        dropped[name] = int((kept & out).sum())
        kept &= ~out
    return kept, dropped


@dataclass(frozen=True)
class Extension:
    """A file under `extensions/`, never changed: it continues the harvest to a larger goal."""

    cache_id: str
    number: int
    """Number of the extension, from 1."""
    first_shard: int
    """Number of its first shard, equal to the number of shards planned before it."""
    first_sequence: int
    """Number of its first sequence, equal to the previous goal."""
    planned_sequences: int | None
    """New goal in sequences, counted from the start of the cache; null: the whole dataset."""


@dataclass(frozen=True)
class ShardRange:
    """Consecutive shards planned together: those of the first harvest, or of one extension."""

    first_shard: int
    first_sequence: int
    """Number of the first sequence of the first shard."""
    goal: int | None
    """Sequences of the cache at the end of this range; None: the whole dataset."""


@dataclass(frozen=True)
class ShardPlan:
    """Assignment of a cache's sequences to shards.

    Every shard is full except the last of each range. A short shard stays as it is when an
    extension continues the harvest.
    """

    size: int
    """Sequences in a full shard."""
    parts: tuple[ShardRange, ...]
    """Ranges of the first harvest and of each extension; each begins where the previous ends."""

    def __post_init__(self) -> None:
        """Check that the ranges are contiguous, as they come from files."""
        first, *rest = self.parts
        assert (first.first_shard, first.first_sequence) == (0, 0)
        for part in self.parts:
            if part.goal is not None and part.goal <= part.first_sequence:
                raise FormatError(
                    "the goal of a shard range is not beyond its first sequence",
                    expected=f"> {part.first_sequence}",
                    got=part.goal,
                )
        for before, part in pairwise([first, *rest]):
            if before.goal is None:
                raise FormatError("an extension after the end of the dataset", got=part)
            begin = (before.first_shard + self._full(before, before.goal), before.goal)
            if (part.first_shard, part.first_sequence) != begin:
                raise FormatError(
                    "an extension does not begin where the previous range of shards ends",
                    expected=f"shard {begin[0]}, sequence {begin[1]}",
                    got=f"shard {part.first_shard}, sequence {part.first_sequence}",
                )

    @property
    def goal(self) -> int | None:
        """Sequences of the whole cache; None: the whole dataset."""
        return self.parts[-1].goal

    @property
    def shards(self) -> int | None:
        """Number of shards if the dataset reaches the goal; None without a goal."""
        return None if self.goal is None else self.shards_of(self.goal)

    def shards_of(self, sequences: int) -> int:
        """Return how many shards hold the first `sequences` sequences."""
        part = self.parts[bisect_right(self.parts, sequences, key=lambda p: p.first_sequence) - 1]
        return part.first_shard + self._full(part, sequences)

    def first_sequence(self, shard: int) -> int:
        """Return the number of a shard's first sequence."""
        part = self.parts[self.part_of(shard)]
        return part.first_sequence + (shard - part.first_shard) * self.size

    def max_sequences(self, shard: int) -> int:
        """Return the planned sequences of a shard, 0 beyond the plan; the dataset may end first."""
        goal = self.parts[self.part_of(shard)].goal
        if goal is None:
            return self.size
        return max(0, min(self.size, goal - self.first_sequence(shard)))

    def is_in_last_range(self, shard: int) -> bool:
        """Return whether a shard is in the last range, where the dataset may have ended."""
        return self.part_of(shard) == len(self.parts) - 1

    def part_of(self, shard: int) -> int:
        """Return the index of the range that a shard belongs to."""
        return bisect_right(self.parts, shard, key=lambda p: p.first_shard) - 1

    def extended(self, goal: int | None) -> ShardPlan:
        """Return this plan with one more range, up to a larger goal."""
        assert self.shards is not None
        assert self.goal is not None
        return ShardPlan(self.size, (*self.parts, ShardRange(self.shards, self.goal, goal)))

    def iter_shards(self, sequences: Iterator[T], part: int = 0) -> Iterator[tuple[int, list[T]]]:
        """Group sequences into (shard, its sequences), up to the goal or the end of the dataset.

        Args:
            sequences: sequences from the first of the range; none beyond the goal is consumed.
            part: index of the range to begin with.
        """
        for shard in count(self.parts[part].first_shard):
            most = self.max_sequences(shard)
            group = list(islice(sequences, most))
            if group:
                yield shard, group
            if not most or len(group) < most:
                return

    def _full(self, part: ShardRange, sequences: int) -> int:
        """Count the shards of a range up to sequence number `sequences` of the cache."""
        return -(-(sequences - part.first_sequence) // self.size)


@dataclass(frozen=True)
class Manifest:
    """The file `manifest.json`, written first and never changed, with the cache's extensions."""

    format_version: int
    """Version of the format (docs/format.md) that the cache follows."""
    cache_id: str
    """`identity.digest()`."""
    identity: Identity
    model: str
    """Name of the model as given on the command line (of a folder: its last component)."""
    revision: str | None
    """Revision of the model, as given on the command line."""
    architecture: str
    dataset: str
    """Name of the dataset as given on the command line (of a file: its last component)."""
    split: str
    """Split of the dataset; empty for files without columns, which have none."""
    backend: Literal["memmap", "zarr"]
    """Storage backend of the shards."""
    compression: Literal["none", "zstd"]
    """Compression of the activations on disk."""
    sequences_per_shard: int
    """Sequences in every shard but the last."""
    planned_sequences: int | None
    """Goal of the first harvest; null: the whole dataset."""
    block_rows: int
    """Rows that a reader fetches at once: about 1 MiB of the widest hookpoint."""
    versions: dict[str, str]
    """Versions of the libraries that wrote the cache."""
    extensions: tuple[Extension, ...] = field(default=(), metadata=NOT_SERIALIZED)
    """Contents of the files under `extensions/`."""

    def __post_init__(self) -> None:
        """Check ranges and relations, and the cache id against the identity."""
        if not 1 <= self.format_version <= FORMAT_VERSION:
            raise FormatError(
                "the cache has another format version",
                expected=f"1 to {FORMAT_VERSION}",
                got=self.format_version,
                remedy="install the version of actcache that wrote it",
            )
        if self.format_version < IDENTIFIED_FROM and (new := _new_keys(self.identity)):
            raise FormatError(
                f"the identity has keys that format version {self.format_version} does not have",
                expected=f"format version {IDENTIFIED_FROM}, or none of them",
                got=", ".join(new),
                remedy="the manifest was edited or damaged; restore it from a copy",
            )
        _at_least("sequences_per_shard", self.sequences_per_shard, 1, 2**31 - 1)
        _at_least("block_rows", self.block_rows, 1, 2**31 - 1)
        if self.planned_sequences is not None:
            _at_least("planned_sequences", self.planned_sequences, 1, 2**53)
        if (self.planned_sequences or 0) > MAX_SHARDS * self.sequences_per_shard:
            raise FormatError(
                "more shards are planned than a cache can have",
                expected=f"<= {MAX_SHARDS:,}",
                got=f"{self.planned_sequences} sequences in shards of {self.sequences_per_shard}",
                remedy="a larger --shard-size",
            )
        if self.backend == "memmap" and self.compression != "none":
            raise FormatError("memmap is never compressed", expected="none", got=self.compression)
        goal = self.plan.goal  # building the plan checks that the extensions are contiguous
        if self.backend == "zarr" and goal is None:
            raise FormatError("a zarr array has a length: planned_sequences", got="null")
        for number, extension in enumerate(self.extensions, start=1):
            if (extension.cache_id, extension.number) != (self.cache_id, number):
                raise FormatError(
                    "an extension belongs to another cache or has another number",
                    expected=f"number {number} of {self.cache_id}",
                    got=f"number {extension.number} of {extension.cache_id}",
                )
        if self.cache_id != self.identity.digest():
            raise FormatError(
                "the cache id is not the digest of the manifest's identity",
                expected=self.identity.digest(),
                got=self.cache_id,
                remedy="the manifest was edited or damaged; restore it from a copy",
            )

    @cached_property
    def file_names(self) -> frozenset[str]:
        """Logical file names that the receipt of every shard lists."""
        has_scales = self.backend == "zarr" and self.identity.dtype in ("int8", "float8_e4m3")
        folders = ("activations", "scales") if has_scales else ("activations",)
        rows = {f"{folder}/{h.name}" for folder in folders for h in self.identity.hookpoints}
        return frozenset(rows | {"tokens", "stats"})

    @cached_property
    def plan(self) -> ShardPlan:
        """Shard plan of the first harvest and all extensions."""
        later = (
            ShardRange(e.first_shard, e.first_sequence, e.planned_sequences)
            for e in self.extensions
        )
        return ShardPlan(
            self.sequences_per_shard, (ShardRange(0, 0, self.planned_sequences), *later)
        )

    def truncated_to(self, extensions: int) -> Manifest:
        """Return this manifest with its first `extensions` extensions only."""
        return dataclasses.replace(self, extensions=self.extensions[:extensions])

    @property
    def shard_rows(self) -> int:
        """Largest number of rows of a full shard, before row filters."""
        return self.sequences_per_shard * self.identity.rows_per_sequence

    def width(self, hookpoint: str) -> int:
        """Return the width of a hookpoint."""
        return {h.name: h.width for h in self.identity.hookpoints}[hookpoint]


def _new_keys(identity: Identity) -> list[str]:
    """List the fields that came with version 3, as far as they differ from what absence means."""
    fields = (f for f in dataclasses.fields(Identity) if is_omitted(f))
    return [f.name for f in fields if getattr(identity, f.name) != f.default]


def parse_manifest(obj: object, where: str = MANIFEST) -> Manifest:
    """Check decoded JSON and build a `Manifest`; raises `FormatError`."""
    return parse_dataclass(Manifest, obj, where)


def read_manifest(root: CachePath) -> Manifest:
    """Read the manifest of the cache in folder `root`, with its extensions.

    Raises:
        EmptyCacheError: the folder holds no manifest.
        FormatError: the manifest or an extension is damaged or from another version.
    """
    manifest = read_first_manifest(root)
    for path in extension_files(root):
        manifest = read_extension(path, manifest)
    return manifest


def read_first_manifest(root: CachePath) -> Manifest:
    """Read the manifest without its extensions; raises as `read_manifest`."""
    path = root / MANIFEST
    try:
        return parse_manifest(read_json(path, links=False, sealed=_UNLESS_VERSION_1), str(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise EmptyCacheError(
            f"{root} is not a cache: it holds no {MANIFEST}",
            remedy=f"actcache harvest MODEL DATASET --out {root}",
        ) from error


def extension_path(root: CachePathT, number: int) -> CachePathT:
    """Return the path of the file of an extension."""
    return root / EXTENSIONS / f"{number:05d}.json"


def extension_files(root: CachePathT) -> list[CachePathT]:
    """List the files under `extensions/` by number; raises `FormatError` if it is a link."""
    folder = root / EXTENSIONS
    if folder.is_symlink():
        raise FormatError(f"{folder} is a symbolic link", expected="a folder")
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = sorted((int(n[:-5]), n) for n in names if _EXTENSION_NAME.fullmatch(n))
    return [folder / name for _, name in found]


def read_extension(path: CachePath, manifest: Manifest) -> Manifest:
    """Read the next extension of a manifest and return the manifest with it.

    Raises:
        FormatError: the file is damaged, or is not the next extension.
    """
    obj = read_json(
        path, _MAX_EXTENSION_BYTES, links=False, sealed=manifest.format_version >= SEALED_FROM
    )
    extension = parse_dataclass(Extension, obj, str(path))
    expected = extension_path(path.parents[1], len(manifest.extensions) + 1).name
    if path.name != expected:
        raise FormatError(f"{path} is not the next extension", expected=expected, got=path.name)
    try:
        return dataclasses.replace(manifest, extensions=(*manifest.extensions, extension))
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None


_KEEP = "go on with the files that it was begun with"
_SHOWN = {
    "model_fingerprint": ("model", "its weights or configuration have changed"),
    "tokenizer_fingerprint": ("tokenizer", _KEEP),
    "dataset_fingerprint": ("text", _KEEP),
    "model_commit": ("model commit", "--revision {}"),
    "dataset_commits": ("dataset commits", "--dataset-revision {}"),
    "date": ("date", "--date {}"),
    "eos_id": ("separator", "--separator {}"),
    "whole_rows": ("whole rows", "--id-rows says whether rows of token ids are whole"),
    "template_columns": ("columns", "of the template, or attention_mask"),
}
"""How errors call a field, if not by its name, and the remedy."""


def differences(new: Manifest, existing: Manifest) -> list[str]:
    """List what makes two manifests describe other bytes, as 'name: existing, not new (remedy)'.

    Names and library versions are not compared; identity, backend, shard size and goal are. The
    goal is that of the last extension.
    """
    fixed = ("backend", "compression", "sequences_per_shard", "block_rows")
    pairs = [(f, getattr(new, f), getattr(existing, f)) for f in fixed]
    pairs.append(("planned_sequences", new.plan.goal, existing.plan.goal))
    pairs += [
        (f.name, getattr(new.identity, f.name), getattr(existing.identity, f.name))
        for f in dataclasses.fields(Identity)
    ]
    return [_difference(name, before, now) for name, now, before in pairs if now != before]


def _difference(field: str, before: object, now: object) -> str:
    name, remedy = _SHOWN.get(field, (field, ""))
    if before is None and field in ("eos_id", "model_commit"):
        remedy = "--separator none" if field == "eos_id" else _KEEP
    elif "{}" in remedy:
        values = before if isinstance(before, tuple) else (before,)
        given = before not in (None, ())
        remedy = (
            " ".join(remedy.format("''" if value == "" else value) for value in values)
            if given
            else ""
        )
        if given and not now and field.endswith(("_commit", "_commits")):
            remedy = f"by its name on the hub, with {remedy}"  # a local copy has no revision
    return f"{name}: {before!r}, not {now!r}" + (f" ({remedy})" if remedy else "")


def _at_least(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise FormatError(f"{name} is out of range", expected=f"{low} to {high}", got=value)


def with_extension(manifest: Manifest, goal: int | None) -> Manifest:
    """Return the manifest with one more extension, up to `goal` sequences (None: all text)."""
    part = manifest.plan.extended(goal).parts[-1]
    extension = Extension(
        cache_id=manifest.cache_id,
        number=len(manifest.extensions) + 1,
        first_shard=part.first_shard,
        first_sequence=part.first_sequence,
        planned_sequences=goal,
    )
    return dataclasses.replace(manifest, extensions=(*manifest.extensions, extension))


def library_versions(compression: str) -> dict[str, str]:
    """Return the versions of the libraries that decide the numbers and the compressed bytes."""
    from importlib.metadata import version

    names = ["actcache", "torch", "transformers", "tokenizers", "datasets", "numpy"]
    names += ["numcodecs"] if compression != "none" else []
    return {name: version(name) for name in names} | {"python": platform.python_version()}
