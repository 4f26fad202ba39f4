"""Signs that a run goes wrong, each named once while it goes and again at its end.

Some are known before the first step, from the options and the statistics of the rows. The others
are read from the lines of metrics.jsonl, and so are functions of the run: a resumed run reads the
lines before its checkpoint again, and ends with the findings of an uninterrupted one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from actcache.format.statistics import Statistics
from saetrain.config.sae import PENALISED, SaeEntry
from saetrain.optim import warmup_steps
from saetrain.runs.record import RunRecord
from saetrain.tracking.jsonl import METRICS, read_lines, sae_metrics

ENOUGH_STEPS = 100
"""Steps below which a run is too short for its schedules."""
RISE = 1.5
"""Times the least FVU so far, from which a rise is reported."""
MOST_DEAD = 100 / 3
"""Share of dead latents above which it is reported, percent."""
ROUNDING = 1e-12
"""Variance, as a share of the mean squared norm, that rounding of sums alone explains."""
FEW = 8
"""Findings that are printed at once; the others are counted."""
_WORSE = 2  # lines running that a rise must last: one line may hold rows that are unlike others
_SAME_L0 = 0.8  # times the L0 at the least FVU: below, the FVU rises because fewer latents fire

Kind = Literal["steps", "lr", "equal_rows", "fvu", "rise", "dead"]


@dataclass(frozen=True)
class Finding:
    """A sign that a run, or one of its SAEs, goes wrong."""

    sae: str
    """Name of the SAE; empty: of the run, or of a hookpoint."""
    kind: Kind
    step: int
    """Steps done when it was found."""
    text: str
    """One sentence, with the options that mend it."""


def findings_at_start(record: RunRecord, statistics: Mapping[str, Statistics]) -> list[Finding]:
    """Return what the options and the rows show before the first step.

    Args:
        record: the run.
        statistics: those of its rows, by hookpoint; hookpoints that are missing are not judged.
    """
    found = []
    if record.steps < ENOUGH_STEPS:
        found.append(Finding("", "steps", 0, _too_short(record)))
    for name, of_rows in statistics.items():
        if of_rows.count and of_rows.variance <= ROUNDING * of_rows.rms_norm**2:
            text = (
                f"all rows of {name} are equal up to rounding, so their FVU has no meaning: leave "
                "this hookpoint out with --hookpoint"
            )
            found.append(Finding("", "equal_rows", 0, text))
    for entry in record.saes:
        if not all(name in statistics for name in entry.sources):
            continue
        if entry.lr > (rms := _rms(entry, statistics)):
            text = (
                f"{entry.name}: the learning rate {_short(entry.lr)} is larger than "
                f"{_short(rms)}, the root mean square of a row's numbers: "
                f"--lr {_short(rms / 100)}{_or_scale(entry, record)}"
            )
            found.append(Finding(entry.name, "lr", 0, text))
    return found


def _rms(entry: SaeEntry, statistics: Mapping[str, Statistics]) -> float:
    """Return the root mean square of the numbers of an SAE's input rows, as they are trained on."""
    scales = dict(
        zip(entry.hookpoints, entry.scales or (1.0,) * len(entry.hookpoints), strict=True)
    )
    squares = sum((scales[name] * statistics[name].rms_norm) ** 2 for name in entry.sources)
    return math.sqrt(squares / sum(len(statistics[name].total) for name in entry.sources))


def _too_short(record: RunRecord) -> str:
    options, steps = record.options, record.steps
    rows = ENOUGH_STEPS * record.plan.batch_size
    more = f"--max-tokens {rows}"
    if options.max_tokens is None:
        more = f"--epochs {math.ceil(ENOUGH_STEPS * options.epochs / steps)}"
    return (
        f"the run has {steps:,} step{'s' * (steps > 1)}, and training needs about {ENOUGH_STEPS} "
        f"at least: {more}, or a smaller --batch-size"
    )


class Watch:
    """Reader of the lines of metrics.jsonl that reports each sign of an SAE once.

    Args:
        record: the run.
        findings: those of its start.
    """

    def __init__(self, record: RunRecord, findings: Iterable[Finding] = ()) -> None:
        self.findings = list(findings)
        """All findings so far."""
        self._record, self._last_step = record, 0
        self._saes = {entry.name: _SaeWatch(entry, record) for entry in record.saes}

    def replay(self, root: Path) -> None:
        """Read the lines that metrics.jsonl already has; raises `FormatError`."""
        path = root / METRICS
        for line in read_lines(path):
            if "saes" in line:
                self.read(line["step"], sae_metrics(path, line, list(self._saes)))

    def read(self, step: int, figures: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
        """Read one line, and return what is found for the first time.

        Args:
            step: steps done.
            figures: means since the line before, by the SAE's name.
        """
        since, self._last_step = self._last_step, step
        found = []
        for name, of_sae in figures.items():
            found += self._saes[name].read(since, step, of_sae)
        self.findings += found
        return found


def as_lines(found: Sequence[Finding]) -> list[str]:
    """Return the sentences of some findings, and one that counts the others.

    These are the first findings, of each kind one at least.
    """
    first_of_kind = {finding.kind: i for i, finding in reversed([*enumerate(found)])}
    others = [i for i in range(len(found)) if i not in first_of_kind.values()]
    shown = sorted([*first_of_kind.values(), *others][:FEW])
    more = len(found) - FEW
    rest = [f"{more:,} more: --json lists all of them at the end"] if more > 0 else []
    return [*(found[i].text for i in shown), *rest]


class _SaeWatch:
    """What was found of one SAE, and the least FVU so far."""

    def __init__(self, entry: SaeEntry, record: RunRecord) -> None:
        self._entry, self._record = entry, record
        self._settled = _settled(entry, record)
        self._found: set[Kind] = set()
        self._least: tuple[float, float, int] | None = None  # FVU, L0, step
        self._worse = 0

    def read(self, since: int, step: int, figures: Mapping[str, Any]) -> list[Finding]:
        """Return what the mean figures of the steps from `since` to `step` show."""
        texts: dict[Kind, str | None] = {"dead": self._dead(step, figures["dead_percent"])}
        if since >= self._settled:
            fvu = figures["fvu"]
            texts["fvu"] = self._bad(step, fvu) if fvu > 1 else None
            texts["rise"] = self._rise(step, fvu, figures["l0"])
        new = {kind: text for kind, text in texts.items() if text and kind not in self._found}
        self._found |= new.keys()
        return [Finding(self._entry.name, kind, step, text) for kind, text in new.items()]

    def _bad(self, step: int, fvu: float) -> str:
        return (
            f"{self._entry.name}: FVU {fvu:.3g} at step {step:,}: the mean row alone would have "
            f"1: {self._lower_rate()}{self._or_scale()}{self._or_norms()}"
        )

    def _rise(self, step: int, fvu: float, l0: float) -> str | None:
        least = self._least
        if least is None or fvu < least[0] or l0 < _SAME_L0 * least[1]:
            self._least, self._worse = (fvu, l0, step), 0
            return None
        self._worse = self._worse + 1 if fvu > RISE * least[0] else 0
        if self._worse < _WORSE:
            return None
        return (
            f"{self._entry.name}: FVU rose from {least[0]:.3g} at step {least[2]:,} to {fvu:.3g} "
            f"at step {step:,}: {self._lower_rate()}{self._or_scale()}{self._or_norms()}"
        )

    def _dead(self, step: int, percent: float | None) -> str | None:
        record, options = self._record, self._entry.options
        rows, whole = (n * record.plan.batch_size for n in (step, record.steps))
        judged = min(whole, max(2 * record.dead_after, whole // 4))
        if percent is None or percent <= MOST_DEAD or rows < judged:
            return None
        mend = f"a smaller --dead-after (now {record.dead_after:,} rows) or fewer latents"
        if options.auxk_alpha == 0:
            mend = "--auxk-alpha above 0"
        return (
            f"{self._entry.name}: {percent:.0f}% of the latents are dead at step {step:,}: "
            f"{mend}{self._or_scale()}"
        )

    def _or_scale(self) -> str:
        return _or_scale(self._entry, self._record)

    def _or_norms(self) -> str:
        """Name the option that leaves rows of large norm out, unless it is set or impossible."""
        options = self._record.options
        return "" if options.max_norm_ratio or options.follow else ", or --max-norm-ratio 10"

    def _lower_rate(self) -> str:
        return f"--lr {_short(self._entry.lr / 4)} (now {_short(self._entry.lr)})"


def _settled(entry: SaeEntry, record: RunRecord) -> int:
    """Return the step from which on the rate has risen, and k and the penalty are constant."""
    options, steps = entry.options, record.steps
    ends = [steps // 20, warmup_steps(options.lr_warmup_steps, steps), options.k_anneal_steps]
    if options.activation in PENALISED and options.sparsity_warmup_steps is not None:
        ends.append(options.sparsity_warmup_steps)
    return max(ends)


def _or_scale(entry: SaeEntry, record: RunRecord) -> str:
    """Name the option that takes the unit of the rows away, unless it is set or impossible."""
    return "" if entry.scales or record.options.finetune else ", or --input-scale rms"


def _short(number: float) -> str:
    return f"{number:.2g}"
