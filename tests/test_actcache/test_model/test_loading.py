from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

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


def changed(tokenizer: Any, **parts: Any) -> Any:
    """Return a copy with other parts of the serialised tokenizer."""
    other = copy.deepcopy(tokenizer)
    other._tokenizer = Tokenizer.from_str(
        json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()) | parts)
    )
    return other


def test_the_fingerprint_of_a_tokenizer_covers_every_part_that_decides_ids(
    make_tokenizer: Callable[..., Any],
) -> None:
    first = make_tokenizer()
    parts = json.loads(first.backend_tokenizer.to_str())
    byte_level, added = parts["pre_tokenizer"], parts["added_tokens"]
    model = parts["model"] | {"merges": parts["model"]["merges"][::-1]}
    variants = [
        changed(first, normalizer={"type": "NFC"}),
        changed(first, pre_tokenizer=byte_level | {"use_regex": False}),
        changed(first, pre_tokenizer=byte_level | {"add_prefix_space": True}),
        changed(first, post_processor=None),
        changed(first, model=model),
        changed(first, added_tokens=[added[0] | {"lstrip": True}, added[1]]),
        changed(first, added_tokens=[added[0] | {"special": False}, added[1]]),
        copy.deepcopy(first),
        type("Other", (type(first),), {})(tokenizer_object=first.backend_tokenizer),
    ]
    variants[-2].split_special_tokens = True
    assert len({fingerprint_tokenizer(first), *map(fingerprint_tokenizer, variants)}) == 10


def test_the_fingerprint_of_a_tokenizer_covers_nothing_else(
    make_tokenizer: Callable[..., Any], tmp_path: Path
) -> None:
    first = make_tokenizer()
    other = copy.deepcopy(first)
    other.pad_token, other.padding_side, other.model_max_length = "</s>", "left", 5
    other.backend_tokenizer.enable_padding(pad_id=1, pad_token="</s>", length=9)
    other.backend_tokenizer.enable_truncation(3)
    other.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved").rename(tmp_path / "elsewhere")
    again = load_tokenizer(config(tmp_path / "elsewhere"))
    assert again.name_or_path != first.name_or_path
    again(["a text", "that is longer"], padding=True, truncation=True)
    program = (
        "import sys; from transformers import AutoTokenizer\n"
        "from actcache.model.loading import fingerprint_tokenizer\n"
        "print(fingerprint_tokenizer(AutoTokenizer.from_pretrained(sys.argv[1])))"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "elsewhere")]
    elsewhere = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    found = {*map(fingerprint_tokenizer, (first, other, again)), elsewhere}
    assert found == {fingerprint_tokenizer(changed(first, decoder=None))}


def test_the_fingerprint_for_chats_covers_what_templates_read(
    make_tokenizer: Callable[..., Any],
) -> None:
    first = make_tokenizer()
    first.chat_template = "{{ messages }}{{ pad_token }}"
    variants = [copy.deepcopy(first) for _ in range(4)]
    variants[0].pad_token = "</s>"
    variants[1].chat_template = "{{ messages }}"
    variants[2].chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    variants[3].chat_template = {"default": "{{ messages }}", "tool_use": ""}
    assert len({fingerprint_tokenizer(t, chat=True) for t in (first, *variants)}) == 5
    padded = copy.deepcopy(variants[1])
    padded.pad_token = "</s>"
    assert fingerprint_tokenizer(padded, chat=True) == fingerprint_tokenizer(variants[1], chat=True)
    assert len({fingerprint_tokenizer(t) for t in (first, *variants)}) == 1


def test_the_fingerprint_of_a_tokenizer_in_python_covers_its_files_and_arguments(
    tmp_path: Path,
) -> None:
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path)
    first, again = (ByT5Tokenizer.from_pretrained(tmp_path) for _ in range(2))
    assert getattr(first, "backend_tokenizer", None) is None
    again.padding_side, again.model_max_length = "left", 7
    assert fingerprint_tokenizer(first) == fingerprint_tokenizer(again)
    again.add_tokens(["<more>"])
    assert fingerprint_tokenizer(first) != fingerprint_tokenizer(again)


def test_the_fingerprint_of_a_model_covers_neither_head_nor_training(tiny_model: Path) -> None:
    first, other = (load_model(config(tiny_model)) for _ in range(2))
    other.lm_head.weight += 1
    other.config.use_cache = not other.config.use_cache
    other.config.attention_dropout = 0.5
    other.config.initializer_range = 0.7
    assert fingerprint_model(first) == fingerprint_model(other)
    assert fingerprint_model(first, before=True) != fingerprint_model(other, before=True)
    other.config.rms_norm_eps = 1e-3
    assert fingerprint_model(first) != fingerprint_model(other)


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
