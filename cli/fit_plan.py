"""`saetrain fit --plan`: the SAEs of a run, before it is begun."""

from __future__ import annotations

from typing import Any

from saetrain.config.fit_config import FitConfig

from .error_handling import print_json
from .tables import table


def print_estimate(config: FitConfig, as_json: bool) -> None:
    """Print the SAEs that the options mean, their parameters and their memory."""
    import dataclasses

    from actcache.core.device import choose_device
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

    def sizes(of: Any) -> list[str]:
        found = (of.weights, of.optimizer_state, of.gradients, of.activations)
        return [f"{of.parameters:,}", *map(format_bytes, found)]

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
        f"{fits}. SAEs step one after another: gradients and activations are the largest one's",
        f"{format_bytes(plan.rows)} of rows are mixed in memory, once for all SAEs",
    ]
