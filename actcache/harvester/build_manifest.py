"""The manifest that a decided harvest will have."""

from __future__ import annotations

from pathlib import Path

from actcache.cache.folder import choose_block_rows, sequences_per_shard
from actcache.config import HarvestConfig
from actcache.data.documents import Mixture, Source, TokenFile, document_kind
from actcache.data.sequences import SequencePipeline
from actcache.format.manifest import FORMAT_VERSION, Identity, Manifest, library_versions
from actcache.harvester.resolve import ResolvedHarvest, is_stream
from actcache.model.loading import fingerprint_tokenizer


def build_manifest(
    config: HarvestConfig,
    resolved: ResolvedHarvest,
    identity: Identity,
    planned: int,
    architecture: str,
) -> Manifest:
    """Identity, shard plan and names.

    Args:
        config: the options.
        resolved: what they come to.
        identity: what the numbers will be.
        planned: sequences that the model will run on.
        architecture: class of the model.
    """
    hookpoints = resolved.hookpoints
    return Manifest(
        format_version=FORMAT_VERSION,
        cache_id=identity.digest(),
        identity=identity,
        model=_last_part(config.model),
        revision=config.revision,
        architecture=architecture,
        dataset=" + ".join(_last_part(name) for name in (config.dataset, *config.mix)),
        split=config.split if identity.column else "",
        backend=config.backend,
        compression=config.compress,
        sequences_per_shard=sequences_per_shard(config, planned, hookpoints, identity.dtype),
        planned_sequences=planned,
        block_rows=choose_block_rows(hookpoints, identity.dtype),
        versions=library_versions(config.compress),
    )


def build_identity(
    config: HarvestConfig,
    resolved: ResolvedHarvest,
    model_fingerprint: str,
    model_dtype: str,
    dtype: str,
) -> Identity:
    """Everything that decides the numbers, as the manifest has it."""
    source, pipeline, tokenizer = resolved.source, resolved.pipeline, resolved.tokenizer
    kind = document_kind(source)
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
        exclude_special=resolved.exclude_special,
        exclude_tokens=resolved.exclude_tokens,
        max_norm_ratio=config.max_norm_ratio,
        hookpoints=resolved.hookpoints,
        dtype=dtype,  # type: ignore[arg-type] # the caller has looked it up
        via=(),
        batch_size=config.batch_size,
        row_order=config.order,
        seed=config.seed,
    )


def _shuffle_buffer(source: Source, pipeline: SequencePipeline) -> int | None:
    if pipeline.order.keep_order or not is_stream(source):
        return None
    return pipeline.order.buffer


def _last_part(name: str) -> str:
    """A local path's last part, so that a cache says the same wherever it was made."""
    return Path(name).resolve().name if Path(name).exists() else name
