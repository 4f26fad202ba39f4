"""The summary that a call of fit returns."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from actcache.cache.reader import Cache
from actcache.errors import CorruptShardError, FormatError
from actcache.stream.order import split_shards
from saetrain.config.fit_config import FitConfig
from saetrain.config.grid import vary
from saetrain.evaluation import evaluate
from saetrain.launch.run import fit
from saetrain.launch.summary import enough_shards
from saetrain.runs.record import read_run
from saetrain.tracking.jsonl import METRICS, TIMINGS

Options = Callable[..., FitConfig]


def test_a_finished_run_without_its_metrics_is_refused(options: Options) -> None:
    config = options(resume=True)
    fit(config)
    (Path(config.out) / METRICS).unlink()
    with pytest.raises(FormatError, match=r"metrics\.jsonl differs"):
        fit(config)


def test_an_incomplete_cache_gives_a_warning_with_the_numbers_of_shards(
    make_cache: Callable[..., Path], options: Options
) -> None:
    path = make_cache(shards=4)
    (path / "shards" / "END.json").unlink()
    (path / "shards" / "00003.json").unlink()
    config = options(cache=str(path))
    (warning,) = fit(config).warnings
    assert "is not complete: shards there 3, planned 4" in warning
    assert "--follow waits for more" in warning
    record = read_run(Path(config.out))
    assert sorted([*record.training_shards, *record.held_out]) == [0, 1, 2]
    assert record.steps == 2 * 128 // 32


def test_a_sealed_cache_that_lost_a_receipt_is_refused(
    make_cache: Callable[..., Path], options: Options
) -> None:
    path = make_cache(shards=4)
    (path / "shards" / "00002.json").unlink()
    config = options(cache=str(path))
    with pytest.raises(CorruptShardError, match=r"was complete(.|\n)*without \[2\], 1 in all"):
        fit(config)
    assert not Path(config.out).exists()


def test_a_summary_names_the_bottleneck_and_timings_the_speed(
    options: Options,
) -> None:
    config = options(resume=True)
    summary = fit(config)
    assert summary.limit is not None
    assert "of the time went into waiting for rows" in summary.limit
    assert summary.bytes_per_second == pytest.approx(summary.rows_per_second * 2 * 16 * 4)
    for text in (Path(config.out) / TIMINGS).read_text().splitlines():
        line = json.loads(text)
        assert 0 <= line["data_wait"] <= 1
        assert line["bytes_per_second"] == pytest.approx(line["rows_per_second"] * 2 * 16 * 4)
    assert fit(config).limit is None


def test_a_finished_run_whose_metrics_were_changed_is_refused(options: Options) -> None:
    config = options(resume=True)
    fit(config)
    path = Path(config.out) / METRICS
    path.write_text(path.read_text().replace("layers.1", "layers.2"))
    with pytest.raises(FormatError, match=r"metrics\.jsonl differs from the lines"):
        fit(config)


@pytest.mark.parametrize("optimizer", ["signum", "adam"])
def test_a_run_without_validations_measures_its_saved_saes_at_the_end(
    options: Options, optimizer: str
) -> None:
    config = vary(options(optimizer=optimizer, resume=True), k=(3, 4))
    summary = fit(config)
    assert summary.held_out.keys() == summary.saes.keys()
    for sae in evaluate(config.out).saes:
        assert sae.fvu == pytest.approx(summary.held_out[sae.name]["fvu"], rel=1e-6)
        assert sae.l0 == pytest.approx(summary.held_out[sae.name]["l0"], rel=1e-6)
    assert '"val"' not in (Path(config.out) / METRICS).read_text()
    assert fit(config).held_out == summary.held_out  # no step is left


def test_a_validation_of_an_earlier_step_is_not_the_end_of_a_run(options: Options) -> None:
    config = options(val_every=4)
    first = fit(config)
    longer = dataclasses.replace(
        config, epochs=config.epochs + 1, val_every=None, resume=True, force_config=True
    )
    summary = fit(longer)
    assert summary.steps > first.steps
    for sae in evaluate(config.out).saes:
        assert sae.fvu == pytest.approx(summary.held_out[sae.name]["fvu"], rel=1e-6)


def test_a_run_that_holds_nothing_out_has_no_held_out_figures(options: Options) -> None:
    summary = fit(options(val_fraction=0.0))
    assert summary.held_out == {}
    assert summary.warnings == ()


def test_held_out_rows_that_cannot_be_measured_do_not_end_a_finished_run(
    make_cache: Callable[..., Path], options: Options
) -> None:
    path = make_cache()
    (held_out,) = split_shards(range(4), options().val_fraction, options().seed)[1]
    (rows,) = Cache.open(path).files_of("layers.1", held_out).values()
    Path(rows).write_bytes(bytes(Path(rows).stat().st_size))
    config = options(cache=str(path))
    summary = fit(config)
    assert summary.held_out.keys() == {"layers.0"}
    (warning,) = summary.warnings
    assert warning.startswith("held-out FVU was not measured at layers.1: ")
    assert json.loads((Path(config.out) / "exit.json").read_text())["code"] == 0


@pytest.mark.parametrize(
    ("shards", "needed", "expected"),
    [
        ([], 100, []),
        ([4, 9], 1, [4, 9]),
        ([*range(20)], 800, [0, 2, 5, 7, 10, 12, 15, 17]),
        ([*range(20)], 1001, [0, 1, 3, 5, 7, 9, 10, 12, 14, 16, 18]),
        ([*range(20)], 10**6, [*range(20)]),
    ],
)
def test_shards_are_chosen_evenly(shards: list[int], needed: int, expected: list[int]) -> None:
    assert enough_shards(dict.fromkeys(shards, 100), needed) == expected
