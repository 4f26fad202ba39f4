"""`saetrain eval`: evaluate the SAEs of a run on its held-out rows."""

from __future__ import annotations

from typing import Annotated

import typer

from .error_handling import print_json, print_stderr, report_errors
from .fit import format_number, heading
from .options import BlockCache, BlockCacheBytes, require_names
from .tables import table


@report_errors
def run(
    run: Annotated[str, typer.Argument(help="Folder of the run.")],
    cache: Annotated[
        str | None, typer.Option(help="Folder or URL of the cache. Default: the one in run.json.")
    ] = None,
    device: Annotated[
        str, typer.Option(help="Torch device. auto: cuda if there is a GPU, else cpu.")
    ] = "auto",
    block_cache: BlockCache = None,
    block_cache_bytes: BlockCacheBytes = None,
    best: Annotated[
        bool, typer.Option("--best", help="Evaluate the SAEs saved by fit --save-best instead.")
    ] = False,
    max_norm_ratio: Annotated[
        float | None,
        typer.Option(
            metavar="R",
            help="Leave out held-out rows whose norm is more than R times the median norm of the "
            "training rows of their hookpoint. 0: none. Default: those that the run left out.",
        ),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print held-out FVU, L0 and dead latents of every SAE of RUN, and write RUN/eval.json.

    With --best, the file is RUN/eval-best.json.
    """
    import dataclasses
    from pathlib import Path

    from actcache.cache.sinks import as_lines
    from saetrain.evaluation import BEST_EVALUATION, EVALUATION, evaluate

    require_names(RUN=run, **{"--cache": cache, "--block-cache": block_cache})
    evaluation = evaluate(
        Path(run),
        cache,
        device,
        block_cache,
        block_cache_bytes,
        best=best,
        max_norm_ratio=max_norm_ratio,
    )
    if json:
        print_json(dataclasses.asdict(evaluation))
        return
    header = [
        heading(sae.name for sae in evaluation.saes),
        "latents",
        "k",
        "FVU",
        "L0",
        "dead %",
        "fired %",
        "rows/s",
        *["step"] * best,
    ]
    rows = [
        [
            sae.name,
            str(sae.num_latents),
            format_number(sae.k, "d"),
            f"{sae.fvu:.4f}",
            f"{sae.l0:.1f}",
            format_number(sae.dead_percent, ".1f"),
            f"{sae.fired_percent:.1f}",
            format_number(evaluation.rows_per_second, ",.0f"),
            *[f"{sae.step:,}"] * best,
        ]
        for sae in evaluation.saes
    ]
    print(table(header, rows))
    for line in as_lines(evaluation.sinks):
        print_stderr(f"warning: held out: {line}")
    for sae in evaluation.saes:
        for name, output in sae.parts.items():
            print(f"{sae.name} at {name}: FVU {output.fvu:.4f}, norm {output.decoder_norm:.3f}")
    without = f", {evaluation.rows_left_out:,} left out" if evaluation.rows_left_out else ""
    print(
        f"{evaluation.rows:,} held-out rows{without}; dead: not fired in the last "
        f"{evaluation.dead_after:,} rows of training; fired: on held-out rows; rows/s: of training"
    )
    if evaluation.step < evaluation.steps:
        print(
            f"step {evaluation.step:,} of {evaluation.steps:,}: the run is unfinished; "
            f"saetrain fit ... --out {run} --resume resumes"
        )
    path = f"{run}/{header[0].upper()}" + ("/best-STEP" if best else "")
    print(f"SAEs in {path}, this table in {run}/{BEST_EVALUATION if best else EVALUATION}")
