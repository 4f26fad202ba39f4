"""Harvests of texts with documents that cannot be used."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from actcache.cache.reader import Cache
from actcache.cache.verify import verify
from actcache.config import HarvestConfig
from actcache.errors import ConfigError, DatasetError
from actcache.format import manifest as manifest_module
from actcache.format.receipts import LEFT_OUT_FROM
from actcache.harvester import job as job_module
from actcache.harvester import resolve as resolve_module
from actcache.harvester.run import harvest
from actcache.inspection.facts import cache_facts
from actcache.inspection.summary import inspect


@pytest.fixture
def version(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Return a function that sets the format version of new caches."""

    def use(number: int) -> None:
        if number > manifest_module.FORMAT_VERSION:
            monkeypatch.setattr(manifest_module, "FORMAT_VERSION", number)
        monkeypatch.setattr(resolve_module, "FORMAT_VERSION", number)

    return use


@pytest.fixture
def text(prose: list[str], tmp_path: Path) -> Path:
    """The prose with two documents that cannot be used, and two behind the last sequence."""
    rows: list[Any] = [*prose[:10], 7, *prose[10:20], {"no": "text"}, *prose[20:], 8, 9]
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


@pytest.fixture
def whole(options: Callable[..., Any], text: Path) -> Callable[..., Any]:
    """Return a factory of options to harvest the whole text in its order."""
    share = {"max_tokens": None, "keep_order": True, "max_bad_documents": 0.2}
    return lambda **more: options(**{"dataset": str(text), **share, **more})


def left_out(root: Path) -> dict[int, dict[str, int]]:
    return {s: receipt.left_out for s, receipt in Cache.open(root).receipts.items()}


def test_documents_left_out_are_counted_in_receipts_summary_log_and_inspection(
    whole: Callable[..., Any], text: Path, tmp_path: Path, version: Callable[[int], None]
) -> None:
    version(LEFT_OUT_FROM)
    summary = harvest(whole())
    root = tmp_path / "cache"
    counts = left_out(root)
    assert summary.left_out == {"type": 4}
    assert sum(Counter(c.get("type", 0) for c in counts.values()).elements()) == 4
    assert counts[max(counts)] == {"type": 2}  # behind the last sequence
    (warning,) = (w for w in summary.warnings if "left out" in w)
    assert "4 documents could not be used" in warning
    assert re.search(r"document 10 \(.*text\.jsonl, line 11\).*does not hold text", warning)
    lines = (root / "logs/left-out-rank0.jsonl").read_text().splitlines()
    log = [json.loads(line) for line in lines]
    assert [(e["document"], e["reason"], e["shown"]) for e in log] == [
        (10, "type", "7"),
        (21, "type", "{'no': 'text'}"),
        (62, "type", "8"),
        (63, "type", "9"),
    ]
    assert [e["place"] for e in log] == [f"{text}, line {n}" for n in (11, 22, 63, 64)]
    assert verify(root).left_out == {"type": 4}
    assert cache_facts(inspect(root), None)["documents"] == "4 left out: 4 type"


def test_a_resumed_harvest_counts_the_same(
    whole: Callable[..., Any],
    tmp_path: Path,
    tree: Callable[[Path], dict[str, str]],
    version: Callable[[int], None],
) -> None:
    version(LEFT_OUT_FROM)
    root = tmp_path / "cache"
    harvest(whole())
    before, counts = tree(root), left_out(root)
    for shard, counted in counts.items():
        if counted or shard % 3 == 0:
            (root / f"shards/{shard:05d}.json").unlink()
    summary = harvest(whole(max_bad_documents=0.5))  # no part of the identity
    assert left_out(root) == counts
    assert summary.left_out == {"type": 4}
    after = tree(root)
    assert {k: v for k, v in after.items() if "logs" not in k} == {
        k: v for k, v in before.items() if "logs" not in k
    }


def test_over_the_share_the_harvest_stops_and_names_the_first(
    whole: Callable[..., Any], version: Callable[[int], None]
) -> None:
    version(LEFT_OUT_FROM)
    with pytest.raises(
        DatasetError,
        match=r"(?s)4 of 64 documents cannot be used.*document 10 .*line 11.*"
        r"--max-bad-documents.*4 type.*--text-column",
    ):
        harvest(whole(max_bad_documents=0.01))


def test_caches_of_earlier_versions_leave_no_document_out(
    whole: Callable[..., Any], version: Callable[[int], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    version(2)
    begun = SimpleNamespace(dataset_fingerprint="")
    monkeypatch.setattr(job_module, "_begun_before", lambda _: begun)
    with pytest.raises(DatasetError, match=r"(?s)^column 'text' does not hold text.*--text-column"):
        harvest(whole())


def test_tokens_beyond_the_embedding_are_named_before_the_harvest(
    make_tokenizer: Callable[..., Any],
    make_model: Callable[..., Path],
    whole: Callable[..., Any],
    prose: list[str],
    tmp_path: Path,
    version: Callable[[int], None],
) -> None:
    version(LEFT_OUT_FROM)
    model = make_model()
    tokenizer = make_tokenizer()
    assert len(tokenizer) == 300
    tokenizer.add_tokens(["gnu"])
    tokenizer.save_pretrained(model)
    rows = [*prose, "a gnu in the cache"]
    path = tmp_path / "gnu.jsonl"
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    summary = harvest(whole(model=str(model), dataset=str(path)))
    assert summary.left_out == {"token_id": 1}
    first, second = (w for w in summary.warnings if "left out" in w)
    assert "1 token beyond the model's 300 embeddings: 'gnu' (300)" in first
    assert "id 300 ('gnu')" in second
    assert "gnu.jsonl, line 61" in second


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_outside_0_to_1_is_refused(share: float) -> None:
    with pytest.raises(ConfigError, match="--max-bad-documents"):
        HarvestConfig("model", "data", "out", max_bad_documents=share)
