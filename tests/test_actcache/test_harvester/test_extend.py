"""`harvest --extend`: a larger goal for an existing cache, under the same cache id."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actcache.cache.folder import publish_extension
from actcache.cache.reader import Cache
from actcache.cache.repair import retract_damaged
from actcache.cache.verify import verify
from actcache.config import HarvestConfig
from actcache.core.json_codec import read_json, to_json
from actcache.core.process import World
from actcache.data import shared_sequences
from actcache.errors import CacheMismatchError, DiskFullError, FormatError
from actcache.format.manifest import read_manifest, with_extension
from actcache.format.receipts import read_cache_state, read_end, receipt_path
from actcache.harvester import resolve
from actcache.harvester import run as run_module
from actcache.harvester.run import HarvestSummary, harvest
from actcache.inspection import summarize

Options = Callable[..., HarvestConfig]
Tree = Callable[[Path | str], dict[str, str]]

pytestmark = pytest.mark.usefixtures("warm_model")

STORAGES = pytest.mark.parametrize(
    "storage",
    [{}, {"backend": "zarr"}, {"backend": "zarr", "compress": "zstd"}],
    ids=["memmap", "zarr", "zstd"],
)


def tokens(sequences: int, **given: Any) -> dict[str, Any]:
    return {"max_tokens": 16 * sequences, **given}


def shapes(cache: Cache) -> list[tuple[int, int]]:
    """(first sequence, sequences) of every shard."""
    return [(r.first_sequence, r.sequences) for r in cache.receipts.values()]


def by_address(cache: Cache, hookpoint: str) -> dict[tuple[int, int], bytes]:
    """Every row by its sequence in the whole harvest and its position."""
    rows = {}
    for shard, receipt in cache.receipts.items():
        words = cache.tokens(shard)
        sequences = words.row_sequence + receipt.first_sequence
        addresses = zip(sequences.tolist(), words.row_position.tolist(), strict=True)
        found = cache.read(hookpoint, shard).values
        rows |= zip(addresses, (row.tobytes() for row in found), strict=True)
    return rows


@STORAGES
def test_an_extended_cache_holds_the_rows_of_one_harvest_with_the_larger_goal(
    storage: dict[str, str], options: Options, tree: Tree, tmp_path: Path
) -> None:
    root = Path(harvest(options(**tokens(10), **storage)).cache)
    before = tree(root)
    summary = harvest(options(**tokens(19), **storage, extend=True))
    assert (summary.new_shards, summary.complete, summary.reason) == (3, True, "goal")
    assert summary.warnings == ()
    after, cache = tree(root), Cache.open(root)
    changed = {name for name in before if after[name] != before[name]}
    assert {Path(name).name for name in changed} <= {"END.json", "zarr.json"}
    assert cache.complete
    assert shapes(cache) == [(0, 4), (4, 4), (8, 2), (10, 4), (14, 4), (18, 1)]
    assert cache.end is not None
    assert (cache.end.last_shard, cache.end.sequences, cache.end.extensions) == (5, 19, 1)
    whole = Cache.open(harvest(options(**tokens(19), **storage, out=str(tmp_path / "w"))).cache)
    assert whole.manifest.cache_id == cache.manifest.cache_id
    for name in cache.hookpoints:
        assert by_address(cache, name) == by_address(whole, name)
    assert verify(root).is_sound
    assert verify(root).leftovers == ()


def test_an_extension_changes_no_manifest_and_is_printed_by_inspect(options: Options) -> None:
    config = options(**tokens(10))
    root = Path(harvest(config).cache)
    manifest = (root / "manifest.json").read_bytes()
    assert "extended" not in summarize(Cache.open(root)).state
    harvest(options(**tokens(15), extend=True))
    harvest(options(**tokens(18), extend=True))
    assert (root / "manifest.json").read_bytes() == manifest
    record = read_json(root / "extensions" / "00002.json", sealed=True)
    assert record == {
        "cache_id": Cache.open(root).manifest.cache_id,
        "number": 2,
        "first_shard": 5,
        "first_sequence": 15,
        "planned_sequences": 18,
    }
    state = summarize(Cache.open(root)).state
    assert state == "complete (goal reached); extended after 160, 240 tokens"


def test_a_zarr_array_grows_and_opens_with_zarr(options: Options) -> None:
    import zarr

    storage = {"backend": "zarr"}
    root = harvest(options(**tokens(10), **storage)).cache
    harvest(options(**tokens(19), **storage, extend=True))
    cache = Cache.open(root)
    array = zarr.open(f"{root}/activations/layers.0", mode="r")
    assert array.shape == (6 * 60, 32)
    for shard, receipt in cache.receipts.items():
        rows = array[shard * 60 : shard * 60 + receipt.rows]
        np.testing.assert_array_equal(rows, cache.read("layers.0", shard).values)


def test_the_same_command_again_writes_nothing(options: Options, tree: Tree) -> None:
    root = Path(harvest(options(**tokens(10))).cache)
    harvest(options(**tokens(19), extend=True))
    before = tree(root)
    for config in (options(**tokens(19), extend=True), options(**tokens(19))):
        summary = harvest(config)
        assert (summary.new_shards, summary.complete, summary.reason) == (0, True, "goal")
    further = harvest(options(**tokens(12), extend=True))  # the goal is already larger
    assert (further.new_shards, further.complete) == (0, True)
    assert tree(root) == before


def test_another_goal_is_refused_without_extend_which_the_remedy_names(
    options: Options, tree: Tree
) -> None:
    root = Path(harvest(options(**tokens(10))).cache)
    before = tree(root)
    for shard_size in (4, None):  # by formula, a larger goal has other shards
        with pytest.raises(
            CacheMismatchError, match=r"planned_sequences: 10, not 19(?s:.*)--extend"
        ):
            harvest(options(**tokens(19), shard_size=shard_size))
    with pytest.raises(CacheMismatchError) as refused:
        harvest(options(**tokens(9)))
    assert "--extend" not in str(refused.value)
    assert tree(root) == before
    harvest(options(**tokens(19), extend=True))
    with pytest.raises(CacheMismatchError, match="planned_sequences: 19, not 10"):
        harvest(options(**tokens(10)))


def test_other_options_than_max_tokens_are_refused_with_extend_too(
    options: Options, tree: Tree
) -> None:
    root = Path(harvest(options(**tokens(10))).cache)
    before = tree(root)
    for name, value in {"seed": 1, "shard_size": 5, "backend": "zarr", "dtype": "float16"}.items():
        with pytest.raises(CacheMismatchError, match="holds another cache"):
            harvest(options(**tokens(19), extend=True, **{name: value}))
    assert tree(root) == before


def test_without_a_cache_extend_is_a_harvest(options: Options, tree: Tree, tmp_path: Path) -> None:
    harvest(options(**tokens(10), out=str(tmp_path / "whole")))
    harvest(options(**tokens(10), extend=True))
    assert tree(options().out) == tree(tmp_path / "whole")


@STORAGES
def test_an_unfinished_harvest_reaches_its_goal_before_it_is_extended(
    storage: dict[str, str], options: Options, tree: Tree, tmp_path: Path
) -> None:
    whole = str(tmp_path / "whole")
    harvest(options(**tokens(10), **storage, out=whole))
    harvest(options(**tokens(19), **storage, out=whole, extend=True))
    root = Path(harvest(options(**tokens(10), **storage)).cache)
    for shard in (1, 2):
        receipt_path(root, shard).unlink()
    (root / "shards" / "END.json").unlink()
    assert harvest(options(**tokens(19), **storage, extend=True)).new_shards == 5
    assert tree(root) == tree(whole)


def test_shards_by_formula_keep_their_size(options: Options) -> None:
    given: dict[str, Any] = {"shard_size": None, "batch_size": 1}
    root = harvest(options(**tokens(10), **given)).cache
    harvest(options(**tokens(150), **given, extend=True))
    cache = Cache.open(root)
    assert cache.complete
    assert {receipt.sequences for receipt in cache.receipts.values()} == {1}
    assert harvest(options(**tokens(150), **given)).new_shards == 0


# Text that ends.


@pytest.mark.parametrize("counted", [True, False])
def test_extending_beyond_the_end_of_the_text_warns_and_writes_nothing(
    counted: bool, options: Options, tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(harvest(options(max_tokens=None, shard_size=50)).cache)
    before = tree(root)
    stamps = {p: p.stat().st_mtime_ns for p in root.glob("shards/*")}
    if not counted:
        monkeypatch.setattr(resolve, "COUNTED_TOKENS", 0)
    for goal in (None, 16 * 500):
        if goal is None and not counted:
            continue
        summary = harvest(options(max_tokens=goal, shard_size=50, extend=True))
        assert (summary.new_shards, summary.complete, summary.reason) == (0, True, "text")
        (warning,) = summary.warnings
        assert warning.startswith("--extend: the text has ")
    assert tree(root) == before
    assert {p: p.stat().st_mtime_ns for p in root.glob("shards/*")} == stamps


@pytest.mark.parametrize("counted", [True, False])
def test_an_extension_that_reaches_the_end_of_the_text_completes_the_cache(
    counted: bool, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = Cache.open(harvest(options(max_tokens=None, out=str(tmp_path / "all"))).cache)
    assert everything.end is not None
    root = harvest(options(**tokens(10))).cache
    if not counted:
        monkeypatch.setattr(resolve, "COUNTED_TOKENS", 0)
    summary = harvest(options(**tokens(500), extend=True))
    assert (summary.complete, summary.reason, summary.warnings) == (True, "text", ())
    cache = Cache.open(root)
    assert cache.end is not None
    assert cache.end.sequences == everything.end.sequences
    assert verify(root).is_sound
    assert by_address(cache, "layers.0") == by_address(everything, "layers.0")
    again = harvest(options(**tokens(500), extend=True))
    assert (again.new_shards, again.complete, again.reason) == (0, True, "text")


def test_extending_without_max_tokens_harvests_the_whole_text(options: Options) -> None:
    root = harvest(options(**tokens(10))).cache
    assert harvest(options(max_tokens=None, extend=True)).reason == "text"
    assert Cache.open(root).complete


# Crashes, and any number of processes.


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.soak)])
@STORAGES
def test_an_extension_that_crashes_at_any_system_call_is_finished_by_the_same_command(
    storage: dict[str, str], step: int, options: Options, faults: Any, tree: Tree, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"shard_size": 2, "batch_size": 2, **storage}
    more = {**tokens(5), **given, "extend": True}
    begun = str(tmp_path / "begun")
    harvest(options(**tokens(3), **given, out=begun))
    whole = str(tmp_path / "whole")
    shutil.copytree(begun, whole)
    harvest(options(**more, out=whole))
    for number in itertools.count(0, step):
        root = tmp_path / str(number)
        shutil.copytree(begun, root)
        try:
            with faults.at(number):
                harvest(options(**more, out=str(root)))
        except faults.Crash:
            found = verify(root)
            assert found.is_sound
            assert found.shards >= 2
            for shard in Cache.open(root).shards:
                assert len(Cache.open(root).read("layers.0", shard)) in (15, 30)
        else:
            break
        assert harvest(options(**more, out=str(root))).complete
        assert tree(root) == tree(whole)
        shutil.rmtree(root)
    assert number > 40


def test_an_extension_with_an_outdated_zarr_json_is_read_and_repaired(options: Options) -> None:
    storage = {"backend": "zarr"}
    root = Path(harvest(options(**tokens(10), **storage)).cache)
    document = root / "activations" / "layers.0" / "zarr.json"
    old = document.read_bytes()
    harvest(options(**tokens(19), **storage, extend=True))
    new = document.read_bytes()
    document.write_bytes(old)
    assert verify(root).is_sound
    assert len(Cache.open(root).read("layers.0", 5)) == 15
    harvest(options(**tokens(19), **storage))
    assert document.read_bytes() == new
    document.write_bytes(new.replace(b"360", b"300"))  # five shards: the length of no extension
    assert [d.file for d in verify(root).damages] == ["activations/layers.0/zarr.json"]


@STORAGES
def test_a_cache_opened_before_an_extension_reads_its_shards_after_it(
    storage: dict[str, str], options: Options
) -> None:
    root = Path(harvest(options(**tokens(10), **storage)).cache)
    opened = Cache.open(root)
    before = {shard: opened.read("layers.0", shard).values.tobytes() for shard in (0, 1, 2)}
    opened = Cache.open(root)
    for goal in (13, 19):
        harvest(options(**tokens(goal), **storage, extend=True))
    shortened = Cache.open(root).truncated_to(0)
    for cache in (opened, shortened, shortened.truncated_to(0)):
        read = {shard: cache.read("layers.0", shard).values.tobytes() for shard in cache.shards}
        assert read == before


def harvest_by(ranks: list[int], world_size: int, config: HarvestConfig) -> list[HarvestSummary]:
    """Run some ranks of a harvest in this process, one after another."""

    class Alone(World):
        def check_equal_then_run_on_rank_zero(self, what: bytes, act: Callable[[], None]) -> None:
            act()

    summaries = []
    for rank in ranks:
        with pytest.MonkeyPatch.context() as patched:
            alone = SimpleNamespace(from_environment=lambda r=rank: Alone(r, world_size))
            patched.setattr(run_module, "World", alone)
            patched.setattr(shared_sequences, "PATIENCE", 0.2)  # for ranks that come later
            summaries.append(harvest(config))
    return summaries


@STORAGES
@pytest.mark.parametrize("ranks", [[0, 1], [1, 0], [0, 2, 1], [2, 1, 0]])
@pytest.mark.parametrize("finished", [True, False])
def test_any_number_of_processes_extends_to_the_same_bytes(
    finished: bool,
    ranks: list[int],
    storage: dict[str, str],
    options: Options,
    tree: Tree,
    tmp_path: Path,
) -> None:
    whole = str(tmp_path / "whole")
    harvest(options(**tokens(10), **storage, out=whole))
    harvest(options(**tokens(19), **storage, out=whole, extend=True))
    root = Path(harvest(options(**tokens(10), **storage)).cache)
    if not finished:
        receipt_path(root, 1).unlink()
        (root / "shards" / "END.json").unlink()
    summaries = harvest_by(ranks, len(ranks), options(**tokens(19), **storage, extend=True))
    assert summaries[-1].complete
    assert sum(s.new_shards for s in summaries) == 3 + (not finished)
    assert tree(root) == tree(whole)


def test_an_extension_published_by_another_process_is_continued(
    options: Options, tree: Tree, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The extension is published after this process read the manifest, before it reads it again."""
    whole = str(tmp_path / "whole")
    harvest(options(**tokens(10), out=whole))
    harvest(options(**tokens(19), out=whole, extend=True))
    root = Path(harvest(options(**tokens(10))).cache)
    make_shards = run_module._make_shards

    def late(*given: Any) -> int:
        count = make_shards(*given)
        if not (root / "extensions").exists():
            publish_extension(root, with_extension(read_manifest(root), 19))
        return count

    monkeypatch.setattr(run_module, "_make_shards", late)
    assert harvest(options(**tokens(19), extend=True)).complete
    assert tree(root) == tree(whole)


def test_a_cache_opens_while_it_is_being_extended(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = Path(harvest(options(**tokens(10))).cache)
    old = read_manifest(root)
    harvest(options(**tokens(19), extend=True))
    new = read_manifest(root)
    answers = iter([old, new])
    monkeypatch.setattr("actcache.format.receipts.read_manifest", lambda _: next(answers))
    manifest, receipts, end = read_cache_state(root)
    assert (manifest, len(receipts), end is not None) == (new, 6, True)
    for shard in (3, 4, 5):  # only END.json is newer
        receipt_path(root, shard).unlink()
    answers = iter([old, new])
    assert read_cache_state(root)[0] == new
    answers = iter([old, old])
    with pytest.raises(FormatError, match="counts extensions that do not exist"):
        read_cache_state(root)


def test_disk_space_is_required_for_new_shards_only(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    harvest(options(**tokens(10)))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=150_000))
    with pytest.raises(DiskFullError, match="does not fit"):
        harvest(options(**tokens(100), extend=True))
    assert not Path(options().out, "extensions").exists()
    assert harvest(options(**tokens(11), extend=True)).complete


# Reading the files under extensions/.


def test_the_end_marker_is_invalid_once_an_extension_is_published(
    make_cache: Callable[..., Path],
) -> None:
    root = make_cache(shards=3, sequences=4, last_sequences=2)
    manifest = read_manifest(root)
    assert read_end(root, manifest) is not None
    publish_extension(root, with_extension(manifest, 19))
    cache = Cache.open(root)
    assert (cache.end, cache.complete) == (None, False)
    assert "3 of 6 shards are missing" in summarize(cache).state
    found = verify(root)
    assert (found.is_sound, found.complete, found.leftovers) == (True, False, ())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cache_id": "00"}, "belongs to another cache"),
        ({"number": 2}, "belongs to another cache"),
        ({"first_shard": 2}, "does not begin where"),
        ({"first_sequence": 9}, "does not begin where"),
        ({"planned_sequences": 10}, "not beyond"),
        ({"planned_sequences": -1}, "not beyond"),
        ({"planned_sequences": "19"}, "another type"),
        ({"more": 1}, "other keys"),
    ],
)
def test_an_extension_that_does_not_follow_is_refused_with_its_path(
    changes: dict[str, Any], message: str, make_cache: Callable[..., Path]
) -> None:
    root = make_cache(shards=3, sequences=4, last_sequences=2, extended_by=9)
    path = root / "extensions" / "00001.json"
    path.write_bytes(to_json(json.loads(path.read_text()) | changes, sealed=True))
    with pytest.raises(FormatError, match=message) as refused:
        Cache.open(root)
    assert str(path) in str(refused.value)
    assert [d.file for d in verify(root).damages] == ["extensions/00001.json"]


def test_extensions_with_gaps_or_symbolic_links_are_refused(
    make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    root = make_cache(shards=3, sequences=4, last_sequences=2, extended_by=9)
    path = root / "extensions" / "00001.json"
    path.rename(path.with_name("00002.json"))
    with pytest.raises(FormatError, match=r"(?s)not the next extension.*00001\.json"):
        Cache.open(root)
    path.with_name("00002.json").rename(tmp_path / "00001.json")
    path.symlink_to(tmp_path / "00001.json")
    assert [d.file for d in verify(root).damages] == ["extensions/00001.json"]
    path.unlink()
    path.parent.rmdir()
    path.parent.symlink_to(tmp_path)
    assert [d.file for d in verify(root).damages] == ["extensions"]


def test_a_missing_extension_is_reported(make_cache: Callable[..., Path]) -> None:
    root = make_cache(shards=3, sequences=4, last_sequences=2, extended_by=9)
    (root / "extensions" / "00001.json").unlink()
    with pytest.raises(FormatError, match="counts extensions that do not exist"):
        Cache.open(root)
    assert not verify(root).is_sound


@pytest.mark.parametrize("extensions", [0, 2, -1])
def test_an_end_marker_with_another_number_of_extensions_is_reported(
    extensions: int, make_cache: Callable[..., Path]
) -> None:
    root = make_cache(shards=3, sequences=4, last_sequences=2, extended_by=9)
    path = root / "shards" / "END.json"
    path.write_bytes(
        to_json(json.loads(path.read_text()) | {"extensions": extensions}, sealed=True)
    )
    assert [d.file for d in verify(root).damages] == ["shards/END.json"]


def test_a_short_shard_before_an_extension_has_a_fixed_length(
    make_cache: Callable[..., Path],
) -> None:
    root = make_cache(shards=3, sequences=4, last_sequences=2, extended_by=9)
    path = receipt_path(root, 2)
    receipt = json.loads(path.read_text())
    path.write_bytes(to_json(receipt | {"sequences": 1}, sealed=True))
    with pytest.raises(FormatError, match="sequences"):
        Cache.open(root)


@STORAGES
def test_repair_restores_shards_from_before_and_after_an_extension(
    storage: dict[str, str], options: Options, tree: Tree
) -> None:
    root = Path(harvest(options(**tokens(10), **storage)).cache)
    config = options(**tokens(19), **storage, extend=True)
    harvest(config)
    before = tree(root)
    for shard in (2, 4):
        path = root / "tokens" / f"{shard:05d}.safetensors"
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    assert retract_damaged(verify(root)) == [2, 4]
    assert not Cache.open(root).complete
    assert harvest(config).new_shards == 2
    assert tree(root) == before
