"""Extreme numbers of options, through two real steps: a sentence or a finished run."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from actcache.errors import ActcacheError, ConfigError
from saetrain.config.fit_config import FitConfig
from saetrain.launch.run import fit

EXTREMES = (1e-320, 1e-30, 1e30, 1e308)


@pytest.fixture(scope="module")
def cache(make_cache: Callable[..., Path]) -> Path:
    return make_cache(shards=2, sequences=4, ctx_len=8, hookpoints={"layers.0": 4})


def trials() -> Iterator[dict[str, Any]]:
    for optimizer in ("signum", "adam", "adamw", "muon"):
        names = ["auxk_alpha"]
        names += ["grad_clip"] if optimizer != "signum" else []
        names += ["weight_decay"] if optimizer in ("adamw", "muon") else []
        for name, value in itertools.product(names, EXTREMES):
            yield {"optimizer": optimizer, name: value}
        for value in (1e-12, 1e6):
            yield {"optimizer": optimizer, "lr": value}
    for optimizer in ("adamw", "muon"):
        yield {"optimizer": optimizer, "lr": 1e6, "weight_decay": 1e6}
    for activation, name in [
        *itertools.product(("jumprelu", "relu", "gated"), ["sparsity"]),
        ("jumprelu", "threshold"),
        ("jumprelu", "bandwidth"),
    ]:
        for value in EXTREMES:
            yield {"activation": activation, name: value}


def run(cache: Path, out: Path, options: dict[str, Any]) -> bool:
    """Train two steps; return whether the run was refused or ended with one of our errors."""
    given: dict[str, Any] = {"num_latents": 16, "k": 2, "batch_size": 16, "max_tokens": 32}
    given |= {"val_fraction": 0.0, "device": "cpu", "log_every": 1, "dead_after": 1}
    try:
        fit(FitConfig(cache=str(cache), out=str(out), **given, **options))
    except ActcacheError:
        return True
    return False


def test_a_sample_of_extreme_numbers_ends_in_a_sentence_or_a_run(
    cache: Path, tmp_path: Path
) -> None:
    sample = list(trials())[::7]
    refused = [run(cache, tmp_path / str(i), options) for i, options in enumerate(sample)]
    assert len(refused) == 10
    assert 0 < sum(refused) < len(refused)


@pytest.mark.soak
def test_every_extreme_number_ends_in_a_sentence_or_a_run(cache: Path, tmp_path: Path) -> None:
    every = list(trials())
    refused = [run(cache, tmp_path / str(i), options) for i, options in enumerate(every)]
    assert len(refused) == 66
    assert 0 < sum(refused) < len(refused)


@pytest.mark.parametrize(
    ("optimizer", "name", "value"),
    [
        ("signum", "lr", 1e200),
        ("signum", "lr", 1e-200),
        ("muon", "lr", 1e308),
        ("adamw", "weight_decay", 1e308),
        ("muon", "weight_decay", 1e30),
    ],
)
def test_a_number_that_no_step_can_use_is_out_of_range(
    optimizer: Any, name: str, value: float
) -> None:
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} is out of range"):
        FitConfig("cache", "run", optimizer=optimizer, **{name: value})  # type: ignore[arg-type]
