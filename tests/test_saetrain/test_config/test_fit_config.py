"""Defaults of `FitConfig`."""

from __future__ import annotations

from saetrain.config.fit_config import FitConfig


def test_the_defaults_are_adam_with_auxk_and_topk_32() -> None:
    config = FitConfig("cache", "run")
    assert (config.optimizer, config.expansion_factor, config.k) == ("adam", 32, 32)
    assert config.auxk_alpha == 1 / 32
    assert config.lr is None
    assert config.dead_after is None
