"""What a harvest will do, as far as it can be told without the model's weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from actcache.config import HarvestConfig
from actcache.documents import Source
from actcache.errors import ConfigError
from actcache.manifest import Hookpoint
from actcache.model import load_config, load_tokenizer
from actcache.planning import (
    choose_hookpoints,
    choose_pipeline,
    excluded_tokens,
    needs_tokenizer,
    special_tokens,
    survey_model,
)
from actcache.sources import open_documents
from actcache.tokens import Pipeline


@dataclass(frozen=True)
class Decision:
    """Text, pipeline, filters and hookpoints."""

    source: Source
    model_config: Any
    """Of transformers."""
    surveyed: Any
    """The model: on the meta device where possible, else with its weights."""
    hookpoints: tuple[Hookpoint, ...]
    tokenizer: Any
    """None if nothing asks for one."""
    pipeline: Pipeline
    exclude_special: tuple[int, ...]
    exclude_tokens: tuple[int, ...]


def decide(config: HarvestConfig) -> Decision:
    """Find, and check against each other, everything but weights.

    Raises:
        ActcacheError: one of its kinds, for anything a user can mend.
    """
    source = open_documents(config)
    model_config = load_config(config)
    surveyed, sites = survey_model(config, model_config)
    hookpoints = choose_hookpoints(config, surveyed, sites)
    tokenizer = load_tokenizer(config) if needs_tokenizer(config, source) else None
    pipeline = choose_pipeline(config, model_config, tokenizer, source)
    longest = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and config.ctx_len > longest:
        raise ConfigError(
            "--ctx-len is longer than the model's context",
            expected=f"<= {longest}",
            got=config.ctx_len,
        )
    return Decision(
        source=source,
        model_config=model_config,
        surveyed=surveyed,
        hookpoints=hookpoints,
        tokenizer=tokenizer,
        pipeline=pipeline,
        exclude_special=special_tokens(tokenizer) if config.exclude_special else (),
        exclude_tokens=excluded_tokens(config.exclude_tokens, tokenizer, pipeline.vocab_size),
    )
