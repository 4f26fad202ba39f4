"""Training does not depend on the unit of the rows, at default options."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from saetrain.config.fit_config import FitConfig
from saetrain.config.sae import SaeOptions
from saetrain.evaluation import evaluate
from saetrain.launch.run import fit
from saetrain.tracking.jsonl import METRICS

Options = Callable[..., FitConfig]
MakeCache = Callable[..., Path]

SMALL: dict[str, Any] = {"num_latents": 48, "k": 4}
AUTOENCODERS: dict[str, dict[str, Any]] = {
    "adam": {},
    "adamw": {"optimizer": "adamw"},
    "muon": {"optimizer": "muon"},
    "signum": {"optimizer": "signum"},
    "batchtopk": {"activation": "batchtopk"},
    "groupmax": {"activation": "groupmax"},
    "relu": {"activation": "relu"},
    "jumprelu": {"activation": "jumprelu"},
    "gated": {"activation": "gated"},
    "multi-topk": {"multi_topk": True},
    "matryoshka": {"matryoshka": (8, 24)},
    "folded": {"decoder_norm": "fold"},
}
OTHERS = {name: AUTOENCODERS[name] for name in ("adam", "relu", "jumprelu", "gated")}
KINDS: dict[str, dict[str, Any]] = {
    "autoencoder": {},
    "transcoder": {"transcode": True},
    "skip": {"transcode": True, "skip_connection": True},
    "crosscoder": {"crosscode": True},
}


def rows_times(first: float, second: float) -> Callable[..., NDArray[np.float32]]:
    """Return rows of two hookpoints, which are multiplied by these numbers; both have a mean."""

    def rows(name: str, shard: int, count: int, width: int) -> NDArray[np.float32]:
        state = np.random.RandomState(shard)
        codes = np.abs(state.standard_normal((count, 24))) * (state.uniform(size=(count, 24)) < 0.1)
        clean = codes @ np.random.RandomState(9).standard_normal((24, width)) + 1.5
        noisy = clean + 0.02 * state.standard_normal((count, width))
        return noisy.astype(np.float32) * np.float32(first if name.endswith(":in") else second)

    return rows


def train(
    options: Options, make_cache: MakeCache, out: str, kind: str, first: float, second: float
) -> tuple[list[Any], dict[str, tuple[float, float]]]:
    """Return the logged figures, and held-out FVU and dead share (percent) by SAE."""
    names = {"layers.0:in": 16, "layers.0": 16} if kind != "autoencoder" else {"layers.0": 16}
    cache = make_cache(hookpoints=names, rows=rows_times(first, second))
    several = AUTOENCODERS if kind == "autoencoder" else OTHERS
    config = FitConfig(
        cache=str(cache),
        out=f"{options().out}-{out}",
        saes=tuple([SaeOptions(**SMALL, **each) for each in several.values()]),
        batch_size=32,
        epochs=2,
        log_every=8,
        device="cpu",
        **KINDS[kind],
    )
    fit(config)
    lines = [json.loads(line) for line in (Path(config.out) / METRICS).read_text().splitlines()]
    found = evaluate(Path(config.out)).saes
    figures = {sae.name: (sae.fvu, 100 - sae.fired_percent) for sae in found}
    return [line["saes"] for line in lines if "saes" in line], figures


@pytest.mark.parametrize("kind", KINDS)
def test_runs_at_three_scales_are_the_same(
    options: Options, make_cache: MakeCache, kind: str
) -> None:
    """Powers of 2 change no bit of scaled rows; a hundredth changes their last bits."""
    logged, figures = train(options, make_cache, "one", kind, 1.0, 1.0)
    assert all(np.isfinite(fvu) and fvu < 1 for fvu, _ in figures.values()), figures
    for name, first, second in (("large", 2.0**10, 2.0**10), ("apart", 2.0**-7, 1.0)):
        again, others = train(options, make_cache, name, kind, first, second)
        without_norms = [
            [{s: {k: v for k, v in f.items() if "norm/" not in k} for s, f in line.items()}]
            for run in (logged, again)
            for line in run
        ]
        half = len(without_norms) // 2
        assert without_norms[:half] == without_norms[half:]
        assert others.keys() == figures.keys()
    _, small = train(options, make_cache, "small", kind, 1e-2, 1e-2)
    for name, (fvu, dead) in figures.items():
        assert small[name][0] == pytest.approx(fvu, rel=0.01), name
        assert small[name][1] == pytest.approx(dead, abs=2.1), name
