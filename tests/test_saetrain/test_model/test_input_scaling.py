"""Input scales folded into the saved weights. Letters: D d_in, M num_latents, K k."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.func import functional_call

from actcache.cache.reader import Cache
from saetrain.config.fit_config import FitConfig
from saetrain.config.sae import SaeConfig, SaeEntry
from saetrain.evaluation import evaluate
from saetrain.launch.run import fit
from saetrain.model.losses import scale_of
from saetrain.model.sae import build_sae
from saetrain.model.weight_scales import input_scaling
from saetrain.runs.record import read_run
from saetrain.tracking.jsonl import METRICS

Options = Callable[..., FitConfig]

D, M, K = 6, 24, 4
CPU = torch.device("cpu")


def random_sae(config: SaeConfig, seed: int = 0) -> Any:
    sae = build_sae(config, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).abs() * 0.3)
        sae.W_enc.copy_(torch.randn(sae.W_enc.shape, generator=generator))
        sae.normalise_decoder()
        for buffer in sae.buffers():
            buffer.fill_(0.7)
    return sae.eval()


@pytest.mark.parametrize(
    "activation", ["topk", "batchtopk", "groupmax", "jumprelu", "relu", "gated"]
)
def test_weights_for_unscaled_rows_compute_the_same_function_with_the_same_decoder(
    activation: Any,
) -> None:
    config, scale = SaeConfig(D, M, K, activation=activation), 0.03
    sae = random_sae(config)
    scaling = input_scaling(SaeEntry("h", config, 1.0, 0, scales=(scale,)), CPU, torch.float64)
    assert scaling is not None
    x = 30 * torch.randn(50, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    weights = dict(sae.named_buffers()) | dict(sae.named_parameters())
    raw = scaling.fold_into(weights)
    assert raw.keys() == weights.keys()
    assert torch.equal(raw["W_dec"], sae.W_dec)
    scaled, plain = sae(x * scaling.rows), functional_call(sae, raw, (x,))
    assert (plain.top_acts > 0).any()
    torch.testing.assert_close(plain.reconstruction, scaled.reconstruction / scale)
    torch.testing.assert_close(plain.top_acts, scaled.top_acts / scale)


@pytest.mark.parametrize("kind", ["transcoder", "transcoder with a skip", "crosscoder"])
def test_each_hookpoint_has_its_own_scale(kind: str) -> None:
    config = SaeConfig(D, M, K, transcode=True, d_out=4, skip_connection="skip" in kind)
    widths = (D, 4)
    if kind == "crosscoder":
        config, widths = SaeConfig(D + 4, M, K, widths=(D, 4)), (D, 4)
    sae, scales = random_sae(config), (0.03, 5.0)
    scaling = input_scaling(SaeEntry("h", config, 1.0, 0, scales=scales), CPU, torch.float64)
    assert scaling is not None
    rows = torch.randn(50, D + 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    rows = rows / torch.tensor([s for s, w in zip(scales, widths, strict=True) for _ in range(w)])
    read, _ = sae.split(rows * scaling.rows)
    raw_read, _ = sae.split(rows)
    raw = functional_call(sae, scaling.fold_into(dict(sae.named_parameters())), (raw_read,))
    scaled = sae(read)
    expected = scaled.reconstruction / scaling.predicted
    torch.testing.assert_close(raw.reconstruction, expected)
    torch.testing.assert_close(raw.top_acts, scaled.top_acts)


def test_a_weight_of_unknown_unit_raises() -> None:
    scaling = input_scaling(SaeEntry("h", SaeConfig(D, M, K), 1.0, 0, scales=(2.0,)), CPU)
    assert scaling is not None
    with pytest.raises(AssertionError, match="novel"):
        scaling.fold_into({"novel": torch.zeros(1)})


def test_scales_normalise_the_root_mean_square_of_the_training_rows(
    options: Options, cache_path: Path
) -> None:
    cache = Cache.open(cache_path)
    for kind in ("rms", "unit"):
        config = options(input_scale=kind, out=f"{options().out}-{kind}")
        fit(config)
        record = read_run(Path(config.out))
        for entry in record.saes:
            shards = [cache.read(entry.hookpoint, s, 0, 128) for s in record.training_shards]
            rows = np.concatenate([cache.row_dtype.to_float32(r) for r in shards]).astype(
                np.float64
            )
            (scale,) = entry.scales
            squares = np.square(rows * scale)
            mean = squares.mean() if kind == "rms" else squares.sum(axis=1).mean()
            assert mean == pytest.approx(1.0, rel=1e-6)
    assert scale_of("none", cache.statistics("layers.0")) == 1.0


@pytest.mark.parametrize("settings", [{}, {"decoder_norm": "fold"}, {"activation": "batchtopk"}])
def test_a_run_is_independent_of_the_unit_of_its_rows_and_saves_weights_for_unscaled_rows(
    options: Options, make_cache: Callable[..., Path], settings: dict[str, Any]
) -> None:
    """Scale rows by 64, a power of 2: results are bit for bit the same except for the unit."""
    logged, saved = [], []
    for times in (1.0, 64.0):

        def rows(_: str, shard: int, count: int, width: int, times: float = times) -> Any:
            state = np.random.RandomState(shard)
            codes = np.abs(state.standard_normal((count, 4)))
            few = codes @ np.random.RandomState(9).standard_normal((4, width))
            noise = 0.02 * state.standard_normal((count, width))
            return (few + 0.5 + noise).astype(np.float32) * np.float32(times)

        config = options(
            cache=str(make_cache(rows=rows)),
            out=f"{options().out}-{times}",
            input_scale="unit",
            optimizer="adam",
            max_tokens=40 * 32,
            val_every=40,
            **settings,
        )
        fit(config)
        root = Path(config.out)
        lines = [json.loads(line) for line in (root / METRICS).read_text().splitlines()]
        logged.append([line["saes"] for line in lines if "saes" in line])
        (held_out,) = [line["val"] for line in lines if "val" in line]
        for figure in evaluate(root).saes:
            assert figure.fvu == pytest.approx(held_out[figure.name]["fvu"], rel=1e-3)
            last = logged[-1][-1][figure.name]["fvu"]
            assert figure.fvu == pytest.approx(last, rel=0.5)  # not off by a scale
            assert figure.fvu < 1
        saved.append(load_file(root / "layers.0" / "sae.safetensors"))
    assert logged[0] == logged[1]
    small, large = saved
    assert torch.equal(small["encoder.weight"], large["encoder.weight"])
    assert torch.equal(small["W_dec"], large["W_dec"])
    torch.testing.assert_close(64 * small["b_dec"], large["b_dec"], rtol=1e-6, atol=0)
    torch.testing.assert_close(64 * small["encoder.bias"], large["encoder.bias"])


@pytest.mark.parametrize("kind", [{"crosscode": True}, {"transcode": True}])
def test_transcoders_and_crosscoders_can_be_scaled(
    options: Options, make_cache: Callable[..., Path], kind: dict[str, Any]
) -> None:
    cache = make_cache(hookpoints={"layers.0:in": 12, "layers.0": 16})
    config = options(cache=str(cache), input_scale="rms", val_every=12, **kind)
    fit(config)
    (figure,) = evaluate(Path(config.out)).saes
    (entry,) = read_run(Path(config.out)).saes
    assert len(entry.scales) == 2
    lines = (Path(config.out) / METRICS).read_text().splitlines()
    (held_out,) = json.loads(lines[-1])["val"].values()
    assert figure.fvu == pytest.approx(held_out["fvu"], rel=1e-3)
    cfg = json.loads((Path(config.out) / entry.name / "cfg.json").read_text())
    assert not cfg["normalize_decoder"] or "transcode" in kind


def test_without_a_scale_nothing_is_recorded(options: Options) -> None:
    fit(options(input_scale="none"))
    for entry in read_run(Path(options().out)).saes:
        assert (entry.scales, entry.encoder_scale) == ((), 1.0)
        assert input_scaling(dataclasses.replace(entry), CPU) is None
