"""Resolution of options and a cache into a run record."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actcache.cache.reader import Cache
from actcache.core.json_codec import to_json
from actcache.errors import ConfigError, FormatError, HookpointError
from actcache.stream.order import POOL_ROWS
from saetrain.config.fit_config import DEFAULTS, FitConfig
from saetrain.launch.resolve import assign_hookpoints, default_dead_after
from saetrain.launch.run import fit
from saetrain.optim import default_lr
from saetrain.runs.record import RUN, read_run

Options = Callable[..., FitConfig]
Snapshot = Callable[[Path], dict[str, bytes]]


def only_changed(old: dict[str, bytes], new: dict[str, bytes]) -> list[str]:
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def test_patterns_select_hookpoints_once_in_the_order_of_the_cache(options: Options) -> None:
    config = options(hookpoint=("layers.1", "*", "layers.*"))
    fit(config)
    assert [entry.hookpoint for entry in read_run(Path(config.out)).saes] == [
        "layers.0",
        "layers.1",
    ]


def test_dead_after_is_a_small_part_of_the_run_between_four_batches_and_ten_million_rows(
    options: Options,
) -> None:
    def of(steps: int, version: int = 2) -> int:
        return default_dead_after(DEFAULTS[version], 2048, steps, min(steps, 137))

    assert [of(steps) for steps in (3, 20, 137, 548)] == [3 * 2048, 8192, 8768, 35072]
    assert of(10**6) == 10_000_000
    assert [of(steps, 1) for steps in (3, 137, 548)] == [3 * 2048, 137 * 2048, 137 * 2048]
    assert fit(options(dead_after=None)).dead_after == 4 * 32
    old = options(dead_after=None, defaults=1, epochs=2, out=options().out + "-old")
    assert fit(old).dead_after == 12 * 32
    assert fit(options(dead_after=7, out=options().out + "-given")).dead_after == 7


def test_a_threshold_without_a_logarithm_is_refused(options: Options) -> None:
    zero = options(activation="jumprelu", threshold=0.0)
    with pytest.raises(ConfigError, match="--threshold 0 has no logarithm"):
        fit(zero)
    assert not Path(zero.out).exists()
    fit(dataclasses.replace(zero, defaults=1))


def test_default_learning_rates_depend_on_the_width_of_each_sae_and_the_steps(
    make_cache: Callable[..., Path], options: Options
) -> None:
    path = make_cache(hookpoints={"layers.0": 16, "layers.1": 8})
    for optimizer in ("signum", "adam"):
        config = options(
            cache=str(path),
            lr=None,
            num_latents=None,
            expansion_factor=4,
            optimizer=optimizer,
            max_tokens=64,
            out=options().out + optimizer,
        )
        fit(config)
        for entry, width in zip(read_run(Path(config.out)).saes, (16, 8), strict=True):
            assert entry.config.num_latents == 4 * width
            assert entry.lr == default_lr(optimizer, 4 * width, width, 2, rows=32)  # type: ignore[arg-type]


def test_accumulated_batches_are_one_update_to_the_default_learning_rate(options: Options) -> None:
    config = options(lr=None, optimizer="muon", grad_acc_steps=3)
    fit(config)
    for entry in read_run(Path(config.out)).saes:
        assert entry.lr == default_lr("muon", 48, 16, 4, rows=96)
    old = dataclasses.replace(config, defaults=1, out=config.out + "-old")
    fit(old)
    assert {entry.lr for entry in read_run(Path(old.out)).saes} == {2e-3}


def test_max_tokens_overrides_epochs(options: Options) -> None:
    assert fit(options(max_tokens=32 * 15 + 31, epochs=9)).steps == 15
    assert fit(options(epochs=2, out=options().out + "-two")).steps == 24


def test_the_size_of_the_buffer_changes_the_order(options: Options, snapshot: Snapshot) -> None:
    one, two = options(out=options().out + "1"), options(pool_rows=64)
    fit(one)
    fit(two)
    assert read_run(Path(one.out)).pool_rows == POOL_ROWS
    assert read_run(Path(two.out)).plan.window == 2
    assert "metrics.jsonl" in only_changed(snapshot(Path(one.out)), snapshot(Path(two.out)))


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 11},
        {"saes": lambda saes: saes[:1]},
        {"saes": lambda saes: saes[::-1]},
        {"saes": lambda saes: [saes[0] | {"lr": 0.03}, saes[1]]},
        {"saes": lambda saes: [saes[0] | {"seed": 1}, saes[1]]},
        {"saes": lambda saes: [saes[0] | {"setting": "k3"}, saes[1]]},
        {"saes": lambda saes: [saes[0] | {"options": saes[0]["options"] | {"k": 4}}, saes[1]]},
        {"saes": lambda saes: [saes[0] | {"config": saes[0]["config"] | {"k": 4}}, saes[1]]},
    ],
    ids=range(8),
)
def test_a_sealed_record_that_contradicts_its_own_options_is_refused_on_resume(
    options: Callable[..., FitConfig], change: dict[str, Any]
) -> None:
    config = options(resume=True)
    fit(config)
    path = Path(config.out) / RUN
    run = json.loads(path.read_text())
    changed = {k: value(run[k]) if callable(value) else value for k, value in change.items()}
    path.write_bytes(to_json(run | changed, sealed=True))
    with pytest.raises(FormatError, match="contradicts its own options"):
        fit(config)


def test_a_hookpoint_may_have_the_name_of_another_library(
    make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    cache = Cache.open(make_cache())

    def chosen(*names: str) -> list[str]:
        config = FitConfig(str(cache.root), out=str(tmp_path), hookpoint=names)
        return [roles.name for roles in assign_hookpoints(config, cache)]

    assert chosen("blocks.1.hook_resid_post") == ["layers.1"]
    assert chosen("transformer.h.1", "blocks.*.hook_resid_post") == ["layers.0", "layers.1"]
    with pytest.raises(HookpointError, match=r"(?s)'blocks\.2\.hook_resid_post'.*layers\.0 \| lay"):
        chosen("blocks.2.hook_resid_post")
