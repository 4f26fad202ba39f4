"""`--force-config`: a run resumes with changed options, and its record keeps the step.

The options that may change keep tensor shapes, SAE names, optimisers and the order of rows, so that
the checkpoint still fits. The results then depend on the run's history, not on its options alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from actcache.core.options import names_on_resume
from actcache.errors import RunError
from saetrain.config.fit_config import FitConfig
from saetrain.config.sae import SaeEntry
from saetrain.runs.record import OptionChange, RunRecord

OVERRIDABLE = frozenset(names_on_resume(FitConfig, "forced"))
"""Fields of the options that --force-config lets change. Of hookpoints, only lr: a changed k or
width changes the SAEs' sizes, which is refused."""

_LENGTH = {"epochs", "max_tokens"}


def apply_overrides(
    record: RunRecord,
    config: FitConfig,
    changed: Mapping[str, str],
    saes: tuple[SaeEntry, ...],
    steps: int,
    done: int,
) -> RunRecord:
    """Return the record of a run with changed options.

    Args:
        record: the current record.
        config: the new options.
        changed: description of each changed option, by field.
        saes: the SAEs under the new options.
        steps: steps of the whole run under the new options.
        done: steps of the newest checkpoint.

    Raises:
        RunError: an option changes what must stay the same.
    """
    bound = [text for name, text in changed.items() if name not in OVERRIDABLE]
    if config.follow:  # its steps were planned from the harvest's goal at the start
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
            # Values computed at the run's start, such as scales, stay.
            dataclasses.replace(old, config=new.config, lr=new.lr, options=new.options)
            for old, new in zip(record.saes, saes, strict=True)
        ),
        steps=steps,
        dead_after=dead_after or record.dead_after,
    )


def with_history_entry(
    record: RunRecord, step: int, changes: tuple[str, ...], versions: dict[str, str]
) -> RunRecord:
    """Return the record with an entry for changes at a step, if there are any.

    Entries of later steps move to this one: a run that fell back to an older checkpoint repeats the
    steps since then with the changed options.
    """
    history = [dataclasses.replace(c, step=min(c.step, step)) for c in record.history]
    if changes:
        history.append(OptionChange(step, changes, versions))
    return dataclasses.replace(record, history=tuple(history))


def _fixed(sae: SaeEntry) -> object:
    """Return the properties of an SAE that may not change."""
    sizes = dataclasses.replace(sae.config, sparsity=0.0)
    return sae.name, sizes, sae.reads, sae.predicts, sae.seed, sae.options.optimizer


def _refused(config: FitConfig, expected: str, got: list[str]) -> RunError:
    return RunError(
        f"--force-config cannot resume {config.out} with these options",
        expected=expected,
        got="\n            ".join(got),
        remedy="repeat these options as they were (run.json lists them), or choose another --out; "
        "--help lists the options that may change",
    )
