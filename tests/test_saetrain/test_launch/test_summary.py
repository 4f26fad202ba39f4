"""The summary that a call of fit returns."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from actcache.errors import CorruptShardError, FormatError
from saetrain.config.fit_config import FitConfig
from saetrain.launch.run import fit
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
