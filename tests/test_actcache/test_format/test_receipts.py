from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from actcache.cache.reader import Cache
from actcache.core.json_codec import to_json
from actcache.errors import FormatError
from actcache.filesystem.atomic import FileDigest
from actcache.format.manifest import FILTERS, Manifest, read_manifest
from actcache.format.receipts import (
    LEFT_OUT_FROM,
    CompletionMarker,
    ShardReceipt,
    count_left_out,
    digest,
    publish_receipt,
    read_end,
    read_receipts,
    receipt_path,
    write_completion_marker,
)


@pytest.fixture
def root(make_cache: Callable[..., Path]) -> Path:
    return make_cache(shards=3, sequences=2)


@pytest.fixture
def manifest(root: Path) -> Manifest:
    return read_manifest(root)


def test_receipts_are_read_in_order_and_other_files_ignored(root: Path, manifest: Manifest) -> None:
    for name in (".00007.json.partial-1", "notes.txt", "12.json", "END.json.bak"):
        (root / "shards" / name).write_text("{")
    assert list(read_receipts(root, manifest)) == [0, 1, 2]


def test_a_cache_without_receipts_has_no_shard(tmp_path: Path, manifest: Manifest) -> None:
    assert read_receipts(tmp_path, manifest) == {}
    assert read_end(tmp_path, manifest) is None


def test_shards_beyond_five_digits_are_found_in_order(root: Path, manifest: Manifest) -> None:
    first = read_receipts(root, manifest)[0]
    obj = json.loads(to_json(first)) | {"shard": 123456, "first_sequence": 2 * 123456}
    receipt_path(root, 123456).write_bytes(to_json(obj, sealed=True))
    endless = dataclasses.replace(manifest, planned_sequences=None)
    assert list(read_receipts(root, endless)) == [0, 1, 2, 123456]
    with pytest.raises(FormatError, match="sequences"):  # beyond the goal there is no shard
        read_receipts(root, manifest)


@pytest.mark.parametrize("hookpoints", [1, 30, 400])
def test_a_receipt_stays_below_4_kb_and_240_bytes_a_file(
    hookpoints: int, manifest: Manifest, tmp_path: Path
) -> None:
    names = [f"layers.{n}.self_attn.o_proj:in" for n in range(hookpoints)]
    file = FileDigest(4 << 30, "f" * 32)
    files = {f"activations/{name}": file for name in names} | {"tokens": file, "stats": file}
    receipt = ShardReceipt(
        cache_id="f" * 32,
        shard=99_999,
        first_sequence=2**40,
        sequences=2**20,
        rows=2**30,
        dropped=dict.fromkeys(FILTERS, 2**30),
        non_finite=dict.fromkeys(names, 2**20),
        near_overflow=dict.fromkeys(names, 2**20),
        files=files,
    )
    publish_receipt(tmp_path, manifest, receipt)
    assert receipt_path(tmp_path, 99_999).stat().st_size < 4_000 + 240 * len(files)


def change(root: Path, number: int, **changes: object) -> None:
    path = receipt_path(root, number)
    path.write_bytes(to_json(json.loads(path.read_text()) | changes, sealed=True))


DROPPED = dict.fromkeys(FILTERS, 0) | {"skip_positions": 2}
FILE = {"bytes": 1, "xxh3_128": "0"}


@pytest.mark.parametrize(
    "changes",
    [
        {"cache_id": "other"},
        {"shard": 2},
        {"shard": -1},
        {"shard": 1.0},
        {"first_sequence": 3},
        {"first_sequence": -2},
        {"sequences": 0},
        {"sequences": 3},
        {"sequences": 2**53},
        {"rows": -1},
        {"rows": 31},
        {"rows": 2**53},
        {"rows": 10**40},
        {"rows": "32"},
        {"dropped": {}},
        {"dropped": DROPPED | {"other": 0}},
        {"dropped": DROPPED | {"skip_positions": 1}},
        {"dropped": DROPPED | {"skip_positions": 4, "padding": -2}},
        {"non_finite": {}},
        {"non_finite": {"layers.0": 0, "layers.1": 33}},
        {"non_finite": {"layers.0": 0, "layers.1": 0, "../../x": 0}},
        {"non_finite": {"layers.0": 0, "layers.1": -1}},
        {"near_overflow": {}},
        {"near_overflow": {"layers.0": 0, "layers.1": 33}},
        {"near_overflow": {"layers.0": 0, "layers.1": 0, "../../x": 0}},
        {"near_overflow": {"layers.0": 0, "layers.1": -1}},
        {
            "non_finite": {"layers.0": 0, "layers.1": 20},
            "near_overflow": {"layers.0": 0, "layers.1": 13},
        },
        {"left_out": {"type": -1}},
        {"left_out": {"type": "1"}},
        {"files": {}},
        {"files": {"tokens": FILE, "stats": FILE, "activations/../../x": FILE}},
        {"files": {"tokens": {"bytes": -1, "xxh3_128": "0"}}},
        {"files": {"tokens": {"bytes": 1, "xxh3_128": 0}}},
        {"files": None},
        {"unknown": 1},
    ],
)
def test_an_invalid_receipt_is_refused_and_its_path_named(root: Path, changes: dict) -> None:
    change(root, 1, **changes)
    with pytest.raises(FormatError, match=r"00001\.json"):
        Cache.open(root)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"shard": NaN}', "[" * 100_000])
def test_a_damaged_receipt_is_refused_and_its_path_named(root: Path, text: str) -> None:
    receipt_path(root, 1).write_text(text)
    with pytest.raises(FormatError, match=r"00001\.json"):
        Cache.open(root)


def test_a_receipt_under_the_name_of_another_shard_is_refused(root: Path) -> None:
    text = receipt_path(root, 1).read_text()
    for name in ("00005.json", "000001.json"):
        path = root / "shards" / name
        path.write_text(text)
        with pytest.raises(FormatError, match="receipt of another shard"):
            Cache.open(root)
        path.unlink()


@pytest.mark.parametrize(
    "changes",
    [
        {"cache_id": "other"},
        {"last_shard": -1},
        {"last_shard": 6},
        {"last_shard": 10**30},
        {"sequences": -1},
        {"reason": "bored"},
        {"extra": 1},
    ],
)
def test_an_invalid_seal_is_refused_and_its_path_named(root: Path, changes: dict) -> None:
    path = root / "shards" / "END.json"
    path.write_bytes(to_json(json.loads(path.read_text()) | changes, sealed=True))
    with pytest.raises(FormatError, match=r"END\.json"):
        Cache.open(root)


def test_a_seal_over_a_huge_number_of_shards_is_read_quickly(
    root: Path, manifest: Manifest
) -> None:
    end = CompletionMarker(manifest.cache_id, 2**52, 2**53, "goal", 0)
    write_completion_marker(root, manifest, end)
    with pytest.raises(FormatError, match="goal of the harvest"):
        Cache.open(root)


def test_a_cache_is_complete_with_its_seal_and_every_shard(root: Path) -> None:
    assert Cache.open(root).complete
    receipt_path(root, 1).unlink()
    assert not Cache.open(root).complete


def test_the_digest_covers_every_receipt_in_its_order(root: Path, manifest: Manifest) -> None:
    zero, one, two = read_receipts(root, manifest).values()
    digests = [digest([zero, one]), digest([one, zero]), digest([zero]), digest([zero, two])]
    assert len(set(digests)) == 4
    before = Cache.open(root).digest([0, 1])
    assert before == digests[0]
    change(root, 1, files=json.loads(to_json(two))["files"])
    assert Cache.open(root).digest([0, 1]) != before


@pytest.mark.parametrize("planned", [2**20, 17, 1])
def test_a_seal_that_does_not_agree_with_the_goal_is_refused(
    planned: int, make_cache: Callable[..., Path]
) -> None:
    root = make_cache(shards=2, sequences=8)
    path = root / "manifest.json"
    path.write_bytes(
        to_json(json.loads(path.read_text()) | {"planned_sequences": planned}, sealed=True)
    )
    with pytest.raises(FormatError):
        Cache.open(root)


def test_documents_left_out_are_read_back_and_refused_where_no_version_counts_them(
    root: Path, manifest: Manifest
) -> None:
    first = read_receipts(root, manifest)[0]
    assert b"left_out" not in to_json(first)
    counted = dataclasses.replace(first, left_out={"token_id": 2, "type": 1})
    newer = dataclasses.replace(manifest, format_version=LEFT_OUT_FROM)
    publish_receipt(root, newer, counted)
    found = read_receipts(root, newer)
    assert found[0] == counted
    assert count_left_out([*found.values(), counted]) == {"token_id": 4, "type": 2}
    with pytest.raises(FormatError, match=r"(?s)00000\.json has a key .*left_out"):
        read_receipts(root, dataclasses.replace(manifest, format_version=LEFT_OUT_FROM - 1))
