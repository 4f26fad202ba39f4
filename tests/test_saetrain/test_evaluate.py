"""`saetrain.evaluate`: held-out figures against a computation by hand in float64."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

from actcache.errors import CacheMismatchError, FormatError, RunError
from actcache.order import split_shards
from actcache.reader import Cache
from saetrain.evaluate import EVALUATION, evaluate
from saetrain.fit import fit
from saetrain.run import read_run
from saetrain.tracking import METRICS

Float64 = NDArray[np.float64]


def rows_of(cache: Cache, hookpoint: str, shards: list[int]) -> Float64:
    stored = np.concatenate([cache.read(hookpoint, shard) for shard in shards])
    return cache.codec.to_float32(stored).astype(np.float64)  # [N, D]


def active(folder: Path, x: Float64, k: int) -> tuple[Float64, Float64]:
    """Latents and reconstruction of rows by the SAE in a folder. [N, M], [N, D]"""
    stored = load_file(folder / "sae.safetensors")
    weights = {name: array.astype(np.float64) for name, array in stored.items()}
    pre_acts = (x - weights["b_dec"]) @ weights["encoder.weight"].T + weights["encoder.bias"]
    kth = np.sort(pre_acts, axis=1)[:, -k][:, None]
    z = np.where(pre_acts >= kth, np.maximum(pre_acts, 0), 0)
    return z, z @ weights["W_dec"] + weights["b_dec"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_figure_equals_one_computed_by_hand(
    make_cache: Callable[..., Path], options: Callable[..., Any], dtype: str
) -> None:
    path = make_cache(dtype=dtype, shards=5, hookpoints={"layers.0": 16, "layers.1.mlp:in": 12})
    config = options(cache=str(path), val_fraction=0.5, k=5)
    summary = fit(config)
    evaluation = evaluate(Path(config.out))
    cache, record = Cache.open(path), read_run(Path(config.out))
    held_out = list(record.held_out)
    assert len(held_out) in (2, 3)
    assert evaluation.rows == 128 * len(held_out)
    assert (evaluation.cache_id, evaluation.dead_after) == (cache.manifest.cache_id, 64)
    assert evaluation.rows_per_second > 0
    assert [sae.hookpoint for sae in evaluation.saes] == ["layers.0", "layers.1.mlp:in"]
    for sae in evaluation.saes:
        x = rows_of(cache, sae.hookpoint, held_out)
        mean = rows_of(cache, sae.hookpoint, record.training_shards).mean(axis=0)
        z, reconstruction = active(Path(config.out) / sae.hookpoint, x, sae.k)
        fvu = ((x - reconstruction) ** 2).sum() / ((x - mean) ** 2).sum()
        assert sae.fvu == pytest.approx(fvu, rel=1e-5)
        assert sae.l0 == pytest.approx((z > 0).sum(axis=1).mean(), abs=1e-3)
        assert sae.fired_percent == pytest.approx(100 * (z > 0).any(axis=0).mean())
        assert sae.dead_percent == summary.saes[sae.hookpoint]["dead_percent"]
        assert (sae.num_latents, sae.k) == (48, 5)


def test_the_figures_are_written_beside_the_run(options: Callable[..., Any]) -> None:
    config = options()
    fit(config)
    root = Path(config.out)
    evaluation = evaluate(root)
    written = json.loads((root / EVALUATION).read_text())
    assert written["saes"][0]["fvu"] == evaluation.saes[0].fvu
    assert written["rows"] == evaluation.rows == 128
    assert evaluate(root) == evaluation


def test_a_line_that_a_kill_cut_off_does_not_stand_in_the_way(options: Callable[..., Any]) -> None:
    config = options()
    fit(config)
    root = Path(config.out)
    with (root / METRICS).open("a") as file:
        file.write('{"step": 16, "sa')
    assert evaluate(root).saes[0].fvu > 0


def test_the_cache_may_lie_elsewhere_and_be_no_other(
    make_cache: Callable[..., Path], options: Callable[..., Any], tmp_path: Path
) -> None:
    here = shutil.copytree(make_cache(), tmp_path / "here")
    config = options(cache=str(here))
    fit(config)
    there = here.rename(tmp_path / "there")
    assert evaluate(Path(config.out), str(there)).rows == 128
    with pytest.raises(CacheMismatchError):
        evaluate(Path(config.out), str(make_cache(seed=3)))
    receipt = there / "shards" / "00002.json"
    receipt.write_text(receipt.read_text().replace('"xxh3_128": "', '"xxh3_128": "f', 1))
    with pytest.raises(CacheMismatchError, match="have changed"):
        evaluate(Path(config.out), str(there))


def test_a_run_that_held_nothing_out_says_so(options: Callable[..., Any]) -> None:
    config = options(val_fraction=0.0)
    fit(config)
    with pytest.raises(RunError, match=r"held nothing out(.|\n)*--val-fraction"):
        evaluate(Path(config.out))


def test_a_run_that_is_not_there_or_not_trained_says_so(
    options: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="is not a run"):
        evaluate(tmp_path / "nowhere")
    config = options()
    fit(config)
    (Path(config.out) / METRICS).write_text("")
    with pytest.raises(RunError, match="has not been trained yet"):
        evaluate(Path(config.out))
    fit(options(out=str(tmp_path / "other")))
    shutil.rmtree(tmp_path / "other" / "layers.1")
    with pytest.raises(FormatError, match=r"layers\.1 holds no SAE"):
        evaluate(tmp_path / "other")


def test_held_out_rows_that_are_not_finite_are_refused_in_words(
    make_cache: Callable[..., Path], options: Callable[..., Any]
) -> None:
    """And are never trained on, or `fit` would fail."""
    _, held_out = split_shards(range(4), options().val_fraction, options().seed)

    def rows(hookpoint: str, shard: int, count: int, width: int) -> NDArray[np.float32]:
        made = np.random.RandomState(shard).standard_normal((count, width)).astype(np.float32)
        if shard in held_out:
            made[5, 3] = np.inf
        return made

    config = options(cache=str(make_cache(rows=rows)))
    fit(config)
    with pytest.raises(RunError, match=r"layers\.0 cannot be evaluated on"):
        evaluate(Path(config.out))
