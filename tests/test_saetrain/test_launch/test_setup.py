"""Initial values of SAEs, and the variance of the loss."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from actcache.cache.reader import Cache
from saetrain.config.fit_config import FitConfig
from saetrain.launch.run import fit
from saetrain.runs.record import read_run

Options = Callable[..., FitConfig]
Rows = NDArray[np.float32]


def test_b_dec_starts_at_the_mean_of_the_training_rows(
    make_cache: Callable[..., Path], options: Options
) -> None:
    def rows(hookpoint: str, shard: int, count: int, width: int) -> Rows:
        made = np.random.RandomState(shard).standard_normal((count, width)) + 10.0**shard
        return made.astype(np.float32)

    path = make_cache(rows=rows, hookpoints={"layers.0": 16})
    config = options(cache=str(path), lr=1e-30, max_tokens=32)
    fit(config)
    cache, record = Cache.open(path), read_run(Path(config.out))
    training = [cache.read("layers.0", shard).values for shard in record.training_shards]
    mean = np.concatenate(training).astype(np.float64).mean(axis=0)
    b_dec = load_file(Path(config.out) / "layers.0" / "sae.safetensors")["b_dec"]
    assert b_dec.numpy() == pytest.approx(mean, rel=1e-6)


def test_the_loss_of_a_run_divides_by_the_variance_of_its_training_rows(
    make_cache: Callable[..., Path], options: Options
) -> None:
    """Not by that of the batch, which is almost 0 for a cache of constant blocks."""
    path = make_cache(hookpoints={"layers.0": 16})
    config = options(cache=str(path), lr=1e-30, max_tokens=384, log_every=12, auxk_alpha=0.0)
    fvu = fit(config).saes["layers.0"]["fvu"]
    cache, record = Cache.open(path), read_run(Path(config.out))
    stored = [cache.read("layers.0", shard).values for shard in record.training_shards]
    x = np.concatenate(stored).astype(np.float64)
    from saetrain.formats.sparsify import load_sae

    sae = load_sae(Path(config.out) / "layers.0").double()
    with torch.no_grad():
        reconstruction = sae(torch.from_numpy(x)).reconstruction.numpy()
    expected = ((x - reconstruction) ** 2).sum() / ((x - x.mean(axis=0)) ** 2).sum()
    assert fvu == pytest.approx(expected, rel=1e-5)
