"""Logs of a harvest: nothing in them is trusted."""

import json
import os

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


def test_speed_is_what_receipts_say_was_written_over_the_time_that_the_log_says(cache):
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


def test_no_logs_are_no_speed(cache):
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
def test_a_line_that_is_no_entry_is_counted_and_skipped(cache, line):
    log(cache, 0, entry(0, 1.0), line, entry(1, 1.0))
    (speed,) = speeds(cache)
    assert (speed.shards, speed.unread) == (2, 1)


def test_entries_of_shards_that_are_not_there_do_not_count(cache):
    log(cache, 0, entry(0, 1.0), entry(99, 5.0), entry(-1, 5.0))
    (speed,) = speeds(cache)
    assert (speed.shards, speed.seconds, speed.unread) == (1, 1.0, 0)


def test_hosts_print_and_are_few(cache):
    log(cache, 0, *(entry(0, 1.0, host=f"\x1b[2J\ud800{i}" + "A" * 500) for i in range(9)))
    (speed,) = speeds(cache)
    assert len(speed.hosts) == 3
    assert all(host.isprintable() and len(host) < 100 for host in speed.hosts)


def test_of_a_long_log_the_end_is_read(cache):
    path = log(cache, 0, entry(0, 1.0))
    path.write_bytes(b"x" * (3 * TAIL) + b"\n" + path.read_bytes())
    (speed,) = speeds(cache)
    assert (speed.shards, speed.unread) == (1, 0)


def test_neither_links_nor_pipes_nor_folders_are_read(cache, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    text = json.dumps(entry(0, 1.0))
    (elsewhere / "harvest-rank0.jsonl").write_text(text)
    logs = cache.root / "logs"
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
