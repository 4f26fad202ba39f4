"""Checkpoints that lack weights, hold others, or hold them in other shapes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from actcache.cache.reader import Cache
from actcache.config import HarvestConfig
from actcache.core.process import captured_warnings
from actcache.errors import ModelError
from actcache.harvester.run import harvest
from actcache.model.loading import fingerprint_model, load_config, load_model

Changed = Callable[..., Path]


@pytest.fixture
def changed(tiny_model: Path, tmp_path: Path) -> Changed:
    """Return a factory of copies of the tiny model with other weights or another configuration."""

    def make(
        rename: Callable[[str], str] = lambda name: name,
        *,
        without: str | None = None,
        more: dict[str, torch.Tensor] | None = None,
        **config: Any,
    ) -> Path:
        folder = tmp_path / "changed"
        shutil.copytree(tiny_model, folder)
        state = load_file(folder / "model.safetensors")
        kept = {rename(k): v for k, v in state.items() if without is None or without not in k}
        save_file(kept | (more or {}), folder / "model.safetensors", {"format": "pt"})
        values = json.loads((folder / "config.json").read_text()) | config
        values.pop("layer_types", None)
        (folder / "config.json").write_text(json.dumps(values))
        return folder

    return make


def loaded(folder: Path, **options: Any) -> Any:
    return load_model(HarvestConfig(str(folder), "data", "out", **options))


SPREAD = {"device_map": "auto", "max_memory": ("cpu=60KB",)}
"""A part of the weights stays on disk."""


@pytest.mark.parametrize(
    "options", [{}, {"load_in": "4bit"}, SPREAD], ids=["plain", "4bit", "disk"]
)
@pytest.mark.parametrize(
    ("rename", "message"),
    [
        (
            lambda name: f"_orig_mod.{name}",  # saved from torch.compile
            r"lacks 29 of.*model\.norm\.weight.*and 25 more.*got: +names with the prefix of a "
            r"wrapper, such as _orig_mod\.model\.embed_tokens\.weight",
        ),
        (
            lambda name: name.replace("layers.1.mlp", "layers.1.ffn"),
            r"lacks 3 of.*layers\.1\.mlp\.up_proj.*got: +3 weights that the model has no use for: "
            r"model\.layers\.1\.ffn\.down_proj.*another architecture",
        ),
    ],
)
def test_missing_weights_are_refused_however_they_are_loaded(
    rename: Callable[[str], str], message: str, options: dict[str, Any], changed: Changed
) -> None:
    with pytest.raises(ModelError, match=f"(?s){message}"):
        loaded(changed(rename), **options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"rename": lambda name: name.replace("model.", "model._orig_mod.")},
            r"wrapper, such as model\._orig_mod\.embed.*rename it model\.embed_tokens\.weight",
        ),
        (
            {"rename": lambda name: f"policy.{name}"},
            r"names that begin with 'policy\.', such as policy\.model\..*remove 'policy\.'",
        ),
        (
            {"num_hidden_layers": 5},
            r"lacks 18 of.*got: +3 layers; the configuration says 5.*config",
        ),
        (
            {
                "rename": lambda name: name.replace("q_proj.", "q_proj.base_layer."),
                "more": {"model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(2, 2)},
            },
            r"lacks 3 of.*q_proj\.weight.*got: +weights of an adapter.*merge_and_unload",
        ),
        (
            {"attention_bias": True},
            r"lacks 12 of.*got: +layers without self_attn.k_proj.bias, .*q_proj.bias.*config.json",
        ),
        ({"without": "embed_tokens"}, r"lacks 1 of.*: model\.embed_tokens\.weight.*a part of the"),
        (
            {"without": "layers.2.mlp.up_proj"},
            r"lacks 1 of.*: model\.layers\.2\.mlp\.up_proj\.weight.*a part of the weights",
        ),
    ],
)
def test_the_likely_cause_of_missing_weights_is_named(
    given: dict[str, Any], message: str, changed: Changed
) -> None:
    with pytest.raises(ModelError, match=f"(?s){message}"):
        loaded(changed(**given))


def test_a_missing_buffer_is_refused_like_a_weight(tmp_path: Path) -> None:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    sizes = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 4}
    heads |= {"q_lora_rank": 4, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 4}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1}
    experts |= {"first_k_dense_replace": 1, "moe_intermediate_size": 8}
    config = DeepseekV3Config(**sizes, **heads, **experts, bos_token_id=0, eos_token_id=1)
    DeepseekV3ForCausalLM(config).save_pretrained(tmp_path)
    loaded(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    (name,) = (name for name in state if name.endswith("e_score_correction_bias"))
    del state[name]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=rf"lacks 1 of.*: {name}"):
        loaded(tmp_path)


@pytest.mark.parametrize("bits", ["none", "8bit", "4bit"])
def test_weights_of_another_shape_are_named_with_both_shapes(bits: str, changed: Changed) -> None:
    folder = changed(intermediate_size=64)
    with pytest.raises(ModelError) as caught:
        loaded(folder, load_in=bits)
    message = str(caught.value)
    assert "9 weights of" in message
    line = "mlp.up_proj.weight: [48, 32] in the checkpoint, [64, 32] by the configuration"
    assert all(f"model.layers.{layer}.{line}" in message for layer in range(3))
    assert "restore the config.json" in message


def test_weights_of_another_shape_are_refused_where_they_stay_on_disk(changed: Changed) -> None:
    folder = changed(intermediate_size=64)
    with pytest.raises(
        ModelError, match=r"(?s)weight model\.layers\.\d\.mlp.*does not fit.*config"
    ):
        fingerprint_model(loaded(folder, device_map="auto", max_memory=("cpu=1KB",)))


def test_unused_weights_are_named_in_a_warning(changed: Changed) -> None:
    more = {f"value_head.{n}": torch.ones(3) for n in range(6)}
    with captured_warnings() as captured:
        loaded(changed(more=more))
    (line,) = captured.lines
    assert "6 weights are not used: value_head.0, value_head.1," in line
    assert line.endswith("value_head.3 and 2 more")


@pytest.mark.parametrize("options", [{}, SPREAD], ids=["plain", "disk"])
def test_a_missing_head_is_no_error_and_not_in_the_fingerprint(
    options: dict[str, Any], changed: Changed
) -> None:
    folder = changed(without="lm_head")
    first = loaded(folder, **options)
    assert "lm_head.weight" not in first.state_dict()
    assert fingerprint_model(first) == fingerprint_model(loaded(folder, **options))


def test_a_head_that_is_tied_to_the_embeddings_is_not_missing(changed: Changed) -> None:
    folder = changed(without="lm_head", tie_word_embeddings=True)
    model = loaded(folder)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "lm_head.weight" in model.state_dict()


def test_a_model_saved_without_its_head_gives_the_same_rows_and_is_resumed_by_several_processes(
    options: Callable[..., Any],
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tree: Callable[..., Any],
) -> None:
    from transformers import AutoModel, AutoTokenizer

    AutoModel.from_pretrained(tiny_model).save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path / "base")
    given = {"model": str(tmp_path / "base"), "out": str(tmp_path / "headless")}
    whole = Cache.open(harvest(options()).cache)
    headless = Cache.open(harvest(options(**given)).cache)
    for name in whole.hookpoints:
        for shard in whole.shards:
            found, expected = headless.read(name, shard).values, whole.read(name, shard).values
            np.testing.assert_array_equal(found, expected)
    before = tree(headless.root)
    (headless.root / "shards" / "00001.json").unlink()
    (headless.root / "shards" / "END.json").unlink()
    assert harvest(options(**given)).new_shards == 1
    assert tree(headless.root) == before


def test_an_adapter_is_refused_with_its_base_and_how_to_merge_it(
    changed: Changed, tmp_path: Path
) -> None:
    text = json.dumps({"peft_type": "LORA", "base_model_name_or_path": "some/base"})
    alone, beside = tmp_path / "adapter", changed()
    alone.mkdir()
    for folder in (alone, beside):
        (folder / "adapter_config.json").write_text(text)
        with pytest.raises(ModelError, match=r"(?s)an adapter of some/base.*merge_and_unload"):
            load_config(HarvestConfig(str(folder), "data", "out"))
