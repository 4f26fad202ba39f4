"""Open model and text, choose hookpoints and pipeline, and build the manifest.

Nothing here loads weights, unless the model cannot be built on the meta device.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from actcache.cache.folder import choose_block_rows, sequences_per_shard
from actcache.config import HarvestConfig
from actcache.data.chats import chat_text_before, closing_token, template_variables
from actcache.data.datasets import (
    DocumentStream,
    IndexedDocuments,
    Kind,
    Mixture,
    Source,
    TokenFile,
    open_dataset,
)
from actcache.data.document_order import DocumentOrder
from actcache.data.plain_files import is_pattern
from actcache.data.sequences import (
    NumberedSequences,
    SequencePipeline,
    SequenceReader,
    count_sequences,
)
from actcache.data.template_clock import now, pin_clock
from actcache.data.token_rows import MASK, RowSample, WholeRows, sample_rows
from actcache.errors import ConfigError, DatasetError, ModelError
from actcache.format.manifest import (
    FORMAT_VERSION,
    Hookpoint,
    Identity,
    Manifest,
    library_versions,
)
from actcache.model.hooks import HookSite, choose, discover_sites, residual_hookpoints
from actcache.model.loading import (
    fingerprint_tokenizer,
    fingerprint_tokenizer_before,
    load_config,
    load_meta_model,
    load_model,
    load_tokenizer,
    model_commit,
)
from actcache.storage import ROW_DTYPES

COUNTED_TOKENS = 1 << 24
"""Largest goal, in tokens, for which the text is counted beforehand. Counting more would take
minutes, so the text is assumed to be long enough; a harvest ends with its text in any case."""
_NAMED = 5  # tokens that a warning names


TEXT_ENDS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "<EOS_TOKEN>",
    "<eos>",
    "</s>",
)
"""Tokens that separate the texts of pretraining; of several in a vocabulary, the first does: a
Llama's </s> and a Gemma's HTML tag </s> are left over where one of the others is."""
TURN_ENDS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|eot|>",
    "<|end|>",
    "<|return|>",
    "<end_of_turn>",
    "<turn|>",
    "<|END_OF_TURN_TOKEN|>",
)
"""Tokens that end a turn of a conversation. A tokenizer with another one has a chat template."""


DocumentSource = IndexedDocuments | DocumentStream | Mixture
"""A source that has documents."""


@dataclass(frozen=True)
class ResolvedHarvest:
    """Inputs that the options name, opened and checked: text, model without weights, hookpoints."""

    source: Source
    model_config: Any
    """The model's transformers configuration."""
    model: Any
    """The model, on the meta device where possible."""
    has_weights: bool
    """Whether `model` was loaded with its weights, because it cannot be built on meta."""
    hookpoints: tuple[Hookpoint, ...]
    renamed: dict[str, list[str]]
    """Names of other libraries, and layers counted from the end, with the hookpoints they mean."""
    tokenizer: Any
    """None if no option needs it."""
    pipeline: SequencePipeline
    exclude_special: tuple[int, ...]
    """Token ids of --exclude-special."""
    exclude_tokens: tuple[int, ...]
    """Token ids of --exclude-tokens."""
    commit: str | None
    """Commit of the model's repository; None: a local folder."""
    date: str | None
    """Moment that the chat template reads; None: it reads none."""
    warnings: tuple[str, ...]
    """Warnings for the user."""

    def text_warnings(self) -> tuple[str, ...]:
        """Return warnings about the text and what it becomes; a stream may have more later."""
        return (*self.source.warnings(), *self.pipeline.warnings())


def resolve(config: HarvestConfig, date: Callable[[], str] = now) -> ResolvedHarvest:
    """Open and check everything that a harvest needs, except weights.

    Args:
        config: the options.
        date: function to the moment that a chat template reads, where --date is not given.

    Raises:
        ActcacheError: an option, the model or the text does not allow the harvest.
    """

    @functools.cache  # the text is opened first, which may need the tokenizer
    def load_model_config() -> tuple[Any, str | None]:
        return load_config(config), model_commit(config)

    @functools.cache
    def load() -> Any:
        _, commit = load_model_config()  # all files of one commit, whatever is uploaded meanwhile
        pinned = config if commit is None else dataclasses.replace(config, revision=commit)
        return load_tokenizer(pinned)

    source = open_dataset(config, lambda: template_variables(load()))
    model_config, commit = load_model_config()
    if commit is not None:
        config = dataclasses.replace(config, revision=commit)
    model, sites, has_weights = probe_model(config, model_config)
    hookpoints, renamed = choose_hookpoints(config, model, sites)
    tokenizer = load() if needs_tokenizer(config, source) else None
    pipeline = choose_pipeline(config, model_config, tokenizer, source)
    pinned = None
    if source.column.kind == "chat":
        pinned = pin_clock(tokenizer, lambda: config.date or date())
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
        model=model,
        has_weights=has_weights,
        hookpoints=hookpoints,
        renamed=renamed,
        tokenizer=tokenizer,
        pipeline=pipeline,
        exclude_special=special_tokens(tokenizer) if config.exclude_special else (),
        exclude_tokens=excluded_tokens(config.exclude_tokens, tokenizer, pipeline.vocab_size),
        commit=commit,
        date=pinned,
        warnings=(
            _tokens_beyond(tokenizer, pipeline.vocab_size) if source.column.kind != "ids" else ()
        ),
    )


def resolve_before(config: HarvestConfig, date: Callable[[], str] = now) -> ResolvedHarvest:
    """Open a harvest that format version 1 or 2 began, with that version's rules; as `resolve`.

    There, EOS separated documents of every model, rows of token ids were joined, and conversations
    were rendered as `chat_text_before` does, with EOS after each.
    """
    joins = config.pipeline == "pack" and Path(config.dataset).suffix.lower() != ".bin"
    is_default = joins and config.separator == "auto"
    if is_default:
        config = dataclasses.replace(config, separator="eos")
    if joins and config.token_column is not None and config.id_rows == "auto":
        config = dataclasses.replace(config, id_rows="joined")
    resolved = resolve(config, date)
    # Receipts of these versions cannot count documents left out.
    pipeline = dataclasses.replace(resolved.pipeline, max_bad_documents=None)
    if resolved.source.column.kind == "chat":
        eos_id = resolved.tokenizer.eos_token_id if is_default else pipeline.eos_id
        pipeline = dataclasses.replace(pipeline, columns=(), render=chat_text_before, eos_id=eos_id)
    return dataclasses.replace(resolved, pipeline=pipeline)


def probe_model(config: HarvestConfig, model_config: Any) -> tuple[Any, dict[str, HookSite], bool]:
    """Find what can be hooked in a model, on the meta device or, if that fails, with its weights.

    Returns:
        The model, its sites by name, and whether the model has its weights.

    Raises:
        ModelError: it cannot be loaded either way.
    """
    try:
        model = load_meta_model(model_config, config)
        return model, discover_sites(model), False
    except Exception:  # each model has its own error where it does not support the meta device
        model = load_model(config)
        return model, discover_sites(model), True


def choose_hookpoints(
    config: HarvestConfig, model: Any, sites: dict[str, HookSite]
) -> tuple[tuple[Hookpoint, ...], dict[str, list[str]]]:
    """Match --hookpoint, --layers or --layer-stride against the sites.

    Returns:
        The hookpoints, and those of them that were named otherwise by that name.

    Raises:
        HookpointError: a name means nothing in this model.
    """
    patterns = config.hookpoint or residual_hookpoints(model, config.layers, config.layer_stride)
    hookpoints, renamed = choose(patterns, sites, model)
    for layer, name in zip(config.layers, patterns, strict=False):
        if layer == "middle" or int(layer) < 0:
            renamed[f"--layers {layer}"] = [name]
    return tuple(hookpoints), renamed


def needs_tokenizer(config: HarvestConfig, source: Source) -> bool:
    """Return whether the text or an option needs the tokenizer; token ids mostly do not."""
    return (
        source.column.kind != "ids"
        or config.bos == "always"
        or config.exclude_special
        or any(not token.isdecimal() for token in config.exclude_tokens)
        or (
            config.pipeline == "pack"
            and not isinstance(source, TokenFile)
            and (config.id_rows == "auto" or not _is_tokenless(config.separator))
        )
    )


def _is_tokenless(separator: str) -> bool:
    return separator == "none" or separator.isdecimal()


def choose_pipeline(
    config: HarvestConfig, model_config: Any, tokenizer: Any, source: Source
) -> SequencePipeline:
    """Choose BOS, separator, padding token and document order, and whether rows are kept whole.

    Raises:
        ConfigError: the options do not fit a .bin file, which has no documents, or the text.
        DatasetError: rows of token ids are whole sequences that are longer than --ctx-len.
        ModelError: the tokenizer lacks EOS, the BOS of --bos always, or a chat template.
    """
    kind, is_file = source.column.kind, isinstance(source, TokenFile)
    if is_file and (config.pipeline != "pack" or config.separator not in ("auto", "none")):
        named = "--pipeline" if config.pipeline != "pack" else "--separator"
        raise ConfigError(
            f"{config.dataset} holds no documents"
            + (f" to {config.pipeline}" if named == "--pipeline" else " to join"),
            expected="--pipeline pack, without --separator",
            got=f"{named} {getattr(config, named[2:])}",
        )
    if config.id_rows != "auto" and (kind != "ids" or is_file):
        raise ConfigError(
            f"--id-rows {config.id_rows} needs rows of token ids",
            expected="--token-column",
            got=f"documents of the kind {kind}" if not is_file else "a .bin file",
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
    pipeline = SequencePipeline(
        kind=config.pipeline,
        ctx_len=config.ctx_len,
        bos_id=bos_id,
        eos_id=None,
        pad_id=None if config.pipeline == "pack" else _pad_id(tokenizer),
        order=DocumentOrder(config.seed, config.keep_order or is_file, config.shuffle_buffer),
        vocab_size=model_config.get_text_config().vocab_size,
        max_bad_documents=config.max_bad_documents,
    )
    if isinstance(source, TokenFile):
        return pipeline
    if kind == "chat":
        others = {name for one in _sources(source) for name in one.column.others}
        pipeline = dataclasses.replace(pipeline, columns=("messages", *sorted(others)))
    if kind == "ids":
        pipeline = _for_rows(config, tokenizer, source, pipeline)
    if pipeline.kind != "pack":
        return pipeline
    eos_id, notes = choose_separator(config, tokenizer, kind, pipeline.vocab_size)
    return dataclasses.replace(pipeline, eos_id=eos_id, notes=(*pipeline.notes, *notes))


def _tokens_beyond(tokenizer: Any, vocab_size: int) -> tuple[str, ...]:
    """Warn if the tokenizer has tokens that the model has no embedding for."""
    if tokenizer is None or len(tokenizer) <= vocab_size:
        return ()
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= vocab_size)
    names = ", ".join(f"{token!r} ({i})" for i, token in beyond[:_NAMED])
    more = f" and {len(beyond) - _NAMED:,} more" if len(beyond) > _NAMED else ""
    return (
        f"the tokenizer has {len(beyond):,} token{'s' if len(beyond) > 1 else ''} beyond the "
        f"model's {vocab_size:,} embeddings: {names}{more}; documents with such are left out",
    )


def _sources(source: DocumentSource) -> tuple[IndexedDocuments | DocumentStream, ...]:
    return source.sources if isinstance(source, Mixture) else (source,)


def _for_rows(
    config: HarvestConfig, tokenizer: Any, source: DocumentSource, pipeline: SequencePipeline
) -> SequencePipeline:
    """Adapt the pipeline to rows of token ids: those that are whole sequences are kept whole.

    Raises:
        DatasetError: rows are longer than a sequence, or of several datasets, some are whole.
    """
    samples = [sample_rows(one, tokenizer) for one in _sources(source)]
    found = [sample.evidence(config.ctx_len) for sample in samples]
    column, sample = source.column.name, RowSample.of_all(samples)
    pipeline = dataclasses.replace(
        pipeline,
        columns=(MASK,) if sample.masked else (),
        notes=sample.notes(column),
    )
    if config.pipeline != "pack" or config.id_rows == "joined":
        if pipeline.bos_id is None or not sample.begin_with_bos:
            return pipeline
        note = f"rows of {column!r} begin with BOS, and --bos always puts one before them"
        return dataclasses.replace(pipeline, notes=(*pipeline.notes, note))
    if config.id_rows == "auto":
        if not any(found):
            return pipeline
        if not all(found):
            raise DatasetError(
                f"rows of {column!r} are whole sequences in some of the datasets only",
                expected="--id-rows whole | joined",
                got=", ".join(why or "rows to be joined" for why in found),
                remedy="name one of them, or harvest the datasets into caches of their own",
            )
    bos_id = None if sample.begin_with_bos else pipeline.bos_id
    fits = config.ctx_len - (bos_id is not None)
    why = " and ".join(dict.fromkeys(filter(None, found))) or "--id-rows whole"
    if config.id_rows == "auto" and sample.longest > fits:
        raise DatasetError(
            f"rows of {column!r} are whole sequences ({why}) that are longer than --ctx-len",
            expected=f"at most {fits} tokens",
            got=f"{sample.longest} tokens",
            remedy=f"--ctx-len {config.ctx_len - fits + sample.longest} keeps them whole; "
            "--id-rows whole cuts their ends off, --id-rows joined joins and cuts them anew",
        )
    note = f"rows of {column!r} are whole sequences ({why}): they are not joined"
    if sample.lengths and sample.longest < fits:
        note += (
            f", and are padded; --ctx-len {config.ctx_len - fits + sample.longest} is enough for "
            f"the {len(sample.lengths):,} that were looked at"
        )
    if config.id_rows == "auto":
        note += " (--id-rows joined joins them)"
    return dataclasses.replace(
        pipeline,
        kind="truncate",
        bos_id=bos_id,
        pad_id=_pad_id(tokenizer),
        whole_rows=WholeRows(fits, tokenizer.bos_token_id if sample.begin_with_bos else None),
        notes=(note, *pipeline.notes),
    )


def choose_separator(
    config: HarvestConfig, tokenizer: Any, kind: Kind, vocab_size: int
) -> tuple[int | None, tuple[str, ...]]:
    """Choose the token after each document.

    The EOS of a chat model ends a turn. Its plain texts are separated as in pretraining: by the
    first of `TEXT_ENDS` that the tokenizer has. A conversation that the chat template ends with a
    token of its own has nothing after it.

    Returns:
        The token's id, None for none, and what the summary says.

    Raises:
        ConfigError: --separator is not a single token of this model.
        ModelError: the tokenizer lacks the token.
    """
    asked = config.separator
    if asked == "none":
        return None, ()
    if asked not in ("auto", "eos", "bos"):
        return token_id("--separator", asked, tokenizer, vocab_size), ()
    name = "BOS" if asked == "bos" else "EOS"
    closing = closing_token(tokenizer) if kind == "chat" else None
    if closing is not None and asked == "auto":
        return None, ()
    found = tokenizer.bos_token_id if asked == "bos" else tokenizer.eos_token_id
    if found is None:
        raise ModelError(
            f"the tokenizer of {config.model} has no {name} token to join documents with",
            remedy="--separator none or TOKEN, --pipeline truncate or crop, or a .bin file of "
            "token ids",
        )
    eos = tokenizer.eos_token
    if asked != "auto":
        return (None if closing == eos and asked == "eos" else found), ()
    if kind == "chat" or not _ends_turns(tokenizer):
        return found, ()
    tokens = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
    for end in TEXT_ENDS:
        if end in tokens:
            return tokens[end], (
                f"documents are separated by {end!r}, as in pretraining, and not by the end of a "
                f"turn {eos!r} (--separator eos)",
            )
    note = f"documents are separated by the end of a turn {eos!r}: the tokenizer has no token that "
    return found, (note + "is known to end a text (--separator TOKEN or none)",)


def _ends_turns(tokenizer: Any) -> bool:
    """Return whether EOS ends the turns of conversations, and not texts."""
    eos = tokenizer.eos_token
    if eos in TEXT_ENDS:
        return False
    return eos in TURN_ENDS or (bool(tokenizer.chat_template) and closing_token(tokenizer) == eos)


def _adds_bos(tokenizer: Any) -> bool:
    ids = tokenizer("a")["input_ids"]
    return bool(ids) and ids[0] == tokenizer.bos_token_id


def _pad_id(tokenizer: Any) -> int:
    """Return the PAD, else EOS, else 0. Any id works: padding is masked, and known by length."""
    ids = [getattr(tokenizer, name, None) for name in ("pad_token_id", "eos_token_id")]
    return next((int(i) for i in ids if i is not None), 0)


def special_tokens(tokenizer: Any) -> tuple[int, ...]:
    """Return the ids of all special tokens, added ones included, in ascending order."""
    added = tokenizer.added_tokens_decoder.items()
    return tuple(sorted({*tokenizer.all_special_ids, *(i for i, t in added if t.special)}))


def excluded_tokens(tokens: tuple[str, ...], tokenizer: Any, vocab_size: int) -> tuple[int, ...]:
    """Return the ids of --exclude-tokens, given as ids or text, in ascending order.

    Raises:
        ConfigError: a value is not a single token of this model.
    """
    found = {token_id("--exclude-tokens", token, tokenizer, vocab_size) for token in tokens}
    return tuple(sorted(found))


def token_id(option: str, token: str, tokenizer: Any, vocab_size: int) -> int:
    """Return the id of a token that an option gives as an id or text.

    Raises:
        ConfigError: it is not a single token of this model.
    """
    if token.isdecimal():
        found = int(token)
    else:
        found = tokenizer.get_vocab().get(token, -1)
        encoded = tokenizer(token, add_special_tokens=False)["input_ids"]
        found = encoded[0] if found < 0 and len(encoded) == 1 else found
    if not 0 <= found < vocab_size:
        raise ConfigError(
            f"{option} {token!r} is not a token of this model",
            expected=f"an id from 0 to {vocab_size - 1}, or text that is one token",
            got=token,
        )
    return int(found)


def goal_sequences(config: HarvestConfig) -> int | None:
    """Return the sequences in --max-tokens, with --load-in 8bit rounded down to whole batches."""
    if config.max_tokens is None:
        return None
    sequences = config.max_tokens // config.ctx_len
    return sequences - (sequences % config.batch_size if config.load_in == "8bit" else 0)


def planned_sequences(
    config: HarvestConfig, resolved: ResolvedHarvest, text: NumberedSequences | None = None
) -> int:
    """Return the number of sequences to harvest: the goal, or fewer if the text is shorter.

    Args:
        config: the options.
        resolved: the opened text.
        text: the text, as it will be read; None: it is counted apart.

    Raises:
        DatasetError: the text is shorter than one sequence.
    """
    goal, pipeline = goal_sequences(config), resolved.pipeline
    assumed = goal is not None and is_assumed_long_enough(goal, resolved.source, pipeline)
    limit = 1 if assumed else goal
    # A reader keeps what it counts, which is too much without a limit.
    is_apart = isinstance(text, SequenceReader) and (goal is None or assumed)
    if text is None or is_apart:
        count = count_sequences(resolved.source, resolved.tokenizer, pipeline, limit)
    else:
        count = text.count(0, sys.maxsize if limit is None else limit)
    if count == 0:
        whole = f"at least {pipeline.text_tokens} tokens"
        raise DatasetError(
            f"{config.dataset} is shorter than one sequence",
            expected=whole if pipeline.kind == "pack" else "a document that is not empty",
            remedy="give more text or a smaller --ctx-len",
        )
    return goal if assumed and goal is not None else count


def is_assumed_long_enough(goal: int, source: Source, pipeline: SequencePipeline) -> bool:
    """Return whether the text is assumed to reach the goal because counting would cost too much."""
    if isinstance(source, TokenFile):  # the file size gives the exact number
        return False
    if is_stream(source):
        return True
    if goal * pipeline.ctx_len <= COUNTED_TOKENS:
        return False
    if isinstance(source, IndexedDocuments) and source.bytes is not None:
        return goal * pipeline.text_tokens <= source.bytes + source.count
    return True


def is_stream(source: Source) -> bool:
    """Return whether counting the documents would download a stream a second time."""
    if isinstance(source, TokenFile):
        return False
    return any(isinstance(one, DocumentStream) for one in _sources(source))


def build_identity(
    config: HarvestConfig, resolved: ResolvedHarvest, model_fingerprint: str, model_dtype: str
) -> Identity:
    """Collect everything that determines the cache's rows.

    Raises:
        ConfigError: the activations' dtype cannot be stored.
    """
    source, pipeline, tokenizer = resolved.source, resolved.pipeline, resolved.tokenizer
    column, order = source.column, pipeline.order
    dtype = model_dtype if config.dtype == "auto" else config.dtype
    if dtype not in ROW_DTYPES:
        raise ConfigError(
            "the model's type cannot be stored",
            expected=" | ".join(ROW_DTYPES),
            got=dtype,
            remedy="name one with --dtype",
        )
    fingerprint = ""
    if tokenizer is not None and column.kind != "ids":  # of ids, it gives only ids that follow
        fingerprint = fingerprint_tokenizer(tokenizer, chat=column.kind == "chat")
    return Identity(
        model_fingerprint=model_fingerprint,
        model_dtype=model_dtype,
        tokenizer_fingerprint=fingerprint,
        dataset_fingerprint=source.fingerprint,
        weights=source.weights if isinstance(source, Mixture) else (),
        documents=column.kind,
        column=column.name,
        shuffle_buffer=order.buffer if is_stream(source) and not order.keep_order else None,
        pipeline=pipeline.kind,
        ctx_len=pipeline.ctx_len,
        bos_id=pipeline.bos_id,
        eos_id=pipeline.eos_id,
        pad_id=pipeline.pad_id,
        keep_order=order.keep_order,
        skip_positions=config.skip_positions,
        exclude_special=resolved.exclude_special,
        exclude_tokens=resolved.exclude_tokens,
        max_norm_ratio=config.max_norm_ratio,
        hookpoints=resolved.hookpoints,
        dtype=dtype,  # type: ignore[arg-type] # one of ROW_DTYPES
        via=(),
        batch_size=config.batch_size,
        row_order=config.order,
        seed=config.seed,
        date=resolved.date,
        model_commit=resolved.commit,
        dataset_commits=source.commits,
        whole_rows=pipeline.whole_rows is not None,
        template_columns=pipeline.columns,
    )


def identity_before(identity: Identity, resolved: ResolvedHarvest, made: Identity) -> Identity:
    """Return the identity that format versions 1 and 2 give a harvest.

    Args:
        identity: today's, with the model's fingerprint of those versions.
        resolved: the opened model and text.
        made: the identity of the cache, which may have any of the fingerprints of a text that
            those versions made.
    """
    tokenizer, source = resolved.tokenizer, resolved.source
    before = identity.tokenizer_fingerprint
    if tokenizer is not None:
        before = fingerprint_tokenizer_before(tokenizer, chat=source.column.kind == "chat")
    texts = source.earlier() or (source.fingerprint,)
    text = made.dataset_fingerprint
    return dataclasses.replace(
        identity,
        tokenizer_fingerprint=before,
        dataset_fingerprint=text if text in texts else texts[0],
        date=None,
        model_commit=None,
        dataset_commits=(),
    )


def build_manifest(
    config: HarvestConfig,
    resolved: ResolvedHarvest,
    identity: Identity,
    planned: int,
    architecture: str,
) -> Manifest:
    """Add the shard plan, library versions and names to an identity.

    Args:
        config: the options.
        resolved: the opened text and hookpoints.
        identity: everything that determines the rows.
        planned: number of sequences to harvest.
        architecture: class name of the model.
    """
    hookpoints = resolved.hookpoints
    return Manifest(
        format_version=FORMAT_VERSION,
        cache_id=identity.digest(),
        identity=identity,
        model=_base_name(config.model),
        revision=config.revision,
        architecture=architecture,
        dataset=" + ".join(_base_name(name) for name in (config.dataset, *config.mix)),
        split=config.split if identity.column else "",
        backend=config.backend,
        compression=config.compress,
        sequences_per_shard=sequences_per_shard(config, planned, hookpoints, identity.dtype),
        planned_sequences=planned,
        block_rows=choose_block_rows(hookpoints, identity.dtype),
        versions=library_versions(config.compress),
    )


def _base_name(name: str) -> str:
    """Shorten a local path to its last component, so that manifests do not depend on the folder."""
    path = Path(name)
    if path.exists():
        return path.resolve().name
    return path.name if is_pattern(name) else name
