"""Initial b_dec and encoder scale."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import saetrain.training.init
import saetrain.training.step
from actcache.cache.reader import Cache
from actcache.errors import ConfigError, CorruptShardError
from actcache.stream.order import batch_rows
from saetrain.config.fit_config import FitConfig
from saetrain.launch.run import fit
from saetrain.model.losses import FVU_ONLY
from saetrain.model.sae import Sae
from saetrain.runs.record import read_run
from saetrain.training.init import geometric_median, search_encoder_scale

Options = Callable[..., FitConfig]
Snapshot = Callable[[Path], dict[str, bytes]]


class Killed(BaseException):
    """A simulated SIGKILL."""


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def first_rows(config: FitConfig, hookpoint: str, rows: int) -> torch.Tensor:
    """Read the rows of a run's first batches."""
    cache, plan = Cache.open(config.cache), read_run(Path(config.out)).plan
    batches = [batch_rows(plan, 0, step) for step in range(-(-rows // plan.batch_size))]
    addresses = np.concatenate(batches)[:rows].tolist()
    read = [cache.row_dtype.to_torch(cache.read(hookpoint, s, r, 1)) for s, r in addresses]
    return torch.cat(read).float()


def test_no_point_near_the_geometric_median_has_a_smaller_sum_of_distances() -> None:
    rows = normal(300, 5).exp()
    median = geometric_median(rows)

    def total(point: np.ndarray[Any, Any]) -> float:
        return float(np.linalg.norm(rows.double().numpy() - point, axis=1).sum())

    nearby = np.random.RandomState(0).normal(size=(50, 5)) * 1e-2
    assert all(total(median) < total(median + step) for step in nearby)
    assert total(median) < total(rows.double().numpy().mean(axis=0))


def test_outliers_hardly_move_the_geometric_median() -> None:
    rows = normal(500, 4)
    with_outliers = rows.clone()
    with_outliers[:5] = 1e6
    assert np.linalg.norm(geometric_median(with_outliers) - geometric_median(rows)) < 0.1


def test_the_geometric_median_of_equal_rows_is_that_row() -> None:
    assert geometric_median(torch.full((10, 3), 2.0)).tolist() == [2.0, 2.0, 2.0]


@pytest.mark.parametrize("times", [0.02, 1.0, 30.0])
def test_the_encoder_scale_is_the_least_squares_solution(times: float) -> None:
    """Without a bias TopK's reconstruction r grows with the scale, so the best is <x,r>/<r,r>."""
    sae, x = Sae(16, 64, 4), normal(400, 16)
    with torch.no_grad():
        sae.W_enc.mul_(times)
    before = sae.W_enc.detach().clone()
    found = search_encoder_scale(sae, x, 16.0, FVU_ONLY)
    assert torch.equal(sae.W_enc, before)
    r = sae(x).reconstruction.detach().double()
    best = float((x.double() * r).sum() / r.square().sum())
    assert abs(math.log2(found / best)) <= 1 / 64


def test_b_dec_starts_at_mean_median_or_zeros(options: Options) -> None:
    means = {}
    for init in ("mean", "geometric-median", "zeros"):
        config = options(b_dec_init=init, out=f"{options().out}-{init}", lr=1e-30, max_tokens=32)
        fit(config)
        b_dec = load_file(Path(config.out) / "layers.1" / "sae.safetensors")["b_dec"]
        means[init] = b_dec
    assert means["zeros"].abs().max() < 1e-29  # one step of lr 1e-30
    cache, record = Cache.open(config.cache), read_run(Path(config.out))
    mean = cache.statistics("layers.1", record.training_shards).mean
    torch.testing.assert_close(means["mean"], torch.from_numpy(mean).float())
    median = geometric_median(first_rows(config, "layers.1", 384))  # 2,048 rows, or the whole epoch
    torch.testing.assert_close(means["geometric-median"], torch.from_numpy(median).float())
    assert not torch.allclose(means["geometric-median"], means["mean"], rtol=1e-3)


def test_the_encoder_scale_is_recorded_and_lowers_the_first_fvu(options: Options) -> None:
    plain = options(max_tokens=32, log_every=1, lr=1e-30)
    found = dataclasses.replace(plain, encoder_scale="auto", out=plain.out + "-auto")
    before, after = fit(plain).saes, fit(found).saes
    for entry in read_run(Path(found.out)).saes:
        assert entry.encoder_scale not in (0.0, 1.0)
        assert after[entry.name]["fvu"] < before[entry.name]["fvu"]
    given = repr(read_run(Path(found.out)).saes[0].encoder_scale)
    same = dataclasses.replace(plain, encoder_scale=given, out=plain.out + "-given")
    assert fit(same).saes["layers.0"] == after["layers.0"]


@pytest.mark.parametrize("option", [{"encoder_scale": "auto"}, {"b_dec_init": "geometric-median"}])
def test_nothing_is_chosen_on_first_rows_that_differ_from_their_receipts(
    options: Options, make_cache: Callable[..., Path], option: dict[str, Any]
) -> None:
    config = options(cache=str(make_cache()), hookpoint=("layers.0",), val_fraction=0, **option)
    for path in (Path(config.cache) / "activations" / "layers.0").iterdir():
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    with pytest.raises(CorruptShardError, match="differs from the receipt"):
        fit(config)
    if option.keys() == {"encoder_scale"}:  # run.json would hold the scale
        assert not (Path(config.out) / "run.json").exists()


def test_a_run_killed_before_its_first_checkpoint_restarts_with_the_same_weights(
    options: Options, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"b_dec_init": "geometric-median", "encoder_scale": "auto", "input_scale": "unit"}
    whole, killed = options(**settings, out=options().out + "-whole"), options(**settings)
    fit(whole)
    real = saetrain.training.step.train_step

    def step(trainer: Any, rows: Any, number: int) -> None:
        if number == 2:
            raise Killed
        real(trainer, rows, number)

    with monkeypatch.context() as patch:
        patch.setattr(saetrain.training.step, "train_step", step)
        with pytest.raises(Killed):
            fit(killed)
    with monkeypatch.context() as patch:  # run.json holds the scale: no second search
        patch.setattr(saetrain.training.init, "search_encoder_scale", None)
        fit(dataclasses.replace(killed, resume=True))
    assert snapshot(Path(killed.out)) == snapshot(Path(whole.out))


def test_saes_of_a_grid_start_with_the_weights_of_single_runs(
    options: Options, snapshot: Snapshot
) -> None:
    from saetrain.config.grid import vary

    config = vary(options(), b_dec_init=("mean", "zeros"), encoder_scale=("auto", "0.5"))
    fit(config)
    alone = options(b_dec_init="zeros", encoder_scale="auto", out=options().out + "-alone")
    fit(alone)
    name = Path("layers.0", "b-dec-zeros-encoder-auto", "sae.safetensors")
    one = Path(alone.out, "layers.0", "sae.safetensors")
    assert Path(config.out, name).read_bytes() == one.read_bytes()
    assert Path(config.out, "layers.1", "b-dec-mean-encoder-0.5").is_dir()


@pytest.mark.parametrize("scale", ["0", "-1", "nan", "inf", "much"])
def test_an_invalid_encoder_scale_raises_an_error(options: Options, scale: str) -> None:
    with pytest.raises(ConfigError, match="--encoder-scale"):
        options(encoder_scale=scale)


def test_spellings_of_an_encoder_scale_are_normalised(options: Options) -> None:
    spelled = [options(encoder_scale=text).encoder_scale for text in ("1", "1.0", "1e0", ".5")]
    assert spelled == ["1", "1", "1", "0.5"]


def test_encoder_scale_auto_of_a_transcoder_raises_an_error(options: Options) -> None:
    with pytest.raises(ConfigError, match="decoder begins at 0"):
        options(transcode=True, encoder_scale="auto")
