"""Pipelines, filters and kinds of text in whole harvests: which rows exist, and their values."""

from __future__ import annotations

import dataclasses
import gzip
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from actcache.cache.reader import Cache
from actcache.config import HarvestConfig, PlanConfig
from actcache.errors import CacheMismatchError, ConfigError, DatasetError
from actcache.format.manifest import FILTERS
from actcache.format.receipts import ShardReceipt
from actcache.harvester import job, resolve
from actcache.harvester.estimate import estimate_harvest
from actcache.harvester.run import harvest
from actcache.model.loading import load_model, load_tokenizer

Options = Callable[..., HarvestConfig]
Tree = Callable[[Path | str], dict[str, str]]

pytestmark = pytest.mark.usefixtures("warm_model")

POINTS = ("layers.0", "layers.1:in", "layers.2.mlp:in", "layers.2")


def states_of(model: Any, cache: Cache, shard: int) -> dict[str, torch.Tensor]:
    """Run the model on each sequence alone, without padding; positions beyond it are NaN."""
    words = cache.tokens(shard)
    found = torch.full((2, *words.tokens.shape, 32), float("nan"))
    for number, (tokens, length) in enumerate(zip(words.tokens, words.lengths, strict=True)):
        ids = torch.from_numpy(tokens[:length].astype(np.int64))[None]
        with torch.inference_mode():
            states = model(ids, output_hidden_states=True, use_cache=False).hidden_states
        found[0, number, :length] = states[1][0]
        found[1, number, :length] = states[2][0]
    return {"layers.0": found[0], "layers.1": found[1]}


def positions(cache: Cache, shard: int) -> tuple[torch.Tensor, torch.Tensor]:
    words = cache.tokens(shard)
    return torch.from_numpy(words.row_sequence).long(), torch.from_numpy(words.row_position).long()


def counts(cache: Cache) -> dict[str, int]:
    receipts: list[ShardReceipt] = list(cache.receipts.values())
    for receipt in receipts:
        assert receipt.rows + sum(receipt.dropped.values()) == receipt.sequences * 16
    return {name: sum(r.dropped[name] for r in receipts) for name in FILTERS}


@pytest.mark.parametrize("pipeline", ["crop", "truncate"])
def test_rows_of_a_padded_sequence_equal_those_without_padding(
    pipeline: str, options: Options, prose: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "short.jsonl"
    texts = [text[: 5 * number] for number, text in enumerate(prose)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    points = ("layers.0", "layers.1")
    given = {"pipeline": pipeline, "ctx_len": 48, "max_tokens": None, "hookpoint": points}
    config = options(dataset=str(path), **given)
    cache = Cache.open(harvest(config).cache)
    model = load_model(config)
    lengths = [len(load_tokenizer(config)(text)["input_ids"]) for text in texts if text]
    assert sum(r.sequences for r in cache.receipts.values()) == len(lengths)
    assert cache.rows == sum(min(length, 48) - 1 for length in lengths)
    assert any(length < 48 for length in lengths)
    assert any(length > 48 for length in lengths)
    for shard in cache.shards:
        states = states_of(model, cache, shard)
        for name in points:
            rows = cache.row_dtype.to_torch(cache.read(name, shard))
            expected = states[name][positions(cache, shard)]
            torch.testing.assert_close(rows, expected, rtol=1e-4, atol=1e-4)


def test_padding_is_masked_in_attention(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    from actcache.model.hooks import ActivationCapture

    masks = []
    run = ActivationCapture.run

    def record(capture: Any, tokens: torch.Tensor, mask: torch.Tensor, *rest: Any) -> Any:
        masks.append((tokens, mask))
        return run(capture, tokens, mask, *rest)

    monkeypatch.setattr(ActivationCapture, "run", record)
    cache = Cache.open(harvest(options(pipeline="truncate", ctx_len=48, max_tokens=480)).cache)
    lengths = [length for shard in cache.shards for length in cache.tokens(shard).lengths]
    seen = [int(n) for _, mask in masks for n in mask.sum(dim=1)]
    filler = [48] * (len(seen) - len(lengths))  # unused rows of the last batch
    assert sorted(seen) == sorted([*lengths, *filler])


def test_the_padding_side_of_the_tokenizer_does_not_matter(
    options: Options, tiny_model: Path, tmp_path: Path, tree: Tree
) -> None:
    trees = []
    for side in ("left", "right"):
        folder = tmp_path / side / "model"
        shutil.copytree(tiny_model, folder)
        path = folder / "tokenizer_config.json"
        settings = json.loads(path.read_text()) | {"padding_side": side, "truncation_side": side}
        path.write_text(json.dumps(settings | {"pad_token": "</s>"}))
        config = options(model=str(folder), out=str(tmp_path / side / "cache"), ctx_len=48)
        assert load_tokenizer(config).padding_side == side
        for pipeline in ("pack", "truncate"):
            out = f"{config.out}-{pipeline}"
            small = options(
                model=config.model, out=out, pipeline=pipeline, ctx_len=48, max_tokens=480
            )
            trees.append(tree(harvest(small).cache))
    assert trees[0] == trees[2]
    assert trees[1] == trees[3]


def rows_by_address(cache: Cache, name: str) -> dict[tuple[int, int, int], bytes]:
    """Return every row by (shard, sequence, position)."""
    found = {}
    for shard in cache.shards:
        words = cache.tokens(shard)
        rows = cache.read(name, shard).values
        for row, s, p in zip(rows, words.row_sequence, words.row_position, strict=True):
            found[shard, int(s), int(p)] = row.tobytes()
    return found


def test_excluded_tokens_have_no_rows_and_other_rows_are_unchanged(
    options: Options,
) -> None:
    whole = Cache.open(harvest(options(out=options().out + "-whole", hookpoint=POINTS)).cache)
    tokens = np.concatenate([whole.tokens(s).tokens.reshape(-1) for s in whole.shards])
    common = int(np.bincount(tokens).argmax())
    config = options(exclude_special=True, exclude_tokens=(str(common),), hookpoint=POINTS)
    cache = Cache.open(harvest(config).cache)
    identity = cache.manifest.identity
    assert (identity.exclude_special, identity.exclude_tokens) == ((0, 1), (common,))
    assert cache.manifest.cache_id != whole.manifest.cache_id
    for name in POINTS:
        expected = {
            (shard, s, p): row
            for (shard, s, p), row in rows_by_address(whole, name).items()
            if whole.tokens(shard).tokens[s, p] not in (0, 1, common)
        }
        assert rows_by_address(cache, name) == expected
    dropped = counts(cache)
    assert dropped["exclude_tokens"] == (tokens == common).sum()
    assert dropped["exclude_special"] == (tokens == 1).sum()  # BOS, 0, is at skipped positions
    assert dropped["skip_positions"] == 10


def test_rows_of_large_norm_are_dropped_at_every_hookpoint(options: Options) -> None:
    whole = Cache.open(harvest(options(out=options().out + "-whole", hookpoint=POINTS)).cache)
    config = options(max_norm_ratio=1.2, hookpoint=POINTS)
    cache = Cache.open(harvest(config).cache)
    found = {name: rows_by_address(cache, name) for name in POINTS}
    everything = {name: rows_by_address(whole, name) for name in POINTS}
    for shard in whole.shards:
        norms = {
            name: {
                address: float(np.linalg.norm(np.frombuffer(row, "<f4").astype(np.float64)))
                for address, row in rows.items()
                if address[0] == shard
            }
            for name, rows in everything.items()
        }
        medians = {name: float(np.median(list(of.values()))) for name, of in norms.items()}
        remaining = {
            address
            for address in norms[POINTS[0]]
            if all(norms[name][address] <= 1.2 * medians[name] for name in POINTS)
        }
        for name in POINTS:
            assert {address for address in found[name] if address[0] == shard} == remaining
            for address in remaining:
                assert found[name][address] == everything[name][address]
    assert 0 < counts(cache)["max_norm_ratio"] == whole.rows - cache.rows


@pytest.mark.parametrize("given", [{"exclude_special": True, "max_norm_ratio": 1.3}, {}])
@pytest.mark.parametrize("pipeline", ["pack", "crop", "truncate"])
@pytest.mark.parametrize("storage", [{}, {"backend": "zarr"}], ids=["memmap", "zarr"])
def test_an_interrupted_harvest_with_filters_ends_in_the_same_bytes(
    given: dict[str, Any], pipeline: str, storage: dict[str, str], options: Options, tree: Tree
) -> None:
    from actcache.format.receipts import receipt_path

    config = options(pipeline=pipeline, **given, **storage)
    root = Path(harvest(config).cache)
    whole = tree(root)
    receipt_path(root, 1).unlink()
    (root / "shards" / "END.json").unlink()
    assert harvest(config).new_shards == 1
    assert tree(root) == whole


def test_a_shard_whose_rows_are_all_dropped_has_no_rows(options: Options, tmp_path: Path) -> None:
    path = tmp_path / "ids.bin"
    np.array([7] * 64 + [8] * 128, dtype="<u2").tofile(path)
    config = options(dataset=str(path), exclude_tokens=("7",), max_tokens=None, max_norm_ratio=9.0)
    cache = Cache.open(harvest(config).cache)
    assert [receipt.rows for receipt in cache.receipts.values()] == [0, 60, 60]
    assert cache.read("layers.0", 0).values.shape == (0, 32)
    assert cache.statistics("layers.0", [0]).count == 0
    assert cache.complete


@pytest.mark.parametrize(
    "given",
    [
        {"pipeline": "truncate"},
        {"pipeline": "crop"},
        {"exclude_special": True},
        {"exclude_tokens": ("7",)},
        {"max_norm_ratio": 5.0},
        {"streaming": True},
    ],
)
def test_a_cache_cannot_be_resumed_with_another_pipeline_or_filter(
    given: dict[str, Any], options: Options
) -> None:
    harvest(options())
    with pytest.raises(CacheMismatchError, match=next(iter(given)).replace("streaming", "shuffle")):
        harvest(options(**given))


def test_a_stream_with_keep_order_gives_the_cache_of_the_file(
    options: Options,
) -> None:
    kept = {"keep_order": True}
    whole = Cache.open(harvest(options(out=options().out + "-file", **kept)).cache)
    cache = Cache.open(harvest(options(streaming=True, **kept)).cache)
    assert cache.manifest.cache_id == whole.manifest.cache_id
    assert cache.digest(cache.shards) == whole.digest(whole.shards)


def test_a_stream_that_ends_before_the_goal_completes_the_cache_with_reason_text(
    options: Options,
) -> None:
    counted = harvest(options(out=options().out + "-all", max_tokens=None))
    sequences = Cache.open(counted.cache).end.sequences  # type: ignore[union-attr]
    summary = harvest(options(streaming=True, max_tokens=16 * 100_000, shuffle_buffer=7))
    assert (summary.complete, summary.reason) == (True, "text")
    cache = Cache.open(summary.cache)
    assert cache.end is not None
    assert cache.end.sequences == sequences
    assert cache.manifest.identity.shuffle_buffer == 7


def test_a_mixture_is_harvested_and_its_weights_are_recorded(
    options: Options, tmp_path: Path
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text("".join(json.dumps({"text": "row " * 30}) + "\n" for _ in range(50)))
    config = options(mix=(str(other),), weight=(1.0, 2.0), max_tokens=None)
    summary = harvest(config)
    cache = Cache.open(summary.cache)
    assert cache.manifest.identity.weights == (1.0, 2.0)
    assert cache.manifest.dataset == "prose.jsonl + other.jsonl"
    assert summary.reason == "text"
    tokenizer = load_tokenizer(config)
    texts = [tokenizer.decode(t) for s in cache.shards for t in cache.tokens(s).tokens]
    rows = sum("row row row" in text for text in texts)
    assert 0.2 < rows / len(texts) < 0.8  # two thirds of the documents, which are short


def test_files_of_a_pattern_are_harvested_and_warnings_are_in_the_summary_and_the_plan(
    options: Options, prose: list[str], tmp_path: Path
) -> None:
    (tmp_path / "parts").mkdir()
    for number in range(2):
        lines = [json.dumps({"text": text}) + "\n" for text in prose[number::2]]
        lines.append('{"text": "caf\\udce9"}\n')
        (tmp_path / "parts" / f"{number}.jsonl.gz").write_bytes(
            gzip.compress("".join(lines).encode())
        )
    (tmp_path / "parts" / "photo.jpg").touch()
    made = []
    for pattern in ("parts/*", "parts", "parts/[0-9].jsonl.gz"):
        out = str(tmp_path / f"cache-{len(made)}")
        config = options(dataset=str(tmp_path / pattern), out=out)
        summary = harvest(config)
        plan = estimate_harvest(PlanConfig(**dataclasses.asdict(config)))
        unread = [f"1 file of {config.dataset} left unread, of an unknown kind: photo.jpg"]
        replaced = [
            f"1 document of {tmp_path}/parts/{number}.jsonl.gz holds bytes that are not UTF-8; "
            "they were replaced"
            for number in range(2)
        ]
        expected = (*unread * (pattern != "parts/[0-9].jsonl.gz"), *replaced)
        assert summary.warnings == plan.warnings == expected
        made.append(Cache.open(summary.cache).manifest)
    assert len({manifest.cache_id for manifest in made}) == 1
    assert [manifest.dataset for manifest in made] == ["*", "parts", "[0-9].jsonl.gz"]


def test_conversations_are_rendered_by_the_chat_template(
    options: Options, tiny_model: Path, tmp_path: Path
) -> None:
    written = "<s>{{ m['role'] }} {{ m['content'] }}</s>"
    for folder, each in (("chat", written), ("other", f"{written} ")):
        shutil.copytree(tiny_model, tmp_path / folder)
        template = "{% for m in messages %}" + each + "{% endfor %}"
        (tmp_path / folder / "chat_template.jinja").write_text(template)
    talk = [{"role": "user", "content": "the row"}, {"role": "model", "content": "the cache"}]
    path = tmp_path / "talk.jsonl"
    path.write_text("".join(json.dumps({"talk": talk}) + "\n" for _ in range(20)))
    given = {"dataset": str(path), "chat_column": "talk", "max_tokens": None}
    config = options(model=str(tmp_path / "chat"), **given)
    cache = Cache.open(harvest(config).cache)
    found = load_tokenizer(config).decode(cache.tokens(0).tokens.reshape(-1))
    once = "<s>user the row</s><s>model the cache</s>"
    assert found.startswith(once * 3)  # it ends with EOS, so none is added
    assert cache.manifest.identity.documents == "chat"
    with pytest.raises(CacheMismatchError, match="tokenizer: "):
        harvest(options(model=str(tmp_path / "other"), **given))


def test_a_column_of_token_ids_is_packed_with_eos(options: Options, tmp_path: Path) -> None:
    path = tmp_path / "ids.jsonl"
    rows = [list(range(5, 5 + n)) for n in (20, 3, 40, 0, 11)]
    path.write_text("".join(json.dumps({"ids": ids}) + "\n" for ids in rows))
    config = options(dataset=str(path), token_column="ids", keep_order=True, max_tokens=None)
    cache = Cache.open(harvest(config).cache)
    line = [token for ids in rows if ids for token in [*ids, 1]]
    found = np.concatenate([cache.tokens(s).tokens.reshape(-1) for s in cache.shards])
    assert found.tolist() == line[: len(line) // 16 * 16]


def sequences_of(cache: Cache) -> list[list[int]]:
    """Return the sequences of a cache without padding."""
    found = [cache.tokens(shard) for shard in cache.shards]
    pairs = [pair for words in found for pair in zip(words.tokens, words.lengths, strict=True)]
    return [tokens[:length].tolist() for tokens, length in pairs]


def write_rows(path: Path, rows: list[list[int]]) -> str:
    path.write_text("".join(json.dumps({"input_ids": ids}) + "\n" for ids in rows))
    return str(path)


@pytest.mark.parametrize("first", [0, 9])
def test_rows_that_are_whole_sequences_are_kept_whole(
    first: int, options: Options, tmp_path: Path
) -> None:
    rows = [[first, *range(20 + n % 50, 35 + n % 50)] for n in range(600)]
    rows[2] = rows[2][:7]  # padded
    rows[1] = [8, *range(100, 120)]  # not one of those that are looked at
    config = options(
        dataset=write_rows(tmp_path / "rows.jsonl", rows), max_tokens=None, keep_order=True
    )
    summary = harvest(config)
    cache = Cache.open(summary.cache)
    assert sequences_of(cache) == [row[:16] for row in rows]
    identity = cache.manifest.identity
    assert identity.whole_rows
    assert (identity.pipeline, identity.eos_id, identity.bos_id) == ("truncate", None, None)
    found, whole, cut, *bos = [w for w in summary.warnings if "rows" in w or "column" in w]
    assert "'input_ids' is read, as lists of token ids (--token-column input_ids)" in found
    assert ("each begins with BOS" if first == 0 else "most have 16 tokens") in whole
    assert "--id-rows joined" in whole
    assert cut.startswith("1 rows of token ids had more than 16 tokens")
    assert bool(bos) == (first == 0)
    plan = estimate_harvest(PlanConfig(**dataclasses.asdict(config)))
    assert {found, whole} <= set(plan.warnings)


def test_whole_rows_get_no_second_bos(options: Options, tmp_path: Path) -> None:
    rows = [[0, *range(20 + n, 20 + n + 15)] for n in range(9)]
    config = options(dataset=write_rows(tmp_path / "a.jsonl", rows), bos="always", max_tokens=None)
    cache = Cache.open(harvest(config).cache)
    assert sorted(sequences_of(cache)) == rows
    without = write_rows(tmp_path / "b.jsonl", [row[1:] for row in rows])
    again = dataclasses.replace(config, dataset=without, out=str(tmp_path / "other"))
    assert sorted(sequences_of(Cache.open(harvest(again).cache))) == rows


def test_a_second_bos_before_rows_that_begin_with_it_is_said(
    options: Options, tmp_path: Path
) -> None:
    rows = [[0, *range(20 + n, 20 + n + 15)] for n in range(9)]
    dataset = write_rows(tmp_path / "a.jsonl", rows)
    for given in ({"pipeline": "truncate"}, {"pipeline": "crop"}, {"id_rows": "joined"}):
        for bos in ("always", "auto"):
            config = options(dataset=dataset, max_tokens=None, bos=bos, **given)
            warnings = estimate_harvest(PlanConfig(**dataclasses.asdict(config))).warnings
            said = any("begin with BOS, and --bos always puts one" in w for w in warnings)
            assert said == (bos == "always")


@pytest.mark.parametrize(("length", "bos", "enough"), [(20, "auto", 20), (16, "always", 17)])
def test_whole_rows_that_do_not_fit_are_refused_with_remedies(
    length: int, bos: Any, enough: int, options: Options, tmp_path: Path
) -> None:
    rows = [list(range(20 + n, 20 + n + length)) for n in range(9)]
    dataset = write_rows(tmp_path / "a.jsonl", rows)
    config = options(dataset=dataset, bos=bos, max_tokens=None, keep_order=True)
    remedies = rf"--ctx-len {enough} .*--id-rows whole.*--id-rows joined"
    with pytest.raises(DatasetError, match=rf"(?s)whole sequences.*{remedies}"):
        harvest(config)
    fitting = dataclasses.replace(config, ctx_len=enough)
    whole = dataclasses.replace(config, id_rows="whole")
    joined = dataclasses.replace(config, id_rows="joined")
    head = [0] * (bos == "always")
    for given, expected in (
        (fitting, [head + row for row in rows]),
        (whole, [(head + row)[:16] for row in rows]),
    ):
        cache = Cache.open(
            harvest(
                dataclasses.replace(given, out=f"{config.out}-{given.id_rows}{given.ctx_len}")
            ).cache
        )
        assert sequences_of(cache) == expected
    identity = Cache.open(harvest(joined).cache).manifest.identity
    assert (identity.pipeline, identity.eos_id, identity.whole_rows) == ("pack", 1, False)


def test_a_mixture_of_whole_rows_and_documents_is_refused(options: Options, tmp_path: Path) -> None:
    whole = write_rows(tmp_path / "a.jsonl", [[0, n, 5] for n in range(20, 40)])
    documents = write_rows(tmp_path / "b.jsonl", [[5, 6, 7, 8][: 1 + n % 4] for n in range(20)])
    config = options(dataset=whole, mix=(documents,), max_tokens=None)
    with pytest.raises(DatasetError, match=r"(?s)some of the datasets only.*--id-rows"):
        harvest(config)
    assert harvest(dataclasses.replace(config, id_rows="joined")).complete


def test_padding_that_a_mask_marks_leaves_no_rows(options: Options, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [[0, *range(20, 22 + n)] for n in range(10)]
    padded = [
        {
            "input_ids": [1] * (16 - len(row)) + row,
            "attention_mask": [0] * (16 - len(row)) + [1] * len(row),
        }
        for row in rows
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in padded))
    config = options(dataset=str(path), max_tokens=None, keep_order=True)
    for number, given in enumerate([{}, {"pipeline": "truncate"}, {"id_rows": "joined"}]):
        summary = harvest(dataclasses.replace(config, out=f"{config.out}-{number}", **given))
        assert any("attention_mask marks padding" in warning for warning in summary.warnings)
        cache = Cache.open(summary.cache)
        assert cache.manifest.identity.template_columns == ("attention_mask",)
        if number < 2:
            assert sequences_of(cache) == rows
        else:
            line = [token for row in rows for token in [*row, 1]]
            found = [token for ids in sequences_of(cache) for token in ids]
            assert found == line[: len(found)]


def test_conversations_are_packed_as_their_template_ends_them(
    options: Options, tiny_model: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_model, tmp_path / "chat")
    template = "{% for m in messages %}<s>{{ m['role'] }} {{ m['content'] }}</s>\n{% endfor %}"
    (tmp_path / "chat" / "chat_template.jinja").write_text(template)
    talk = [{"role": "user", "content": "the row"}, {"role": "assistant", "content": "the cache"}]
    path = tmp_path / "talk.jsonl"
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for _ in range(20)))
    model = str(tmp_path / "chat")
    config = options(model=model, dataset=str(path), max_tokens=None, ctx_len=32)
    summary = harvest(config)
    cache = Cache.open(summary.cache)
    text = load_tokenizer(config).decode(cache.tokens(0).tokens.reshape(-1))
    once = "<s>user the row</s>\n<s>assistant the cache</s>\n"
    assert text.startswith(once * 2)  # EOS is the end of a turn: none is added
    assert cache.manifest.identity.eos_id is None
    assert cache.manifest.identity.template_columns == ("messages",)
    assert any("--chat-column messages" in warning for warning in summary.warnings)
    for separator, put in (("eos", ""), ("bos", "<s>"), ("</s>", "</s>")):
        given = dataclasses.replace(config, separator=separator, out=f"{config.out}-{put[1:-1]}")
        cache = Cache.open(harvest(given).cache)
        text = load_tokenizer(config).decode(cache.tokens(0).tokens.reshape(-1))
        assert text.startswith((once + put) * 2)


def test_a_cache_with_another_separator_or_joined_rows_is_refused_by_name(
    options: Options, tiny_model: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(tiny_model, tmp_path / "chat")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_special_tokens({"eos_token": "<|im_end|>"})
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    tokenizer.save_pretrained(folder)
    config = options(model=str(folder))
    model = LlamaForCausalLM.from_pretrained(folder)
    model.resize_token_embeddings(302, mean_resizing=False)
    model.save_pretrained(folder)
    earlier = harvest(dataclasses.replace(config, separator="eos"))
    with pytest.raises(CacheMismatchError, match=r"separator: 300, not 301 \(--separator 300\)"):
        harvest(config)
    assert harvest(dataclasses.replace(config, separator="eos")).cache_id == earlier.cache_id
    summary = harvest(dataclasses.replace(config, out=str(tmp_path / "new")))
    assert any("<|endoftext|>" in w and "--separator eos" in w for w in summary.warnings)
    found = sequences_of(Cache.open(summary.cache))
    assert any(301 in ids for ids in found)
    assert not any(300 in ids for ids in found)
    rows = write_rows(tmp_path / "rows.jsonl", [[0, 5, 6]] * 30)
    given = {"dataset": rows, "out": str(tmp_path / "rows")}
    harvest(dataclasses.replace(config, **given, id_rows="joined", separator="eos"))
    with pytest.raises(CacheMismatchError, match=r"whole rows: False, not True \(--id-rows"):
        harvest(dataclasses.replace(config, **given))


def test_a_half_done_cache_is_not_finished_with_another_version_of_a_folder(
    options: Options, tmp_path: Path
) -> None:
    rows = [list(range(n % 50, n % 50 + 7)) for n in range(3000)]
    config = options(dataset=str(tmp_path / "saved"), token_column="ids", max_tokens=512)
    datasets.Dataset.from_dict({"ids": rows}).save_to_disk(config.dataset)
    first = harvest(config)
    rows[1001] = [3] * 7  # not one of those that the sampled fingerprint takes
    shutil.rmtree(config.dataset)
    datasets.Dataset.from_dict({"ids": rows}).save_to_disk(config.dataset)
    with pytest.raises(CacheMismatchError, match="text: "):
        harvest(config)
    other = harvest(dataclasses.replace(config, out=str(tmp_path / "other")))
    assert other.cache_id != first.cache_id


@pytest.mark.parametrize("streaming", [False, True])
def test_a_cache_with_the_sampled_fingerprint_of_a_folder_is_resumed(
    streaming: bool, options: Options, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = options(
        dataset=str(tmp_path / "saved"), token_column="ids", max_tokens=512, streaming=streaming
    )
    datasets.Dataset.from_dict({"ids": [[n % 50, 4, 5] for n in range(500)]}).save_to_disk(
        config.dataset
    )
    with monkeypatch.context() as patch:  # as in format version 1
        patch.setattr(resolve, "FORMAT_VERSION", 1)
        sampled = resolve.open_dataset(config).earlier()[-1]
        begun = SimpleNamespace(dataset_fingerprint=sampled)
        patch.setattr(job, "_begun_before", lambda _: begun)
        made = harvest(config)
    folder = Path(made.cache) / "shards"
    (folder / "00000.json").unlink()
    (folder / "END.json").unlink()
    again = harvest(config)
    assert (again.cache_id, again.new_shards) == (made.cache_id, 1)
    fingerprint = Cache.open(made.cache).manifest.identity.dataset_fingerprint
    assert fingerprint.endswith("-streamed" if streaming else "-sampled")


@pytest.mark.parametrize(("ratio", "fits"), [(5.0, True), (1e9, False)])
def test_the_float16_range_is_checked_after_the_norm_filter(
    ratio: float, fits: bool, make_model: Callable[..., Path], options: Options
) -> None:
    from transformers import AutoModelForCausalLM

    path = make_model()
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.model.embed_tokens.weight[1] *= 1e6  # EOS: far beyond float16
    model.save_pretrained(path)
    given = {"model": str(path), "hookpoint": ("layers.0:in",), "max_tokens": None}
    config = options(dtype="float16", max_norm_ratio=ratio, **given)
    if fits:
        cache = Cache.open(harvest(config).cache)
        assert counts(cache)["max_norm_ratio"] > 0
        assert not any(receipt.non_finite["layers.0:in"] for receipt in cache.receipts.values())
    else:
        with pytest.raises(ConfigError, match=r"(?s)do not fit float16.*--max-norm-ratio"):
            harvest(config)
