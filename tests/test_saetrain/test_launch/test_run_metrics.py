"""Whole runs: the metrics of each SAE besides its losses, and their steps."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import saetrain.training.step
from actcache.errors import ConfigError
from saetrain.config.fit_config import FitConfig
from saetrain.kernels import signum_update_
from saetrain.launch.run import fit
from saetrain.tracking.jsonl import METRICS
from saetrain.training.sae_trainer import SaeTrainer

Options = Callable[..., FitConfig]


def figures(config: FitConfig, sae: str = "layers.0") -> list[dict[str, Any]]:
    fit(config)
    text = (Path(config.out) / METRICS).read_text()
    return [json.loads(line)["saes"][sae] for line in text.splitlines()]


def test_the_learning_rate_and_k_are_those_of_the_last_step(options: Options) -> None:
    config = options(optimizer="adam", k_anneal_steps=8, k_start=11, log_every=1)
    found = figures(config)
    rising, falling = [i / 4 for i in range(4)], [(12 - i) / 8 for i in range(4, 12)]
    assert [line["lr"] for line in found] == pytest.approx([0.01 * s for s in rising + falling])
    assert [line["k"] for line in found] == [11, 10, 9, 8, 7, 6, 5, 4, 3, 3, 3, 3]


@pytest.mark.parametrize(
    ("schedule", "lrs"),
    [(None, [0.01, 0.01, 0.01]), ("constant", [0.01, 0.01, 0.01]), ("linear", [0.01, 0.00625])],
)
def test_the_learning_rate_of_signum_is_that_of_its_update(
    options: Options, monkeypatch: pytest.MonkeyPatch, schedule: Any, lrs: list[float]
) -> None:
    used: list[float] = []
    last: list[float] = []
    real = SaeTrainer.state

    def state(trainer: SaeTrainer) -> Any:
        used.append(last[-1])
        return real(trainer)

    def update(*arguments: Any) -> None:
        last.append(arguments[3].lr)
        signum_update_(*arguments)

    monkeypatch.setattr(SaeTrainer, "state", state)
    monkeypatch.setattr("saetrain.optim.signum.Signum.UPDATE", staticmethod(update))
    found = figures(options(hookpoint=("layers.0",), lr_schedule=schedule, save_every=4))
    assert [line["lr"] for line in found] == used
    assert [line["lr"] for line in found[: len(lrs)]] == pytest.approx(lrs)


@pytest.mark.parametrize("clip", [None, 1e-4])
def test_the_gradient_norm_is_taken_before_clipping(
    options: Options, monkeypatch: pytest.MonkeyPatch, clip: float | None
) -> None:
    """Every second step ends an update; lines cover four steps, so two updates."""
    norms: list[float] = []
    real = saetrain.training.step._update

    def look(trainer: SaeTrainer, *arguments: Any) -> Any:
        found = {
            name: p.grad.double()
            for name, p in trainer.sae.named_parameters()
            if p.grad is not None
        }
        W_dec = trainer.sae.W_dec.detach().double()
        along = (found["W_dec"] * W_dec).sum(dim=1, keepdim=True)
        found["W_dec"] = found["W_dec"] - along * W_dec
        norms.append(float(torch.cat([g.flatten() for g in found.values()]).norm()))
        return real(trainer, *arguments)

    monkeypatch.setattr(saetrain.training.step, "_update", look)
    config = options(
        hookpoint=("layers.0",), optimizer="adam", grad_clip=clip, grad_acc_steps=2, log_every=4
    )
    found = [line["grad_norm"] for line in figures(config)]
    means = [(a + b) / 2 for a, b in zip(norms[::2], norms[1::2], strict=True)]
    assert found == pytest.approx(means, rel=1e-6)
    assert len(found) == 3
    assert min(found) > 1e-4


def test_the_gradient_norm_is_null_on_a_line_without_an_update(options: Options) -> None:
    found = figures(options(optimizer="adam", grad_acc_steps=3, log_every=2))
    assert [line["grad_norm"] is None for line in found] == [True, False, False, True, False, False]


def test_the_decoder_norms_are_those_of_the_trained_weights(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    last: dict[str, torch.Tensor] = {}
    real = SaeTrainer.state

    def state(trainer: SaeTrainer) -> Any:
        last[trainer.entry.name] = trainer.sae.W_dec.detach().norm(dim=1)
        return real(trainer)

    monkeypatch.setattr(SaeTrainer, "state", state)
    line = figures(options(optimizer="adam", decoder_norm="free", lr=0.1), "layers.1")[-1]
    norms = last["layers.1"]
    expected = (float(norms.min()), float(norms.max()))
    assert (line["decoder_norm_min"], line["decoder_norm_max"]) == expected
    assert expected[0] < 0.99 or expected[1] > 1.01


@pytest.mark.parametrize(
    ("every", "at"), [(1, [2, 4, 6, 8, 10, 12]), (2, [4, 8, 12]), (4, [8, 12]), (0, [])]
)
def test_histograms_are_written_at_their_interval_and_on_the_last_line(
    options: Options, every: int, at: list[int]
) -> None:
    config = options(log_every=2, histogram_every=every)
    found = [line.get("log10_density") for line in figures(config)]
    assert [2 * (i + 1) for i, histogram in enumerate(found) if histogram] == at
    rows = [histogram["rows"] for histogram in found if histogram]
    assert rows == [32 * (step - before) for before, step in zip([0, *at], at, strict=False)]
    for histogram in filter(None, found):
        assert histogram["never"] + sum(histogram["counts"]) == 48


def test_histograms_change_no_other_metric(options: Options) -> None:
    with_them, without = options(histogram_every=1), options(histogram_every=0)
    first = figures(with_them)
    second = figures(dataclasses.replace(without, out=with_them.out + "-without"))
    assert [{k: v for k, v in f.items() if k != "log10_density"} for f in first] == second


def test_a_negative_interval_of_histograms_is_refused(options: Options) -> None:
    with pytest.raises(ConfigError, match="--histogram-every"):
        options(histogram_every=-1)
