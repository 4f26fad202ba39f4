"""`saetrain fit`: train SAEs from a cache."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import typer

from saetrain.config.fit_config import FitConfig

from .error_handling import print_json, print_stderr
from .tables import table

if TYPE_CHECKING:
    from saetrain.launch.summary import FitSummary


def run(config: FitConfig, plan: bool, as_json: bool) -> None:
    """Train SAEs at each hookpoint of CACHE from one stream of its rows.

    Options of an SAE may be given several times (--k 16 --k 32 --seed 0 --seed 1). Every
    combination is trained.
    """
    import os

    is_rank_zero = os.environ.get("RANK", "0") == "0"  # torchrun sets RANK
    if plan:
        if is_rank_zero:
            print_estimate(config, as_json)
        return
    import dataclasses

    from actcache.core.progress import format_bytes
    from saetrain.distributed.coordinator import reports_outcome
    from saetrain.distributed.process_group import RemoteRankError
    from saetrain.distributed.signals import RunStopped
    from saetrain.launch.run import fit

    try:
        summary = fit(config)
    except (RemoteRankError, RunStopped) as error:
        if reports_outcome(error):
            raise
        raise typer.Exit(error.exit_code) from None
    if not is_rank_zero:
        return
    from saetrain.training.health import as_lines

    for warning in [*summary.warnings, *as_lines(summary.findings)]:
        print_stderr(f"warning: {warning}")
    if as_json:
        print_json(dataclasses.asdict(summary))
        return
    print(fit_table(summary))
    work = "nothing left to do"
    if summary.new_steps:
        work = (
            f"{summary.new_steps:,} steps at {summary.rows_per_second:,.0f} rows/s, "
            f"{format_bytes(summary.bytes_per_second)}/s, "
            f"{summary.data_wait:.0%} of the time waiting for rows"
        )
    total = f"{summary.steps:,} steps of {summary.rows // summary.steps:,} rows"
    print(f"{summary.run}: {work}; finished, {total}")
    if summary.limit is not None:
        print(summary.limit)


def fit_table(summary: FitSummary) -> str:
    """Return the figures of every SAE: those of the last steps, and those on held-out rows."""
    header = [heading(summary.saes), "FVU, last steps", "FVU, held out"]
    header += ["L0, last steps", "L0, held out", f"dead % ({summary.dead_after:,} rows)"]
    header += ["best", "at step"] * bool(summary.best)
    rows = []
    for name, m in summary.saes.items():
        held_out = summary.held_out.get(name, {})
        row = [name, f"{m['fvu']:.4f}", format_number(held_out.get("fvu"), ".4f")]
        row += [f"{m['l0']:.1f}", format_number(held_out.get("l0"), ".1f")]
        row.append(format_number(m["dead_percent"], ".1f"))
        if summary.best:
            row += [f"{summary.best[name].fvu:.4f}", f"{summary.best[name].step:,}"]
        rows.append(row)
    return table(header, rows)


def heading(names: Iterable[str]) -> str:
    """Return the heading of the column of SAE names, which are hookpoints if each has one SAE."""
    return "SAE" if any("/" in name for name in names) else "hookpoint"


def format_number(value: float | None, spec: str) -> str:
    """Format a number for a table; None becomes a dash."""
    return "-" if value is None else format(value, spec)


def print_estimate(config: FitConfig, as_json: bool) -> None:
    """Print the SAEs that the options describe, with their parameters and memory."""
    import dataclasses

    from actcache.core.process import choose_device
    from saetrain.launch.estimate import estimate_fit

    plan = estimate_fit(config, choose_device(config.device))
    if as_json:
        print_json(dataclasses.asdict(plan))
        return
    print(_estimate_table(plan))
    print("\n".join(_estimate_notes(plan)))


def _estimate_table(plan: Any) -> str:
    from actcache.core.progress import format_bytes
    from saetrain.config.grid import short_number

    header = ["SAE", "d_in", "latents", "k", "optimizer", "lr", "seed", "parameters"]
    header += ["weights", "optimizer state", "gradients", "activations"]

    def sizes(sae: Any) -> list[str]:
        memory = (sae.weights, sae.optimizer_state, sae.gradients, sae.activations)
        return [f"{sae.parameters:,}", *map(format_bytes, memory)]

    rows = [
        [
            sae.name,
            str(sae.d_in),
            str(sae.num_latents),
            "-" if sae.k is None else str(sae.k),
            sae.optimizer,
            "by steps" if sae.lr is None else short_number(float(f"{sae.lr:.3g}")),
            str(sae.seed),
            *sizes(sae),
        ]
        for sae in plan.saes
    ]
    rows.append([f"all {len(plan.saes)}", "-", "-", "-", "", "-", "-", *sizes(plan)])
    return table(header, rows)


def _estimate_notes(plan: Any) -> list[str]:
    from actcache.core.progress import format_bytes

    fits = "fits" if plan.fits else "does not fit"
    return [
        f"{format_bytes(plan.total)} on the device, of which {format_bytes(plan.free)} are free "
        f"beside the libraries: {fits}. SAEs step in turn, so gradients and activations are those "
        "of the largest",
        f"{format_bytes(plan.libraries)} of these are the libraries': Python and torch, or on a "
        "GPU the CUDA context",
        f"{format_bytes(plan.rows)} of these are rows in the shuffle buffer, shared by all SAEs",
    ]
