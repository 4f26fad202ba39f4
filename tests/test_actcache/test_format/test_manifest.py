from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actcache.core.json_codec import to_json
from actcache.errors import EmptyCacheError, FormatError
from actcache.format.manifest import Hookpoint, Identity, Manifest, differences, parse_manifest
from actcache.format.manifest import read_manifest as read


@pytest.fixture
def manifest(make_cache: Callable[..., Path]) -> Manifest:
    return read(make_cache(shards=1, sequences=1))


OTHER_IDENTITY = {
    "model_fingerprint": "22",
    "model_dtype": "bfloat16",
    "tokenizer_fingerprint": "33",
    "dataset_fingerprint": "44",
    "weights": (1.0, 2.0),
    "documents": "chat",
    "column": "body",
    "shuffle_buffer": 5,
    "ctx_len": 18,
    "bos_id": 1,
    "eos_id": None,
    "keep_order": True,
    "skip_positions": 0,
    "exclude_special": (0, 1),
    "exclude_tokens": (7,),
    "max_norm_ratio": 10.0,
    "hookpoints": (Hookpoint("layers.0", 16),),
    "dtype": "bfloat16",
    "via": ("float16",),
    "batch_size": 5,
    "row_order": "sequence",
    "seed": 1,
    "whole_rows": True,
    "template_columns": ("tools",),
    "date": "2026-12-01T09:30:00",
    "model_commit": "55",
    "dataset_commits": ("66",),
}

SHOWN = {
    "model_fingerprint": "model",
    "tokenizer_fingerprint": "tokenizer",
    "dataset_fingerprint": "text",
    "eos_id": "separator",
    "model_commit": "model commit",
    "dataset_commits": "dataset commits",
    "whole_rows": "whole rows",
    "template_columns": "columns",
}
"""How errors call fields, if not by their names."""

OTHER_MANIFEST = {
    "model": "other",
    "revision": "main",
    "architecture": "Other",
    "dataset": "other",
    "split": "test",
    "sequences_per_shard": 2,
    "planned_sequences": None,
    "block_rows": 2,
    "versions": {"torch": "9"},
}


def with_identity(manifest: Manifest, **changes: Any) -> Manifest:
    identity = dataclasses.replace(manifest.identity, **changes)
    return dataclasses.replace(manifest, identity=identity, cache_id=identity.digest())


def test_the_examples_change_every_field(manifest: Manifest) -> None:
    fields = {f.name for f in dataclasses.fields(Identity)}
    assert fields - set(OTHER_IDENTITY) == {"pipeline", "pad_id"}  # which go together
    fields = {f.name for f in dataclasses.fields(Manifest)}
    fixed = {"format_version", "cache_id", "identity", "backend", "compression", "extensions"}
    assert fields - set(OTHER_MANIFEST) == fixed
    for name, value in OTHER_IDENTITY.items():
        assert getattr(manifest.identity, name) != value
    for name, value in OTHER_MANIFEST.items():
        assert getattr(manifest, name) != value


@pytest.mark.parametrize("field", OTHER_IDENTITY)
def test_every_field_of_the_identity_changes_the_cache_id(field: str, manifest: Manifest) -> None:
    other = with_identity(manifest, **{field: OTHER_IDENTITY[field]})
    assert other.cache_id != manifest.cache_id
    assert [d.split(":")[0] for d in differences(other, manifest)] == [SHOWN.get(field, field)]


@pytest.mark.parametrize("field", OTHER_MANIFEST)
def test_no_field_outside_the_identity_changes_the_cache_id(field: str, manifest: Manifest) -> None:
    other = dataclasses.replace(manifest, **{field: OTHER_MANIFEST[field]})
    assert other.identity.digest() == manifest.cache_id


def test_names_and_versions_may_differ_but_the_shard_plan_may_not(manifest: Manifest) -> None:
    found = {
        field
        for field, value in OTHER_MANIFEST.items()
        if differences(dataclasses.replace(manifest, **{field: value}), manifest)
    }
    assert found == {"sequences_per_shard", "planned_sequences", "block_rows"}


def test_backend_and_compression_leave_the_cache_id_but_may_not_differ(manifest: Manifest) -> None:
    zarr = dataclasses.replace(manifest, backend="zarr")
    packed = dataclasses.replace(zarr, compression="zstd")
    assert zarr.cache_id == packed.cache_id == manifest.cache_id == manifest.identity.digest()
    assert differences(zarr, manifest) == ["backend: 'memmap', not 'zarr'"]
    assert differences(packed, zarr) == ["compression: 'none', not 'zstd'"]


def test_an_invalid_backend_combination_is_refused(manifest: Manifest) -> None:
    with pytest.raises(FormatError, match="memmap is never compressed"):
        dataclasses.replace(manifest, compression="zstd")
    with pytest.raises(FormatError, match="planned_sequences"):
        dataclasses.replace(manifest, backend="zarr", planned_sequences=None)


def test_a_difference_lists_the_existing_and_the_requested_value(manifest: Manifest) -> None:
    assert differences(with_identity(manifest, seed=9), manifest) == ["seed: 0, not 9"]
    assert differences(manifest, manifest) == []


def test_a_difference_names_the_option_that_gives_the_existing_value(manifest: Manifest) -> None:
    begun = {"date": "2026-01-31", "model_commit": "a1", "dataset_commits": ("b2", "c3")}
    assert differences(manifest, with_identity(manifest, **begun)) == [
        "date: '2026-01-31', not None (--date 2026-01-31)",
        "model commit: 'a1', not None (by its name on the hub, with --revision a1)",
        "dataset commits: ('b2', 'c3'), not () (by its name on the hub, with "
        "--dataset-revision b2 --dataset-revision c3)",
    ]
    newer = {"model_commit": "a2", "dataset_commits": ("", "c4"), "eos_id": 1}
    older = {"model_commit": "a1", "dataset_commits": ("", "c3"), "eos_id": None}
    assert differences(with_identity(manifest, **newer), with_identity(manifest, **older)) == [
        "separator: None, not 1 (--separator none)",
        "model commit: 'a1', not 'a2' (--revision a1)",
        "dataset commits: ('', 'c3'), not ('', 'c4') (--dataset-revision '' --dataset-revision c3)",
    ]
    (difference,) = differences(with_identity(manifest, model_commit="a2"), manifest)
    assert difference.startswith("model commit: None, not 'a2' (go on with the files that it was")
    other = with_identity(manifest, tokenizer_fingerprint="7")
    (difference,) = differences(other, manifest)
    assert difference.startswith("tokenizer: '', not '7' (")


@pytest.mark.parametrize("field", ["whole_rows", "template_columns", "date", "model_commit"])
def test_an_earlier_version_with_a_key_of_version_3_is_refused(
    field: str, manifest: Manifest, tmp_path: Path
) -> None:
    other = with_identity(manifest, **{field: OTHER_IDENTITY[field]})
    for version in (1, 2):
        text = to_json(edited(other, "format_version", version), sealed=version > 1)
        (tmp_path / "manifest.json").write_bytes(text)
        with pytest.raises(
            FormatError, match=rf"format version {version} does not have(?s:.*){field}"
        ):
            read(tmp_path)


@pytest.mark.parametrize(("field", "value"), [("date", None), ("dataset_commits", [])])
def test_a_key_with_the_value_that_its_absence_means_is_refused(
    field: str, value: object, manifest: Manifest, tmp_path: Path
) -> None:
    obj = edited(manifest, "format_version", 3)
    obj["identity"][field] = value
    (tmp_path / "manifest.json").write_bytes(to_json(obj, sealed=True))
    with pytest.raises(FormatError, match=field):
        read(tmp_path)


def test_the_cache_id_never_changes() -> None:
    """Pin the digest of one identity: another JSON encoding would change every cache id."""
    identity = Identity(
        model_fingerprint="m",
        model_dtype="bfloat16",
        tokenizer_fingerprint="t",
        dataset_fingerprint="d",
        weights=(),
        documents="text",
        column="text",
        shuffle_buffer=None,
        pipeline="pack",
        ctx_len=256,
        bos_id=None,
        eos_id=2,
        pad_id=None,
        keep_order=False,
        skip_positions=1,
        exclude_special=(),
        exclude_tokens=(),
        max_norm_ratio=None,
        hookpoints=(Hookpoint("layers.9", 576), Hookpoint("layers.9.mlp:in", 576)),
        dtype="bfloat16",
        via=(),
        batch_size=8,
        row_order="shuffled",
        seed=0,
    )
    assert identity.digest() == "475b24cd135bb12567ceee0ef8f8b421"


def test_a_manifest_is_parsed_back_equal(manifest: Manifest) -> None:
    assert parse_manifest(json.loads(to_json(manifest))) == manifest


@pytest.mark.parametrize(
    "name",
    [
        "..",
        "../x",
        "a/../../b",
        "/etc",
        "a..b",
        ".a",
        "a.",
        "",
        "a b",
        "a\n",
        "a:out",
        "a:in:in",
        "a\0",
        "a\\b",
        "é",
        "a" * 201,
    ],
)
def test_a_hookpoint_that_could_leave_the_folder_is_refused(name: str) -> None:
    with pytest.raises(FormatError, match="not a hookpoint name"):
        Hookpoint(name, 4)


@pytest.mark.parametrize("name", ["layers.9", "h.0.attn.c_proj:in", "wte", "a-b_c.D"])
def test_module_paths_are_hookpoint_names(name: str) -> None:
    assert Hookpoint(name, 4).name == name


def edited(manifest: Manifest, path: str, value: object) -> dict:
    obj = json.loads(to_json(manifest))
    *folders, last = path.split("/")
    target = obj
    for folder in folders:
        target = target[int(folder) if folder.isdigit() else folder]
    target[last] = value
    return obj


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("format_version", 0),
        ("format_version", 2),
        ("format_version", 3),
        ("format_version", 4),
        ("format_version", "1"),
        ("format_version", True),
        ("format_version", 1.0),
        ("seal", "0" * 32),
        ("cache_id", "00" * 16),
        ("unknown", 1),
        ("identity", []),
        ("identity/unknown", 1),
        ("identity/ctx_len", 1),
        ("identity/ctx_len", 2**31),
        ("identity/ctx_len", 10**30),
        ("identity/ctx_len", float("nan")),
        ("identity/skip_positions", 17),
        ("identity/skip_positions", -1),
        ("identity/batch_size", 0),
        ("identity/seed", 2**32),
        ("identity/seed", True),
        ("identity/dtype", "float8"),
        ("identity/row_order", "random"),
        ("identity/pipeline", "../x"),
        ("identity/hookpoints", []),
        ("identity/hookpoints", [{"name": "a", "width": 1}] * 2),
        ("identity/hookpoints/0/name", "../../etc"),
        ("identity/hookpoints/0/width", 0),
        ("identity/hookpoints/0/width", 2**24 + 1),
        ("backend", "pickle"),
        ("compression", "gzip"),
        ("compression", "zstd"),
        ("sequences_per_shard", 0),
        ("block_rows", 0),
        ("block_rows", 2**31),
        ("planned_sequences", 0),
        ("versions", {"torch": 2}),
        ("model", None),
    ],
)
def test_an_invalid_manifest_is_refused_and_its_path_named(
    path: str, value: object, manifest: Manifest, tmp_path: Path
) -> None:
    obj = edited(dataclasses.replace(manifest, format_version=1), path, value)
    (tmp_path / "manifest.json").write_text(json.dumps(obj))
    with pytest.raises(FormatError, match=r"manifest\.json"):
        read(tmp_path)


def test_an_edited_identity_does_not_match_the_cache_id(manifest: Manifest, tmp_path: Path) -> None:
    text = to_json(edited(manifest, "identity/seed", 5), sealed=True)
    (tmp_path / "manifest.json").write_bytes(text)
    with pytest.raises(FormatError, match="cache id is not the digest of the manifest's identity"):
        read(tmp_path)


def test_a_folder_without_a_manifest_is_no_cache(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for root in (tmp_path, tmp_path / "missing", tmp_path / "file"):
        with pytest.raises(EmptyCacheError, match=r"(?s)is not a cache.*remedy: +actcache harvest"):
            read(root)


def test_a_full_shard_has_the_rows_that_the_filter_leaves(manifest: Manifest) -> None:
    assert manifest.identity.rows_per_sequence == 16
    assert dataclasses.replace(manifest, sequences_per_shard=3).shard_rows == 48
    assert manifest.width("layers.1") == 16


def test_more_shards_than_fit_into_memory_are_refused(manifest: Manifest) -> None:
    with pytest.raises(FormatError, match=r"(?s)more shards.*4,194,304.*--shard-size"):
        dataclasses.replace(manifest, planned_sequences=2**53)
