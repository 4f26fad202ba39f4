from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actcache.cache.folder import choose_block_rows, require_room, sequences_per_shard
from actcache.config import HarvestConfig
from actcache.data.datasets import open_dataset
from actcache.errors import ConfigError, DatasetError, DiskFullError, ModelError
from actcache.format.manifest import Hookpoint, read_manifest
from actcache.harvester import resolve as resolve_module
from actcache.harvester.resolve import (
    choose_hookpoints,
    choose_pipeline,
    choose_separator,
    excluded_tokens,
    goal_sequences,
    needs_tokenizer,
    planned_sequences,
    probe_model,
    resolve,
    special_tokens,
)
from actcache.model.loading import load_config


def pipeline_of(config: HarvestConfig, tokenizer: Any) -> Any:
    vocabulary = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=300))
    return choose_pipeline(config, vocabulary, tokenizer, open_dataset(config))


@pytest.mark.parametrize(
    ("bos", "adds_bos", "expected"),
    [
        ("auto", True, 0),
        ("auto", False, None),
        ("always", False, 0),
        ("always", True, 0),
        ("never", True, None),
    ],
)
def test_bos_follows_from_the_option_and_the_tokenizer(
    bos: str,
    adds_bos: bool,
    expected: int | None,
    options: Callable[..., HarvestConfig],
    make_tokenizer: Callable[..., Any],
) -> None:
    pipeline = pipeline_of(options(bos=bos, seed=4), make_tokenizer(adds_bos=adds_bos))
    assert pipeline.bos_id == expected
    assert (pipeline.eos_id, pipeline.order.seed, pipeline.order.keep_order) == (1, 4, False)
    assert (pipeline.ctx_len, pipeline.vocab_size) == (16, 300)


def test_a_tokenizer_without_a_required_token_is_refused_with_a_remedy(
    options: Callable[..., HarvestConfig], make_tokenizer: Callable[..., Any]
) -> None:
    with pytest.raises(ModelError, match=r"(?s)no BOS token.*remedy: +--bos never"):
        pipeline_of(options(bos="always"), make_tokenizer(adds_bos=False, bos=False))
    without = make_tokenizer(eos=False)
    with pytest.raises(
        ModelError, match=r"(?s)no EOS token.*--separator none or TOKEN.*\.bin file"
    ):
        pipeline_of(options(), without)
    with pytest.raises(ModelError, match=r"(?s)no BOS token.*--separator none or TOKEN"):
        pipeline_of(options(separator="bos"), make_tokenizer(adds_bos=False, bos=False))
    assert pipeline_of(options(separator="none"), without).eos_id is None
    assert pipeline_of(options(separator="<s>"), without).eos_id == 0


def test_the_separator_is_none_or_any_token(
    options: Callable[..., HarvestConfig], make_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    tokenizer = make_tokenizer()
    for asked, found in {"none": None, "eos": 1, "bos": 0, "7": 7, "</s>": 1, "a": 66}.items():
        pipeline = pipeline_of(options(separator=asked), tokenizer)
        assert (pipeline.eos_id, pipeline.notes) == (found, ())
    for token in ("300", "of no single token", ""):
        with pytest.raises(ConfigError, match=r"(?s)--separator.*0 to 299.*one token"):
            pipeline_of(options(separator=token), tokenizer)
    (tmp_path / "a.bin").write_bytes(bytes(64))
    with pytest.raises(ConfigError, match=r"(?s)no documents to join.*--separator eos"):
        pipeline_of(options(dataset=str(tmp_path / "a.bin"), separator="eos"), tokenizer)
    with pytest.raises(ConfigError, match=r"(?s)--id-rows whole needs rows of token ids"):
        pipeline_of(options(id_rows="whole"), tokenizer)


CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
BY_EOS = "{% for m in messages %}{{ m.role }}{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize(
    ("family", "eos", "others", "template", "expected"),
    [
        ("SmolLM2", "<|endoftext|>", ["<|im_start|>", "<|im_end|>"], None, "<|endoftext|>"),
        ("SmolLM2 chat", "<|im_end|>", ["<|endoftext|>", "<|im_start|>"], CHATML, "<|endoftext|>"),
        ("Qwen base", "<|endoftext|>", ["<|im_start|>", "<|im_end|>"], CHATML, "<|endoftext|>"),
        ("Llama 3 chat", "<|eot_id|>", ["<|end_of_text|>"], BY_EOS, "<|end_of_text|>"),
        ("Gemma chat", "<eos>", ["<end_of_turn>", "</s>"], CHATML, "<eos>"),
        ("Gemma tuned by ChatML", "<|im_end|>", ["<eos>", "</s>"], CHATML, "<eos>"),
        ("Mistral chat", "</s>", ["[INST]", "<unk>"], BY_EOS, "</s>"),
        ("Mistral tuned by ChatML", "<|im_end|>", ["<unk>", "</s>"], CHATML, "</s>"),
        ("Phi 3", "<|endoftext|>", ["</s>", "<|end|>"], BY_EOS, "<|endoftext|>"),
        ("Phi 3, EOS a turn's end", "<|end|>", ["</s>", "<|endoftext|>"], None, "<|endoftext|>"),
        ("OLMo chat", "<|endoftext|>", ["<|user|>"], BY_EOS, "<|endoftext|>"),
        ("Command R", "<|END_OF_TURN_TOKEN|>", ["<EOS_TOKEN>"], CHATML, "<EOS_TOKEN>"),
        ("a turn's end of its own", "<stop>", ["<|endoftext|>"], BY_EOS, "<|endoftext|>"),
        ("an EOS of its own", "<stop>", ["<|endoftext|>"], CHATML, "<stop>"),
    ],
)
def test_plain_text_of_a_chat_model_is_separated_as_in_pretraining(
    family: str,
    eos: str,
    others: list[str],
    template: str | None,
    expected: str,
    options: Callable[..., HarvestConfig],
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer(eos=False)
    tokenizer.add_special_tokens({"eos_token": eos})
    tokenizer.add_special_tokens({"additional_special_tokens": others})
    tokenizer.chat_template = template
    config = options()
    vocabulary = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=400))
    pipeline = choose_pipeline(config, vocabulary, tokenizer, open_dataset(config))
    assert tokenizer.convert_ids_to_tokens(pipeline.eos_id) == expected, family
    assert bool(pipeline.notes) == (expected != eos)
    for note in pipeline.notes:
        assert repr(expected) in note
        assert "--separator eos" in note


def test_a_chat_model_without_an_end_of_text_is_said_to_join_by_the_end_of_a_turn(
    options: Callable[..., HarvestConfig],
) -> None:
    added = {5: SimpleNamespace(content="<|im_end|>"), 6: SimpleNamespace(content="<|im_start|>")}
    tokenizer = SimpleNamespace(
        eos_token="<|im_end|>", eos_token_id=5, added_tokens_decoder=added, chat_template=None
    )
    found, (note,) = choose_separator(options(), tokenizer, "text", 300)
    assert found == 5
    assert "'<|im_end|>'" in note
    assert "--separator TOKEN or none" in note


def test_a_file_of_token_ids_is_not_shuffled_and_needs_no_tokenizer(
    options: Callable[..., HarvestConfig], tmp_path: Path, make_tokenizer: Callable[..., Any]
) -> None:
    path = tmp_path / "ids.bin"
    path.write_bytes(bytes(64))
    pipeline = pipeline_of(options(dataset=str(path)), None)
    assert (pipeline.bos_id, pipeline.eos_id, pipeline.order.keep_order) == (None, None, True)
    pipeline = pipeline_of(options(dataset=str(path), bos="always"), make_tokenizer())
    assert pipeline.bos_id == 0


def test_bos_auto_adds_no_bos_to_conversations_and_token_columns(
    options: Callable[..., HarvestConfig], make_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    tokenizer = make_tokenizer(adds_bos=True)
    path = tmp_path / "a.jsonl"
    path.write_text('{"ids": [1, 2], "talk": [{"role": "user", "content": "a"}]}\n')
    config = options(dataset=str(path), token_column="ids")
    assert pipeline_of(config, tokenizer).bos_id is None
    assert pipeline_of(dataclasses.replace(config, bos="always"), tokenizer).bos_id == 0
    config = options(dataset=str(path), chat_column="talk")
    with pytest.raises(ModelError, match=r"(?s)no chat template.*--text-column"):
        pipeline_of(config, tokenizer)
    tokenizer.chat_template = "{{ messages }}"
    assert pipeline_of(config, tokenizer).bos_id is None


@pytest.mark.parametrize("kind", ["crop", "truncate"])
def test_crop_and_truncate_pad_and_add_no_eos(
    kind: Any, options: Callable[..., HarvestConfig], make_tokenizer: Callable[..., Any]
) -> None:
    tokenizer = make_tokenizer()
    found = pipeline_of(options(pipeline=kind), tokenizer)
    assert (found.kind, found.eos_id, found.pad_id) == (kind, None, 1)  # EOS stands in for PAD
    tokenizer.pad_token = "<s>"
    assert pipeline_of(options(pipeline=kind), tokenizer).pad_id == 0
    assert pipeline_of(options(pipeline=kind), make_tokenizer(eos=False)).pad_id == 0


def test_a_file_of_token_ids_has_no_documents_to_crop(
    options: Callable[..., HarvestConfig], tmp_path: Path
) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(64))
    with pytest.raises(ConfigError, match=r"(?s)no documents to crop.*--pipeline pack"):
        pipeline_of(options(dataset=str(tmp_path / "a.bin"), pipeline="crop"), None)


def test_special_tokens_include_added_ones(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer()
    assert special_tokens(tokenizer) == (0, 1)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    tokenizer.add_tokens(["plain"])
    turn = tokenizer.convert_tokens_to_ids("<|turn|>")
    assert special_tokens(tokenizer) == (0, 1, turn)


def test_tokens_to_exclude_are_given_by_id_name_or_text(
    make_tokenizer: Callable[..., Any],
) -> None:
    tokenizer = make_tokenizer()
    written = next(token for token in tokenizer.get_vocab() if token[0] == "Ġ" and len(token) > 1)
    text, number = written.replace("Ġ", " "), tokenizer.convert_tokens_to_ids(written)
    found = excluded_tokens(("7", "</s>", text, "7"), tokenizer, 300)
    assert found == tuple(sorted({7, 1, number}))
    assert excluded_tokens(("7", "0"), None, 300) == (0, 7)
    for token in ("300", "of no single token", ""):
        with pytest.raises(ConfigError, match=r"(?s)--exclude-tokens.*0 to 299.*one token"):
            excluded_tokens((token,), tokenizer, 300)


def test_the_tokenizer_is_loaded_only_if_needed(
    options: Callable[..., HarvestConfig], tmp_path: Path
) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(64))
    (tmp_path / "a.jsonl").write_text('{"ids": [1, 2]}\n')

    def needed(name: str, **given: Any) -> bool:
        config = options(dataset=str(tmp_path / name), **given)
        return needs_tokenizer(config, open_dataset(config))

    assert not needed("a.bin")
    assert not needed("a.bin", exclude_tokens=("3",))
    assert needed("a.bin", exclude_tokens=("</s>",))
    assert needed("a.bin", exclude_special=True)
    assert needed("a.bin", bos="always")
    assert needed("a.jsonl", token_column="ids")  # to join with EOS
    assert not needed("a.jsonl", token_column="ids", pipeline="crop")
    assert needed("a.jsonl", token_column="ids", separator="none")  # to see BOS
    assert needed("a.jsonl", token_column="ids", id_rows="joined")
    assert not needed("a.jsonl", token_column="ids", id_rows="joined", separator="none")
    assert not needed("a.jsonl", token_column="ids", id_rows="joined", separator="7")


def test_a_stream_is_assumed_long_enough_and_not_counted(
    options: Callable[..., HarvestConfig], prose_file: Path
) -> None:
    assert planned(options(streaming=True, max_tokens=16 * 99_999)) == 99_999


def planned(config: HarvestConfig) -> int:
    return planned_sequences(config, resolve(config))


def test_the_planned_sequences_are_the_goal_or_those_of_a_shorter_text(
    options: Callable[..., HarvestConfig],
) -> None:
    assert planned(options(max_tokens=16 * 10 + 15)) == 10
    everything = planned(options(max_tokens=None))
    assert everything > 100
    assert planned(options(max_tokens=16 * (everything + 50))) == everything


def test_a_large_goal_is_assumed_for_text_and_computed_for_token_ids(
    options: Callable[..., HarvestConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resolve_module, "COUNTED_TOKENS", 1000)
    assert (
        planned(options(max_tokens=16 * 500)) == 500
    )  # the file has as many bytes as the goal has tokens
    all_there_is = planned(options(max_tokens=16 * 10_000))  # it has fewer: the text is counted
    assert all_there_is < 500
    path = tmp_path / "ids.bin"
    path.write_bytes(bytes(2 * 16 * 5))
    assert planned(options(dataset=str(path), max_tokens=16 * 10_000)) == 5


@pytest.mark.parametrize("max_tokens", [None, 16, 1 << 30])
def test_text_shorter_than_one_sequence_is_refused_for_every_goal(
    max_tokens: int | None, options: Callable[..., HarvestConfig], tmp_path: Path
) -> None:
    (tmp_path / "short.txt").write_text("the row")
    for path, data in (("short.txt", b"the row"), ("short.bin", bytes(30))):
        (tmp_path / path).write_bytes(data)
        config = options(dataset=str(tmp_path / path), max_tokens=max_tokens)
        with pytest.raises(DatasetError, match=r"(?s)short\.\w+ is shorter.*tokens.*--ctx-len"):
            planned(config)


def shard(config: HarvestConfig, planned: int, width: int = 8, dtype: str = "float32") -> int:
    return sequences_per_shard(config, planned, (Hookpoint("a", width),), dtype)


def test_a_shard_is_a_128th_of_the_harvest_in_whole_batches(
    options: Callable[..., HarvestConfig],
) -> None:
    assert shard(options(shard_size=None), 128 * 8) == 8
    assert shard(options(shard_size=None), 128 * 8 + 1) == 12
    assert shard(options(shard_size=None), 1) == 4
    assert shard(options(shard_size=7), 10_000) == 7


@given(st.integers(1, 10**9), st.integers(1, 2**16), st.integers(2, 2**14), st.integers(1, 64))
def test_a_shard_that_is_compressed_has_less_than_2_gib_at_a_hookpoint_unless_one_batch_has_more(
    planned: int, width: int, ctx_len: int, batch_size: int
) -> None:
    config = HarvestConfig(
        "m", "d", "o", ctx_len=ctx_len, batch_size=batch_size, backend="zarr", compress="zstd"
    )
    size = shard(config, planned, width, "bfloat16")
    assert size % batch_size == 0
    assert size == batch_size or size * (ctx_len - 1) * width * 2 < 2**31 - 16


@given(st.integers(1, 10**9), st.integers(1, 2**20), st.integers(2, 2**17), st.integers(1, 64))
def test_a_shard_has_a_bounded_number_of_bytes_unless_one_batch_is_more(
    planned: int, width: int, ctx_len: int, batch_size: int
) -> None:
    config = HarvestConfig("m", "d", "o", ctx_len=ctx_len, batch_size=batch_size)
    size = shard(config, planned, width, "bfloat16")
    assert size % batch_size == 0
    assert size >= batch_size
    if size > batch_size:
        assert size * (ctx_len - 1) * width * 2 <= 4 << 30
        assert (size - batch_size) * 128 < planned


@pytest.mark.parametrize(
    ("width", "dtype", "rows"),
    [
        (576, "bfloat16", 1024),  # 1.125 MiB: nearer than 0.5625
        (768, "bfloat16", 512),
        (4096, "bfloat16", 128),
        (5120, "float32", 64),  # 1.25 MiB: nearer than 0.625
        (6000, "float32", 32),
        (2**24, "float32", 1),
        (1, "float16", 2**19),
    ],
)
def test_a_block_is_the_power_of_two_of_rows_nearest_one_mebibyte(
    width: int, dtype: str, rows: int
) -> None:
    assert choose_block_rows((Hookpoint("a", 1), Hookpoint("b", width)), dtype) == rows


@given(st.integers(1, 2**20))
def test_no_other_power_of_two_is_nearer(width: int) -> None:
    rows = choose_block_rows((Hookpoint("a", width),), "bfloat16")
    best = min((2**n for n in range(22)), key=lambda n: (abs(n * width * 2 - 2**20), n))
    assert rows == best


def free(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=size))


def test_a_harvest_larger_than_the_free_space_is_refused(
    make_cache: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    root = make_cache(shards=4)
    size = sum(p.stat().st_size for p in root.rglob("*.*") if p.is_file())
    manifest = read_manifest(root)
    free(monkeypatch, size)
    with pytest.raises(DiskFullError, match=r"(?s)does not fit.*new.*kB free.*got.*--max-tokens"):
        require_room(tmp_path / "new" / "cache", manifest, published=())
    free(monkeypatch, 2 * size)
    require_room(tmp_path / "new" / "cache", manifest, published=())


def test_published_shards_need_no_free_space(
    make_cache: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_cache(shards=4)
    manifest = read_manifest(root)
    free(monkeypatch, 0)
    require_room(root, manifest, published=range(4))
    require_room(root, dataclasses.replace(manifest, planned_sequences=None), published=())
    with pytest.raises(DiskFullError):
        require_room(root, manifest, published=range(3))


@pytest.mark.parametrize(("hookpoints", "width", "dtype"), [(1, 8, "float32"), (40, 64, "float16")])
def test_the_required_space_covers_the_written_bytes(
    hookpoints: int,
    width: int,
    dtype: str,
    make_cache: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = {f"layers.{n}.self_attn.o_proj:in": width for n in range(hookpoints)}
    root = make_cache(shards=3, sequences=2, hookpoints=names, dtype=dtype, end=True)
    written = sum(p.stat().st_size for p in root.rglob("*") if p.is_file())
    free(monkeypatch, written - 1)
    with pytest.raises(DiskFullError):
        require_room(root, read_manifest(root), published=())


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_the_required_space_covers_the_padding_of_zarr_and_ignores_compression(
    compression: str, make_cache: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    hookpoints = {f"layers.{n}": 256 for n in range(4)}
    shape = {"shards": 2, "sequences": 64, "hookpoints": hookpoints}
    noise = np.random.RandomState(0)
    root = make_cache(
        last_sequences=1,
        rows=lambda _, __, count, width: noise.standard_normal((count, width)),
        backend="zarr",
        compression="none",
        **shape,
    )
    manifest = dataclasses.replace(read_manifest(root), compression=compression)
    written = sum(p.stat().st_size for p in root.rglob("*") if p.is_file())
    free(monkeypatch, written - 1)
    with pytest.raises(DiskFullError):
        require_room(root, manifest, published=())
    require_room(root, dataclasses.replace(manifest, backend="memmap", compression="none"), ())


def test_hookpoints_are_chosen_without_loading_weights(
    options: Callable[..., HarvestConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: Any) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(resolve_module, "load_model", fail)
    config = options(hookpoint=("model.layers.[01].mlp",))
    model, sites, has_weights = probe_model(config, load_config(config))
    expected = (Hookpoint("layers.0.mlp", 32), Hookpoint("layers.1.mlp", 32))
    assert choose_hookpoints(config, model, sites) == (expected, {})
    assert not has_weights
    config = options(hookpoint=(), layer_stride=2)
    chosen, _ = choose_hookpoints(config, model, sites)
    assert [h.name for h in chosen] == ["layers.0", "layers.2"]
    config = options(hookpoint=(), layers=(-1, "middle", 0))
    chosen, renamed = choose_hookpoints(config, model, sites)
    assert [h.name for h in chosen] == ["layers.0", "layers.1", "layers.2"]
    assert renamed == {"--layers -1": ["layers.2"], "--layers middle": ["layers.1"]}


def test_a_model_that_fails_on_the_meta_device_is_probed_with_its_weights(
    options: Callable[..., HarvestConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise NotImplementedError("no meta")

    config = options()
    _, sites, _ = probe_model(config, load_config(config))
    monkeypatch.setattr(resolve_module, "load_meta_model", refuse)
    model, again, has_weights = probe_model(config, load_config(config))
    assert again == sites
    assert has_weights
    assert next(model.parameters()).device.type == "cpu"


def test_the_goal_is_rounded_down_to_sequences_and_in_8_bits_to_batches() -> None:
    sizes = {"ctx_len": 16, "batch_size": 4, "max_tokens": 16 * 11 + 15}

    def goal(**options: Any) -> int | None:
        return goal_sequences(HarvestConfig("m", "d", "o", **options))

    assert goal() is None
    assert goal(**sizes) == goal(**sizes, load_in="4bit") == 11
    assert goal(**sizes, load_in="8bit") == 8
    assert goal(load_in="8bit", batch_size=4, shard_size=8, max_tokens=4096) == 4
