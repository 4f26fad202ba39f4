"""`saetrain fit --plan`: sizes and memory of the SAEs of a run, without training it."""

from __future__ import annotations

from typing import Any

from saetrain.config.fit_config import FitConfig

from .error_handling import print_json
from .tables import table


def print_estimate(config: FitConfig, as_json: bool) -> None:
    """Print the SAEs that the options describe, with their parameters and memory."""
    import dataclasses

    from actcache.core.process import choose_device
    from saetrain.launch.estimate import estimate_fit

    plan = estimate_fit(config, choose_device(config.device))
    if as_json:
        print_json(dataclasses.asdict(plan))
        return
    print(_table(plan))
    print("\n".join(_notes(plan)))


def _table(plan: Any) -> str:
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


def _notes(plan: Any) -> list[str]:
    from actcache.core.progress import format_bytes

    fits = "fits" if plan.total <= plan.free else "does not fit"
    return [
        f"{format_bytes(plan.total)} on the device, of which {format_bytes(plan.free)} are free: "
        f"{fits}. SAEs step in turn, so gradients and activations are those of the largest",
        f"{format_bytes(plan.rows)} of rows in the shuffle buffer, shared by all SAEs",
    ]
