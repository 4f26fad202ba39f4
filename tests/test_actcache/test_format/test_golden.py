"""The committed caches under `tests/golden/`, examples of docs/format.md.

Should the format change on purpose: `python tests/test_actcache/test_format/test_golden.py` writes
them anew.
"""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from actcache.cache.folder import publish_extension
from actcache.cache.reader import Cache
from actcache.cache.verify import verify
from actcache.cache.writer import ShardData, ShardText, publish_shard
from actcache.core.json_codec import to_json
from actcache.errors import FormatError
from actcache.filesystem.atomic import digest_file, write_atomic
from actcache.format.manifest import (
    MANIFEST,
    Hookpoint,
    Identity,
    Manifest,
    kept_positions,
    with_extension,
)
from actcache.format.receipts import (
    CompletionMarker,
    publish_receipt,
    read_receipt,
    receipt_path,
    write_completion_marker,
)
from actcache.storage import BACKENDS, ROW_DTYPES

GOLDEN = Path(__file__).parents[2] / "golden"
CACHES = {
    "v1": (1, "memmap", "none", "bfloat16", 0),
    "v1-zarr": (1, "zarr", "none", "bfloat16", 0),
    "v1-zarr-zstd": (1, "zarr", "zstd", "bfloat16", 0),
    "v1-int8": (1, "memmap", "none", "int8", 0),
    "v1-zarr-fp8": (1, "zarr", "none", "float8_e4m3", 0),
    "v1-zarr-extended": (1, "zarr", "none", "bfloat16", 5),
    "v2": (2, "memmap", "none", "bfloat16", 0),
    "v2-zarr-extended": (2, "zarr", "none", "bfloat16", 5),
    "v3": (3, "memmap", "none", "bfloat16", 0),
}
"""By folder: format version, backend, compression, type, and number of sequences of the extension.
The compressed bytes are those of constraints.txt's blosc."""
OF_VERSION_3 = {
    "documents": "chat",
    "column": "messages",
    "template_columns": ("tools",),
    "date": "2026-01-31T09:30:00",
    "model_commit": "3" * 40,
    "dataset_commits": ("4" * 40,),
}
LEFT_OUT = {1: {"template": 2, "undecodable": 1}}
"""Documents that are left out, by shard, from version 3 on."""
HOOKPOINTS = {"layers.0": 6, "layers.1.mlp:in": 10}


def value(hookpoint, sequence, position, dtype):
    """Build the values of a row: small integers, exact in every type. [D]

    The first number of an 8-bit row is the largest of its type: the scale is 2 ** position.
    """
    index = list(HOOKPOINTS).index(hookpoint)
    dims = np.arange(HOOKPOINTS[hookpoint])
    row = (7 * sequence + 3 * position + dims + 5 * index) % 31 - 15.0
    largest = {"int8": 127.0, "float8_e4m3": 448.0}.get(dtype)
    if largest is None:
        return row
    row[0] = largest
    return row * 2.0**position


def write_golden(root, version, backend, compression, dtype, more):
    identity = Identity(
        model_fingerprint="0" * 32,
        model_dtype="bfloat16",
        tokenizer_fingerprint="1" * 32,
        dataset_fingerprint="2" * 32,
        weights=(),
        documents="text",
        column="text",
        shuffle_buffer=None,
        pipeline="pack",
        ctx_len=4,
        bos_id=None,
        eos_id=2,
        pad_id=None,
        keep_order=False,
        skip_positions=1,
        exclude_special=(),
        exclude_tokens=(),
        max_norm_ratio=None,
        hookpoints=tuple(Hookpoint(name, width) for name, width in HOOKPOINTS.items()),
        dtype=dtype,
        via=(),
        batch_size=2,
        row_order="shuffled",
        seed=7,
    )
    if version > 2:
        identity = dataclasses.replace(identity, **OF_VERSION_3)
    manifest = Manifest(
        format_version=version,
        cache_id=identity.digest(),
        identity=identity,
        model="golden-model",
        revision="main",
        architecture="GoldenForCausalLM",
        dataset="golden.jsonl",
        split="train",
        backend=backend,
        compression=compression,
        sequences_per_shard=4,
        planned_sequences=10,
        block_rows=4,
        versions={"actcache": "0.1.0"},
    )
    write_atomic(root / MANIFEST, [to_json(manifest, sealed=manifest.format_version > 1)])
    BACKENDS[backend].initialize(root, manifest)
    if more:
        manifest = with_extension(manifest, 10 + more)
        publish_extension(root, manifest)
    row_dtype = ROW_DTYPES[dtype]
    shards = [4, 4, 2, 4, 1] if more else [4, 4, 2]
    for shard, sequences in enumerate(shards):
        first = manifest.plan.first_sequence(shard)
        tokens = np.arange(sequences * 4, dtype=np.int32).reshape(sequences, 4) + 100 * shard
        numbers = np.arange(sequences, dtype=np.int64) + first
        text = ShardText(tokens, np.full(sequences, 4, dtype=np.int32), numbers // 2, 5 * numbers)
        kept, dropped = kept_positions(identity, text.tokens, text.lengths)
        rows = {}
        for name in HOOKPOINTS:
            exact = [
                value(name, first + s, p, dtype) for s, p in zip(*np.nonzero(kept), strict=True)
            ]
            rows[name] = row_dtype.from_torch(torch.tensor(np.array(exact), dtype=torch.float32))
        publish_shard(root, manifest, ShardData(shard, text, kept, dropped, rows, {}))
        if version > 2 and shard in LEFT_OUT:
            receipt = read_receipt(receipt_path(root, shard), manifest)
            receipt = dataclasses.replace(receipt, left_out=LEFT_OUT[shard])
            publish_receipt(root, manifest, receipt)
    extensions = len(manifest.extensions)
    end = CompletionMarker(manifest.cache_id, len(shards) - 1, 10 + more, "goal", extensions)
    write_completion_marker(root, manifest, end)


def files_below(root):
    return {str(p.relative_to(root)): digest_file(p) for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize("name", CACHES)
def test_the_writer_reproduces_the_golden_cache_byte_for_byte(name, tmp_path):
    write_golden(tmp_path, *CACHES[name])
    assert files_below(tmp_path) == files_below(GOLDEN / name)


@pytest.mark.parametrize("name", CACHES)
@pytest.mark.parametrize("hookpoint", HOOKPOINTS)
def test_the_reader_returns_every_row_of_the_golden_cache(hookpoint, name):
    cache = Cache.open(GOLDEN / name)
    assert cache.complete
    assert cache.rows == 3 * (10 + CACHES[name][4])
    for shard in cache.shards:
        words = cache.tokens(shard)
        rows = cache.row_dtype.to_float32(cache.read(hookpoint, shard))
        for row, sequence, position in zip(
            rows, words.row_sequence, words.row_position, strict=True
        ):
            first = cache.receipts[shard].first_sequence
            expected = value(hookpoint, first + int(sequence), int(position), CACHES[name][3])
            np.testing.assert_array_equal(row, expected)
            assert position >= 1


@pytest.mark.parametrize("golden", CACHES)
def test_the_golden_receipts_match_their_files(golden):
    cache = Cache.open(GOLDEN / golden)
    backend = BACKENDS[CACHES[golden][1]]
    for shard, receipt in cache.receipts.items():
        paths = {
            "tokens": cache.root / "tokens" / f"{shard:05d}.safetensors",
            "stats": cache.root / "stats" / f"{shard:05d}.safetensors",
        } | backend.files(cache.root, cache.manifest, shard)
        assert {name: digest_file(path) for name, path in paths.items()} == receipt.files


@pytest.mark.parametrize("name", ["v2", "v2-zarr-extended"])
def test_seals_change_neither_the_rows_nor_what_identifies_them(name):
    new, old = (Cache.open(GOLDEN / version) for version in (name, name.replace("v2", "v1")))
    assert new.manifest.cache_id == old.manifest.cache_id
    assert new.digest(new.shards) == old.digest(old.shards)


def test_version_3_records_the_clock_the_commits_and_what_was_left_out():
    cache = Cache.open(GOLDEN / "v3")
    for name, recorded in OF_VERSION_3.items():
        assert getattr(cache.manifest.identity, name) == recorded
    assert {s: r.left_out for s, r in cache.receipts.items() if r.left_out} == LEFT_OUT
    assert verify(GOLDEN / "v3").is_sound


def test_a_receipt_of_an_earlier_version_counts_nothing_left_out(tmp_path):
    manifest = Cache.open(shutil.copytree(GOLDEN / "v2", tmp_path / "v2")).manifest
    path = receipt_path(tmp_path / "v2", 1)
    receipt = dataclasses.replace(read_receipt(path, manifest), left_out=LEFT_OUT[1])
    path.write_bytes(to_json(receipt, sealed=True))
    with pytest.raises(FormatError, match=r"00001\.json has a key(?s:.*)left_out"):
        read_receipt(path, manifest)
    with pytest.raises(AssertionError):
        publish_receipt(tmp_path / "v2", manifest, receipt)


if __name__ == "__main__":
    for folder, how in CACHES.items():
        shutil.rmtree(GOLDEN / folder, ignore_errors=True)
        write_golden(GOLDEN / folder, *how)
