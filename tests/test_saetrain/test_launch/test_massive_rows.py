"""Runs with --max-norm-ratio: a few rows of 100 times the norm are left out while streaming."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import saetrain.training.step
from actcache.cache.reader import Cache
from actcache.core.json_codec import to_json
from actcache.errors import CacheMismatchError, ConfigError, FormatError, RunError
from saetrain.config.fit_config import FitConfig
from saetrain.evaluation import evaluate
from saetrain.launch.run import fit
from saetrain.runs.record import RUN, read_run, with_massive_rows

Options = Callable[..., FitConfig]
Snapshot = Callable[[Path], dict[str, bytes]]

PLANTED = {0: [60], 1: [3, 77], 2: [], 3: [127, 128]}
"""Rows of layers.1 of 100 times the norm, by shard."""


def rows(hookpoint: str, shard: int, count: int, width: int, factor: float = 100) -> Any:
    made = np.random.RandomState([shard, len(hookpoint)]).standard_normal((count, width))
    if hookpoint == "layers.1":
        made[PLANTED[shard]] *= factor
    return made.astype(np.float32)


@pytest.fixture(scope="module")
def path(make_cache: Callable[..., Path]) -> Path:
    """4 shards of 192 rows at layers.0 and layers.1; at layers.1 five rows are massive."""
    return make_cache(rows=rows, sequences=12, row_order="sequence")


@pytest.fixture
def run(options: Options, path: Path) -> Options:
    return lambda **changes: options(**{"cache": str(path), "max_norm_ratio": 10.0} | changes)


def expected_rows(config: FitConfig) -> dict[int, list[int]]:
    shards = read_run(Path(config.out)).training_shards
    return {shard: PLANTED[shard] for shard in shards if PLANTED[shard]}


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The batches of layers.1 that a run trains on."""
    found, real = [], saetrain.training.step.train_step

    def step(trainer: Any, x: Any, number: int) -> None:
        if trainer.entry.hookpoint == "layers.1":
            found.append(x.clone())
        real(trainer, x, number)

    monkeypatch.setattr(saetrain.training.step, "train_step", step)
    return found


def test_no_batch_holds_a_row_above_the_limit(run: Options, seen: list[Any]) -> None:
    config = run(epochs=2)
    summary = fit(config)
    record = with_massive_rows(read_run(Path(config.out)), Cache.open(config.cache))
    left_out = {shard: found.tolist() for shard, found in record.plan.left_out.items()}
    assert left_out == expected_rows(config)
    assert record.plan.rows == 3 * 192 - sum(map(len, left_out.values()))
    assert summary.steps == len(seen) == 2 * record.plan.steps_per_epoch
    assert max(float(x.norm(dim=1).max()) for x in seen) < record.norm_limits["layers.1"] < 100
    seen.clear()
    fit(run(max_norm_ratio=0.0, out=config.out + "-all"))
    assert max(float(x.norm(dim=1).max()) for x in seen) > 100


def test_mean_variance_and_scale_are_those_of_the_kept_rows(run: Options) -> None:
    config = run(input_scale="rms", val_every=4)
    fit(config)
    root = Path(config.out)
    cache, record = Cache.open(config.cache), read_run(root)
    kept = [
        np.delete(
            cache.row_dtype.to_float32(cache.read("layers.1", s)).astype(float), PLANTED[s], 0
        )
        for s in record.training_shards
    ]
    x = np.concatenate(kept)
    found = with_massive_rows(record, cache).statistics(cache, "layers.1")
    np.testing.assert_allclose(found.mean, x.mean(axis=0), atol=1e-6)
    scale = 4 / np.sqrt((x**2).sum(axis=1).mean())
    assert record.saes[1].scales == (pytest.approx(scale, rel=1e-6),)
    lines = [json.loads(line) for line in (root / "metrics.jsonl").read_text().splitlines()]
    fvus = [line["val"]["layers.1"]["fvu"] for line in lines if "val" in line]
    assert all(0 < fvu < 3 for fvu in fvus)


def test_the_run_says_how_many_rows_it_leaves_out_where_and_of_what_share(
    run: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    config = run()
    fit(config)
    told = [line for line in capsys.readouterr().err.splitlines() if "max-norm-ratio" in line]
    count = sum(map(len, expected_rows(config).values()))
    (line,) = told  # and no warning of sinks
    assert line.startswith(f"fit: --max-norm-ratio leaves {count} of 576 rows out (")
    assert line.endswith("% of the variance of layers.1")


class Killed(BaseException):
    """Stands in for a signal: no handler may catch it."""


@pytest.mark.parametrize("stop_at", [1, 5, 12])
def test_a_killed_run_ends_in_the_same_bytes(
    run: Options, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch, stop_at: int
) -> None:
    whole, hit = (
        run(out=run().out + name, save_every=2, val_every=3) for name in ("-whole", "-hit")
    )
    fit(whole)
    real = saetrain.training.step.train_step

    def step(trainer: Any, x: Any, number: int) -> None:
        if number == stop_at:
            raise Killed
        real(trainer, x, number)

    with monkeypatch.context() as patch:
        patch.setattr(saetrain.training.step, "train_step", step)
        with pytest.raises(Killed):
            fit(hit)
    fit(dataclasses.replace(hit, resume=True))
    assert snapshot(Path(whole.out)) == snapshot(Path(hit.out))


def test_run_json_records_limits_and_digest_only_with_the_option(run: Options) -> None:
    with_option, without = run(), run(max_norm_ratio=None, out=run().out + "-none")
    for config in (with_option, without):
        fit(config)
    obj = json.loads((Path(with_option.out) / RUN).read_text())
    assert obj["norm_limits"].keys() == {"layers.0", "layers.1"}
    assert len(obj["left_out_digest"]) == 32
    assert "left_out" not in obj["plan"]
    obj = json.loads((Path(without.out) / RUN).read_text())
    assert not {"norm_limits", "left_out_digest"} & obj.keys()


def rewritten(config: FitConfig, **changes: Any) -> FitConfig:
    """Write other values into run.json; return the options that resume the run."""
    file = Path(config.out) / RUN
    file.write_bytes(to_json(dataclasses.replace(read_run(file.parent), **changes), sealed=True))
    return dataclasses.replace(config, resume=True)


def test_other_rows_than_those_of_the_start_are_refused_on_resume(run: Options) -> None:
    config = run()
    fit(config)
    record = read_run(Path(config.out))
    limits = record.norm_limits | {"layers.1": 1e6}
    for changes, error, said in (
        (
            {"norm_limits": limits},
            CacheMismatchError,
            r"(?s)not those of this run.*left_out_digest",
        ),
        ({"left_out_digest": "0" * 32}, CacheMismatchError, "not those of this run"),
        ({"norm_limits": {"layers.7": 3.0}}, FormatError, "norm_limits"),
        ({"norm_limits": {"layers.1": -3.0}}, FormatError, "norm limit of layers.1"),
    ):
        try:
            changed = rewritten(config, **changes)
        except FormatError as refused:  # the record itself refuses it
            assert "norm limit of layers.1" in str(refused)  # noqa: PT017
            continue
        with pytest.raises(error, match=said):
            fit(changed)
        with pytest.raises(error, match=said):
            evaluate(config.out)
        rewritten(config, **{name: getattr(record, name) for name in changes})
    with pytest.raises(RunError, match=r"--max-norm-ratio: 10\.0 then, 12\.0 now"):
        fit(dataclasses.replace(config, resume=True, max_norm_ratio=12.0))


def test_an_evaluation_leaves_out_the_rows_that_the_run_left_out(run: Options) -> None:
    config = run()
    fit(config)
    (shard,) = read_run(Path(config.out)).held_out
    gone = len(PLANTED[shard])
    assert gone
    found = evaluate(config.out)
    assert (found.rows, found.rows_left_out, found.sinks) == (192 - gone, gone, ())
    written = json.loads((Path(config.out) / "eval.json").read_text())
    assert written["rows_left_out"] == gone
    every = evaluate(config.out, max_norm_ratio=0)
    assert (every.rows, every.rows_left_out, len(every.sinks)) == (192, 0, 1)
    assert every.saes[0].fvu == pytest.approx(found.saes[0].fvu, rel=0.2)  # layers.0
    assert abs(every.saes[1].fvu - found.saes[1].fvu) > 0.01  # of other rows
    again = evaluate(config.out, max_norm_ratio=10)
    assert dataclasses.replace(again, saes=found.saes) == found
    for one, other in zip(again.saes, found.saes, strict=True):
        assert one.fvu == other.fvu
    with pytest.raises(ConfigError, match=r"(?s)--max-norm-ratio is out of range.*0, or >= 2"):
        evaluate(config.out, max_norm_ratio=1.5)


def test_a_run_over_all_rows_may_be_evaluated_without_the_massive_ones(run: Options) -> None:
    config = run(max_norm_ratio=None)
    fit(config)
    found, every = evaluate(config.out, max_norm_ratio=10), evaluate(config.out)
    assert (found.rows_left_out, every.rows_left_out) == (every.rows - found.rows, 0)
    assert found.rows_left_out > 0


def test_a_ratio_that_would_leave_out_many_rows_is_refused(
    make_cache: Callable[..., Path], run: Options
) -> None:
    path = make_cache(
        rows=lambda *a: rows(*a[:1], 2, *a[2:]) * (1 + 4 * (np.arange(a[2]) % 20 == 0))[:, None]
    )
    config = run(cache=str(path), max_norm_ratio=2.0)
    with pytest.raises(ConfigError, match=r"(?s)more than a few rows.*at most 1%.*a larger ratio"):
        fit(config)
    assert not (Path(config.out) / RUN).exists()


def test_a_ratio_above_all_rows_leaves_none_out_and_trains_the_same_bytes(
    run: Options, snapshot: Snapshot, capsys: pytest.CaptureFixture[str]
) -> None:
    without, above = run(max_norm_ratio=0.0), run(max_norm_ratio=1e6, out=run().out + "-above")
    fit(without)
    capsys.readouterr()
    fit(above)
    assert "leaves none of 576 rows out" in capsys.readouterr().err
    assert snapshot(Path(without.out)) == snapshot(Path(above.out))


def test_following_a_harvest_is_refused(run: Options) -> None:
    with pytest.raises(ConfigError, match=r"--max-norm-ratio is not possible with --follow"):
        run(follow=True)
    assert run(follow=True, max_norm_ratio=0.0).follow
