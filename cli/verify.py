"""`actcache verify`: check every byte of a cache against its receipts, and repair it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Annotated

import typer

from actcache.config import HarvestConfig
from actcache.errors import ActcacheError, ConfigError, CorruptShardError, quote_name
from actcache.filesystem.paths import reject_url

from .error_handling import print_json, print_stderr, report_errors
from .options import command, require_names

if TYPE_CHECKING:
    from actcache.cache.verify import Verification


@report_errors
def run(
    cache: Annotated[str, typer.Argument(help="Folder of the cache, or its URL.")],
    harvest: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- MODEL DATASET OPTIONS]",
            help="With --repair: arguments of the harvest command that wrote the cache, without "
            "--out.",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Check sizes and headers only.")] = False,
    repair: Annotated[
        bool,
        typer.Option(
            "--repair",
            help="Mend manifest and receipts, and retract damaged shards; if a harvest command "
            "follows, harvest them again. What it does not make in the original bytes is left as "
            "it is.",
        ),
    ] = False,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, max=1024, help="Number of files read in parallel. Default: one per core."
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check every file of CACHE against its receipts and list damaged and missing files."""
    import dataclasses

    from actcache.cache.flipped_bits import BitSearch
    from actcache.cache.repair import mend, require_repairable, retract_damaged
    from actcache.cache.verify import verify

    require_names(CACHE=cache)
    if harvest and not repair:
        raise ConfigError("a harvest command needs --repair", got=" ".join(harvest))
    if repair:
        reject_url(cache, "CACHE with --repair", "files are published by renaming them")
    config = _harvest_config([*harvest, "--out", cache]) if harvest else None
    found = verify(cache, quick=quick, threads=threads)
    if not json:
        _print(found)
    mended: set[str] = set()
    search = BitSearch()
    while repair and (more := set(mend(found, search)) - mended):
        mended |= more
        print_stderr(f"mended without a harvest: {quote_name(', '.join(sorted(more)))}")
        found = verify(cache, quick=quick, threads=threads)
        if not json:
            _print(found)
    if search.untried:
        print_stderr(
            f"in {len(search.untried)} of the damaged files no flipped bit was searched, which "
            "would take too long: their shards are made again, if at all"
        )
    to_harvest = config is not None and not (found.is_sound and found.complete)
    if config is not None and found.damages:
        require_repairable(found)
        _require_same(config)
    is_sound = found.is_sound
    if config is not None and to_harvest:
        is_sound = _harvest_again(config, found)
    elif repair:
        retract_damaged(found)
        if found.damages or found.retracted:
            print_stderr("run the harvest command again: it writes only the missing shards")
    if json:
        print_json(dataclasses.asdict(found) | {"sound": is_sound})
    if not is_sound:
        raise typer.Exit(CorruptShardError.exit_code)


def _harvest_config(arguments: list[str]) -> HarvestConfig:
    """Parse a harvest command line; click rejects unknown options."""
    configs: list[HarvestConfig] = []
    app = typer.Typer(add_completion=False, rich_markup_mode=None)

    def collect(config: HarvestConfig, _json: bool) -> None:
        configs.append(config)

    app.command()(command(HarvestConfig, collect, ["model", "dataset"]))
    app(args=arguments, prog_name="actcache verify CACHE --repair --", standalone_mode=False)
    if not configs:  # --help has been printed
        raise typer.Exit
    return configs[0]


def _require_same(config: HarvestConfig) -> None:
    """Check, before shards are retracted, that this harvest command writes the same cache."""
    from pathlib import Path

    from actcache.format.manifest import MANIFEST
    from actcache.harvester.job import require_same_harvest

    if (Path(config.out) / MANIFEST).exists():
        require_same_harvest(config, Path(config.out))


def _harvest_again(config: HarvestConfig, found: Verification) -> bool:
    """Retract the damaged shards and harvest those missing; return whether the cache is complete.

    Shards that a failed harvest did not reach are reinstated as they were.
    """
    from pathlib import Path

    from actcache.cache.repair import retract_damaged
    from actcache.cache.restore import reinstate_all
    from actcache.format.manifest import read_manifest
    from actcache.harvester.run import harvest

    try:
        retracted = retract_damaged(found)
        summary = harvest(config)
    except BaseException:
        with contextlib.suppress(
            ActcacheError, OSError
        ):  # the error of the harvest is the one to report
            reinstate_all(Path(config.out), read_manifest(Path(config.out)))
        raise
    for warning in summary.warnings:
        print_stderr(f"warning: {warning}")
    numbers = ", ".join(map(str, retracted)) or "none"
    print_stderr(
        f"{summary.cache}: retracted shards {numbers}; harvested {summary.new_shards} shards again"
    )
    return summary.complete


def _print(found: Verification) -> None:
    from actcache.core.progress import format_bytes

    for damage in found.damages:
        lines = damage.file, f"  expected: {damage.expected}", f"  got:      {damage.got}"
        print("\n".join(map(quote_name, lines)))
    if found.leftovers:
        shown = ", ".join(found.leftovers[:5]) + (", ..." if len(found.leftovers) > 5 else "")
        count = len(found.leftovers)
        print(f"{count} files belong to no receipt and are ignored: {quote_name(shown)}")
    for note in found.notes:
        print(f"note: {note}")
    if found.left_out:
        reasons = ", ".join(f"{count:,} {name}" for name, count in found.left_out.items())
        print(f"note: documents that the harvest left out: {quote_name(reasons)}")
    if found.retracted:
        print(f"retracted shards to harvest again: {', '.join(map(str, found.retracted))}")
    how = "sizes and headers" if found.quick else "every byte"
    state = "sound" if found.is_sound else f"{len(found.damages)} findings"
    state += "" if found.complete else ", incomplete"
    print(
        f"{found.cache}: {state}; {how} of {found.files} files in {found.shards} shards, "
        f"{format_bytes(found.bytes)}"
    )
