from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actcache.config import HarvestConfig
from actcache.errors import ModelError
from actcache.model.loading import load_config, require_causal_lm


def config_of(name: str, **options: Any) -> Any:
    import transformers

    return getattr(transformers, f"{name}Config")(**options)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("T5", "an encoder-decoder model"),
        ("Bart", "an encoder-decoder model"),
        ("Whisper", "an encoder-decoder model"),
        ("Bert", "an encoder, in which every token attends to later ones"),
        ("Roberta", "an encoder, in which every token attends to later ones"),
        ("ModernBert", "an encoder, in which every token attends to later ones"),
        ("BertGeneration", "an encoder, in which every token attends to later ones"),
        ("XLNet", "an encoder, in which every token attends to later ones"),
        ("XLM", "an encoder, in which every token attends to later ones"),
        ("Llava", "a multimodal model"),
        ("Qwen2VL", "a multimodal model"),
        ("CLIP", "a multimodal model"),
        ("ViT", "not a language model that predicts the next token"),
    ],
)
def test_a_model_that_is_not_a_decoder_is_refused_with_its_kind(name: str, kind: str) -> None:
    with pytest.raises(ModelError) as caught:
        require_causal_lm("some/model", config_of(name))
    message = str(caught.value)
    assert f"some/model is {kind}\n" in message
    assert f"expected: a decoder-only language model\n  got:      {name}Config" in message
    assert ("remedy:   harvest its language model alone" in message) == ("multimodal" in kind)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Llama", {}),
        ("GPTNeoX", {}),
        ("Mamba", {}),
        ("Gemma3Text", {}),
        ("Gemma3", {}),  # multimodal, loads as a causal LM
        ("Llama4", {}),  # only its text model is loaded
        ("Bert", {"is_decoder": True}),
        ("XLM", {"causal": True}),
    ],
)
def test_decoders_and_multimodal_models_that_load_as_decoders_are_accepted(
    name: str, options: dict[str, Any]
) -> None:
    require_causal_lm("some/model", config_of(name, **options))


def test_a_model_whose_own_code_defines_a_causal_lm_is_accepted() -> None:
    config = config_of("Bert")
    config.auto_map = {"AutoModel": "own.Own"}
    with pytest.raises(ModelError):
        require_causal_lm("some/model", config)
    config.auto_map = {"AutoModelForCausalLM": "own.Own"}
    require_causal_lm("some/model", config)


@pytest.mark.parametrize("name", ["T5", "Bert", "Llava"])
def test_the_kind_is_checked_before_weights_are_loaded(name: str, tmp_path: Path) -> None:
    config_of(name).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"(?s)is an? (encoder|multimodal).*decoder-only"):
        load_config(HarvestConfig(str(tmp_path), "data", "out"))
