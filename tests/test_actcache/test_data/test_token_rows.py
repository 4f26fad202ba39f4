"""Rows of token ids: padding, and what a sample of them shows."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actcache.config import HarvestConfig
from actcache.data.datasets import open_dataset
from actcache.data.table_rows import DOCUMENT
from actcache.data.token_rows import MASK, RowSample, WholeRows, row_ids, sample_rows
from actcache.errors import DatasetError

TOKENIZER = SimpleNamespace(bos_token_id=0, eos_token_id=1, pad_token_id=2)


@pytest.fixture(autouse=True)
def _copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "copies"))


def write(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    path = folder / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        dataset = datasets.Dataset.from_list(rows)
        dataset.with_format("numpy").save_to_disk(path)
    return path


def sample(path: Path, tokenizer: Any = TOKENIZER, **options: Any) -> RowSample:
    source: Any = open_dataset(HarvestConfig("model", str(path), "out", **options))
    return sample_rows(source, tokenizer)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "saved"])
def test_an_attention_mask_leaves_padding_out(kind: str, streaming: bool, tmp_path: Path) -> None:
    rows = [
        {"input_ids": [0, 5, 6, 2], MASK: [1, 1, 1, 0]},
        {"input_ids": [2, 0, 7, 8], MASK: [0, 1, 1, 1]},
    ]
    path = write(tmp_path, kind, rows)
    options = {"streaming": True, "max_tokens": 4096} if streaming else {}
    for _ in range(2):
        found = sample(path, **options)
        assert found == RowSample((3, 3), with_bos=2, masked=True, padded=0)
    assert "left out" in found.notes("input_ids")[0]


def test_a_mask_of_ones_changes_nothing(tmp_path: Path) -> None:
    ids = [[5, 6], [7]]
    masked = [{"input_ids": row, MASK: [1] * len(row)} for row in ids]
    plain = [{"input_ids": row} for row in ids]
    for rows in (masked, plain):
        found = sample(write(tmp_path, "jsonl", rows))
        assert found == RowSample((2, 1), with_bos=0, masked=False, padded=0)
        assert found.notes("input_ids") == ()


def test_a_mask_of_another_length_is_refused() -> None:
    for mask in ([1], 1, [1, 1, 1]):
        with pytest.raises(DatasetError, match=MASK):
            row_ids({DOCUMENT: [5, 6], MASK: mask})
    assert row_ids({DOCUMENT: [5, 6]}) == [5, 6]


@pytest.mark.parametrize(
    ("lengths", "bos", "expected"),
    [
        ([16] * 3, 0, "each has 16 tokens"),
        ([16, 16, 3, 20], 0, "most have 16 tokens"),
        ([16], 0, "16 tokens"),
        ([16, 3, 4], 0, ""),
        ([9, 20, 31], 3, "each begins with BOS"),
        ([9, 20] * 10, 19, "nearly all begin with BOS"),
        ([9, 20, 31], 2, ""),
        ([7] * 8, 0, "each has 7 tokens"),
        ([7] * 19 + [3], 0, "nearly all have 7 tokens"),
        ([7] * 7, 0, ""),
        ([40] * 8, 0, "each has 40 tokens"),
        ([3, 16, 40], 0, ""),
        ([], 0, ""),
    ],
)
def test_rows_of_one_length_or_with_bos_are_whole_sequences(
    lengths: list[int], bos: int, expected: str
) -> None:
    why = RowSample(tuple(lengths), bos, masked=False, padded=0).evidence(16)
    assert expected in why
    assert bool(why) == bool(expected)


def test_padding_without_a_mask_is_said(tmp_path: Path) -> None:
    path = write(tmp_path, "jsonl", [{"input_ids": [5, 6, 2, 2]}, {"input_ids": [5, 6, 7, 1]}])
    (note,) = sample(path).notes("input_ids")
    assert note.startswith("1 of the 2 rows of 'input_ids'")
    assert "--exclude-tokens" in note
    eos_pads = SimpleNamespace(bos_token_id=0, eos_token_id=1, pad_token_id=1)
    assert sample(path, eos_pads).padded == 0  # a single EOS ends a text
    left = write(tmp_path, "jsonl", [{"input_ids": [2, 2, 5, 6]}, {"input_ids": [0, 5, 6, 7]}])
    assert sample(left).padded == 1
    bos_pads = SimpleNamespace(bos_token_id=0, eos_token_id=1, pad_token_id=0)
    assert sample(left, bos_pads).padded == 0


def test_rows_that_contradict_the_sample_are_counted_once() -> None:
    rows = WholeRows(3, bos_id=0)
    lists = [[0, 5], [0, 5, 6, 7], [5], [6]]
    assert rows.warnings() == ()
    for _ in range(2):  # counted before the harvest, then harvested
        documents = ((n, iter([np.array(ids)])) for n, ids in enumerate(lists))
        assert [n for n, _ in rows.count(documents)] == [0, 1, 2, 3]
    cut, without = rows.warnings()
    assert cut.startswith("1 rows of token ids had more than 3 tokens")
    assert without.startswith("2 rows of token ids do not begin with BOS")
