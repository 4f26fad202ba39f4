"""Whether a folder holds a run to go on with, and what that run is under the options of now."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

from actcache.errors import RunError
from actcache.manifest import MANIFEST
from actcache.reader import Cache
from saetrain.checkpoint import newest_step
from saetrain.config import FitConfig, SaeConfig
from saetrain.crew import Crew
from saetrain.deciding import (
    entries_of,
    of_the_run,
    steps_of,
    versions_now,
    whole_updates,
    with_rates,
)
from saetrain.ending import EXIT
from saetrain.forcing import force, with_change
from saetrain.run import (
    LOCK,
    RUN,
    RunRecord,
    SaeEntry,
    changed_options,
    check_same_cache,
    check_same_run,
    place_of,
    read_run,
    write_run,
)
from saetrain.wandb_runs import new_id


def is_begun(config: FitConfig, root: Path) -> bool:
    """Whether the folder holds a run to go on with; raises `RunError` if it must not be used."""
    if (root / RUN).exists():
        if not config.resume:
            raise RunError(
                f"{root} holds a run already",
                remedy="--resume to go on with it, or another --out",
            )
        return True
    if root.exists():
        if not root.is_dir():
            raise RunError(f"--out {root} is a file", expected="a new or empty folder")
        # A run stopped or killed before or while it wrote its first file has not begun.
        names = {path.name for path in root.iterdir()} - {str(LOCK), EXIT}
        if any(not name.startswith(f".{RUN}.") for name in names):
            what = "a cache" if (root / MANIFEST).exists() else "other things"
            raise RunError(f"--out {root} holds {what}", expected="a new or empty folder")
    return False


def go_on(
    config: FitConfig, cache: Cache, root: Path, crew: Crew
) -> tuple[RunRecord, tuple[str, ...], tuple[str, ...]]:
    """The record of the run that is there, checked against what is asked now.

    Returns:
        It with the options of now, what has changed since it was last written, and warnings.
    """
    config = of_the_run(config)
    record = read_run(root)
    check_same_cache(record, cache)
    options = changed_options(record, config)
    record = dataclasses.replace(record, wandb_id=record.wandb_id or new_id(config))
    asked = dataclasses.replace(record, options=config)
    if options and config.force_config:
        steps, done = _forced_steps(record, config), newest_step(root) or 0
        saes = with_rates(entries_of(config, cache, functools.partial(_kinds_of, record)), steps)
        asked = force(record, config, options, saes, steps, done)
    else:
        check_same_run(record, asked)
    now = versions_now()
    last = record.history[-1].versions if record.history else record.versions
    libraries = [
        f"{name}: {then} then, {now.get(name)} now"
        for name, then in last.items()
        if now.get(name) != then
    ]
    warnings = tuple(
        f"{name} is {now.get(name)} now; this run was begun with {then}"
        for name, then in record.versions.items()
        if now.get(name) != then
    )
    parts = crew.processes if crew.shares_batches else 1
    shares = []
    if parts != record.batch_parts:
        shares = [f"processes that share each batch: {record.batch_parts} then, {parts} now"]
        warnings += (f"{shares[0]}: the batches are the same, but sums are rounded otherwise",)
    asked = dataclasses.replace(asked, batch_parts=parts)
    return asked, (*options.values(), *libraries, *shares), warnings


def _kinds_of(record: RunRecord, entries: Sequence[SaeEntry]) -> list[SaeConfig]:
    """What the SAEs of a run with --finetune are under other options: where they began is past."""
    return [
        sae.config
        if entry.options.sparsity is None
        else dataclasses.replace(sae.config, sparsity=entry.options.sparsity)
        for sae, entry in zip(record.saes, entries, strict=False)
    ]


def _forced_steps(record: RunRecord, config: FitConfig) -> int:
    """Steps of a run under other options."""
    if config.follow:
        return whole_updates(config, record.steps)
    return steps_of(config, record.plan.steps_per_epoch)


def write_changes(root: Path, record: RunRecord, first_step: int, changes: tuple[str, ...]) -> None:
    """Write down what is not as it was when the run was last started.

    Options that touch no result are left as they were given first. The cache's place is that of
    now: `saetrain eval` must find it.
    """
    old = read_run(root)
    new = dataclasses.replace(old, cache=place_of(record.options.cache), wandb_id=record.wandb_id)
    if first_step < record.steps:
        if changed_options(old, record.options):
            new = dataclasses.replace(record, cache=new.cache)
        new = dataclasses.replace(new, batch_parts=record.batch_parts)
        new = with_change(new, first_step, changes, versions_now())
    if new != old:
        write_run(root, new)
