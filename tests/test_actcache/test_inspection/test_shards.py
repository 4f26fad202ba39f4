"""Facts from receipts: positions left out, bad rows, files of a shard."""

import dataclasses

import pytest

from actcache.cache.reader import Cache
from actcache.inspection.shards import CLASSES, LISTED, bad_rows, excluded, shard_facts


@pytest.fixture
def receipt(make_cache):
    return Cache.open(make_cache(shards=1)).receipts[0]


def with_counts(receipt, shard, non_finite=0, near_overflow=0):
    return dataclasses.replace(
        receipt,
        shard=shard,
        non_finite={"layers.0": non_finite, "layers.1": 0},
        near_overflow={"layers.0": 0, "layers.1": near_overflow},
    )


def test_left_out_positions_are_counted_by_filter_most_first(receipt):
    one = dataclasses.replace(receipt, dropped={"padding": 5, "skip_positions": 2, "new": 0})
    two = dataclasses.replace(receipt, dropped={"skip_positions": 10})
    found = excluded([one, two], tokens=100)
    assert [(e.name, e.positions, e.fraction) for e in found] == [
        ("skip_positions", 12, 0.12),
        ("padding", 5, 0.05),
    ]


def test_filters_beyond_the_limit_are_summed_up_and_names_are_escaped(receipt):
    dropped = {f"\x1b[2J{i}" + "A" * 1000: 100 - i for i in range(50)}
    found = excluded([dataclasses.replace(receipt, dropped=dropped)], tokens=10_000)
    assert len(found) == CLASSES + 1
    assert found[-1].name == "others"
    assert sum(e.positions for e in found) == sum(dropped.values())
    assert all(e.name.isprintable() and len(e.name) < 60 for e in found)


def test_only_shards_with_bad_rows_are_listed(receipt):
    receipts = [with_counts(receipt, 0), with_counts(receipt, 1, 3), with_counts(receipt, 2, 1, 7)]
    found = bad_rows(receipts)
    assert (found.non_finite, found.near_overflow, found.shards) == (4, 7, 2)
    assert [a.shard for a in found.worst] == [1, 2]
    assert found.worst[1].non_finite == {"layers.0": 1}
    assert found.worst[1].near_overflow == {"layers.1": 7}


def test_the_worst_of_many_bad_shards_are_listed_and_all_are_counted(receipt):
    receipts = [with_counts(receipt, n, non_finite=n) for n in range(LISTED + 50)]
    found = bad_rows(receipts)
    assert found.shards == LISTED + 49
    assert [a.shard for a in found.worst] == list(range(LISTED + 49, 49, -1))


def test_a_shard_is_described_with_the_state_of_its_files(make_cache):
    cache = Cache.open(make_cache(shards=3, sequences=8))
    root = cache.root
    (root / "activations/layers.0/00001.safetensors").unlink()
    (root / "tokens/00001.safetensors").write_bytes(b"cut")
    (root / "stats/00001.safetensors").unlink()
    (root / "stats/00001.safetensors").symlink_to("/etc/passwd")
    found = shard_facts(cache, 1)
    assert (found.first_sequence, found.sequences, found.rows) == (8, 8, 128)
    assert {file.name: file.state for file in found.files} == {
        "activations/layers.0": "missing",
        "activations/layers.1": "there",
        "stats": "no plain file",
        "tokens": "3 bytes",
    }
    promised = cache.receipts[1].files
    assert all(f.bytes == promised[f.name].bytes for f in found.files)
