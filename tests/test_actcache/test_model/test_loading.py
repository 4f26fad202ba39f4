from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from actcache.config import HarvestConfig
from actcache.errors import ModelError
from actcache.model.loading import (
    dtype_name,
    fingerprint_model,
    fingerprint_tokenizer,
    load_config,
    load_meta_model,
    load_model,
    load_tokenizer,
)


@pytest.mark.parametrize(
    "change", [{"rms_norm_eps": 1e-3}, {"hidden_act": "relu"}, {"num_key_value_heads": 1}]
)
def test_the_fingerprint_depends_on_the_configuration(
    change: dict[str, Any], tiny_model: Path
) -> None:
    model = load_model(config(tiny_model))
    other = copy.deepcopy(model)
    other.config.update(change)
    assert fingerprint_model(other) != fingerprint_model(model)


def test_the_fingerprint_does_not_depend_on_name_and_version(tiny_model: Path) -> None:
    model = load_model(config(tiny_model))
    other = copy.deepcopy(model)
    other.config._name_or_path = "elsewhere"
    other.config.transformers_version = "9.9.9"
    assert fingerprint_model(other) == fingerprint_model(model)


def config(model: Path | str, **options: Any) -> HarvestConfig:
    return HarvestConfig(str(model), "data", "out", **options)


def test_a_folder_is_loaded_frozen_and_in_evaluation_mode(tiny_model: Path) -> None:
    model = load_model(config(tiny_model))
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert load_config(config(tiny_model)).num_hidden_layers == 3
    assert load_tokenizer(config(tiny_model)).eos_token == "</s>"


def test_the_dtype_is_that_of_the_checkpoint_or_of_model_dtype(
    tiny_model: Path, make_model: Callable[..., Path]
) -> None:
    assert dtype_name(load_model(config(tiny_model))) == "float32"
    assert dtype_name(load_model(config(tiny_model, model_dtype="bfloat16"))) == "bfloat16"
    assert dtype_name(load_model(config(make_model(dtype="float16")))) == "float16"


def test_the_meta_model_has_no_weights(tiny_model: Path) -> None:
    options = config(tiny_model)
    model = load_meta_model(load_config(options), options)
    assert {p.device.type for p in model.parameters()} == {"meta"}


def test_the_fingerprint_depends_on_names_dtypes_shapes_and_bytes_of_weights(
    tiny_model: Path,
) -> None:
    model = load_model(config(tiny_model))
    first = fingerprint_model(model)
    assert fingerprint_model(load_model(config(tiny_model))) == first
    others = [load_model(config(tiny_model)) for _ in range(3)]
    others[0].model.layers[2].mlp.down_proj.weight[0, 0] += 1e-3
    others[1].bfloat16()
    weight = others[2].model.layers[0].mlp.up_proj.weight
    others[2].model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(weight.reshape(32, 48))
    assert len({first, *map(fingerprint_model, others)}) == 4


def test_the_fingerprint_of_a_tokenizer_depends_on_its_token_ids(
    make_tokenizer: Callable[..., Any], tiny_model: Path
) -> None:
    first = fingerprint_tokenizer(make_tokenizer())
    assert fingerprint_tokenizer(load_tokenizer(config(tiny_model))) == first
    other = copy.deepcopy(make_tokenizer())
    other.add_tokens(["quick"])
    variants = [make_tokenizer(adds_bos=False), make_tokenizer(eos=False), other]
    assert len({first, *map(fingerprint_tokenizer, variants)}) == 4


@pytest.mark.parametrize("load", [load_config, load_tokenizer, load_model])
def test_a_missing_model_is_reported_with_its_name(load: Callable[..., Any]) -> None:
    with pytest.raises(ModelError, match=r"(?s)nobody/no-such-model.*remedy:.*--revision"):
        load(config("nobody/no-such-model"))


@pytest.mark.parametrize("model", ["./nowhere", "/nowhere", "~/nowhere"])
def test_a_missing_local_folder_is_reported(model: str) -> None:
    with pytest.raises(ModelError, match=f"no such model folder: {model}"):
        load_config(config(model))


def test_a_folder_without_a_model_or_with_a_damaged_one_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot load the configuration"):
        load_config(config(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match="cannot load the configuration"):
        load_config(config(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelError, match="cannot load the weights"):
        load_model(config(tmp_path))
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        load_tokenizer(config(tmp_path))


def test_a_missing_gguf_file_is_reported_with_the_existing_ones(
    tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "model.gguf").touch()
    with pytest.raises(ModelError, match=r"(?s)no file other\.gguf.*model\.gguf.*--gguf-file"):
        load_config(config(tmp_path, gguf_file="other.gguf"))
    with pytest.raises(ModelError, match=r"expected: a \.gguf file"):
        load_config(config(tiny_model, gguf_file="other.gguf"))


def test_code_in_the_models_folder_is_not_run_unless_trusted(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}'
    )
    (tmp_path / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import PretrainedConfig\n"
        "class OwnConfig(PretrainedConfig):\n    model_type = 'own'\n"
    )
    with pytest.raises(ModelError):
        load_config(config(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**18),
        ("num_hidden_layers", 10_001),
        ("vocab_size", 10**18),
        ("hidden_size", 1 << 25),
        ("head_dim", float("inf")),
        ("intermediate_size", float("nan")),
    ],
)
def test_a_configuration_with_absurd_sizes_is_refused_before_a_model_is_built(
    key: str, value: float, tiny_model: Path, tmp_path: Path
) -> None:
    values = json.loads((tiny_model / "config.json").read_text())
    for changed in (values | {key: value}, values | {"text_config": {key: value}}):
        (tmp_path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(ModelError, match=rf"(?s)that of no model.*{key} of at most.*config"):
            load_config(config(tmp_path))
