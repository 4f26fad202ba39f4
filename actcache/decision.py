"""What a harvest will do, as far as it can be told without the model's weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from actcache.config import HarvestConfig
from actcache.documents import Mixture, Source, TokenFile, kind_of, open_documents
from actcache.errors import ConfigError
from actcache.manifest import Hookpoint, Identity
from actcache.model import fingerprint_tokenizer, load_config, load_tokenizer
from actcache.planning import (
    choose_hookpoints,
    choose_pipeline,
    excluded_tokens,
    is_stream,
    needs_tokenizer,
    special_tokens,
    survey_model,
)
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


def make_identity(
    config: HarvestConfig, decided: Decision, model_fingerprint: str, model_dtype: str, dtype: str
) -> Identity:
    """Everything that decides the numbers, as the manifest has it."""
    source, pipeline, tokenizer = decided.source, decided.pipeline, decided.tokenizer
    kind = kind_of(source)
    fingerprint = ""
    if tokenizer is not None:
        fingerprint = fingerprint_tokenizer(tokenizer, chat=kind == "chat")
    return Identity(
        model_fingerprint=model_fingerprint,
        model_dtype=model_dtype,
        tokenizer_fingerprint=fingerprint,
        dataset_fingerprint=source.fingerprint,
        weights=source.weights if isinstance(source, Mixture) else (),
        documents=kind,
        column="" if isinstance(source, TokenFile) else source.column.name,
        shuffle_buffer=_shuffle_buffer(source, pipeline),
        pipeline=pipeline.kind,
        ctx_len=pipeline.ctx_len,
        bos_id=pipeline.bos_id,
        eos_id=pipeline.eos_id,
        pad_id=pipeline.pad_id,
        keep_order=pipeline.order.keep_order,
        skip_positions=config.skip_positions,
        exclude_special=decided.exclude_special,
        exclude_tokens=decided.exclude_tokens,
        max_norm_ratio=config.max_norm_ratio,
        hookpoints=decided.hookpoints,
        dtype=dtype,  # type: ignore[arg-type] # the caller has looked it up
        via=(),
        batch_size=config.batch_size,
        row_order=config.order,
        seed=config.seed,
    )


def _shuffle_buffer(source: Source, pipeline: Pipeline) -> int | None:
    if pipeline.order.keep_order or not is_stream(source):
        return None
    return pipeline.order.buffer
