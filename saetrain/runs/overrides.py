"""`--force-config`: a run goes on under other options, and its record says since when.

What is let through leaves every tensor's shape, every SAE's name, the optimisers and the order of
rows as they are, so that the checkpoint still fits. The run is no longer a function of its options
alone, but of its history.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from actcache.core.options import names_on_resume
from actcache.errors import RunError
from saetrain.config.fit_config import FitConfig
from saetrain.runs.record import OptionChange, RunRecord, SaeEntry

OVERRIDABLE = frozenset(names_on_resume(FitConfig, "forced"))
"""Options that --force-config may change, by field name."""

_LENGTH = {"epochs", "max_tokens"}


def apply_overrides(
    record: RunRecord,
    config: FitConfig,
    changed: Mapping[str, str],
    saes: tuple[SaeEntry, ...],
    steps: int,
    done: int,
) -> RunRecord:
    """The record of a run under other options.

    Args:
        record: the run as it is.
        config: the options from now on.
        changed: those that are others, in words, by field.
        saes: the SAEs that they make.
        steps: of the whole run under them.
        done: steps of the newest checkpoint.

    Raises:
        RunError: an option changes what must stay.
    """
    bound = [text for name, text in changed.items() if name not in OVERRIDABLE]
    if config.follow:  # its steps are planned from the harvest's goal of then
        bound += [text for name, text in changed.items() if name in _LENGTH]
    if bound:
        raise _refused(config, "options that leave shapes, optimisers and order of rows", bound)
    if [_fixed(sae) for sae in saes] != [_fixed(sae) for sae in record.saes]:
        names = [sae.name for sae in record.saes]
        raise _refused(config, f"the same SAEs: {', '.join(names)}", list(changed.values()))
    if steps < done:
        raise _refused(config, f"at least the {done:,} steps that are done", [f"{steps:,} steps"])
    dead_after = config.dead_after if "dead_after" in changed else None
    return dataclasses.replace(
        record,
        options=dataclasses.replace(config, force_config=False),
        saes=tuple(
            # What was found at the run's beginning, such as scales, stays.
            dataclasses.replace(old, config=new.config, lr=new.lr, options=new.options)
            for old, new in zip(record.saes, saes, strict=True)
        ),
        steps=steps,
        dead_after=dead_after or record.dead_after,
    )


def with_history_entry(
    record: RunRecord, step: int, changes: tuple[str, ...], versions: dict[str, str]
) -> RunRecord:
    """The record with what has changed by a step, if anything has.

    What came after that step is undone, if the run fell back to it, and is in force from it on.
    """
    history = [dataclasses.replace(c, step=min(c.step, step)) for c in record.history]
    if changes:
        history.append(OptionChange(step, changes, versions))
    return dataclasses.replace(record, history=tuple(history))


def _fixed(sae: SaeEntry) -> object:
    """What of an SAE must stay."""
    sizes = dataclasses.replace(sae.config, sparsity=0.0)
    return sae.name, sizes, sae.reads, sae.predicts, sae.seed, sae.options.optimizer


def _refused(config: FitConfig, expected: str, got: list[str]) -> RunError:
    return RunError(
        f"--force-config cannot go on with {config.out} so",
        expected=expected,
        got="\n            ".join(got),
        remedy="repeat these options as they were (they stand in run.json), or choose another "
        "--out; what may change is in --help",
    )
