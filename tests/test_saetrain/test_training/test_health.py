"""Signs that a run goes wrong: when each is found, what it says, and where it is printed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from actcache.format.dtypes import ROW_DTYPES
from actcache.format.statistics import Statistics, compute
from actcache.stream.order import OrderPlan
from saetrain.config.fit_config import FitConfig
from saetrain.config.grid import vary
from saetrain.config.sae import SaeConfig, SaeEntry
from saetrain.launch.run import fit
from saetrain.runs.record import RunRecord
from saetrain.tracking.jsonl import METRICS
from saetrain.training.checkpointing import Checkpointer
from saetrain.training.health import FEW, Finding, Watch, as_lines, findings_at_start

Options = Callable[..., FitConfig]

STEPS, BATCH = 400, 32
GOOD = {"fvu": 0.2, "l0": 3.0, "dead_percent": 5.0}


class Killed(BaseException):
    """A simulated SIGKILL: no product code catches it."""


def record(
    options: Options, steps: int = STEPS, dead_after: int = 640, lr: float = 0.01, **changes: Any
) -> RunRecord:
    """Build the record of a run of one SAE on rows of width 16."""
    config = options(hookpoint=("layers.0",), lr_warmup_steps=None, **changes)
    entry = SaeEntry("layers.0", SaeConfig(16, 48, 3), lr, 0, options=config.sae)
    return RunRecord(
        format_version=2,
        cache=config.cache,
        cache_id="0" * 32,
        receipts_digest="0" * 32,
        held_out=(),
        plan=OrderPlan(((0, 4096),), 16, BATCH, BATCH, 8, 0),
        steps=steps,
        dead_after=dead_after,
        saes=(entry,),
        options=config,
        versions={},
    )


def read(watch: Watch, *lines: dict[str, Any]) -> list[tuple[int, str]]:
    """Read a line every 10 steps; return (step, kind) of each finding."""
    found = []
    for number, line in enumerate(lines, 1):
        found += watch.read(10 * number, {"layers.0": GOOD | line})
    return [(finding.step, finding.kind) for finding in found]


def statistics(rows: Any) -> dict[str, Statistics]:
    row_dtype = ROW_DTYPES["float32"]
    import torch

    stored = row_dtype.from_torch(torch.as_tensor(np.asarray(rows, np.float32)))
    return {"layers.0": compute(stored, row_dtype)}


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ([{}] * 40, []),
        # An FVU above 1, from the first line after the warm-up on, once.
        ([{"fvu": 9.0}, {"fvu": 9.0}, {"fvu": 1.2}, {"fvu": 1.3}], [(30, "fvu")]),
        # A rise by half in two lines running.
        ([{}] * 5 + [{"fvu": 0.31}] * 3, [(70, "rise")]),
        ([{}] * 5 + [{"fvu": 0.31}, {"fvu": 0.25}, {"fvu": 0.31}, {}], []),
        ([{}] * 5 + [{"fvu": 0.29}] * 3, []),
        # Fewer latents cost FVU: a penalty that takes effect is no rise.
        ([{"l0": 30.0}] * 5 + [{"fvu": 0.5}] * 5, []),
        ([{"l0": 30.0}] * 5 + [{"fvu": 0.5}] * 2 + [{"fvu": 0.8}] * 2, [(90, "rise")]),
        # Dead latents, once a quarter of the run is over.
        ([{"dead_percent": 60.0}] * 12, [(100, "dead")]),
        ([{"dead_percent": 33.0}] * 12, []),
        ([{"dead_percent": None}] * 12, []),
    ],
)
def test_a_line_shows_what_goes_wrong_once(
    options: Options, lines: list[dict[str, Any]], expected: list[tuple[int, str]]
) -> None:
    watch = Watch(record(options))
    assert read(watch, *lines) == expected
    assert [(f.step, f.kind) for f in watch.findings] == expected


def test_dead_latents_are_judged_after_twice_the_rows_that_make_them_dead(
    options: Options,
) -> None:
    lines = [{"dead_percent": 90.0}] * 40
    assert read(Watch(record(options, dead_after=100 * BATCH)), *lines) == [(200, "dead")]
    # In a run too short for that, its last line is judged.
    assert read(Watch(record(options, dead_after=STEPS * BATCH)), *lines) == [(400, "dead")]


def test_each_finding_names_the_option_that_mends_it(options: Options) -> None:
    watch = Watch(record(options, lr=0.4))
    read(watch, *[{}] * 8, {"fvu": 1.5, "dead_percent": 50.0}, {"fvu": 1.5, "dead_percent": 50.0})
    texts = {finding.kind: finding.text for finding in watch.findings}
    assert texts == {
        "fvu": "layers.0: FVU 1.5 at step 90: the mean row alone would have 1: --lr 0.1 (now "
        "0.4), or --input-scale rms, or --max-norm-ratio 10",
        "rise": "layers.0: FVU rose from 0.2 at step 30 to 1.5 at step 100: --lr 0.1 (now 0.4), "
        "or --input-scale rms, or --max-norm-ratio 10",
        "dead": "layers.0: 50% of the latents are dead at step 100: a smaller --dead-after (now "
        "640 rows) or fewer latents, or --input-scale rms",
    }
    without = Watch(record(options, auxk_alpha=0.0))
    read(without, *[{"dead_percent": 50.0}] * 10)
    assert "--auxk-alpha above 0" in without.findings[0].text
    scaled = record(options)
    (entry,) = scaled.saes
    scaled = dataclasses.replace(scaled, saes=(dataclasses.replace(entry, scales=(2.0,)),))
    watch = Watch(scaled)
    read(watch, *[{"fvu": 2.0}] * 3)
    assert "--input-scale" not in watch.findings[0].text


def test_no_finding_names_an_option_that_the_run_refuses(options: Options) -> None:
    for changes, refused in (
        ({"finetune": "other"}, "--input-scale"),
        ({"follow": True}, "--max-norm-ratio"),
    ):
        watch = Watch(record(options, **changes))
        read(watch, *[{"fvu": 2.0, "dead_percent": 50.0}] * 40)
        assert {finding.kind for finding in watch.findings} == {"fvu", "dead"}
        assert not any(refused in finding.text for finding in watch.findings)


def test_the_start_shows_a_run_that_is_too_short(options: Options) -> None:
    (found,) = findings_at_start(record(options, steps=24, epochs=2), {})
    assert found == Finding("", "steps", 0, found.text)
    assert found.text.startswith("the run has 24 steps, ")
    assert "--epochs 9, or a smaller --batch-size" in found.text  # 12 steps an epoch
    (found,) = findings_at_start(record(options, steps=99, max_tokens=99 * BATCH), {})
    assert "--max-tokens 3200" in found.text
    assert findings_at_start(record(options, steps=100), {}) == []


def test_the_start_shows_a_rate_larger_than_the_numbers_of_the_rows(options: Options) -> None:
    rows = np.sign(np.random.RandomState(0).standard_normal((64, 16)))
    assert findings_at_start(record(options, lr=0.5), statistics(rows)) == []
    (found,) = findings_at_start(record(options, lr=0.5), statistics(0.01 * rows))
    assert (found.sae, found.kind) == ("layers.0", "lr")
    assert "the learning rate 0.5 is larger than 0.01, " in found.text
    assert found.text.endswith("--lr 0.0001, or --input-scale rms")
    scaled = record(options, lr=0.5)
    (entry,) = scaled.saes
    scaled = dataclasses.replace(scaled, saes=(dataclasses.replace(entry, scales=(100.0,)),))
    assert findings_at_start(scaled, statistics(0.01 * rows)) == []


@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_the_start_shows_rows_that_are_all_equal(options: Options, scale: float) -> None:
    row = scale * np.random.RandomState(0).standard_normal((1, 16))
    (found,) = findings_at_start(record(options, lr=1e-9), statistics(row.repeat(5000, 0)))
    assert (found.kind, found.sae) == ("equal_rows", "")
    assert "all rows of layers.0 are equal up to rounding" in found.text
    varied = row + 1e-4 * scale * np.random.RandomState(1).standard_normal((5000, 16))
    assert findings_at_start(record(options, lr=1e-9), statistics(varied)) == []


def test_many_findings_are_counted(options: Options) -> None:
    found = [Finding(f"layers.{i}", "fvu", 10, f"layers.{i} is bad") for i in range(40)]
    lines = as_lines(found)
    assert lines == [
        *(f"layers.{i} is bad" for i in range(FEW)),
        "32 more: --json lists all of them at the end",
    ]
    assert as_lines(found[:FEW]) == lines[:FEW]


def test_each_kind_of_finding_is_among_those_of_many_saes() -> None:
    found = [Finding(f"layers.{i}", "lr", 0, f"layers.{i}: rate") for i in range(40)]
    found += [Finding("layers.7", "fvu", 10, "layers.7: FVU"), Finding("a", "dead", 20, "a: dead")]
    lines = as_lines(found)
    assert lines[:6] == [f"layers.{i}: rate" for i in range(6)]
    assert lines[6:] == [
        "layers.7: FVU",
        "a: dead",
        "34 more: --json lists all of them at the end",
    ]


def diverging(options: Options, **changes: Any) -> FitConfig:
    """Train two SAEs at two rates, one of which is far too large."""
    fast = {"lr_warmup_steps": 0, "epochs": 2, "log_every": 4, "auxk_alpha": 0.0, "dead_after": 32}
    return vary(
        options(optimizer="adam", hookpoint=("layers.0",), **fast | changes), lr=(3.0, 0.01)
    )


def test_a_run_says_what_goes_wrong_at_once_and_returns_it_at_the_end(
    options: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    config = diverging(options, resume=True)
    summary = fit(config)
    printed = [line for line in capsys.readouterr().err.splitlines() if "warning: " in line]
    assert printed == [f"warning: {finding.text}" for finding in summary.findings]
    kinds = [(finding.sae, finding.kind) for finding in summary.findings]
    assert kinds[:2] == [("", "steps"), ("layers.0/lr3", "lr")]
    assert ("layers.0/lr3", "fvu") in kinds
    assert all(name in ("", "layers.0/lr3") for name, _ in kinds)
    assert fit(config).findings == summary.findings  # no step is left
    assert capsys.readouterr().err == ""


def test_a_resumed_run_ends_with_the_findings_of_an_uninterrupted_one(
    options: Options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = fit(diverging(options))
    config = diverging(options, out=options().out + "-again")
    real = Checkpointer.save

    def kill(self: Checkpointer, done: int, position: dict[str, int]) -> None:
        real(self, done, position)
        if done == 12:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Checkpointer, "save", kill)
        with pytest.raises(Killed):
            fit(config)
    capsys.readouterr()
    resumed = fit(dataclasses.replace(config, resume=True))
    assert resumed.findings == whole.findings
    # What the first call has printed of its lines is not printed again.
    printed = capsys.readouterr().err
    early = [f for f in whole.findings if 0 < f.step <= 12]
    assert early
    assert not any(finding.text in printed for finding in early)
    files = [(Path(c.out) / METRICS).read_bytes() for c in (diverging(options), config)]
    assert files[0] == files[1]
