"""`actcache inspect`: what a cache holds."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from .guard import emit, guarded, say
from .tables import table


@guarded
def run(
    cache: Annotated[str, typer.Argument(help="Folder of the cache.")],
    sample: Annotated[int, typer.Option(min=0, help="Show this many rows in their text.")] = 0,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Model id or folder whose tokenizer decodes --sample; default: the one "
            "the cache names."
        ),
    ] = None,
    gguf_file: Annotated[str | None, typer.Option(help="GGUF file of that tokenizer.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what CACHE is of, whether it is complete, and each hookpoint's size and norms."""
    import dataclasses

    from actcache.inspection import sample_rows, summarise
    from actcache.reader import Cache

    opened = Cache.open(cache)
    summary = summarise(opened)
    words = _tokenizer(opened, tokenizer, gguf_file) if sample else None
    samples = sample_rows(opened, sample, words)
    if json:
        emit(dataclasses.asdict(summary) | {"samples": [dataclasses.asdict(s) for s in samples]})
        return
    _print_summary(summary)
    for s in samples:
        norms = ", ".join(f"{name} {norm:.4g}" for name, norm in s.norms.items())
        print(
            f"\nshard {s.shard} row {s.row}: sequence {s.sequence}, position {s.position}; {norms}"
        )
        print(f"  {s.before!r} [{s.token!r}] {s.after!r}")


def _print_summary(summary: Any) -> None:
    from actcache.progress import format_bytes

    size = f"{summary.tokens:,} tokens in {summary.sequences:,} sequences, {summary.shards} shards"
    facts = {
        "cache": f"{summary.cache}  (id {summary.cache_id})",
        "model": summary.model,
        "dataset": summary.dataset,
        "text": summary.text,
        "filters": summary.filters,
        "backend": summary.backend,
        "state": summary.state,
        "size": f"{size}; {summary.rows:,} rows, {format_bytes(summary.bytes)}",
    }
    for name, fact in facts.items():
        print(f"{name:<8} {fact}")
    header = [
        "hookpoint",
        "rows",
        "width",
        "dtype",
        "bytes",
        "mean norm",
        "RMS norm",
        "max norm",
        "non-finite",
    ]
    rows = [
        [
            h.hookpoint,
            f"{h.rows:,}",
            str(h.width),
            h.dtype,
            format_bytes(h.bytes),
            f"{h.mean_norm:.4g}",
            f"{h.rms_norm:.4g}",
            f"{h.max_norm:.4g}",
            str(h.non_finite),
        ]
        for h in summary.hookpoints
    ]
    print("\n" + table(header, rows))


def _tokenizer(cache: Any, name: str | None, gguf_file: str | None) -> Any:
    """The tokenizer that made the cache, checked by fingerprint; None (and a word) without it."""
    from actcache.config import HarvestConfig
    from actcache.errors import ModelError
    from actcache.model import fingerprint_tokenizer, load_tokenizer

    source = HarvestConfig(name or cache.manifest.model, "", "", gguf_file=gguf_file)
    try:
        loaded = load_tokenizer(source)
    except ModelError:
        if name is not None:
            raise
        say(f"no tokenizer {cache.manifest.model} here: showing token ids; see --tokenizer")
        return None
    made_by = cache.manifest.identity.tokenizer_fingerprint  # empty: the text came as token ids
    if made_by and fingerprint_tokenizer(loaded) != made_by:
        say("warning: this is not the tokenizer that made the cache")
    return loaded
