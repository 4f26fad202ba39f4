"""`actcache plan`: estimate the size, memory and time of a harvest."""

from __future__ import annotations

from typing import Any

from actcache.config import PlanConfig

from .error_handling import only_results_on_stdout, print_json, print_stderr
from .tables import table


def run(config: PlanConfig, as_json: bool) -> None:
    """Estimate the size, memory and time of a harvest with these options, without running it.

    Takes the arguments of actcache harvest; --out may be omitted.
    """
    import dataclasses

    from actcache.harvester.estimate import estimate_harvest

    with only_results_on_stdout():
        found = estimate_harvest(config)
    for warning in found.warnings:
        print_stderr(f"warning: {warning}")
    if as_json:
        print_json(
            dataclasses.asdict(found) | {"fits": found.fits, "memory_total": found.memory.total}
        )
        return
    for name, fact in _facts(found, config.out).items():
        print(f"{name:<8} {fact}")
    print("\n" + _table(found))


def _facts(found: Any, out: str) -> dict[str, str]:
    from actcache.core.progress import format_bytes, format_duration

    size = format_bytes
    left_out = ", ".join(f"{n:,} {name}" for name, n in found.dropped.items() if n)
    known = {"exact": "", "estimated": "about ", "at most": "at most "}[found.rows_known]
    memory = found.memory
    room = "fits" if found.fits else f"does not fit: {size(found.bytes - found.free)} too little"
    facts = {
        "model": f"{found.model}, rows as {found.dtype}, {found.backend}",
        "text": f"{found.dataset}: {found.tokens:,} tokens in {found.sequences:,} sequences",
        "rows": f"{known}{found.rows:,} at each hookpoint"
        + (f" (left out: {left_out})" if left_out else ""),
        "shards": f"{found.shards:,} of {found.sequences_per_shard:,} sequences",
        "disk": f"{size(found.bytes)} in {found.files:,} files; {size(found.free)} free at {out}: "
        f"{room}",
        "memory": f"about {size(memory.total)} a process: weights {size(memory.weights)}, shards "
        f"{size(memory.shards)}, forward pass about {size(memory.forward)}, and libraries",
        "of these": f"{size(memory.libraries)} libraries: Python, torch, transformers, and with a "
        "GPU its CUDA context",
    }
    if found.trial is not None:
        trial = found.trial
        device = f", {size(trial.peak_device_memory)} on the device"
        facts["trial"] = (
            f"{trial.tokens:,} tokens in {trial.seconds:.1f} s ({trial.tokens_per_second:,.0f} "
            f"tokens/s), peak {size(trial.peak_memory)} of memory"
            + (device if trial.peak_device_memory else "")
        )
        facts["time"] = f"about {format_duration(found.seconds)} on one process like this"
    return facts


def _table(found: Any) -> str:
    from actcache.core.progress import format_bytes

    rows = [[name, format_bytes(size)] for name, size in found.hookpoints.items()]
    rest = found.bytes - sum(found.hookpoints.values())
    rows.append(["tokens, statistics, receipts", format_bytes(rest)])
    return table(["hookpoint", "bytes"], rows)
