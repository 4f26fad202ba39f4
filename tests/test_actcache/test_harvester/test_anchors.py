"""Resumed harvests tokenise from the last published sequence on, and end in the same bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from actcache.cache.reader import Cache
from actcache.config import HarvestConfig
from actcache.data import sequences, tokenization
from actcache.errors import DatasetError
from actcache.harvester.anchors import find_anchor
from actcache.harvester.run import harvest

Options = Callable[..., HarvestConfig]
Tree = Callable[[Path | str], dict[str, str]]

pytestmark = pytest.mark.usefixtures("warm_model")


@pytest.fixture
def tokenised(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every document that is tokenised."""
    found: list[str] = []

    def watched(tokenizer: Any, kind: Any, records: Iterable[str], render: Any) -> Iterator[Any]:
        given = list(records)
        found.extend(given)
        return tokenization.tokenize(tokenizer, kind, given, render)

    monkeypatch.setattr(sequences, "tokenize", watched)
    monkeypatch.setattr("actcache.data.document_order.DOCUMENTS_AT_ONCE", 4)
    return found


@pytest.fixture
def long_file(prose: list[str], tmp_path: Path) -> str:
    path = tmp_path / "long.jsonl"
    lines = [json.dumps({"text": f"{n} {text}"[:60]}) for n in range(20) for text in prose]
    path.write_text("\n".join(lines))
    return str(path)


def unpublish(root: Path, shards: range) -> None:
    (root / "shards" / "END.json").unlink(missing_ok=True)
    for shard in shards:
        (root / "shards" / f"{shard:05d}.json").unlink()


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"pipeline": "crop"},
        {"pipeline": "truncate", "bos": "never"},
        {"streaming": True, "shuffle_buffer": 20},
        {"keep_order": True},
        {"mix": True, "weight": (1.0, 2.0)},
    ],
    ids=str,
)
def test_a_resumed_harvest_tokenises_from_the_last_published_sequence_on(
    given: dict[str, Any],
    options: Options,
    tree: Tree,
    tokenised: list[str],
    long_file: str,
    tmp_path: Path,
) -> None:
    if given.get("mix"):
        shutil.copy(long_file, tmp_path / "other.jsonl")
        given = given | {"mix": (str(tmp_path / "other.jsonl"),)}
    config = options(dataset=long_file, max_tokens=16 * 200, shard_size=4, **given)
    root = Path(harvest(config).cache)
    whole, all_of_it = tree(root), len(tokenised)
    unpublish(root, range(45, 50))
    tokenised.clear()
    assert harvest(config).new_shards == 5
    assert tree(root) == whole
    assert len(tokenised) < all_of_it / 4


def test_shards_between_published_ones_are_each_entered_at_the_shard_before(
    options: Options, tree: Tree, tokenised: list[str], long_file: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr("actcache.data.sequences._NEAR", 16)
    config = options(dataset=long_file, max_tokens=16 * 200, shard_size=4)
    root = Path(harvest(config).cache)
    whole, all_of_it = tree(root), len(tokenised)
    unpublish(root, range(5, 6))
    unpublish(root, range(45, 46))
    tokenised.clear()
    assert harvest(config).new_shards == 2
    assert tree(root) == whole
    assert len(tokenised) < all_of_it / 4


def test_a_shard_whose_text_is_damaged_is_no_anchor(options: Options, long_file: str) -> None:
    config = options(dataset=long_file, max_tokens=16 * 40, shard_size=4)
    cache = Cache.open(harvest(config).cache)

    def anchor(number: int) -> int | None:
        found = find_anchor(cache.root, cache.manifest, cache.receipts, number)
        return found and found.number

    assert [anchor(n) for n in (0, 3, 4, 7, 8, 40)] == [None, None, 3, 3, 7, 39]
    damaged = cache.root / "tokens" / "00009.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    assert anchor(40) == 35


def test_a_text_that_changed_without_its_fingerprint_ends_a_resumed_harvest(
    options: Options, long_file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = options(dataset=long_file, max_tokens=16 * 40, shard_size=4)
    unpublish(Path(harvest(config).cache), range(5, 10))

    def other(tokenizer: Any, kind: Any, records: Iterable[str], render: Any) -> Iterator[Any]:
        return tokenization.tokenize(tokenizer, kind, [f"x{record}" for record in records], render)

    monkeypatch.setattr(sequences, "tokenize", other)
    with pytest.raises(DatasetError, match="other tokens than when the cache was begun"):
        harvest(config)


def test_an_extended_harvest_tokenises_from_the_last_sequence_on(
    options: Options, tree: Tree, tokenised: list[str], long_file: str, tmp_path: Path
) -> None:
    given = {"dataset": long_file, "shard_size": 4, "streaming": True, "shuffle_buffer": 20}
    whole = harvest(options(max_tokens=16 * 200, **given, out=str(tmp_path / "w")))
    all_of_it = len(tokenised)
    harvest(options(max_tokens=16 * 180, **given))
    tokenised.clear()
    grown = harvest(options(max_tokens=16 * 200, **given, extend=True))
    assert grown.new_shards == 5
    assert len(tokenised) < all_of_it / 4
    same = {n: d for n, d in tree(grown.cache).items() if n.startswith(("tokens", "activations"))}
    assert same == {n: d for n, d in tree(whole.cache).items() if n in same}


def test_a_text_that_is_counted_first_is_tokenised_once(
    options: Options, tokenised: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "numbered.jsonl"
    path.write_text("".join(f'{{"text": "{n} the row of the cache"}}\n' for n in range(400)))
    harvest(options(dataset=str(path), max_tokens=16 * 50))
    assert len(tokenised) == len(set(tokenised)) > 50
