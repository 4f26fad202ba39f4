"""Logs of a harvest, which are untrusted."""

import json
import os
from pathlib import Path

import pytest

from actcache.cache.reader import Cache
from actcache.inspection.harvest_speed import TAIL, speed_by_rank


@pytest.fixture
def cache(make_cache):
    return Cache.open(make_cache(shards=4, sequences=8, ctx_len=17))


def log(cache, rank, *lines):
    path = cache.root / "logs" / f"harvest-rank{rank}.jsonl"
    path.parent.mkdir(exist_ok=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("".join(text + "\n" for text in texts))
    return path


def entry(shard, seconds, host="a", **others):
    return {"shard": shard, "seconds": seconds, "host": host} | others


def speeds(cache):
    return speed_by_rank(cache.root, cache.receipts, 17)


def test_speed_divides_the_receipts_sizes_by_the_logs_times(cache):
    log(cache, 0, entry(0, 1.0, rows=10**9), entry(2, 3.0))
    log(cache, 1, entry(1, 2.0, host="b"), entry(3, 2.0, host="c"))
    first, second = speeds(cache)
    assert (first.rank, first.hosts, first.shards, first.seconds) == (0, ("a",), 2, 4.0)
    assert first.tokens_per_second == 2 * 8 * 17 / 4
    size = sum(f.bytes for shard in (0, 2) for f in cache.receipts[shard].files.values())
    assert first.bytes_per_second == size / 4
    assert (first.median_seconds, first.slowest_seconds, first.slowest_shard) == (2.0, 3.0, 2)
    assert (second.rank, second.hosts) == (1, ("b", "c"))
    assert speed_by_rank(cache.root, {1: cache.receipts[1]}, 17)[0].rank == 1


def test_a_cache_without_logs_has_no_speed(cache):
    assert speeds(cache) == ()
    log(cache, 0)
    assert speeds(cache) == ()
    log(cache, 0, entry(0, 0))
    assert speeds(cache) == ()


@pytest.mark.parametrize(
    "line",
    [
        '{"shard": 0, "seconds": 1.0, "ho',
        "[" * 100_000,
        "[]",
        "null",
        "\x00\x00\x00",
        '{"shard": 0, "seconds": NaN, "host": "a"}',
        '{"shard": 0, "seconds": 1e999, "host": "a"}',
        '{"shard": 0, "seconds": -1, "host": "a"}',
        '{"shard": 0, "seconds": true, "host": "a"}',
        '{"shard": 0, "seconds": "1", "host": "a"}',
        '{"shard": 0, "seconds": 1' + "0" * 400 + ', "host": "a"}',
        '{"shard": 0, "seconds": 1' + "0" * 5000 + ', "host": "a"}',
        '{"shard": [0], "seconds": 1, "host": "a"}',
        '{"shard": 0, "seconds": 1, "host": 5}',
        '{"seconds": 1}',
        "A" * 10_000,
    ],
)
def test_an_invalid_line_is_counted_and_skipped(cache, line):
    log(cache, 0, entry(0, 1.0), line, entry(1, 1.0))
    (speed,) = speeds(cache)
    assert (speed.shards, speed.unread) == (2, 1)


def test_entries_of_unpublished_shards_are_ignored(cache):
    log(cache, 0, entry(0, 1.0), entry(99, 5.0), entry(-1, 5.0))
    (speed,) = speeds(cache)
    assert (speed.shards, speed.seconds, speed.unread) == (1, 1.0, 0)


def test_hosts_are_escaped_and_limited(cache):
    log(cache, 0, *(entry(0, 1.0, host=f"\x1b[2J\ud800{i}" + "A" * 500) for i in range(9)))
    (speed,) = speeds(cache)
    assert len(speed.hosts) == 3
    assert all(host.isprintable() and len(host) < 100 for host in speed.hosts)


def test_only_the_end_of_a_long_log_is_read(cache):
    path = log(cache, 0, entry(0, 1.0))
    path.write_bytes(b"x" * (3 * TAIL) + b"\n" + path.read_bytes())
    (speed,) = speeds(cache)
    assert (speed.shards, speed.unread) == (1, 0)


def test_symlinks_pipes_and_folders_are_not_read(cache, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    text = json.dumps(entry(0, 1.0))
    (elsewhere / "harvest-rank0.jsonl").write_text(text)
    logs = Path(cache.root) / "logs"
    logs.symlink_to(elsewhere)
    assert speeds(cache) == ()
    logs.unlink()
    logs.mkdir()
    (logs / "harvest-rank0.jsonl").symlink_to(elsewhere / "harvest-rank0.jsonl")
    os.mkfifo(logs / "harvest-rank1.jsonl")
    (logs / "harvest-rank2.jsonl").mkdir()
    (logs / "harvest-rank-3.jsonl").write_text(text)
    (logs / "harvest-rank99999999.jsonl").write_text(text)
    assert speeds(cache) == ()
