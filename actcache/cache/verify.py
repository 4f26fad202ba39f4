"""Verify a cache: compare every byte with the receipts, and list damaged, missing and stray files.

It is read-only; `repair` retracts the damaged shards.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

from actcache.cache.folder import TEXT, data_paths
from actcache.cache.reader import Cache, symlinked_dirs
from actcache.core.arguments import SIZE, checked
from actcache.core.progress import Progress
from actcache.errors import ActcacheError, CorruptShardError, FormatError
from actcache.filesystem.atomic import digest_file
from actcache.filesystem.paths import CachePath, open_path, require_local, require_remote
from actcache.filesystem.rooted import walk
from actcache.format.manifest import (
    EXTENSIONS,
    MANIFEST,
    SEALED_FROM,
    Manifest,
    extension_files,
    read_extension,
    read_first_manifest,
)
from actcache.format.receipts import (
    END,
    FOLDER,
    CompletionMarker,
    ShardReceipt,
    count_left_out,
    read_end,
    read_receipt,
    read_retraction,
    receipt_files,
    receipt_path,
    retracted_shards,
    retraction_path,
)
from actcache.storage import BACKENDS, safetensors_io

SEAL = f"{FOLDER}/{END}"
"""Path of the seal, as in findings."""
NO_SEALS = (
    "format version 1: manifest.json, extensions, receipts and END.json have no seals, so some "
    "changes in them are not found; actcache convert makes a cache of version 2"
)
_KINDS = {stat.S_IFLNK: "a symbolic link", stat.S_IFDIR: "a folder"}


@dataclass(frozen=True)
class Finding:
    """One damaged or missing file."""

    file: str
    """Path within the cache; for a run of missing receipts 'FIRST to LAST'."""
    shard: int | None
    """Shard of the file; None: the file belongs to the whole cache."""
    expected: str
    got: str


@dataclass(frozen=True)
class Verification:
    """Result of `verify`."""

    cache: str
    quick: bool
    """Only sizes and headers were checked."""
    complete: bool
    """Whether the cache is sealed and all its shards have receipts."""
    shards: int
    files: int
    bytes: int
    """Bytes of the data files by their receipts."""
    damages: tuple[Finding, ...]
    """Damage, in the order manifest, seal, shards."""
    retracted: tuple[int, ...]
    """Retracted shards that have not been harvested again."""
    leftovers: tuple[str, ...]
    """Files without a receipt, and those of others. Harmless; a running harvest has some."""
    notes: tuple[str, ...]
    """What the format of the cache does not protect against."""
    left_out: dict[str, int]
    """Documents that the harvest could not use, by reason."""

    @property
    def is_sound(self) -> bool:
        """True if no damage was found."""
        return not self.damages


@checked(threads=SIZE)
def verify(
    root: str | os.PathLike[str] | CachePath, *, quick: bool = False, threads: int | None = None
) -> Verification:
    """Check a cache, with a progress bar.

    Args:
        root: folder or URL of the cache. With a URL the block cache is not used, and leftovers are
            not searched.
        quick: check sizes and headers only.
        threads: files read concurrently; by default the number of cores.

    Raises:
        EmptyCacheError: there is no manifest.
        ConfigError: an argument has another type or is out of range.
    """
    root = open_path(root, block_cache_bytes=0)
    state = _read_state(root)
    # A running harvest may publish between two reads: damage is what a second read finds too.
    while state.damages and (later := _read_state(root)) != state:
        state = later
    if state.manifest is None:
        return _found(root, quick, state.damages)
    cache = Cache(root, state.manifest, state.receipts, state.end)
    damages = [*_records(root, state.manifest), *_data(cache, quick, threads)]
    damages += [damage for damage in state.damages if damage.file != SEAL]
    damages.sort(key=lambda found: (-1 if found.shard is None else found.shard, found.file))
    about_end = [damage for damage in state.damages if damage.file == SEAL]
    return _found(root, quick, [*about_end, *damages], cache)


@dataclass(frozen=True)
class _State:
    """Contents of the JSON files of a cache, and the damage found in them."""

    manifest: Manifest | None
    """None: it, or what every shard depends on, is damaged, so nothing else can be checked."""
    receipts: dict[int, ShardReceipt]
    end: CompletionMarker | None
    damages: list[Finding]


def _read_state(root: CachePath) -> _State:
    """Read manifest, extensions, END.json and receipts, in this order; see `read_cache_state`."""
    file = MANIFEST
    try:
        manifest = read_first_manifest(root)
        file = EXTENSIONS
        for path in extension_files(root):
            file = f"{EXTENSIONS}/{path.name}"
            manifest = read_extension(path, manifest)
    except FormatError as error:
        return _State(None, {}, None, [_damage(file, None, error)])
    if linked := symlinked_dirs(root, manifest):
        names = [str(folder.relative_to(require_local(root))) for folder in linked]
        damages = [Finding(name, None, "a folder", "a symbolic link") for name in names]
        return _State(None, {}, None, damages)
    if damages := _documents(root, manifest):
        return _State(None, {}, None, damages)
    end, about_end = _read_end(root, manifest)
    receipts, damages = _receipts(root, manifest)
    if end is not None:
        about_end = _compare_end(end, manifest, receipts, {d.shard for d in damages})
    return _State(manifest, receipts, end, [*about_end, *damages])


def _found(
    root: CachePath, quick: bool, damages: list[Finding], cache: Cache | None = None
) -> Verification:
    files = [f for r in cache.receipts.values() for f in r.files.values()] if cache else []
    return Verification(
        cache=str(root),
        quick=quick,
        complete=cache is not None and cache.complete,
        shards=len(cache.receipts) if cache else 0,
        files=len(files),
        bytes=sum(file.bytes for file in files),
        damages=tuple(damages),
        retracted=tuple(retracted_shards(root)) if cache else (),
        leftovers=tuple(_leftovers(cache)) if cache else (),
        notes=(NO_SEALS,) if cache and cache.manifest.format_version < SEALED_FROM else (),
        left_out=count_left_out(cache.receipts.values()) if cache else {},
    )


def _damage(file: str, shard: int | None, error: ActcacheError) -> Finding:
    if error.expected is None and error.got is None:
        return Finding(file, shard, "the format of docs/format.md", error.what)
    got = error.what if error.got is None else f"{error.got} ({error.what})"
    return Finding(file, shard, error.expected or "the format of docs/format.md", got)


def _documents(root: CachePath, manifest: Manifest) -> list[Finding]:
    """Compare the backend's metadata files with the contents that follow from the manifest.

    They are published before the first shard: until then they may be missing.
    """
    damages = []
    for path, accepted in BACKENDS[manifest.backend].metadata_files(root, manifest).items():
        wanted = f"the {len(accepted[-1])} bytes that follow from the manifest"
        file = str(path.relative_to(root))
        if path.is_symlink() or not path.is_file():
            is_missing = not path.is_symlink() and not path.exists()
            if not is_missing or receipt_files(root):
                damages.append(Finding(file, None, wanted, "no plain file"))
        elif path.stat().st_size not in map(len, accepted) or path.read_bytes() not in accepted:
            damages.append(Finding(file, None, wanted, "other bytes"))
    return damages


def _receipts(root: CachePath, manifest: Manifest) -> tuple[dict[int, ShardReceipt], list[Finding]]:
    receipts, damages = {}, []
    for number, path in receipt_files(root):
        shard = number if path == receipt_path(root, number) else None
        try:
            receipts[number] = read_receipt(path, manifest)
        except FormatError as error:
            damages.append(_damage(f"{FOLDER}/{path.name}", shard, error))
        except OSError as error:
            damages.append(_unreadable(f"{FOLDER}/{path.name}", shard, error))
    return receipts, damages


def _records(root: CachePath, manifest: Manifest) -> list[Finding]:
    """Check the records of retracted shards, which list what a repair must make again."""
    damages = []
    for shard in retracted_shards(root) if isinstance(root, Path) else ():
        file = str(retraction_path(root, shard).relative_to(root))
        try:
            read_retraction(require_local(root), manifest, shard)
        except FormatError as error:
            damages.append(_damage(file, shard, error))
        except OSError as error:
            damages.append(_unreadable(file, shard, error))
    return damages


def _unreadable(file: str, shard: int | None, error: OSError) -> Finding:
    return Finding(file, shard, "a file that can be read", error.strerror or str(error))


def _read_end(root: CachePath, manifest: Manifest) -> tuple[CompletionMarker | None, list[Finding]]:
    try:
        return read_end(root, manifest), []
    except FormatError as error:
        return None, [_damage(SEAL, None, error)]
    except OSError as error:
        return None, [_unreadable(SEAL, None, error)]


def _compare_end(
    end: CompletionMarker,
    manifest: Manifest,
    receipts: dict[int, ShardReceipt],
    damaged: set[int | None],
) -> list[Finding]:
    """Check END.json against the plan and the receipts, and list the missing receipts."""
    numbers = sorted(receipts.keys() | {shard for shard in damaged if shard is not None})
    last = manifest.plan.shards_of(end.sequences) - 1
    if end.last_shard != last or (numbers and numbers[-1] > last):
        wanted = max([last, *numbers])
        return [Finding(SEAL, None, f"last_shard {wanted}", f"{end.last_shard}")]
    missing = [
        _missing(begin, stop - 1)
        for begin, stop in zip([0, *(n + 1 for n in numbers)], [*numbers, last + 1], strict=True)
        if begin < stop
    ]
    sequences = sum(receipt.sequences for receipt in receipts.values())
    if len(receipts) == last + 1 and sequences != end.sequences:
        return [Finding(SEAL, None, f"{sequences} sequences", f"{end.sequences}")]
    return missing


def _missing(first: int, last: int) -> Finding:
    """Describe a run of shards without receipts in one finding, as a bad seal can name billions."""
    file = f"{FOLDER}/{first:05d}.json"
    if last > first:
        file += f" to {FOLDER}/{last:05d}.json"
    return Finding(file, first, f"{last - first + 1} receipts: the cache is sealed", "nothing")


def _data(cache: Cache, quick: bool, threads: int | None) -> list[Finding]:
    """Check the files of all shards, in several threads."""
    tasks = [
        (shard, name, path)
        for shard in cache.receipts
        for name, path in data_paths(cache.root, cache.manifest, shard).items()
    ]
    promised = sum(f.bytes for r in cache.receipts.values() for f in r.files.values())
    bar = Progress("verify", len(tasks) if quick else promised, "files" if quick else "B")
    lock = Lock()

    def advance(units: int) -> None:
        with lock:
            bar.advance(units)

    def check(task: tuple[int, str, CachePath]) -> Finding | None:
        damage = _file(cache, *task, None if quick else advance)
        if quick:
            advance(1)
        return damage

    found: Iterable[Finding | None]
    workers = min(threads or os.cpu_count() or 1, len(tasks))
    try:
        if workers <= 1:
            found = [check(task) for task in tasks]
        else:
            with ThreadPoolExecutor(workers) as pool:
                found = list(pool.map(check, tasks))
    finally:
        bar.close()
    return [damage for damage in found if damage is not None]


def _file(
    cache: Cache, shard: int, name: str, path: CachePath, advance: Callable[[int], None] | None
) -> Finding | None:
    """Check one data file: kind, size, digest (unless quick, without `advance`) and content."""
    file = str(path.relative_to(cache.root))
    promised = cache.receipts[shard].files[name]
    try:
        found = path.lstat()
        if not stat.S_ISREG(found.st_mode):
            kind = _KINDS.get(stat.S_IFMT(found.st_mode), "a pipe or device")
            return Finding(file, shard, "a plain file", kind)
        if found.st_size != promised.bytes:
            return Finding(file, shard, f"{promised.bytes} bytes", f"{found.st_size} bytes")
        if advance is not None:
            local = path if isinstance(path, Path) else require_remote(path)
            got = digest_file(local, advance)
            if got != promised:
                return Finding(
                    file, shard, f"XXH3-128 {promised.xxh3_128}", f"XXH3-128 {got.xxh3_128}"
                )
        _content(cache, shard, name, quick=advance is None)
    except (FileNotFoundError, NotADirectoryError):
        return Finding(file, shard, f"{promised.bytes} bytes", "nothing")
    except (CorruptShardError, FormatError) as error:
        return _damage(file, shard, error)
    except OSError as error:  # such as an I/O error of a failing disk
        return _unreadable(file, shard, error)
    return None


def _content(cache: Cache, shard: int, name: str, *, quick: bool) -> None:
    """Check header and values of a file with the right digest, as the receipt may be wrong."""
    if name == "tokens":
        cache.locate_tokens(shard) if quick else cache.tokens(shard)
        return
    if name != "stats":
        part, _, hookpoint = name.partition("/")
        cache.locate(hookpoint, shard, part)
        return
    extents = cache.locate_statistics(shard)
    receipt = cache.receipts[shard]
    for hookpoint in () if quick else cache.hookpoints:
        finite = receipt.rows - receipt.non_finite[hookpoint]
        counted = int(safetensors_io.read([extents[f"{hookpoint}/norm_histogram"]])[0].sum())
        if counted != finite:
            raise CorruptShardError(
                f"statistics of {hookpoint} against the receipt",
                expected=f"{finite} finite rows",
                got=counted,
            )


def _leftovers(cache: Cache) -> list[str]:
    """List files below the cache that no receipt or metadata lists; links are not followed."""
    root, manifest = cache.root, cache.manifest
    if not isinstance(root, Path):
        return []
    known = {root / MANIFEST, root / FOLDER / END}
    known |= {*BACKENDS[manifest.backend].metadata_files(root, manifest), *extension_files(root)}
    for shard, path in receipt_files(root):
        known |= {path, *data_paths(root, manifest, shard).values()}
    for shard in retracted_shards(root):
        known |= {retraction_path(root, shard), *data_paths(root, manifest, shard).values()}
    left = [path.relative_to(root) for path, _ in walk(root) if path not in known]
    own = [path for path in left if path.parts[0] != "logs" and not path.parts[0].startswith(TEXT)]
    return sorted(map(str, own))
