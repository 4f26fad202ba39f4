"""Defaults of `FitConfig`."""

from __future__ import annotations

import pytest

from saetrain.config.fit_config import DEFAULTS, FitConfig, with_defaults
from saetrain.config.grid import vary


def test_the_defaults_are_adam_with_auxk_and_topk_32() -> None:
    config = FitConfig("cache", "run")
    assert (config.optimizer, config.expansion_factor, config.k) == ("adam", 32, 32)
    assert with_defaults(config, 1).auxk_alpha == 1 / 32
    assert config.lr is None
    assert config.dead_after is None


@pytest.mark.parametrize("version", DEFAULTS)
def test_defaults_fill_in_what_is_unset_in_every_sae(version: int) -> None:
    config = vary(FitConfig("cache", "run", input_scale="unit"), auxk_alpha=(0.5, None))
    filled = with_defaults(config, version)
    assert [sae.auxk_alpha for sae in filled.saes] == [0.5, DEFAULTS[version].auxk_alpha]
    assert [sae.input_scale for sae in filled.saes] == ["unit", "unit"]
    assert (filled.defaults, filled.auxk_alpha) == (version, 0.5)
    assert with_defaults(filled, 3 - version) == filled


def test_rows_of_pretrained_weights_are_not_scaled_by_default() -> None:
    config = FitConfig("cache", "run", finetune="u/r")
    assert with_defaults(config, max(DEFAULTS)).input_scale == "none"


def test_a_configuration_is_made_again_from_its_fields() -> None:
    config = vary(FitConfig("cache", "run", lr=0.1), k=(4, 8))
    assert config.sae == config.saes[0]
    assert FitConfig(**vars(config)) == config
