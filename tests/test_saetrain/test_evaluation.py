"""Evaluation against a computation in NumPy float64."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file

import saetrain.training.checkpointing
import saetrain.training.step
from actcache.cache.reader import Cache
from actcache.core.json_codec import to_json
from actcache.errors import (
    CacheMismatchError,
    ConfigError,
    CorruptShardError,
    FormatError,
    RunError,
)
from actcache.stream.order import split_shards
from saetrain.evaluation import EVALUATION, evaluate
from saetrain.launch.run import fit
from saetrain.runs.record import read_run
from saetrain.tracking.jsonl import METRICS, TIMINGS

Float64 = NDArray[np.float64]


def rows_of(cache: Cache, hookpoint: str, shards: list[int]) -> Float64:
    stored = [cache.row_dtype.to_float32(cache.read(hookpoint, shard)) for shard in shards]
    return np.concatenate(stored).astype(np.float64)  # [N, D]


def active(folder: Path, x: Float64, k: int) -> tuple[Float64, Float64]:
    """Return latents and reconstruction of rows by the SAE in a folder. [N, M], [N, D]"""
    stored = load_file(folder / "sae.safetensors")
    weights = {name: array.astype(np.float64) for name, array in stored.items()}
    pre_acts = (x - weights["b_dec"]) @ weights["encoder.weight"].T + weights["encoder.bias"]
    kth = np.sort(pre_acts, axis=1)[:, -k][:, None]
    z = np.where(pre_acts >= kth, np.maximum(pre_acts, 0), 0)
    return z, z @ weights["W_dec"] + weights["b_dec"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_result_equals_a_computation_in_float64(
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


def test_the_results_are_written_to_eval_json(options: Callable[..., Any]) -> None:
    config = options()
    fit(config)
    root = Path(config.out)
    evaluation = evaluate(str(root))
    written = json.loads((root / EVALUATION).read_text())
    assert written["saes"][0]["fvu"] == evaluation.saes[0].fvu
    assert written["rows"] == evaluation.rows == 128
    assert evaluate(root) == evaluation


def test_an_incomplete_last_line_of_metrics_is_ignored(options: Callable[..., Any]) -> None:
    config = options()
    fit(config)
    root = Path(config.out)
    with (root / METRICS).open("a") as file:
        file.write('{"step": 16, "sa')
    assert evaluate(root).saes[0].fvu > 0


def test_the_cache_may_be_moved_but_not_replaced(
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
    text = receipt.read_text().replace('"xxh3_128": "', '"xxh3_128": "f', 1)
    receipt.write_bytes(to_json(json.loads(text), sealed=True))
    with pytest.raises(CacheMismatchError, match="have changed"):
        evaluate(Path(config.out), str(there))


def test_a_run_without_held_out_rows_raises_an_error(options: Callable[..., Any]) -> None:
    config = options(val_fraction=0.0)
    fit(config)
    with pytest.raises(RunError, match=r"held nothing out(.|\n)*--val-fraction"):
        evaluate(Path(config.out))


def test_a_missing_or_incomplete_run_raises_an_error(
    options: Callable[..., Any], tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="is not a run"):
        evaluate(tmp_path / "nowhere")
    config = options()
    fit(config)
    (Path(config.out) / METRICS).write_text("")
    with pytest.raises(FormatError, match=r"metrics\.jsonl differs"):
        evaluate(Path(config.out))
    fit(options(out=str(tmp_path / "other")))
    shutil.rmtree(tmp_path / "other" / "layers.1")
    with pytest.raises(RunError, match=r"layers\.1/cfg\.json is not that of the last"):
        evaluate(tmp_path / "other")


def stop(monkeypatch: pytest.MonkeyPatch, config: Any, at: int) -> None:
    """Run until step `at` (from 0) and raise KeyboardInterrupt in it."""
    real = saetrain.training.step.train_step

    def step(trainer: Any, rows: Any, number: int) -> None:
        if number == at:
            raise KeyboardInterrupt
        real(trainer, rows, number)

    with monkeypatch.context() as patch:
        patch.setattr(saetrain.training.step, "train_step", step)
        with pytest.raises(KeyboardInterrupt):
            fit(config)


def test_an_unfinished_run_is_evaluated_at_the_step_of_its_last_checkpoint(
    options: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = options(save_every=6, log_every=2, dead_after=32)
    stop(monkeypatch, config, 10)
    root = Path(config.out)
    lines = [json.loads(line) for line in (root / METRICS).read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6, 8, 10]
    dead = [line["saes"]["layers.0"]["dead_percent"] for line in lines]
    assert dead[2] not in dead[3:]
    evaluation = evaluate(root)
    assert (evaluation.step, evaluation.steps) == (6, 12)
    assert evaluation.saes[0].dead_percent == dead[2]
    written = json.loads((root / EVALUATION).read_text())
    assert (written["step"], written["steps"]) == (6, 12)
    fit(dataclasses.replace(config, resume=True))
    assert evaluate(root).step == 12


def test_values_not_logged_before_the_checkpoint_are_none(
    options: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = options(save_every=3, log_every=4)
    stop(monkeypatch, config, 5)
    evaluation = evaluate(Path(config.out))
    assert evaluation.step == 3
    assert evaluation.rows_per_second is None
    assert [sae.dead_percent for sae in evaluation.saes] == [None, None]


def test_a_run_killed_before_its_first_checkpoint_raises_an_error(
    options: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = options(save_every=6)
    stop(monkeypatch, config, 5)
    with pytest.raises(RunError, match=r"nothing has been saved yet(.|\n)*--resume"):
        evaluate(Path(config.out))


def test_a_run_killed_while_saving_is_not_evaluated_as_a_mixture_of_steps(
    options: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, real = options(save_every=3), saetrain.training.checkpointing.export_sae

    def save(folder: Path, *arguments: Any) -> Any:
        if saved and folder.name == "layers.1":
            raise KeyboardInterrupt
        if folder.name == "layers.1":
            saved.append(folder)
        return real(folder, *arguments)

    saved: list[Path] = []
    with monkeypatch.context() as patch:
        patch.setattr(saetrain.training.checkpointing, "export_sae", save)
        with pytest.raises(KeyboardInterrupt):
            fit(config)
    with pytest.raises(RunError, match=r"layers\.0/.* is not that of the last(.|\n)*--resume"):
        evaluate(Path(config.out))
    fit(dataclasses.replace(config, resume=True))
    assert evaluate(Path(config.out)).step == 12


def test_an_sae_of_other_sizes_than_recorded_raises_an_error(
    options: Callable[..., Any], tmp_path: Path
) -> None:
    config, other = options(), options(k=4, out=str(tmp_path / "other"))
    fit(config)
    fit(other)
    root = Path(config.out)
    shutil.rmtree(root / "layers.1")
    shutil.copytree(tmp_path / "other" / "layers.1", root / "layers.1")
    with pytest.raises(RunError, match=r"layers\.1/cfg\.json is not that of the last"):
        evaluate(root)


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        (METRICS, "layers.1", "layers.2"),
        (METRICS, '"saes"', '"others"'),
        (METRICS, '"l0"', '"l1"'),
        (METRICS, '"dead_percent"', '"dead"'),
        (METRICS, '"fvu": ', '"fvu": 1e999, "was": '),
        (METRICS, '"fvu": ', '"fvu": NaN, "was": '),
        (TIMINGS, '"mean_rows_per_second"', '"mean"'),
        (TIMINGS, '"mean_rows_per_second": ', '"mean_rows_per_second": null, "was": '),
    ],
)
def test_lines_without_a_metric_raise_an_error_that_names_the_file(
    options: Callable[..., Any], name: str, old: str, new: str
) -> None:
    config = options()
    fit(config)
    path = Path(config.out) / name
    path.write_text(path.read_text().replace(old, new))
    with pytest.raises(FormatError, match=name):
        evaluate(Path(config.out))


def test_it_runs_on_the_given_device(options: Callable[..., Any]) -> None:
    config = options()
    fit(config)
    assert evaluate(Path(config.out), device="cpu") == evaluate(Path(config.out))
    with pytest.raises(ConfigError, match="--device"):
        evaluate(Path(config.out), device="nonsense")


def test_held_out_rows_that_are_not_finite_raise_an_error(
    make_cache: Callable[..., Path], options: Callable[..., Any]
) -> None:
    """`fit` succeeds, because it never trains on them."""
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


def flip(path: Path, at: int = -5) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("backend", ["memmap", "zarr"])
def test_held_out_rows_and_statistics_that_differ_from_their_receipts_are_refused(
    make_cache: Callable[..., Path], options: Callable[..., Any], backend: str
) -> None:
    config = options(cache=str(make_cache(backend=backend)), hookpoint=("layers.0",))
    fit(config)
    evaluation = evaluate(config.out)
    cache, (held_out,) = Cache.open(config.cache), read_run(Path(config.out)).held_out
    (rows,) = cache.files_of("layers.0", held_out).values()
    assert isinstance(rows, Path)
    for path in (rows, Path(config.cache) / "stats" / f"{held_out:05d}.safetensors"):
        flip(path)
        with pytest.raises(CorruptShardError, match=path.name):
            evaluate(config.out)
        flip(path)
    assert evaluate(config.out).saes == evaluation.saes
