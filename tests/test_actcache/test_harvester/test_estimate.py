from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actcache.cache.reader import Cache
from actcache.config import HarvestConfig, PlanConfig
from actcache.errors import ConfigError
from actcache.harvester import estimate, resolve
from actcache.harvester.estimate import HarvestEstimate, estimate_harvest
from actcache.harvester.run import harvest

pytestmark = pytest.mark.usefixtures("warm_model")

Options = Callable[..., HarvestConfig]


def planned(config: HarvestConfig, **more: Any) -> HarvestEstimate:
    names = [field.name for field in dataclasses.fields(HarvestConfig)]
    return estimate_harvest(PlanConfig(**{name: getattr(config, name) for name in names} | more))


def on_disk(root: str | Path) -> int:
    files = [p for p in Path(root).rglob("*") if p.is_file() and "logs" not in p.parts]
    return sum(path.stat().st_size for path in files)


STORAGES = [
    {},
    {"dtype": "bfloat16"},
    {"dtype": "int8"},
    {"backend": "zarr"},
    {"backend": "zarr", "dtype": "float8_e4m3"},
    {"shard_size": 3},
]
TEXTS: list[dict[str, Any]] = [
    {"max_tokens": 16 * 10},
    {"max_tokens": None},
    {"pipeline": "truncate", "max_tokens": None, "ctx_len": 48},
    {"exclude_special": True, "exclude_tokens": ("7", "12"), "skip_positions": 3},
]


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("text", TEXTS)
def test_the_estimate_equals_the_bytes_and_rows_of_the_harvest(
    storage: dict[str, Any], text: dict[str, Any], options: Options
) -> None:
    config = options(**(text | storage))
    plan = planned(config)
    cache = Cache.open(harvest(config).cache)
    assert (plan.rows, plan.rows_known) == (cache.rows, "exact")
    assert plan.sequences == sum(receipt.sequences for receipt in cache.receipts.values())
    assert plan.tokens == plan.sequences * config.ctx_len
    assert plan.shards == len(cache.shards)
    for name in plan.dropped:
        assert plan.dropped[name] == sum(r.dropped[name] for r in cache.receipts.values())
    for name, size in plan.hookpoints.items():
        files = [
            f for r in cache.receipts.values() for key, f in r.files.items() if key.endswith(name)
        ]
        assert size == sum(file.bytes for file in files)
    total = on_disk(cache.root)
    assert abs(plan.bytes - total) <= 0.01 * total
    written = [p for p in cache.root.rglob("*") if p.is_file() and "logs" not in p.parts]
    assert plan.files == len(written)


def test_nothing_is_written_and_no_weights_are_loaded(
    options: Options, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def refuse(_: object) -> None:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(resolve, "load_model", refuse)
    monkeypatch.setattr(estimate, "load_model", refuse)
    before = sorted(tmp_path.rglob("*"))
    plan = planned(options())
    assert sorted(tmp_path.rglob("*")) == before
    assert plan.dtype == "float32"
    assert plan.trial is None
    assert plan.seconds is None


def test_memory_counts_weights_and_row_buffers(options: Options) -> None:
    plan = planned(options())
    from actcache.model.loading import load_model

    model = load_model(options())
    assert plan.memory.weights == sum(p.numel() * 4 for p in model.parameters())
    row = (32 + 32) * 4
    assert plan.memory.shards == 4 * 15 * (
        2 * row + 2 * 32 * 4
    )  # two hookpoints are permuted at once
    assert plan.memory.libraries > 100e6  # Python, torch and transformers
    assert plan.memory.total == sum(dataclasses.astuple(plan.memory))
    halved = planned(options(model_dtype="bfloat16"))
    assert halved.memory.weights * 2 == plan.memory.weights


def test_free_disk_space_is_compared_with_the_bytes(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(options())
    assert plan.fits
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=plan.bytes - 1))
    full = planned(options())
    assert (full.fits, full.free) == (False, plan.bytes - 1)


def test_a_text_too_long_to_count_is_estimated_from_its_beginning(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = options(max_tokens=16 * 80, exclude_tokens=("7", "12"))
    exact = planned(config)
    monkeypatch.setattr(estimate, "COUNTED_TOKENS", 16 * 40)
    estimated = planned(config)
    assert estimated.rows_known == "estimated"
    assert estimated.rows == pytest.approx(exact.rows, rel=0.1)
    assert estimated.bytes == pytest.approx(exact.bytes, rel=0.1)


def test_norm_filter_and_compression_give_upper_bounds_with_a_warning(options: Options) -> None:
    plan = planned(options(max_norm_ratio=1.1))
    assert plan.rows_known == "at most"
    assert "--max-norm-ratio" in plan.warnings[0]
    plan = planned(options(backend="zarr", compress="zstd"))
    assert "compression" in plan.warnings[0]


def test_a_trial_measures_speed_memory_compression_and_norm_filter_and_deletes_its_files(
    options: Options, tmp_path: Path
) -> None:
    config = options(max_norm_ratio=1.2, backend="zarr", compress="zstd", dtype="bfloat16")
    before = sorted(tmp_path.rglob("*"))
    plan = planned(config, measure=True, measure_seconds=60.0)  # longer than the text lasts
    assert sorted(tmp_path.rglob("*")) == before
    assert plan.trial is not None
    assert plan.seconds is not None
    assert plan.warnings == ()
    assert plan.trial.tokens == plan.tokens
    assert plan.trial.tokens_per_second > 0
    assert plan.trial.peak_memory > 1e8
    assert 0 < plan.trial.compression < 1.2  # headers count in small shards
    assert 0 < plan.trial.norm_share < 0.5
    assert plan.rows_known == "estimated"
    cache = Cache.open(harvest(config).cache)
    assert plan.rows == pytest.approx(cache.rows, rel=0.1)


def test_a_trial_ends_when_its_time_is_over(options: Options) -> None:
    plan = planned(options(max_tokens=None), measure=True, measure_seconds=1e-9)
    assert plan.trial is not None
    assert plan.trial.tokens < plan.tokens
    assert plan.seconds is not None
    assert plan.seconds > plan.trial.seconds / 2


def test_the_estimate_raises_the_errors_of_the_harvest(options: Options, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--ctx-len is longer"):
        planned(options(ctx_len=65, max_tokens=None))
    big = tmp_path / "big.bin"
    np.zeros(16 * 8, dtype="<u2").tofile(big)
    plan = planned(options(dataset=str(big), max_tokens=None))
    assert plan.sequences == 8


def test_an_estimate_serialises_to_json(options: Options) -> None:
    decoded = json.loads(json.dumps(dataclasses.asdict(planned(options()))))
    assert decoded["hookpoints"].keys() == {"layers.0", "layers.1.mlp:in"}


def test_the_estimate_for_a_stream_is_an_upper_bound(options: Options) -> None:
    config = options(streaming=True, max_tokens=16 * 100_000)
    plan = planned(config)
    assert plan.rows_known == "at most"
    assert plan.rows > Cache.open(harvest(config).cache).rows
