"""Verify reports every kind of damage and nothing else; repair restores the original bytes."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actcache.cache import verify as verify_module
from actcache.cache.reader import Cache
from actcache.cache.repair import mend, retract_damaged
from actcache.cache.verify import NO_SEALS, verify
from actcache.config import HarvestConfig
from actcache.core.json_codec import to_json
from actcache.errors import (
    CacheBusyError,
    CorruptShardError,
    EmptyCacheError,
    FormatError,
    RestoreError,
)
from actcache.filesystem.atomic import digest_file
from actcache.filesystem.lock import DirectoryLock
from actcache.format.manifest import IDENTIFIED_FROM, read_manifest
from actcache.format.receipts import publish_receipt, receipt_path, retraction_path
from actcache.harvester import job, resolve
from actcache.harvester import run as run_module
from actcache.harvester.run import harvest
from actcache.storage import zarr

Options = Callable[..., HarvestConfig]
Tree = Callable[[Path | str], dict[str, str]]

VERSIONS = pytest.mark.parametrize("version", [1, 3], ids="v{}".format)

DATA = [
    "activations/layers.0/00001.safetensors",
    "activations/layers.1/00002.safetensors",
    "tokens/00001.safetensors",
    "stats/00000.safetensors",
]


@pytest.fixture
def root(make_cache: Callable[..., Path]) -> Path:
    return make_cache(shards=3, sequences=4, last_sequences=2)


def named(root: Path, **given: Any) -> list[str]:
    return [damage.file for damage in verify(root, **given).damages]


def files_below(root: Path, folder: str) -> dict[Path, bytes]:
    return {p: p.read_bytes() for p in sorted((root / folder).rglob("*")) if p.is_file()}


def flip(path: Path, offset: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 1
    path.write_bytes(data)


def write_version(version: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make harvests write caches of an earlier format version."""
    monkeypatch.setattr(resolve, "FORMAT_VERSION", version)
    begun, nothing = job._begun_before, SimpleNamespace(dataset_fingerprint="")
    if version < IDENTIFIED_FROM:
        monkeypatch.setattr(job, "_begun_before", lambda root: begun(root) or nothing)


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a sealed file, and seal it again."""
    path.write_bytes(to_json(json.loads(path.read_text()) | changes, sealed=True))


@pytest.mark.parametrize("quick", [False, True])
def test_an_undamaged_cache_has_no_findings(quick: bool, root: Path) -> None:
    found = verify(root, quick=quick)
    assert found.is_sound
    assert found.complete
    assert (found.shards, found.files) == (3, 12)
    assert found.bytes == sum(p.stat().st_size for p in root.rglob("*.safetensors"))
    assert found.leftovers == found.retracted == ()


@pytest.mark.parametrize("threads", [1, 2, 7, None])
def test_the_findings_do_not_depend_on_the_number_of_threads(threads: int, root: Path) -> None:
    for file in DATA:
        flip(root / file)
    assert named(root, threads=threads) == [
        "stats/00000.safetensors",
        "activations/layers.0/00001.safetensors",
        "tokens/00001.safetensors",
        "activations/layers.1/00002.safetensors",
    ]


@pytest.mark.parametrize("file", DATA)
def test_a_flipped_byte_in_any_file_is_found(file: str, root: Path) -> None:
    size = (root / file).stat().st_size
    for offset in (0, 7, 8, 50, 4095, 4096, size // 2, size - 1):
        flip(root / file, offset)
        (damage,) = verify(root).damages
        assert damage.file == file
        assert damage.expected != damage.got
        assert damage.expected.startswith("XXH3-128 ")
        flip(root / file, offset)
    assert verify(root).is_sound


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("file", DATA)
@pytest.mark.parametrize("damage", ["cut", "extended", "missing", "link", "folder", "pipe"])
def test_a_file_of_another_size_or_kind_is_found_by_quick_too(
    damage: str, file: str, quick: bool, root: Path, tmp_path: Path
) -> None:
    path = root / file
    size = path.stat().st_size
    if damage in ("cut", "extended"):
        os.truncate(path, size + (1 if damage == "extended" else -1))
    else:
        path.rename(tmp_path / "elsewhere")
    if damage == "link":
        path.symlink_to(tmp_path / "elsewhere")
    if damage == "folder":
        path.mkdir()
    if damage == "pipe":
        os.mkfifo(path)
    assert named(root, quick=quick) == [file]


def test_quick_checks_headers_but_not_rows(root: Path) -> None:
    flip(root / DATA[0], 9)
    flip(root / DATA[1], -1)
    assert named(root, quick=True) == [DATA[0]]
    assert named(root) == [DATA[0], DATA[1]]


def test_two_swapped_files_are_both_named(root: Path, tmp_path: Path) -> None:
    first, second = (root / f"activations/layers.0/0000{s}.safetensors" for s in (0, 1))
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    assert named(root) == [str(p.relative_to(root)) for p in (first, second)]


@pytest.mark.parametrize(
    ("changes", "file"),
    [
        ({"cache_id": "0"}, "shards/00001.json"),
        ({"shard": 2}, "shards/00001.json"),
        ({"first_sequence": 0}, "shards/00001.json"),
        ({"rows": 63}, "shards/00001.json"),
        ({"non_finite": {"layers.0": 1, "layers.1": 0}}, "stats/00001.safetensors"),
        ({"note": 1}, "shards/00001.json"),
    ],
)
def test_an_edited_receipt_is_found(changes: dict, file: str, root: Path) -> None:
    edit(receipt_path(root, 1), **changes)
    assert named(root) == [file]


def test_a_damaged_receipt_is_named_and_its_files_are_no_leftovers(root: Path) -> None:
    receipt_path(root, 1).write_text("{")
    found = verify(root)
    assert [(d.file, d.shard) for d in found.damages] == [("shards/00001.json", 1)]
    assert found.leftovers == ()
    assert found.shards == 2


def test_receipts_that_are_missing_below_the_seal_are_one_finding_a_run(root: Path) -> None:
    receipt_path(root, 1).unlink()
    assert named(root) == ["shards/00001.json"]
    receipt_path(root, 0).unlink()
    assert named(root) == ["shards/00000.json to shards/00001.json"]
    (root / "shards/END.json").unlink()
    assert verify(root).is_sound  # a shorter cache, whose other files are left over
    assert len(verify(root).leftovers) == 8


@pytest.mark.parametrize(
    "changes",
    [{"last_shard": 1}, {"last_shard": 3}, {"sequences": 9}, {"sequences": 2**53}, {"reason": "?"}],
)
def test_a_seal_that_does_not_fit_the_receipts_is_found(changes: dict, root: Path) -> None:
    edit(root / "shards/END.json", **changes)
    assert named(root) == ["shards/END.json"]


def test_a_seal_over_billions_of_shards_gives_one_finding(root: Path) -> None:
    edit(root / "manifest.json", planned_sequences=None)
    edit(root / "shards/END.json", last_shard=2**51 - 1, sequences=2**53)
    (damage,) = verify(root).damages
    assert damage.file == f"shards/00003.json to shards/{2**51 - 1}.json"


def test_a_damaged_manifest_is_the_one_finding(root: Path) -> None:
    flip(root / "manifest.json", 30)
    assert named(root) == ["manifest.json"]
    with pytest.raises(CorruptShardError, match=r"(?s)manifest\.json cannot be repaired.*copy"):
        retract_damaged(verify(root))
    (root / "manifest.json").unlink()
    with pytest.raises(EmptyCacheError):
        verify(root)


@pytest.mark.parametrize("folder", ["activations", "activations/layers.1", "tokens", "shards"])
def test_no_file_is_read_through_a_symlinked_folder(
    folder: str, root: Path, tmp_path: Path
) -> None:
    (root / folder).rename(tmp_path / "elsewhere")
    (root / folder).symlink_to(tmp_path / "elsewhere")
    assert named(root) == [folder]
    with pytest.raises(FormatError, match="is a symbolic link"):
        Cache.open(root)


@pytest.mark.parametrize("file", ["manifest.json", "shards/00001.json", "shards/END.json"])
def test_no_json_of_a_cache_is_read_through_a_link(file: str, root: Path, tmp_path: Path) -> None:
    (root / file).rename(tmp_path / "elsewhere")
    (root / file).symlink_to(tmp_path / "elsewhere")
    assert named(root) == [file]
    with pytest.raises(FormatError, match="not a plain file"):
        Cache.open(root)


def test_a_cache_is_found_through_a_link_to_it(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    assert verify(tmp_path / "link").is_sound


def test_leftovers_are_listed_and_not_deleted(root: Path, tree: Tree) -> None:
    (root / "logs").mkdir()
    (root / "logs" / "harvest-rank0.jsonl").write_text("{}")
    for name in ("notes.txt", "tokens/00007.safetensors", "stats/.00001.safetensors.partial-1"):
        (root / name).write_text("x")
    (root / "link").symlink_to("/")
    before = tree(root)
    found = verify(root)
    assert found.is_sound
    assert found.leftovers == (
        "link",
        "notes.txt",
        "stats/.00001.safetensors.partial-1",
        "tokens/00007.safetensors",
    )
    assert tree(root) == before


def test_files_of_other_programs_are_listed_and_left_alone(root: Path, tree: Tree) -> None:
    files = [".nfs0000", "shards/.ipynb_checkpoints/00001-checkpoint.json", "extensions/.DS_Store"]
    for file in files:
        (root / file).parent.mkdir(exist_ok=True)
        (root / file).write_text("{")
    before = tree(root)
    found = verify(root)
    assert (found.is_sound, list(found.leftovers)) == (True, sorted(files))
    flip(root / DATA[0])
    retract_damaged(verify(root))
    assert {name: before[name] for name in files}.items() <= tree(root).items()


def test_a_cache_without_seals_is_sound_with_a_note(make_cache: Callable[..., Path]) -> None:
    found = verify(make_cache(format_version=1))
    assert (found.is_sound, found.notes) == (True, (NO_SEALS,))


def test_a_harvest_killed_before_its_first_zarr_json_is_incomplete_and_resumes(
    options: Options, tree: Tree, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    config = options(backend="zarr")
    for calls in (0, 1):  # of two arrays
        with monkeypatch.context() as patched:
            write = zarr.write_atomic
            turns = [write, killed] if calls else [killed]
            patched.setattr(zarr, "write_atomic", lambda *given, turns=turns: turns.pop(0)(*given))
            with pytest.raises(KeyboardInterrupt):
                harvest(config)
        found = verify(config.out)
        assert (found.is_sound, found.complete) == (True, False)
    assert harvest(config).complete
    assert tree(config.out) == tree(harvest(options(backend="zarr", out=str(tmp_path / "w"))).cache)


@pytest.mark.parametrize("backend", ["memmap", "zarr"])
@pytest.mark.parametrize("moment", ["extension_files", "receipt_files", "read_end"])
def test_a_cache_that_is_extended_during_a_verification_is_sound(
    moment: str, backend: str, options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(harvest(options(backend=backend)).cache)
    read = getattr(verify_module, moment)

    def then_extended(*given: Any) -> Any:
        found = read(*given)
        monkeypatch.setattr(verify_module, moment, read)
        harvest(options(backend=backend, max_tokens=16 * 14, extend=True))
        return found

    monkeypatch.setattr(verify_module, moment, then_extended)
    found = verify(root)
    assert (found.is_sound, found.complete) == (True, True)


def test_a_harvest_that_ends_during_a_verification_is_sound(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(harvest(options()).cache)
    receipt_path(root, 2).unlink()
    (root / "shards/END.json").unlink()
    read = verify_module.receipt_files

    def then_finished(*given: Any) -> Any:
        found = read(*given)
        monkeypatch.setattr(verify_module, "receipt_files", read)
        harvest(options())
        return found

    monkeypatch.setattr(verify_module, "receipt_files", then_finished)
    assert verify(root).is_sound
    assert Cache.open(root).complete


def test_an_io_error_is_a_finding(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, *rest: Any) -> Any:
        if path.name == "00001.safetensors" and path.parent.name == "tokens":
            raise OSError(5, "Input/output error")
        return digest_file(path, *rest)

    monkeypatch.setattr("actcache.cache.verify.digest_file", fail)
    (damage,) = verify(root).damages
    assert (damage.file, damage.got) == ("tokens/00001.safetensors", "Input/output error")


# Repair.

pytestmark = pytest.mark.usefixtures("warm_model")


def repair(config: HarvestConfig) -> None:
    """Do the same as `actcache verify CACHE --repair -- MODEL DATASET ...`."""
    found = verify(config.out)
    retract_damaged(found)
    if not (found.is_sound and found.complete):
        harvest(config)


def damage_in_every_way(root: Path) -> None:
    """Damage three shards: a flipped byte, a truncated file, an edited receipt, a bad seal.

    Shards 0, 1, 2, 3 of four; the last is left alone.
    """
    flip(root / "activations/layers.0/00000.safetensors")
    os.truncate(root / "stats/00000.safetensors", 10)
    receipt = Cache.open(root).receipts[1]
    lie = dataclasses.replace(receipt.files["tokens"], xxh3_128="0" * 32)
    wrong = dataclasses.replace(receipt, files=receipt.files | {"tokens": lie})
    publish_receipt(root, read_manifest(root), wrong)
    receipt_path(root, 2).write_text("[]")
    (root / "shards/END.json").write_text("?")


def test_repair_ends_in_the_original_digests_and_touches_no_sound_shard(
    options: Options, tree: Tree
) -> None:
    config = options(max_tokens=16 * 16)
    root = Path(harvest(config).cache)
    whole = tree(root)
    sound = receipt_path(root, 3).stat().st_mtime_ns
    damage_in_every_way(root)
    found = verify(root)
    assert {damage.shard for damage in found.damages} == {None, 0, 1, 2}
    assert retract_damaged(found) == [0, 1, 2]
    cache = Cache.open(root)
    assert (cache.shards, cache.complete) == ([3], False)
    between = verify(root)
    assert between.is_sound
    assert (between.retracted, between.leftovers) == ((0, 1, 2), ())
    assert harvest(config).new_shards == 3
    assert tree(root) == whole
    assert receipt_path(root, 3).stat().st_mtime_ns == sound


def test_a_damaged_seal_alone_is_rewritten(options: Options, tree: Tree) -> None:
    root = Path(harvest(options()).cache)
    whole = tree(root)
    edit(root / "shards/END.json", sequences=9)
    repair(options())
    assert tree(root) == whole


def other_machine(patched: pytest.MonkeyPatch) -> None:
    """Give the model's activations other last digits, as another processor would."""
    run = run_module.ActivationCapture.run

    def other(*batch: Any) -> Any:
        return {name: x + 1e-3 for name, x in run(*batch).items()}

    patched.setattr(run_module.ActivationCapture, "run", other)


@VERSIONS
def test_what_cannot_be_restored_is_left_as_it_is_and_the_rest_repaired(
    version: int, options: Options, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_version(version, monkeypatch)
    root = Path(harvest(options()).cache)
    whole = tree(root)
    lost = [f"activations/layers.0/0000{shard}.safetensors" for shard in (0, 1)]
    for file in [*lost, "tokens/00001.safetensors", "tokens/00002.safetensors"]:
        flip(root / file)
    (root / "shards/END.json").write_text("?")
    damaged = tree(root)
    with monkeypatch.context() as patched:
        other_machine(patched)
        for _ in range(2):  # the first try takes nothing from the second
            with pytest.raises(RestoreError, match=r"(?s)^2 shards cannot.* 1 of its 4 files"):
                repair(options())
            assert tree(root) == whole | {file: damaged[file] for file in lost}
            assert (named(root), verify(root).complete) == (lost, True)
    repair(options())
    assert tree(root) == whole


@VERSIONS
@pytest.mark.parametrize("backend", ["memmap", "zarr"])
def test_sound_rows_outlast_a_repair_by_a_machine_that_makes_others(
    backend: str, version: int, options: Options, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_version(version, monkeypatch)
    root = Path(harvest(options(backend=backend)).cache)
    whole = tree(root)
    flip(root / "tokens/00001.safetensors")
    other_machine(monkeypatch)
    repair(options(backend=backend))
    assert tree(root) == whole


@VERSIONS
@pytest.mark.parametrize("file", ["activations/layers.0", "tokens", "stats"])
def test_a_shard_whose_receipt_and_file_are_damaged_is_restored(
    file: str, version: int, options: Options, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_version(version, monkeypatch)
    root = Path(harvest(options()).cache)
    whole = tree(root)
    flip(root / file / "00001.safetensors")
    receipt = receipt_path(root, 1)
    if version > 1:
        flip(receipt, receipt.read_bytes().index(b'"xxh3_128": "') + 14)
    else:  # readable: the rows of one file are proved by the statistics
        text = json.loads(receipt.read_text())
        text["files"]["activations/layers.0"]["xxh3_128"] = "0" * 32
        receipt.write_bytes(to_json(text))
    repair(options())
    assert tree(root) == whole


def test_a_shard_without_a_readable_receipt_stays_retracted_where_others_bytes_are_made(
    options: Options, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(harvest(options()).cache)
    whole = tree(root)
    flip(receipt_path(root, 1))
    with monkeypatch.context() as patched:
        other_machine(patched)
        with pytest.raises(RestoreError, match=r"(?s)shard 1.*receipt was damaged.*retracted"):
            repair(options())
    assert (verify(root).retracted, Cache.open(root).shards) == ((1,), [0, 2])
    data = {name: digest for name, digest in tree(root).items() if not name.startswith("shards/")}
    assert data.items() <= whole.items()
    assert harvest(options()).complete
    assert tree(root) == whole


def test_a_shard_is_not_made_again_through_a_planted_link(
    options: Options, tree: Tree, tmp_path: Path
) -> None:
    root = Path(harvest(options()).cache)
    whole = tree(root)
    flip(root / "tokens/00001.safetensors")
    (root / ".restored-00001").symlink_to(tmp_path)
    before = sorted(tmp_path.iterdir())
    repair(options())
    assert sorted(tmp_path.iterdir()) == before
    (root / ".restored-00001").unlink()
    assert tree(root) == whole


def test_a_second_repair_keeps_the_records_of_the_first(root: Path, tree: Tree) -> None:
    flip(root / DATA[0])
    retract_damaged(verify(root))
    before = tree(root)
    assert not verify(root).is_sound  # sealed, and the receipt is withdrawn
    assert retract_damaged(verify(root)) == []
    assert tree(root) == before


def test_a_damaged_record_is_found_and_made_again(options: Options, tree: Tree) -> None:
    root = Path(harvest(options()).cache)
    whole = tree(root)
    flip(root / "activations/layers.0/00001.safetensors")
    retract_damaged(verify(root))
    flip(retraction_path(root, 1), 20)
    assert "shards/00001.retracted.json" in named(root)
    with pytest.raises(FormatError, match=r"00001\.retracted\.json"):
        harvest(options())
    repair(options())  # the rows are proved by the statistics
    assert tree(root) == whole


@pytest.mark.parametrize("extended_by", [0, 9])
def test_one_flipped_bit_of_a_sealed_file_is_corrected(
    extended_by: int, make_cache: Callable[..., Path], tree: Tree
) -> None:
    root = make_cache(shards=3, sequences=4, extended_by=extended_by)
    whole = tree(root)
    files = sorted(root.rglob("*.json"))
    for path in files:
        size = path.stat().st_size
        for position in (0, size // 3, path.read_bytes().index(b'"seal"') + 12, size - 1):
            data = bytearray(path.read_bytes())
            data[position] ^= 16
            path.write_bytes(data)
            assert mend(verify(root)) == [str(path.relative_to(root))]
            assert tree(root) == whole
    assert len(files) == 5 + 4 * bool(extended_by)
    flip(files[0])
    flip(files[0], 5)
    assert mend(verify(root)) == []


def test_shards_beyond_the_plan_are_not_retracted(
    make_cache: Callable[..., Path], tree: Tree
) -> None:
    root = make_cache(shards=3, sequences=4, extended_by=9)
    (root / "extensions" / "00001.json").unlink()
    before = tree(root)
    with pytest.raises(CorruptShardError, match="cannot be repaired"):
        retract_damaged(verify(root))
    assert tree(root) == before


@pytest.mark.parametrize("file", ["tokens/00001.safetensors", "shards/00001.json"])
def test_a_folder_in_place_of_a_file_cannot_be_repaired(file: str, root: Path) -> None:
    (root / file).unlink()
    (root / file).mkdir()
    with pytest.raises(FormatError, match=f"(?s){file} is a folder.*remedy"):
        retract_damaged(verify(root))
    assert receipt_path(root, 1).exists()


def test_a_file_named_like_a_receipt_is_deleted_by_repair(root: Path, tree: Tree) -> None:
    before = tree(root)
    shutil.copy(receipt_path(root, 1), root / "shards/0000001.json")
    assert named(root) == ["shards/0000001.json"]
    assert retract_damaged(verify(root)) == []
    assert tree(root) == before


def test_a_record_of_another_shard_or_a_damaged_one_is_refused(options: Options) -> None:
    root = Path(harvest(options()).cache)
    flip(root / "tokens/00001.safetensors")
    retract_damaged(verify(root))
    path = retraction_path(root, 1)
    record = path.read_text()
    for damaged in ("{", record.replace('"shard": 1', '"shard": 2')):
        path.write_text(damaged)
        with pytest.raises(FormatError, match=r"00001\.retracted\.json"):
            harvest(options())
    path.write_text(record)
    assert harvest(options()).complete


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.soak)])
def test_a_repair_that_crashes_at_any_call_is_finished_by_the_same_command(
    step: int, options: Options, faults: Any, tree: Tree, tmp_path: Path
) -> None:
    def small(root: Path) -> HarvestConfig:
        return options(out=str(root), max_tokens=16 * 3, shard_size=2, batch_size=2)

    harvest(small(tmp_path / "whole"))
    whole = tree(tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
    flip(tmp_path / "damaged/activations/layers.0/00000.safetensors")
    (tmp_path / "damaged/shards/END.json").write_text("?")
    for number in itertools.count(0, step):
        root = tmp_path / str(number)
        shutil.copytree(tmp_path / "damaged", root)
        try:
            with faults.at(number):
                repair(small(root))
        except faults.Crash:
            assert {d.file for d in verify(root).damages} <= {
                "shards/END.json",
                "activations/layers.0/00000.safetensors",
                "shards/00000.json",
            }
        else:
            break
        repair(small(root))
        assert tree(root) == whole  # so no record of the repair is left either
        shutil.rmtree(root)
    assert tree(root) == whole
    assert number > 40


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_a_zarr_cache_is_verified_and_repaired_alike(
    compression: str, options: Options, tree: Tree
) -> None:
    config = options(backend="zarr", compress=compression)
    root = Path(harvest(config).cache)
    before = tree(root)
    assert verify(root).is_sound
    assert verify(root).leftovers == ()
    chunk = next(root.glob("activations/*/c/1/0"))
    flip(chunk)
    (damage,) = verify(root).damages
    assert (damage.file, damage.shard) == (str(chunk.relative_to(root)), 1)
    assert retract_damaged(verify(root)) == [1]
    assert harvest(config).complete
    assert tree(root) == before


def test_a_damaged_zarr_json_is_named_and_rewritten(options: Options, tree: Tree) -> None:
    config = options(backend="zarr")
    root = Path(harvest(config).cache)
    before = tree(root)
    document = next(root.glob("activations/*/zarr.json"))
    flip(document)
    assert named(root) == [str(document.relative_to(root))]
    assert retract_damaged(verify(root)) == []
    assert harvest(config).complete
    assert tree(root) == before


def test_repair_is_refused_while_a_harvest_runs(root: Path) -> None:
    flip(root / DATA[0])
    lock = DirectoryLock(root)
    lock.acquire()
    with pytest.raises(CacheBusyError):
        retract_damaged(verify(root))
    assert receipt_path(root, 1).exists()


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_damaged_scales_are_named_and_retracted(
    compression: str, make_cache: Callable[..., Path]
) -> None:
    root = make_cache(shards=3, dtype="int8", backend="zarr", compression=compression)
    assert verify(root).is_sound
    flip(root / "scales/layers.0/c/1")
    (root / "scales/layers.1/c/2").unlink()
    assert named(root, quick=True) == ["scales/layers.1/c/2"]
    found = verify(root)
    assert [d.file for d in found.damages] == ["scales/layers.0/c/1", "scales/layers.1/c/2"]
    assert found.leftovers == ()
    data = files_below(root, "scales")
    assert retract_damaged(found) == [1, 2]
    assert files_below(root, "scales") == data
    assert verify(root).leftovers == ()


def test_a_wrong_metadata_file_of_scales_is_named(make_cache: Callable[..., Path]) -> None:
    root = make_cache(dtype="float8_e4m3", backend="zarr")
    (root / "scales/layers.1/zarr.json").write_text("{}")
    assert named(root) == ["scales/layers.1/zarr.json"]
