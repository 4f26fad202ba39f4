from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from actcache.config import HarvestConfig
from actcache.errors import ModelError
from actcache.model.loading import load_config, require_causal_lm


def of(name: str, **options: Any) -> Any:
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
def test_a_model_of_another_kind_is_refused_by_what_it_is(name: str, kind: str) -> None:
    with pytest.raises(ModelError) as caught:
        require_causal_lm("some/model", of(name))
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
        ("Gemma3", {}),  # with its vision tower, which text does not pass
        ("Llama4", {}),  # its text part is what is loaded
        ("Bert", {"is_decoder": True}),
        ("XLM", {"causal": True}),
    ],
)
def test_decoders_are_taken_and_multimodal_models_that_load_as_such(
    name: str, options: dict[str, Any]
) -> None:
    require_causal_lm("some/model", of(name, **options))


def test_a_model_with_code_of_its_own_is_taken_at_its_word() -> None:
    config = of("Bert")
    config.auto_map = {"AutoModel": "own.Own"}
    with pytest.raises(ModelError):
        require_causal_lm("some/model", config)
    config.auto_map = {"AutoModelForCausalLM": "own.Own"}
    require_causal_lm("some/model", config)


@pytest.mark.parametrize("name", ["T5", "Bert", "Llava"])
def test_the_kind_is_told_before_anything_is_loaded(name: str, tmp_path: Path) -> None:
    of(name).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"(?s)is an? (encoder|multimodal).*decoder-only"):
        load_config(HarvestConfig(str(tmp_path), "data", "out"))
