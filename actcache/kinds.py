"""Kinds of models: which have one causal stream of activations to harvest, and which do not.

A row is the activation of one token, given the tokens before it. Of an encoder-decoder there are
two streams, and in an encoder every row sees the documents behind it too, which packing joins.
"""

from __future__ import annotations

from typing import Any

from actcache.errors import ModelError

_LOADER = "AutoModelForCausalLM"
_BIDIRECTIONAL = {"bert-generation", "xlnet"}
"""Encoders that have no head for masked words."""


def require_decoder(name: str, model_config: Any) -> None:
    """Refuse models that are not decoder-only language models.

    Models of text and images are taken where transformers loads them, or their text part, as a
    causal language model: they run on the text alone.

    Args:
        name: what the user calls the model.
        model_config: its transformers configuration.

    Raises:
        ModelError: it is of another kind, which the message names.
    """
    if kind := _other_kind(model_config):
        raise ModelError(
            f"{name} is {kind}",
            expected="a decoder-only language model",
            got=type(model_config).__name__,
            remedy="harvest its language model alone, saved as a model of its own"
            if kind == "a multimodal model"
            else None,
        )


def _other_kind(config: Any) -> str:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_MASKED_LM_MAPPING

    if getattr(config, "is_encoder_decoder", False):
        return "an encoder-decoder model"
    if _LOADER in (getattr(config, "auto_map", None) or {}):  # code of its own, which knows better
        return ""
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING or config.model_type in _BIDIRECTIONAL
    if masked and not (getattr(config, "is_decoder", False) or getattr(config, "causal", False)):
        return "an encoder, in which every token sees those behind it"
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return ""
    if config.sub_configs:
        return "a multimodal model"
    return "not a language model that predicts the next token"
