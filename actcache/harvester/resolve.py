"""Before the model runs: hookpoints, packing, shard plan, room on the disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from actcache.config import HarvestConfig
from actcache.data.datasets import open_dataset
from actcache.data.documents import (
    DocumentStream,
    IndexedDocuments,
    Mixture,
    Source,
    TokenFile,
    document_kind,
)
from actcache.data.sequences import SequencePipeline, count_sequences
from actcache.data.shuffling import DocumentOrder
from actcache.errors import ConfigError, DatasetError, ModelError
from actcache.format.manifest import Hookpoint
from actcache.model.hooks import HookSite, discover_sites, match, residual_hookpoints
from actcache.model.loading import load_config, load_meta_model, load_model, load_tokenizer
from actcache.storage import ROW_DTYPES

COUNTED_TOKENS = 1 << 24
"""A goal up to this many tokens is checked against the text beforehand; a larger one is believed,
for counting it would take minutes, and the harvest ends with the text anyway."""


def probe_model(config: HarvestConfig, model_config: Any) -> tuple[Any, dict[str, HookSite]]:
    """The model without weights where possible, else with; and what can be hooked in it.

    Raises:
        ModelError: it cannot be loaded either way.
    """
    try:
        model = load_meta_model(model_config, config)
        return model, discover_sites(model)
    except Exception:  # any model may refuse the meta device in its own way; its weights decide
        model = load_model(config)
        return model, discover_sites(model)


def choose_hookpoints(
    config: HarvestConfig, model: Any, sites: dict[str, HookSite]
) -> tuple[Hookpoint, ...]:
    """The hookpoints that the options ask for; raises `HookpointError`."""
    patterns = config.hookpoint or residual_hookpoints(model, config.layers, config.layer_stride)
    return tuple(match(patterns, sites, model.base_model_prefix))


def needs_tokenizer(config: HarvestConfig, source: Source) -> bool:
    """Whether anything asked for takes a tokenizer: token ids mostly do without."""
    return (
        document_kind(source) != "ids"
        or config.bos == "always"
        or config.exclude_special
        or any(not token.isdecimal() for token in config.exclude_tokens)
        or (config.pipeline == "pack" and not isinstance(source, TokenFile))
    )


def choose_pipeline(
    config: HarvestConfig, model_config: Any, tokenizer: Any, source: Source
) -> SequencePipeline:
    """How documents become sequences for this tokenizer.

    Raises:
        ConfigError: token ids in one line are to be cropped or truncated.
        ModelError: the tokenizer lacks EOS, a BOS that was asked for, or a chat template.
    """
    kind, is_file = document_kind(source), isinstance(source, TokenFile)
    if is_file and config.pipeline != "pack":
        raise ConfigError(
            f"{config.dataset} holds no documents to {config.pipeline}",
            expected="--pipeline pack",
            got=config.pipeline,
        )
    if kind == "chat" and not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer of {config.model} has no chat template",
            remedy="use the model's chat version, or text with --text-column",
        )
    bos_id = None
    if config.bos == "always" or (config.bos == "auto" and kind == "text" and _adds_bos(tokenizer)):
        bos_id = tokenizer.bos_token_id
        if bos_id is None:
            raise ModelError(
                f"the tokenizer of {config.model} has no BOS token", remedy="--bos never"
            )
    joins = config.pipeline == "pack" and not is_file
    if joins and tokenizer.eos_token_id is None:
        raise ModelError(
            f"the tokenizer of {config.model} has no EOS token to join documents with",
            remedy="--pipeline truncate or crop, or tokenise the text yourself into a .bin file",
        )
    pads = config.pipeline != "pack"
    return SequencePipeline(
        kind=config.pipeline,
        ctx_len=config.ctx_len,
        bos_id=bos_id,
        eos_id=tokenizer.eos_token_id if joins else None,
        pad_id=_pad_id(tokenizer) if pads else None,
        order=DocumentOrder(
            config.seed, config.keep_order or is_file, buffer=config.shuffle_buffer
        ),
        vocab_size=model_config.get_text_config().vocab_size,
    )


def _adds_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def _pad_id(tokenizer: Any) -> int:
    """Any token does: what is padding is told by lengths, and never attended to."""
    names = ("pad_token_id", "eos_token_id")
    found = [getattr(tokenizer, name, None) for name in names]
    return next((int(i) for i in found if i is not None), 0)


def special_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Ids of all special tokens, those that were added among them, ascending."""
    added = tokenizer.added_tokens_decoder.items()
    return tuple(sorted({*tokenizer.all_special_ids, *(i for i, t in added if t.special)}))


def excluded_tokens(tokens: tuple[str, ...], tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    """Ids of the tokens that --exclude-tokens names, ascending.

    Raises:
        ConfigError: there is no such token.
    """
    ids = set()
    for token in tokens:
        if token.isdecimal():
            found = int(token)
        else:
            found = tokenizer.get_vocab().get(token, -1)
            alone = tokenizer(token, add_special_tokens=False)["input_ids"]
            found = alone[0] if found < 0 and len(alone) == 1 else found
        if not 0 <= found < vocab_size:
            raise ConfigError(
                f"--exclude-tokens {token!r} is not a token of this model",
                expected=f"an id from 0 to {vocab_size - 1}, or text that is one token",
                got=token,
            )
        ids.add(found)
    return tuple(sorted(ids))


def planned_sequences(
    config: HarvestConfig, source: Source, tokenizer: Any, pipeline: SequencePipeline
) -> int:
    """Sequences that this harvest is going to run the model on.

    Raises:
        DatasetError: the text is shorter than one sequence.
    """
    goal = config.goal
    believed = goal is not None and assume_enough_text(goal, source, pipeline)
    count = count_sequences(source, tokenizer, pipeline, 1 if believed else goal)
    if count == 0:
        whole = f"at least {pipeline.text_tokens} tokens"
        raise DatasetError(
            f"{config.dataset} is shorter than one sequence",
            expected=whole if pipeline.kind == "pack" else "a document that is not empty",
            remedy="give more text or a smaller --ctx-len",
        )
    return goal if believed and goal is not None else count


def assume_enough_text(goal: int, source: Source, pipeline: SequencePipeline) -> bool:
    """Whether the text is taken to reach the goal, because counting would cost too much."""
    if isinstance(source, TokenFile):  # counted by its size
        return False
    if is_stream(source):
        return True
    if goal * pipeline.ctx_len <= COUNTED_TOKENS:
        return False
    if isinstance(source, IndexedDocuments) and source.bytes is not None:
        return goal * pipeline.text_tokens <= source.bytes + source.count
    return True


def is_stream(source: Source) -> bool:
    """Whether documents come as a stream, which would have to be read twice to be counted."""
    parts = source.parts if isinstance(source, Mixture) else (source,)
    return any(isinstance(part, DocumentStream) for part in parts)


def stored_dtype(config: HarvestConfig, model_dtype: str) -> str:
    """Type of the activations on disk; raises `ConfigError` if there is no such."""
    dtype = model_dtype if config.dtype == "auto" else config.dtype
    if dtype not in ROW_DTYPES:
        raise ConfigError(
            "the model's type cannot be stored",
            expected=" | ".join(ROW_DTYPES),
            got=dtype,
            remedy="name one with --dtype",
        )
    return dtype


@dataclass(frozen=True)
class ResolvedHarvest:
    """Text, pipeline, filters and hookpoints."""

    source: Source
    model_config: Any
    """Of transformers."""
    surveyed: Any
    """The model: on the meta device where possible, else with its weights."""
    hookpoints: tuple[Hookpoint, ...]
    tokenizer: Any
    """None if nothing asks for one."""
    pipeline: SequencePipeline
    exclude_special: tuple[int, ...]
    exclude_tokens: tuple[int, ...]


def resolve(config: HarvestConfig) -> ResolvedHarvest:
    """Find, and check against each other, everything but weights.

    Raises:
        ActcacheError: one of its kinds, for anything a user can mend.
    """
    source = open_dataset(config)
    model_config = load_config(config)
    surveyed, sites = probe_model(config, model_config)
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
    return ResolvedHarvest(
        source=source,
        model_config=model_config,
        surveyed=surveyed,
        hookpoints=hookpoints,
        tokenizer=tokenizer,
        pipeline=pipeline,
        exclude_special=special_tokens(tokenizer) if config.exclude_special else (),
        exclude_tokens=excluded_tokens(config.exclude_tokens, tokenizer, pipeline.vocab_size),
    )
