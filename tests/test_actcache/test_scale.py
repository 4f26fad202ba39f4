"""Recompute the numbers of docs/scale.md from the formulas of the code."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest

from actcache.cache.folder import choose_block_rows, sequences_per_shard
from actcache.config import HarvestConfig
from actcache.core.json_codec import to_json
from actcache.filesystem.atomic import FileDigest
from actcache.format.manifest import FILTERS, Hookpoint
from actcache.format.receipts import ShardReceipt
from actcache.harvester.resolve import goal_sequences
from actcache.storage import ROW_DTYPES
from actcache.storage.safetensors_io import ALIGNMENT
from actcache.stream.order import POOL_ROWS, Epoch, make_plan

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "scale.md").read_text()

TOKENS, D, HOOKPOINTS, GPUS, SEQUENCES = 10**10, 4096, 32, 64, 64
POINTS = tuple(Hookpoint(f"layers.{n}", D) for n in range(HOOKPOINTS))
CONFIG = HarvestConfig("m", "d", "o", max_tokens=TOKENS)
PLANNED = goal_sequences(CONFIG)
assert PLANNED is not None
SHARDS = -(-PLANNED // SEQUENCES)
PER_SEQUENCE = CONFIG.ctx_len - CONFIG.skip_positions
ROWS = PLANNED * PER_SEQUENCE
ITEM = ROW_DTYPES["bfloat16"].itemsize
INT8 = ROW_DTYPES["int8"].row_bytes(D)
FILE = SEQUENCES * PER_SEQUENCE * D * ITEM
FILES = HOOKPOINTS + 3  # tokens, statistics, receipt
BLOCK_ROWS = choose_block_rows(POINTS, "bfloat16")

# Measured on the benchmark's machine, or assumed, as on the page.
PEAK, MFU, DISK, LATENTS, ENCODER_SHARE = 790e12, 0.4, 100e9, 65_536, 0.5
OPEN_10K, PUBLISH, EPOCH_BYTES = 1.049, (12e9, 2.2e9, 29e9), 24
WEIGHTS = 8.03e9 - 2 * 128_256 * D  # of a Llama: no embedding, no head

SPEED = PEAK * MFU / (2 * WEIGHTS + HOOKPOINTS * 4 * D * CONFIG.ctx_len / 2)  # tokens/s of a GPU
COMPUTE = TOKENS / SPEED / GPUS  # s
WRITING = ROWS * D * ITEM * HOOKPOINTS / DISK  # s
EATEN = PEAK * ENCODER_SHARE / LATENTS  # bytes/s of a GPU, of rows of 2 bytes a number
PASS = ROWS * D * ITEM / EATEN  # s


def receipt_bytes() -> int:
    """Return the bytes of a receipt in the middle of the harvest."""
    file = FileDigest(FILE + ALIGNMENT, "0" * 32)
    names = [point.name for point in POINTS]
    receipt = ShardReceipt(
        cache_id="0" * 32,
        shard=SHARDS // 2 + 30_000,
        first_sequence=(SHARDS // 2 + 30_000) * SEQUENCES,
        sequences=SEQUENCES,
        rows=SEQUENCES * PER_SEQUENCE,
        dropped=dict.fromkeys(FILTERS, 0) | {"skip_positions": SEQUENCES},
        non_finite=dict.fromkeys(names, 0),
        near_overflow=dict.fromkeys(names, 0),
        files={f"activations/{name}": file for name in names} | {"tokens": file, "stats": file},
    )
    return len(to_json(receipt))


def blocks(block_rows: int) -> int:
    """Count the blocks of one hookpoint; the last shard is short."""
    last = PLANNED - (SHARDS - 1) * SEQUENCES
    full = -(-SEQUENCES * PER_SEQUENCE // block_rows)
    return (SHARDS - 1) * full + -(-last * PER_SEQUENCE // block_rows)


def numbers() -> dict[str, str]:
    """Compute the page's table."""
    default = sequences_per_shard(CONFIG, PLANNED, POINTS, "bfloat16")
    hookpoint, everything = ROWS * D * ITEM, ROWS * D * ITEM * HOOKPOINTS
    written = SPEED * D * ITEM * HOOKPOINTS * PER_SEQUENCE / CONFIG.ctx_len
    puts = HOOKPOINTS * (-(-(FILE + ALIGNMENT) // (64 << 20)) + 2) + 3
    return {
        "sequences": f"{PLANNED:,}",
        "rows at a hookpoint": f"{ROWS:,}",
        "one hookpoint, bfloat16": f"{hookpoint / 1e12:.2f} TB",
        "all hookpoints, float32": f"{2 * everything / 1e15:.3f} PB",
        "all hookpoints, bfloat16": f"{everything / 1e15:.3f} PB",
        "all hookpoints, bfloat16 with zstd": f"{0.7 * everything / 1e15:.3f} PB",
        "all hookpoints, int8": f"{ROWS * INT8 * HOOKPOINTS / 1e15:.3f} PB",
        "sequences in a shard, by the formula": f"{default}",
        "shards, by the formula": f"{-(-PLANNED // default):,}",
        "shards of 64 sequences": f"{SHARDS:,}",
        "a file of activations": f"{FILE + ALIGNMENT:,} B",
        "a shard": f"{FILE * HOOKPOINTS / 1e9:.2f} GB",
        "memory of a rank": f"{(2 * HOOKPOINTS + 1) * FILE / 1e9:.1f} GB",
        "files": f"{SHARDS * FILES:,}",
        "syncs while harvesting": f"{2 * SHARDS * FILES:,}",
        "receipts": f"{SHARDS * receipt_bytes() / 1e9:.2f} GB",
        "opening, from the page cache": f"{SHARDS * OPEN_10K / 1e4:.0f} s",
        "tokens/s of a GPU": f"{SPEED:,.0f}",
        "compute on 64 GPUs": f"{COMPUTE / 3600:.1f} h",
        "bytes written by a GPU": f"{written / 1e9:.1f} GB/s",
        "bytes written by 64 GPUs": f"{GPUS * written / 1e9:.0f} GB/s",
        "writing at 100 GB/s": f"{WRITING / 3600:.1f} h",
        "a rank's publishing without writes": f"{1e-9 / sum(1 / v for v in PUBLISH):.1f} GB/s",
        "blocks of a hookpoint": f"{blocks(BLOCK_ROWS):,}",
        "order of an epoch, memory": f"{blocks(BLOCK_ROWS) * EPOCH_BYTES / 1e9:.1f} GB",
        "bytes eaten by a GPU": f"{EATEN / 1e9:.1f} GB/s",
        "pass over a hookpoint on one GPU": f"{PASS / 3600:.1f} h",
        "GPUs fed by 100 GB/s, bfloat16": f"{math.floor(DISK / EATEN)}",
        "GPUs fed by 100 GB/s, int8": f"{math.floor(DISK / EATEN * D * ITEM / INT8)}",
        "PUTs, parts of 64 MiB": f"{SHARDS * puts / 1e6:.1f} million",
        "GETs of a pass, 1 MiB": f"{HOOKPOINTS * blocks(BLOCK_ROWS) / 1e6:,.0f} million",
        "GETs of a pass, 16 MiB": f"{HOOKPOINTS * blocks(16 * BLOCK_ROWS) / 1e6:.0f} million",
    }


def table() -> dict[str, str]:
    _, _, text = PAGE.partition("## The numbers")
    rows = re.findall(r"^\| (.+?) \| (.+?) \|$", text, re.MULTILINE)
    return {name: value for name, value in rows if name not in ("quantity", "---")}


def test_every_number_of_the_table_follows_from_the_code() -> None:
    found, computed = table(), numbers()
    assert list(found) == list(computed)
    assert {
        name: (found[name], computed[name]) for name in found if found[name] != computed[name]
    } == {}


@pytest.mark.parametrize(
    "text",
    [
        f"{receipt_bytes():,} bytes each",
        f"{FILES} · {SHARDS:,} = {SHARDS * FILES:,} files",
        f"{PLANNED // SEQUENCES // GPUS:,} or {PLANNED // SEQUENCES // GPUS + 1:,} a rank",
        f"the last of {PLANNED - (SHARDS - 1) * SEQUENCES} sequences",
        f"eight ranks of a machine {8 * (2 * HOOKPOINTS + 1) * FILE / 1e9:.0f} GB",
        f"{HOOKPOINTS * D * ITEM * PER_SEQUENCE // CONFIG.ctx_len:,} bytes: ",
        f"{HOOKPOINTS * SHARDS / 1e6:.1f} million folders more",
        f"{SHARDS * FILES / WRITING:.0f} creates",
        f"{ROWS / PASS:,.0f} rows/s",
        f"{blocks(BLOCK_ROWS) / PASS:,.0f} a second",
        f"{8192 * BLOCK_ROWS / (POOL_ROWS * SEQUENCES):.2f}.",
        f"{blocks(BLOCK_ROWS) * 0.2e-6:.0f} to {blocks(BLOCK_ROWS) * 0.3e-6:.0f} s and",
        f"{math.ceil(GPUS * COMPUTE / WRITING)} would do",
    ],
)
def test_the_numbers_in_the_text_follow_from_the_code(text: str) -> None:
    assert text in PAGE


def test_a_shard_takes_the_syncs_and_renames_that_the_page_counts(
    make_cache: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = {"fsync": 0, "replace": 0}
    for name in calls:
        real = getattr(os, name)

        def count(
            *args: object, name: str = name, real: Callable[..., object] = real, **named: object
        ) -> object:
            calls[name] += 1
            return real(*args, **named)

        monkeypatch.setattr(os, name, count)
    seen = []
    for shards in (2, 3):  # the folders themselves are made, and synced, once
        calls |= {"fsync": 0, "replace": 0}
        make_cache(
            tmp_path / str(shards), shards=shards, hookpoints={p.name: 4 for p in POINTS}, end=False
        )
        seen.append(dict(calls))
    assert seen[1]["replace"] - seen[0]["replace"] == FILES == 35
    assert seen[1]["fsync"] - seen[0]["fsync"] == 2 * FILES == 70


def test_a_file_of_activations_has_a_header_of_one_page_and_blocks_of_one_mebibyte(
    make_cache: Callable[..., Path],
) -> None:
    assert BLOCK_ROWS * D * ITEM == 1 << 20
    root = make_cache(shards=1, sequences=3, ctx_len=9, hookpoints={"a": 4}, dtype="bfloat16")
    (path,) = root.glob("activations/a/*")
    assert path.stat().st_size == ALIGNMENT + 3 * 8 * 4 * ITEM
    shards = [(0, SEQUENCES * PER_SEQUENCE), (1, 57 * PER_SEQUENCE)]
    line = Epoch(make_plan(shards, BLOCK_ROWS, batch_size=8192, seed=0), 0)
    count = sum(1 for _ in line.spans(0, sum(rows for _, rows in shards)))
    assert count == blocks(BLOCK_ROWS) - (SHARDS - 2) * Fraction(512)
