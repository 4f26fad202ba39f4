"""What a cache says of itself: parse and serialise. Standard library only; see FORMAT.md.

`Identity` is all that decides which numbers the cache holds; the cache id is its digest. What may
differ between two copies of the same numbers (backend, shard plan, library versions, names of
things) stands in `Manifest` beside it.
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
from typing import Literal, TypeVar

from actcache.core.json_codec import NOT_SERIALIZED, parse_dataclass, read_json, to_json
from actcache.errors import EmptyCacheError, FormatError
from actcache.filesystem.paths import CachePath, CachePathT

T = TypeVar("T")

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
MAX_SHARDS = 1 << 22
"""What is kept in memory of each shard must fit there."""
EXTENSIONS = "extensions"
INPUT = ":in"
_EXTENSION_NAME = re.compile(r"[0-9]{5,9}\.json")
_MAX_EXTENSION_BYTES = 4096

_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*(:in)?")
"""Module path with an optional ':in': no separators, no '..', nothing that leaves a folder."""

DiskDtype = Literal["bfloat16", "float16", "float32", "int8", "float8_e4m3"]


@dataclass(frozen=True)
class Hookpoint:
    """One place in the model whose activations the cache holds."""

    name: str
    """Module path below the model's base, with ':in' for the module's input."""
    width: int
    """Length of one activation, d_in."""

    def __post_init__(self) -> None:
        """Names become folder names: refuse whatever could leave the cache."""
        if not _NAME.fullmatch(self.name) or len(self.name) > 200:
            raise FormatError("not a hookpoint name", expected=_NAME.pattern, got=repr(self.name))
        _at_least("width", self.width, 1, 2**24)


@dataclass(frozen=True)
class Identity:
    """Everything that decides the numbers in the cache."""

    model_fingerprint: str
    """Digest of the model's configuration and weights as loaded."""
    model_dtype: str
    """Type of the model's arithmetic."""
    tokenizer_fingerprint: str
    """Digest of the tokenizer as it was loaded; empty when the text came as token ids."""
    dataset_fingerprint: str
    """Digest of the text (see FORMAT.md: what it covers depends on the source)."""
    weights: tuple[float, ...]
    """Shares of the datasets that documents were drawn from, in their order; empty: one dataset."""
    documents: Literal["text", "chat", "ids"]
    """What a document was: text, a conversation that the chat template wrote out, or token ids."""
    column: str
    """Column the documents came from; empty for files without columns."""
    shuffle_buffer: int | None
    """Documents came as a stream, shuffled within a buffer of so many; null: all together."""
    pipeline: Literal["pack", "crop", "truncate"]
    """How documents become sequences. pack: joined by EOS, cut to ctx_len; crop: a random window
    of each; truncate: the beginning of each."""
    ctx_len: int
    """Tokens in a sequence."""
    bos_id: int | None
    """Token put first in every sequence; null: none."""
    eos_id: int | None
    """Token put after every document; null: documents came as token ids."""
    pad_id: int | None
    """Token put after sequences that are shorter than ctx_len; null: none are."""
    keep_order: bool
    """Documents were taken in the dataset's own order."""
    skip_positions: int
    """Rows at positions below this were left out."""
    exclude_special: tuple[int, ...]
    """Special tokens whose rows were left out, ascending."""
    exclude_tokens: tuple[int, ...]
    """Other tokens whose rows were left out, ascending."""
    max_norm_ratio: float | None
    """Rows of a norm over so many times their shard's median were left out; null: none."""
    hookpoints: tuple[Hookpoint, ...]
    """What is held, in the order in which it was asked for."""
    dtype: DiskDtype
    """Type of the activations on disk, little-endian."""
    via: tuple[DiskDtype, ...]
    """Types to which the rows were rounded before, in this order; none for a harvest."""
    batch_size: int
    """Sequences in a forward pass; every pass had [batch_size, ctx_len] tokens."""
    row_order: Literal["shuffled", "sequence"]
    """Order of rows within a shard."""
    seed: int
    """Seed of the order of documents and rows."""

    def __post_init__(self) -> None:
        """Check ranges."""
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
            raise FormatError("a hookpoint stands twice", got=names)

    @property
    def rows_per_sequence(self) -> int:
        """Rows that one sequence can have: those of the positions that are not skipped."""
        return self.ctx_len - self.skip_positions

    def digest(self) -> str:
        """The cache id: 128 bits of BLAKE2b over this identity's JSON."""
        return hashlib.blake2b(to_json(self), digest_size=16).hexdigest()


@dataclass(frozen=True)
class Extension:
    """A file under `extensions/`: the harvest goes on beyond its goal. Never changed either."""

    cache_id: str
    """Cache that is extended."""
    number: int
    """Which extension, from 1."""
    first_shard: int
    """Number of its first shard: as many as there were planned before."""
    first_sequence: int
    """Number of its first sequence: the goal before."""
    planned_sequences: int | None
    """The goal now, of all sequences; null: all the text there is."""


@dataclass(frozen=True)
class ShardRange:
    """Consecutive shards that were planned at once."""

    first_shard: int
    """Number of its first shard."""
    first_sequence: int
    """Number of its first sequence."""
    goal: int | None
    """Sequences of the whole harvest when this part is done; None: all of the text."""


@dataclass(frozen=True)
class ShardPlan:
    """All parts of a harvest, each going on where the one before reached its goal."""

    size: int
    """Sequences in a full shard."""
    parts: tuple[ShardRange, ...]

    def __post_init__(self) -> None:
        """Check that the parts join; they come from files."""
        first, *rest = self.parts
        assert (first.first_shard, first.first_sequence) == (0, 0)
        for part in self.parts:
            if part.goal is not None and part.goal <= part.first_sequence:
                raise FormatError(
                    "a goal that is no further than the part's first sequence",
                    expected=f"> {part.first_sequence}",
                    got=part.goal,
                )
        for before, part in pairwise([first, *rest]):
            if before.goal is None:
                raise FormatError("a part after all of the text", got=part)
            begin = (before.first_shard + self._full(before, before.goal), before.goal)
            if (part.first_shard, part.first_sequence) != begin:
                raise FormatError(
                    "a part that does not begin where the one before it ends",
                    expected=f"shard {begin[0]}, sequence {begin[1]}",
                    got=f"shard {part.first_shard}, sequence {part.first_sequence}",
                )

    @property
    def goal(self) -> int | None:
        """Sequences in all; None: all of the text."""
        return self.parts[-1].goal

    @property
    def shards(self) -> int | None:
        """Shards in all, if the text has that many; None: that is not known."""
        return None if self.goal is None else self.shards_of(self.goal)

    def shards_of(self, sequences: int) -> int:
        """How many shards hold the first `iter_sequences` sequences."""
        part = self.parts[bisect_right(self.parts, sequences, key=lambda p: p.first_sequence) - 1]
        return part.first_shard + self._full(part, sequences)

    def first_sequence(self, shard: int) -> int:
        """Number of a shard's first sequence."""
        part = self.parts[self.part_of(shard)]
        return part.first_sequence + (shard - part.first_shard) * self.size

    def max_sequences(self, shard: int) -> int:
        """Sequences that a shard holds if the text does not end before; 0 beyond the plan."""
        goal = self.parts[self.part_of(shard)].goal
        if goal is None:
            return self.size
        return max(0, min(self.size, goal - self.first_sequence(shard)))

    def is_in_last_range(self, shard: int) -> bool:
        """Whether the text may have ended in a shard: only in the last part."""
        return self.part_of(shard) == len(self.parts) - 1

    def part_of(self, shard: int) -> int:
        """Which part a shard belongs to, counted from 0."""
        return bisect_right(self.parts, shard, key=lambda p: p.first_shard) - 1

    def extended(self, goal: int | None) -> ShardPlan:
        """This plan with one more part, up to a larger goal."""
        assert self.shards is not None
        assert self.goal is not None
        return ShardPlan(self.size, (*self.parts, ShardRange(self.shards, self.goal, goal)))

    def iter_shards(self, sequences: Iterator[T], part: int = 0) -> Iterator[tuple[int, list[T]]]:
        """(shard, its sequences), up to the goal or the end of the text.

        Args:
            sequences: those from the part's first on; no more are taken than there are planned.
            part: where to begin.
        """
        for shard in count(self.parts[part].first_shard):
            most = self.max_sequences(shard)
            group = list(islice(sequences, most))
            if group:
                yield shard, group
            if not most or len(group) < most:
                return

    def _full(self, part: ShardRange, sequences: int) -> int:
        """How many shards of a part hold the harvest's first `iter_sequences` sequences."""
        return -(-(sequences - part.first_sequence) // self.size)


@dataclass(frozen=True)
class Manifest:
    """The file `manifest.json`: written first, never changed; and the extensions beside it."""

    format_version: int
    """Version of FORMAT.md that the cache follows."""
    cache_id: str
    """`identity.digest()`."""
    identity: Identity
    """What the numbers are."""
    model: str
    """The model's name as it was given (a folder: its last part)."""
    revision: str | None
    """Revision of the model, as given."""
    architecture: str
    """Class of the model."""
    dataset: str
    """The dataset's name as it was given (a file: its last part)."""
    split: str
    """Split of the dataset; empty for files without columns, which have none."""
    backend: Literal["memmap", "zarr"]
    """How shards lie on disk."""
    compression: Literal["none", "zstd"]
    """Of the activations on disk."""
    sequences_per_shard: int
    """Sequences in every shard but the last."""
    planned_sequences: int | None
    """The goal; null: all the text there is."""
    block_rows: int
    """Rows that a reader fetches at once: about 1 MiB of the widest hookpoint."""
    versions: dict[str, str]
    """Libraries that made the cache."""
    extensions: tuple[Extension, ...] = field(default=(), metadata=NOT_SERIALIZED)
    """What the files under `extensions/` say."""

    def __post_init__(self) -> None:
        """Check ranges, and that the id is that of the identity."""
        if self.format_version != FORMAT_VERSION:
            raise FormatError(
                "the cache has another format version",
                expected=FORMAT_VERSION,
                got=self.format_version,
                remedy="install the version of actcache that made it",
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
        goal = self.plan.goal  # which sees to it that the extensions join
        if self.backend == "zarr" and goal is None:
            raise FormatError("a zarr array has a length: planned_sequences", got="null")
        for number, extension in enumerate(self.extensions, start=1):
            if (extension.cache_id, extension.number) != (self.cache_id, number):
                raise FormatError(
                    "an extension that belongs elsewhere",
                    expected=f"number {number} of {self.cache_id}",
                    got=f"number {extension.number} of {extension.cache_id}",
                )
        if self.cache_id != self.identity.digest():
            raise FormatError(
                "the cache id is not that of the manifest's identity",
                expected=self.identity.digest(),
                got=self.cache_id,
                remedy="the manifest was edited or damaged; restore it from a copy",
            )

    @cached_property
    def file_names(self) -> frozenset[str]:
        """What every receipt calls the files of its shard."""
        apart = self.backend == "zarr" and self.identity.dtype in ("int8", "float8_e4m3")
        folders = ("activations", "scales") if apart else ("activations",)
        rows = {f"{folder}/{h.name}" for folder in folders for h in self.identity.hookpoints}
        return frozenset(rows | {"tokens", "stats"})

    @cached_property
    def plan(self) -> ShardPlan:
        """Which sequences each shard holds."""
        later = (
            ShardRange(e.first_shard, e.first_sequence, e.planned_sequences)
            for e in self.extensions
        )
        return ShardPlan(
            self.sequences_per_shard, (ShardRange(0, 0, self.planned_sequences), *later)
        )

    def truncated_to(self, extensions: int) -> Manifest:
        """This manifest with the first so many of its extensions."""
        return dataclasses.replace(self, extensions=self.extensions[:extensions])

    @property
    def shard_rows(self) -> int:
        """Rows that a full shard can have, before padding, tokens and norms are looked at."""
        return self.sequences_per_shard * self.identity.rows_per_sequence

    def width(self, hookpoint: str) -> int:
        """Width of one hookpoint of this cache."""
        return {h.name: h.width for h in self.identity.hookpoints}[hookpoint]


def parse_manifest(obj: object, where: str = MANIFEST) -> Manifest:
    """Decoded JSON to a checked `Manifest`; raises `FormatError`."""
    return parse_dataclass(Manifest, obj, where)


def read_manifest(root: CachePath) -> Manifest:
    """The manifest of the cache in folder `root`, with its extensions.

    Raises:
        EmptyCacheError: there is no cache.
        FormatError: the manifest or an extension is damaged or from another version.
    """
    manifest = read_first_manifest(root)
    for path in extension_files(root):
        manifest = read_extension(path, manifest)
    return manifest


def read_first_manifest(root: CachePath) -> Manifest:
    """The manifest without extensions; raises as `read_manifest`."""
    path = root / MANIFEST
    try:
        return parse_manifest(read_json(path, links=False), str(path))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise EmptyCacheError(
            f"{root} is not a cache: it holds no {MANIFEST}",
            remedy=f"actcache harvest MODEL DATASET --out {root}",
        ) from error


def extension_path(root: CachePathT, number: int) -> CachePathT:
    """Where the record of an extension lies."""
    return root / EXTENSIONS / f"{number:05d}.json"


def extension_files(root: CachePathT) -> list[CachePathT]:
    """The files that stand where records of extensions do, in their order.

    Raises:
        FormatError: their folder is a symbolic link.
    """
    folder = root / EXTENSIONS
    if folder.is_symlink():
        raise FormatError(f"{folder} is a symbolic link", expected="a folder")
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return [folder / n for n in sorted(filter(_EXTENSION_NAME.fullmatch, names), key=_number)]


def _number(name: str) -> tuple[int, str]:
    return int(name.removesuffix(".json")), name


def read_extension(path: CachePath, manifest: Manifest) -> Manifest:
    """The manifest with one more extension: the one that follows those it has.

    Raises:
        FormatError: it is damaged, or does not follow.
    """
    obj = read_json(path, _MAX_EXTENSION_BYTES, links=False)
    extension = parse_dataclass(Extension, obj, str(path))
    expected = extension_path(path.parents[1], len(manifest.extensions) + 1).name
    if path.name != expected:
        raise FormatError(
            f"{path} is not the extension that comes next", expected=expected, got=path.name
        )
    try:
        return dataclasses.replace(manifest, extensions=(*manifest.extensions, extension))
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None


def differences(ours: Manifest, theirs: Manifest) -> list[str]:
    """Fields in which two manifests ask for other bytes, as 'field: theirs, not ours'.

    Names and library versions may differ; identity, shard size and goal may not. The goal is the
    last one, however many extensions led to it.
    """
    fixed = ("backend", "compression", "sequences_per_shard", "block_rows")
    pairs = [(f, getattr(ours, f), getattr(theirs, f)) for f in fixed]
    pairs.append(("planned_sequences", ours.plan.goal, theirs.plan.goal))
    pairs += [
        (f.name, getattr(ours.identity, f.name), getattr(theirs.identity, f.name))
        for f in dataclasses.fields(Identity)
    ]
    return [f"{name}: {other!r}, not {own!r}" for name, own, other in pairs if own != other]


def _at_least(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise FormatError(f"{name} is out of range", expected=f"{low} to {high}", got=value)


def with_extension(manifest: Manifest, goal: int | None) -> Manifest:
    """The manifest with one more extension, to `goal` sequences in all (None: all of the text)."""
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
    """Versions of what decides the numbers, and the compressed bytes."""
    from importlib.metadata import version

    names = ["actcache", "torch", "transformers", "tokenizers", "datasets", "numpy"]
    names += ["numcodecs"] if compression != "none" else []
    return {name: version(name) for name in names} | {"python": platform.python_version()}
