"""`actcache inspect`: the command and its options."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..error_handling import print_json, print_stderr, report_errors
from ..options import BlockCache, BlockCacheBytes, require_names

if TYPE_CHECKING:
    from actcache.cache.reader import Cache
    from actcache.inspection import CacheSummary, Sample, SequenceView


FEW_SEQUENCES = 8
"""Number of sequences that --text shows without a pager."""
PAGE_SEQUENCES = 3
"""Number of sequences on the page of --html."""
MODEL_NAME = re.compile(r"(?!\.)[\w.-]{1,96}(/(?!\.)[\w.-]{1,96})?", re.ASCII)
"""Names from a cache that a tokenizer may be loaded by: on the hub, or a local folder."""
SAMPLE_NORMS = 8
"""Largest number of hookpoints whose norms are shown with a --sample."""


@report_errors
def run(
    cache: Annotated[str, typer.Argument(help="Folder of the cache, or its URL.")],
    shard: Annotated[
        int | None, typer.Option(min=0, max=2**31 - 1, help="Only this shard, with its files.")
    ] = None,
    hookpoint: Annotated[
        str | None,
        typer.Option(help="This hookpoint in detail; --text shows its norms. Default: the first."),
    ] = None,
    text: Annotated[
        bool, typer.Option("--text", help="Page through sequences with the norm of every token.")
    ] = False,
    sequences: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=2**31 - 1,
            help="How many sequences --text shows. Default: all on a terminal, else "
            f"{FEW_SEQUENCES}; --html: {PAGE_SEQUENCES}.",
        ),
    ] = None,
    sample: Annotated[
        int, typer.Option(min=0, max=100_000, help="Show so many random rows with context.")
    ] = 0,
    html: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Write all facts, with plots, as one HTML page."),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Model id or folder of the tokenizer that decodes text; default: the one that the "
            "cache names."
        ),
    ] = None,
    gguf_file: Annotated[str | None, typer.Option(help="GGUF file of that tokenizer.")] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Details of every hookpoint, shard and rank.")
    ] = False,
    block_cache: BlockCache = None,
    block_cache_bytes: BlockCacheBytes = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the origin of CACHE, whether it is complete, and statistics of its activations."""
    import dataclasses

    from actcache.cache.reader import Cache
    from actcache.filesystem.output import require_output
    from actcache.format.hookpoint_names import find_in_cache
    from actcache.inspection import read_sequences, render_page, sample_rows, shard_facts, summarize

    from .summary import print_summary

    require_names(CACHE=cache, **{"--html": html, "--block-cache": block_cache})
    if html is not None:
        require_output(Path(html), "--html")
    opened = Cache.open(cache, block_cache=block_cache, block_cache_bytes=block_cache_bytes)
    if hookpoint is not None:
        architecture = opened.manifest.architecture
        meant = find_in_cache(hookpoint, opened.hookpoints, architecture)
        if hookpoint not in opened.hookpoints and len(meant) == 1:
            (hookpoint,) = meant
        opened.require_hookpoint(hookpoint)
    shards = None if shard is None else [shard]
    summary = summarize(opened, shards)
    one = None if shard is None else shard_facts(opened, shard)
    decoder = _tokenizer(opened, tokenizer, gguf_file) if sample or text or html else None
    samples = sample_rows(opened, sample, decoder, shards=shards)

    def views(count: int | None) -> Iterator[SequenceView]:
        named = hookpoint or opened.hookpoints[0]
        return itertools.islice(read_sequences(opened, named, decoder, shards), count)

    if html is not None:
        shown = list(views(sequences or PAGE_SEQUENCES))
        _write_page(html, render_page(summary, shown, shard=one))
    if json:
        shown = list(views(sequences or FEW_SEQUENCES)) if text else []
        print_json(
            dataclasses.asdict(summary)
            | {"samples": [dataclasses.asdict(s) for s in samples]}
            | {"shard": None if one is None else dataclasses.asdict(one)}
            | {"readings": [dataclasses.asdict(view) for view in shown]}
        )
        return
    if text:
        _page_through(summary, hookpoint, views, sequences)
    elif html is None:
        print_summary(summary, shard=one, hookpoint=hookpoint, verbose=verbose)
    for s in samples:
        _print_sample(s)


def _print_sample(s: Sample) -> None:
    norms = [f"{name} {norm:.4g}" for name, norm in list(s.norms.items())[:SAMPLE_NORMS]]
    more = [f"{len(s.norms) - len(norms)} more"] if len(s.norms) > len(norms) else []
    position = f"shard {s.shard} row {s.row}: sequence {s.sequence}, position {s.position}"
    print(f"\n{position}; {', '.join(norms + more)}")
    print(f"  {s.before!r} [{s.token!r}] {s.after!r}")


def _page_through(
    summary: CacheSummary,
    hookpoint: str | None,
    views: Callable[[int | None], Iterator[SequenceView]],
    count: int | None,
) -> None:
    """Show sequences in a pager on a terminal; print a few to a file or pipe."""
    import click

    from .sequences import LEGEND, draw

    chosen = next(h for h in summary.hookpoints if hookpoint in (None, h.hookpoint))
    median = chosen.norms.quantile(0.5)
    pager = sys.stdin is not None and sys.stdin.isatty() and sys.stdout.isatty()
    colour = pager and not os.environ.get("NO_COLOR")
    width = shutil.get_terminal_size((100, 24)).columns
    pages = (
        draw(view, median, width, colour=colour)
        for view in views(count if count or pager else FEW_SEQUENCES)
    )
    head = f"{chosen.hookpoint}: median norm of the cache {median:.4g}; {LEGEND}\n\n"
    if pager:
        click.echo_via_pager(itertools.chain([head], pages))
        return
    print(head, end="")
    for page in pages:
        print(page, end="")
    left = summary.sequences - (count or FEW_SEQUENCES)
    if left > 0:
        print(f"and {left:,} more sequences: --sequences N")


def _write_page(file: str, page: str) -> None:
    """Write the page: atomically, unless it goes to a pipe or a device."""
    from actcache.core.progress import format_bytes
    from actcache.filesystem.output import write_output

    sys.stdout.flush()
    written = page.encode()
    write_output(Path(file), written, "--html")
    print_stderr(f"{file}: one page, {format_bytes(len(written))}")


def _tokenizer(cache: Cache, name: str | None, gguf_file: str | None) -> Any:
    """Load the cache's tokenizer and check its fingerprint; None, with a notice, if unavailable."""
    from actcache.config import HarvestConfig
    from actcache.core.process import captured_warnings
    from actcache.errors import ModelError
    from actcache.format.manifest import IDENTIFIED_FROM
    from actcache.inspection.printable import printable
    from actcache.model.loading import (
        fingerprint_tokenizer,
        fingerprint_tokenizer_before,
        load_tokenizer,
    )

    source = HarvestConfig(name or cache.manifest.model, "", "", gguf_file=gguf_file)
    try:
        # The name comes from an untrusted cache: invalid names are not loaded.
        named = name is not None or MODEL_NAME.fullmatch(source.model)
        with captured_warnings() as captured:
            loaded = load_tokenizer(source) if named else None
    except ModelError:
        if name is not None:
            raise
        loaded = None
    if loaded is None:
        shown = printable(source.model, 80)
        print_stderr(f"no tokenizer {shown} here: showing token ids; see --tokenizer")
        return None
    for warning in captured.lines:
        print_stderr(f"warning: {warning}")
    identity = cache.manifest.identity
    made_by = identity.tokenizer_fingerprint  # empty: the dataset has token ids
    is_before = cache.manifest.format_version < IDENTIFIED_FROM
    fingerprint = fingerprint_tokenizer_before if is_before else fingerprint_tokenizer
    found = fingerprint(loaded, chat=identity.documents == "chat")
    if made_by and found != made_by:
        print_stderr("warning: this is not the tokenizer that made the cache")
    return loaded
