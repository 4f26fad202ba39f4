"""Defaults of `FitConfig`."""

from __future__ import annotations

from saetrain.config.fit_config import FitConfig
from saetrain.config.grid import vary


def test_the_defaults_are_adam_with_auxk_and_topk_32() -> None:
    config = FitConfig("cache", "run")
    assert (config.optimizer, config.expansion_factor, config.k) == ("adam", 32, 32)
    assert config.auxk_alpha == 1 / 32
    assert config.lr is None
    assert config.dead_after is None


def test_a_configuration_is_made_again_from_its_fields() -> None:
    config = vary(FitConfig("cache", "run", lr=0.1), k=(4, 8))
    assert config.sae == config.saes[0]
    assert FitConfig(**vars(config)) == config
