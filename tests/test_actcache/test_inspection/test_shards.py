"""What receipts say."""

import dataclasses

import pytest

from actcache.cache.reader import Cache
from actcache.inspection.shards import CLASSES, LISTED, afflictions, excluded, shard_facts


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


def test_every_class_of_left_out_rows_is_told_most_first(receipt):
    one = dataclasses.replace(receipt, dropped={"padding": 5, "skip_positions": 2, "new": 0})
    two = dataclasses.replace(receipt, dropped={"skip_positions": 10})
    found = excluded([one, two], tokens=100)
    assert [(e.name, e.positions, e.fraction) for e in found] == [
        ("skip_positions", 12, 0.12),
        ("padding", 5, 0.05),
    ]


def test_classes_beyond_a_bound_stand_together_and_their_names_print(receipt):
    dropped = {f"\x1b[2J{i}" + "A" * 1000: 100 - i for i in range(50)}
    found = excluded([dataclasses.replace(receipt, dropped=dropped)], tokens=10_000)
    assert len(found) == CLASSES + 1
    assert found[-1].name == "others"
    assert sum(e.positions for e in found) == sum(dropped.values())
    assert all(e.name.isprintable() and len(e.name) < 60 for e in found)


def test_only_shards_with_rows_that_need_care_are_listed(receipt):
    receipts = [with_counts(receipt, 0), with_counts(receipt, 1, 3), with_counts(receipt, 2, 1, 7)]
    found = afflictions(receipts)
    assert (found.non_finite, found.near_overflow, found.shards) == (4, 7, 2)
    assert [a.shard for a in found.worst] == [1, 2]
    assert found.worst[1].non_finite == {"layers.0": 1}
    assert found.worst[1].near_overflow == {"layers.1": 7}


def test_of_many_such_shards_the_worst_are_listed_and_all_are_counted(receipt):
    receipts = [with_counts(receipt, n, non_finite=n) for n in range(LISTED + 50)]
    found = afflictions(receipts)
    assert found.shards == LISTED + 49
    assert [a.shard for a in found.worst] == list(range(LISTED + 49, 49, -1))


def test_a_shard_is_told_with_its_files_and_whether_they_are_there(make_cache):
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
