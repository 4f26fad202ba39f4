"""A converted cache equals, byte for byte, a harvest with the same options where possible."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from actcache.cache.convert import ConversionSummary, convert, roundings_before
from actcache.cache.reader import Cache
from actcache.cache.repair import retract_damaged
from actcache.cache.verify import verify
from actcache.config import ConvertConfig, HarvestConfig
from actcache.core.json_codec import to_json
from actcache.errors import (
    CacheBusyError,
    CacheMismatchError,
    ConfigError,
    CorruptShardError,
    DiskFullError,
    EmptyCacheError,
)
from actcache.filesystem.lock import DirectoryLock
from actcache.format.manifest import Identity, read_manifest
from actcache.format.receipts import receipt_path
from actcache.harvester.run import harvest

Options = Callable[..., HarvestConfig]
Make = Callable[..., Path]
Tree = Callable[[Path | str], dict[str, str]]
Killed = Callable[[int, Callable[[], object]], bool]

ZSTD = {"backend": "zarr", "compress": "zstd"}
TARGETS: list[dict[str, Any]] = [
    {},
    {"backend": "zarr"},
    ZSTD,
    {"dtype": "float32"},
    {"dtype": "float16", "backend": "zarr"},
    {"dtype": "int8"},
    {"dtype": "int8", **ZSTD},
    {"dtype": "float8_e4m3"},
    {"dtype": "float8_e4m3", "backend": "zarr"},
]
FILTERS: dict[str, Any] = {
    "pipeline": "truncate",
    "exclude_special": True,
    "max_norm_ratio": 1.2,
    "skip_positions": 2,
    "ctx_len": 64,
    "max_tokens": None,
    "hookpoint": ("layers.1",),
}


def run(source: Path | str, out: Path | str, **given: Any) -> ConversionSummary:
    return convert(ConvertConfig(str(source), str(out), **given))


@pytest.fixture
def source(make_cache: Make) -> Path:
    """Harvest a sealed bfloat16 cache of a float32 model: three shards, the last one short."""
    return make_cache(shards=3, sequences=4, last_sequences=2, dtype="bfloat16")


# What comes out.


@pytest.mark.parametrize("target", TARGETS, ids=str)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_rows_in_the_models_type_convert_to_the_bytes_of_a_harvest(
    dtype: str, target: dict[str, Any], options: Options, tmp_path: Path, tree: Tree
) -> None:
    model = {"model_dtype": dtype, "hookpoint": ("layers.1",), "max_tokens": 16 * 6}
    config = options(out=str(tmp_path / "source"), **model)
    wanted = {"dtype": dtype} | target
    harvested = harvest(options(out=str(tmp_path / "harvested"), **model, **wanted)).cache
    found = run(harvest(config).cache, tmp_path / "converted", **target)
    assert tree(found.cache) == tree(harvested)
    assert found.complete
    assert found.via == ()
    assert verify(found.cache).is_sound


def test_filters_and_padding_pass_through_a_conversion(
    options: Options, tmp_path: Path, tree: Tree
) -> None:
    source = harvest(options(out=str(tmp_path / "source"), **FILTERS)).cache
    asked = {"dtype": "int8", "backend": "zarr"}
    harvested = harvest(options(out=str(tmp_path / "harvested"), **FILTERS, **asked)).cache
    found = run(source, tmp_path / "converted", **asked)
    assert tree(found.cache) == tree(harvested)
    receipts = Cache.open(found.cache).receipts.values()
    assert sum(receipt.dropped["max_norm_ratio"] for receipt in receipts) > 0
    assert sum(receipt.dropped["padding"] for receipt in receipts) > 0


def test_converting_back_restores_the_same_cache(
    options: Options, tmp_path: Path, tree: Tree
) -> None:
    source = harvest(options(out=str(tmp_path / "source"), model_dtype="bfloat16")).cache
    narrow = {"dtype": "bfloat16", "backend": "memmap"}
    steps: list[dict[str, Any]] = [ZSTD, {"dtype": "float32"}, narrow]
    here = source
    for number, step in enumerate(steps):
        here = run(here, tmp_path / str(number), **step).cache
    assert read_manifest(Path(here)) == read_manifest(Path(source))
    assert tree(here) == tree(source)


def test_a_lossy_rounding_changes_the_cache_id(
    options: Options, tmp_path: Path, tree: Tree
) -> None:
    """float32 rows that were bfloat16 are not the model's float32 rows."""
    rounded = harvest(options(out=str(tmp_path / "source"), dtype="bfloat16")).cache
    exact = harvest(options(out=str(tmp_path / "harvested"))).cache
    wide = run(rounded, tmp_path / "wide", dtype="float32")
    assert wide.via == ("bfloat16",)
    assert wide.cache_id != read_manifest(Path(exact)).cache_id
    source, found = Cache.open(rounded), Cache.open(wide.cache)
    for shard, name in itertools.product(source.shards, source.hookpoints):
        expected = source.row_dtype.to_torch(source.read(name, shard)).float()
        assert torch.equal(found.row_dtype.to_torch(found.read(name, shard)), expected)
        statistics = found.statistics(name, [shard])
        np.testing.assert_array_equal(statistics.total, source.statistics(name, [shard]).total)
    back = run(wide.cache, tmp_path / "back", dtype="bfloat16")
    assert back.via == ()
    assert tree(back.cache) == tree(rounded)


def test_8_bit_rows_are_copied_unchanged_between_backends(
    make_cache: Make, tmp_path: Path, tree: Tree
) -> None:
    source = make_cache(dtype="int8")
    packed = run(source, tmp_path / "packed", **ZSTD)
    assert packed.cache_id == read_manifest(source).cache_id
    back = run(packed.cache, tmp_path / "back", backend="memmap")
    assert tree(back.cache) == tree(source)


def test_every_type_that_rows_were_rounded_to_is_listed(source: Path, tmp_path: Path) -> None:
    here, via = source, []
    for dtype in ("int8", "float32", "float8_e4m3", "float16"):
        summary = run(here, tmp_path / dtype, dtype=dtype)
        here = Path(summary.cache)
        via.append(summary.via)
    eight = ("bfloat16", "int8")
    assert via == [("bfloat16",), eight, eight, (*eight, "float8_e4m3")]
    cache = Cache.open(here)
    assert cache.manifest.identity.via == via[-1]
    assert verify(here).is_sound


@pytest.mark.parametrize(
    ("model", "dtype", "via", "to", "expected"),
    [
        ("bfloat16", "bfloat16", (), "int8", ()),
        ("bfloat16", "float32", (), "int8", ()),
        ("float16", "float32", (), "bfloat16", ()),
        ("float64", "float32", (), "int8", ("float32",)),
        ("float64", "float64", (), "float32", ()),
        ("bfloat16", "float16", (), "float32", ("float16",)),
        ("float16", "bfloat16", (), "float16", ("bfloat16",)),
        ("float32", "bfloat16", (), "float32", ("bfloat16",)),
        ("float32", "float32", ("bfloat16",), "bfloat16", ()),
        ("float32", "float32", ("bfloat16",), "int8", ("bfloat16",)),
        ("float32", "bfloat16", (), "bfloat16", ()),
        ("float32", "int8", (), "float32", ("int8",)),
        ("float32", "float32", ("int8",), "int8", ("int8",)),
        ("float32", "int8", ("bfloat16",), "int8", ("bfloat16",)),
        ("float32", "float16", ("bfloat16",), "bfloat16", ("bfloat16", "float16")),
    ],
)
def test_lossless_steps_are_not_listed_and_rounding_twice_is_rounding_once(
    model: str, dtype: Any, via: tuple[Any, ...], to: Any, expected: tuple[str, ...], source: Path
) -> None:
    identity: Identity = dataclasses.replace(
        read_manifest(source).identity, model_dtype=model, dtype=dtype, via=via
    )
    assert roundings_before(identity, to) == expected


def test_non_finite_rows_stay_non_finite(make_cache: Make, tmp_path: Path) -> None:
    def rows(hookpoint: str, shard: int, count: int, width: int) -> np.ndarray:
        x = np.ones((count, width), dtype=np.float32)
        x[3, 2], x[7, 0], x[9] = np.nan, np.inf, -np.inf
        return x

    source = make_cache(rows=rows)
    for dtype in ("bfloat16", "float16", "int8", "float8_e4m3"):
        cache = Cache.open(run(source, tmp_path / dtype, dtype=dtype).cache)
        for receipt in cache.receipts.values():
            assert receipt.non_finite == {"layers.0": 3, "layers.1": 3}
        x = cache.row_dtype.to_float32(cache.read("layers.0", 0))
        assert (~np.isfinite(x).all(axis=1)).sum() == 3


# Extended.


@pytest.mark.parametrize("target", [{}, {"dtype": "int8", "backend": "zarr"}, ZSTD], ids=str)
def test_an_extended_cache_is_converted_whole_or_after_each_extension(
    target: dict[str, Any], options: Options, tmp_path: Path, tree: Tree
) -> None:
    for goal in (6, 11, 13):
        goes = {"max_tokens": 16 * goal, "extend": goal > 6, "hookpoint": ("layers.1",)}
        source = harvest(options(out=str(tmp_path / "source"), **goes)).cache
        harvested = harvest(options(out=str(tmp_path / "harvested"), **goes, **target)).cache
        step = run(source, tmp_path / "steps", **target)
        assert step.complete
        assert tree(step.cache) == tree(harvested)
    whole = run(source, tmp_path / "whole", **target)
    assert tree(whole.cache) == tree(harvested)
    assert len(read_manifest(tmp_path / "whole").extensions) == 2
    assert verify(whole.cache).is_sound


def test_a_conversion_resumes_after_a_crash_during_an_extension(
    options: Options, faults: Any, tmp_path: Path, tree: Tree
) -> None:
    goes: dict[str, Any] = {"out": str(tmp_path / "source"), "hookpoint": ("layers.1",)}
    harvest(options(max_tokens=16 * 6, **goes))
    run(tmp_path / "source", tmp_path / "before", backend="zarr")
    harvest(options(max_tokens=16 * 9, extend=True, **goes))
    whole = tree(run(tmp_path / "source", tmp_path / "whole", backend="zarr").cache)
    for number in range(0, 40, 2):
        out = tmp_path / str(number)
        shutil.copytree(tmp_path / "before", out)
        with contextlib.suppress(faults.Crash), faults.at(number):
            run(tmp_path / "source", out, backend="zarr")
        run(tmp_path / "source", out, backend="zarr")
        assert tree(out) == whole, number


def test_a_folder_with_extensions_that_the_source_lacks_is_another_cache(
    options: Options, tmp_path: Path, tree: Tree
) -> None:
    goes: dict[str, Any] = {"hookpoint": ("layers.1",)}
    source = harvest(options(out=str(tmp_path / "short"), max_tokens=96, **goes)).cache
    longer = harvest(options(out=str(tmp_path / "long"), max_tokens=96, **goes)).cache
    harvest(options(out=longer, max_tokens=160, extend=True, **goes))
    run(longer, tmp_path / "out")
    before = tree(tmp_path / "out")
    with pytest.raises(CacheMismatchError, match="planned_sequences: 10, not 6"):
        run(source, tmp_path / "out")
    assert tree(tmp_path / "out") == before


# Stopped, and gone on with.


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.soak)])
@pytest.mark.parametrize("target", [{}, {"dtype": "int8", "backend": "zarr"}], ids=str)
def test_a_conversion_killed_at_any_call_is_finished_by_the_same_command(
    target: dict[str, Any], step: int, make_cache: Make, killed: Killed, tmp_path: Path, tree: Tree
) -> None:
    shape: dict[str, Any] = {"shards": 2, "sequences": 2, "hookpoints": {"layers.0": 4}}
    source = make_cache(dtype="bfloat16", **shape)
    given = tree(source)
    whole = tree(run(source, tmp_path / "whole", **target).cache)
    for number in itertools.count(step // 2, step):
        out = tmp_path / str(number)
        if not killed(number, lambda out=out: run(source, out, **target)):
            break
        assert tree(source) == given
        if (out / "manifest.json").exists():
            found = verify(out)
            assert found.is_sound, found.damages
            ended = {name for name in tree(out) if ".partial-" not in name}
            assert found.complete == (ended == set(whole)), number
        assert run(source, out, **target).complete
        assert tree(out) == whole, number
        shutil.rmtree(out)
    assert tree(out) == whole
    assert number > 40


@pytest.mark.parametrize("number", [4, 9, 14])
def test_a_full_disk_raises_disk_full_error_and_leaves_no_file_of_the_shard(
    number: int, source: Path, faults: Any, tmp_path: Path, tree: Tree
) -> None:
    import errno

    whole = tree(run(source, tmp_path / "whole", dtype="int8").cache)
    with (
        pytest.raises(DiskFullError, match="no room"),
        faults.at(number * 4, OSError(errno.ENOSPC, "No space left on device")),
    ):
        run(source, tmp_path / "out", dtype="int8")
    assert verify(tmp_path / "out").leftovers == ()
    run(source, tmp_path / "out", dtype="int8")
    assert tree(tmp_path / "out") == whole


def test_a_repeated_conversion_writes_nothing(source: Path, tmp_path: Path, tree: Tree) -> None:
    first = run(source, tmp_path / "out", dtype="int8")
    assert (first.new_shards, first.new_rows) == (3, 160)
    sizes = [sum(f.bytes for f in r.files.values()) for r in Cache.open(source).receipts.values()]
    assert first.read_bytes == sum(sizes)
    before = tree(tmp_path / "out")
    again = run(source, tmp_path / "out", dtype="int8")
    assert (again.new_shards, again.new_bytes, again.complete) == (0, 0, True)
    assert tree(tmp_path / "out") == before


def test_an_unfinished_source_is_converted_and_completed_later(
    source: Path, tmp_path: Path, tree: Tree
) -> None:
    part = tmp_path / "part"
    shutil.copytree(source, part)
    (part / "shards" / "END.json").unlink()
    receipt_path(part, 1).unlink()
    first = run(part, tmp_path / "out", dtype="float16")
    assert (first.new_shards, first.complete) == (2, False)
    assert not (tmp_path / "out" / "shards" / "END.json").exists()
    shutil.copy(receipt_path(source, 1), receipt_path(part, 1))
    assert not run(part, tmp_path / "out", dtype="float16").complete  # it is not sealed yet
    shutil.copy(source / "shards" / "END.json", part / "shards" / "END.json")
    last = run(part, tmp_path / "out", dtype="float16")
    assert (last.new_shards, last.complete) == (0, True)
    run(source, tmp_path / "whole", dtype="float16")
    assert tree(tmp_path / "out") == tree(tmp_path / "whole")


def test_a_sealed_source_that_lacks_a_shard_leaves_no_seal(source: Path, tmp_path: Path) -> None:
    receipt_path(source, 1).unlink()
    assert not run(source, tmp_path / "out").complete
    assert not (tmp_path / "out" / "shards" / "END.json").exists()


def test_a_retracted_shard_is_restored_by_converting_again(
    source: Path, tmp_path: Path, tree: Tree
) -> None:
    out = tmp_path / "out"
    run(source, out, dtype="int8", backend="zarr")
    before = tree(out)
    flip(out / "scales/layers.1/c/1")
    assert retract_damaged(verify(out)) == [1]
    assert run(source, out, dtype="int8", backend="zarr").new_shards == 1
    assert tree(out) == before


# What is refused.


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("kind", [{}, {"backend": "zarr", "compression": "zstd"}], ids=str)
@pytest.mark.parametrize("what", ["activations/layers.1", "tokens"])
def test_a_damaged_source_file_is_named_and_its_shard_not_published(
    what: str, kind: dict[str, Any], make_cache: Make, tmp_path: Path, tree: Tree
) -> None:
    source = make_cache(shards=3, dtype="bfloat16", **kind)
    whole = tree(run(source, tmp_path / "whole", dtype="int8").cache)
    chunk = source / what / "c" / "1" / "0"
    path = chunk if chunk.exists() else source / what / "00001.safetensors"
    data = path.read_bytes()
    flip(path)
    with pytest.raises(CorruptShardError, match=f"{path}.*shard 1"):
        run(source, tmp_path / "out", dtype="int8")
    found = verify(tmp_path / "out")
    assert (found.is_sound, found.shards, found.leftovers) == (True, 1, ())
    path.write_bytes(data)
    run(source, tmp_path / "out", dtype="int8")
    assert tree(tmp_path / "out") == whole


def test_rows_that_do_not_fit_float16_are_counted_and_refused(
    make_cache: Make, tmp_path: Path
) -> None:
    def rows(hookpoint: str, shard: int, count: int, width: int) -> np.ndarray:
        x = np.ones((count, width), dtype=np.float32)
        if (hookpoint, shard) == ("layers.1", 1):
            x[[2, 5, 6], 1] = 1e5
        return x

    source = make_cache(rows=rows)
    with pytest.raises(ConfigError, match=r"(?s)layers\.1 do not.*3 rows of 128.*--dtype bfloat16"):
        run(source, tmp_path / "out", dtype="float16")
    found = verify(tmp_path / "out")
    assert (found.is_sound, found.shards, found.leftovers) == (True, 1, ())


def test_a_conversion_into_a_locked_folder_is_refused(source: Path, tmp_path: Path) -> None:
    lock = DirectoryLock(tmp_path / "out")
    lock.acquire()
    with pytest.raises(CacheBusyError, match="is running in"):
        run(source, tmp_path / "out")
    lock.release()
    run(source, tmp_path / "out")


def test_a_folder_with_other_files_is_not_changed(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(CacheMismatchError, match="holds other files"):
        run(source, out)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def test_a_folder_with_another_cache_is_not_changed(
    source: Path, make_cache: Make, tree: Tree
) -> None:
    other = make_cache(seed=5)
    before = tree(other)
    with pytest.raises(CacheMismatchError, match=r"(?s)another cache.*seed: 5, not 0"):
        run(source, other, dtype="float32")
    assert tree(other) == before


@pytest.mark.parametrize("out", [".", "inside", ".."])
def test_a_cache_is_not_converted_into_itself(
    out: str, source: Path, tmp_path: Path, tree: Tree
) -> None:
    before = tree(source)
    with pytest.raises(ConfigError, match="must be separate"):
        run(source, source / out, dtype="int8")
    assert tree(source) == before


def test_options_that_cannot_be_combined_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="zstd needs --backend zarr"):
        run(source, tmp_path / "out", compress="zstd")
    manifest = dataclasses.replace(read_manifest(source), planned_sequences=None)
    (source / "manifest.json").write_bytes(to_json(manifest, sealed=True))
    with pytest.raises(ConfigError, match="need a planned number of sequences"):
        run(source, tmp_path / "out", backend="zarr")
    assert not (tmp_path / "out").exists()


def test_auto_compression_is_kept_with_the_backend_only(make_cache: Make, tmp_path: Path) -> None:
    source = make_cache(backend="zarr", compression="zstd")
    for name, given, expected in [
        ("same", {"dtype": "int8"}, ("zarr", "zstd")),
        ("plain", {"compress": "none"}, ("zarr", "none")),
        ("memmap", {"backend": "memmap"}, ("memmap", "none")),
    ]:
        manifest = read_manifest(Path(run(source, tmp_path / name, **given).cache))
        assert (manifest.backend, manifest.compression) == expected
        assert ("numcodecs" in manifest.versions) == (expected[1] == "zstd")


def test_an_empty_source_is_refused(make_cache: Make, tmp_path: Path) -> None:
    with pytest.raises(EmptyCacheError, match="no complete shard"):
        run(make_cache(shards=0, end=False), tmp_path / "out")
    with pytest.raises(EmptyCacheError, match="is not a cache"):
        run(tmp_path, tmp_path / "out")


def test_disk_space_is_checked_first_and_for_missing_shards_only(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = run(source, tmp_path / "whole", dtype="float32").new_bytes
    usage = SimpleNamespace(free=made)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(DiskFullError, match=r"(?s)the conversion does not fit.*smaller --dtype"):
        run(source, tmp_path / "out", dtype="float32")
    assert not (tmp_path / "out").exists()
    run(source, tmp_path / "whole", dtype="float32")
    usage.free = 2 * made + 500_000
    run(source, tmp_path / "out", dtype="float32")


def test_the_source_is_only_read(source: Path, tmp_path: Path, tree: Tree) -> None:
    before = tree(source), sorted(path.name for path in source.iterdir())
    run(source, tmp_path / "out", dtype="int8", backend="zarr")
    assert (tree(source), sorted(path.name for path in source.iterdir())) == before
    text = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert text["identity"]["via"] == ["bfloat16"]


def test_an_extended_cache_is_converted_with_its_extensions_even_if_it_grew_in_between(
    tmp_path: Path, make_cache: Callable[..., Path], tree: Callable[[Path], dict[str, str]]
) -> None:
    plain = make_cache(shards=3, last_sequences=5, dtype="bfloat16")
    grown = make_cache(shards=3, last_sequences=5, dtype="bfloat16", extended_by=11)
    at_once, in_steps = tmp_path / "at once", tmp_path / "in steps"
    for source, out in ((grown, at_once), (plain, in_steps), (grown, in_steps)):
        summary = convert(ConvertConfig(str(source), str(out), backend="zarr"))
        assert summary.complete
        assert verify(out).is_sound
    assert tree(at_once) == tree(in_steps)
    cache = Cache.open(at_once)
    assert cache.complete
    assert len(cache.manifest.extensions) == 1
    back = tmp_path / "back"
    convert(ConvertConfig(str(at_once), str(back), backend="memmap"))
    assert tree(back) == tree(grown)
