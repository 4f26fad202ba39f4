"""Estimates of parameters and memory, compared with real SAEs and steps."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from actcache.errors import ActcacheError, ConfigError
from saetrain.config.fit_config import FitConfig
from saetrain.config.grid import vary
from saetrain.config.sae import OptimizerName, SaeConfig, SaeEntry, SaeOptions
from saetrain.kernels.update import bf16_copy_of
from saetrain.launch.estimate import estimate_fit, estimate_sae, step_bytes
from saetrain.launch.run import fit
from saetrain.model.losses import make_loss_config
from saetrain.model.sae import build_sae
from saetrain.optim import default_lr
from saetrain.runs.record import read_run
from saetrain.training.sae_trainer import (
    SaeTrainer,
    StepSettings,
    make_optimizer,
    parameter_shapes,
)
from saetrain.training.step import train_step

CPU = torch.device("cpu")
FLOAT = 4  # bytes


@pytest.mark.parametrize("optimizer", get_args(OptimizerName))
def test_weights_and_optimizer_state_equal_those_of_a_trained_sae(
    make_trainer: Callable[..., Any], optimizer: OptimizerName
) -> None:
    trainer = make_trainer(16, 400, 4, optimizer=optimizer)
    train_step(trainer, torch.randn(32, 16), 0)
    entry = SaeEntry(
        "layers.0", SaeConfig(16, 400, 4), 0.1, 0, options=SaeOptions(optimizer=optimizer)
    )
    plan = estimate_sae(entry, FitConfig("c", "r"))
    weights = sum(p.numel() * p.element_size() for p in trainer.sae.parameters())
    state = trainer.optimizer.state_tensors().values()
    assert plan.weights == plan.gradients == weights
    large = sum(t.numel() * t.element_size() for t in state if t.dim())  # no counters
    assert plan.optimizer_state == large
    assert plan.parameters == 2 * 16 * 400 + 16 + 400


def test_counting_parameters_allocates_none() -> None:
    shapes = parameter_shapes(SaeConfig(2**16, 2**24, 32))
    assert sum(map(math.prod, shapes)) == 2**41 + 2**16 + 2**24


@pytest.mark.parametrize("optimizer", get_args(OptimizerName))
@pytest.mark.parametrize(
    ("N", "D", "M", "K"), [(512, 64, 2048, 16), (64, 128, 4096, 8), (2048, 64, 256, 64)]
)
def test_a_step_holds_at_most_the_estimate_and_not_much_less(
    make_trainer: Callable[..., Any], N: int, D: int, M: int, K: int, optimizer: OptimizerName
) -> None:
    peak = peak_of_a_step(make_trainer(D, M, K, optimizer=optimizer), torch.randn(N, D))
    gradients = sum(map(math.prod, parameter_shapes(SaeConfig(D, M, K)))) * FLOAT
    planned = gradients + step_bytes(SaeConfig(D, M, K), optimizer, N)
    assert 0.5 * planned <= peak <= planned


def test_the_estimate_counts_the_pre_activations_that_are_formed_at_once() -> None:
    sizes, plain = SaeConfig(768, 2**17, 32), 2**15 * 2**17 * FLOAT
    by_cache, by_device = (step_bytes(sizes, "signum", 2**15, device=d) for d in ("cpu", "cuda"))
    assert by_cache <= by_device < plain / 4
    batch = SaeConfig(768, 2**17, 32, activation="batchtopk")
    assert step_bytes(batch, "signum", 2**15) > plain
    chunked = step_bytes(sizes, "signum", 2**15, device="cuda", chunk_latents=2**16)
    assert plain / 2 < chunked < plain


KINDS: dict[str, dict[str, Any]] = {
    "topk": {},
    "batchtopk": {"activation": "batchtopk"},
    "jumprelu": {"activation": "jumprelu", "sparsity": 0.1},
    "relu": {"activation": "relu", "sparsity": 0.1},
    "gated": {"activation": "gated", "sparsity": 0.1},
    "multi-topk": {"multi_topk": True},
    "matryoshka": {"matryoshka": (16, 40, 100)},
    "matryoshka of gated": {"matryoshka": (16, 40), "activation": "gated", "sparsity": 0.1},
    "matryoshka of batchtopk": {"matryoshka": (16, 40), "activation": "batchtopk"},
    "skip transcoder": {"transcode": True, "skip_connection": True, "d_out": 96},
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_shapes_are_those_of_the_parameters_of_each_kind(kind: str) -> None:
    sizes = SaeConfig(128, 256, 4, **KINDS[kind])
    made = [tuple(parameter.shape) for parameter in build_sae(sizes, device="meta").parameters()]
    assert sorted(parameter_shapes(sizes)) == sorted(made)


@pytest.mark.parametrize(
    ("N", "D", "M", "K"), [(512, 64, 2048, 16), (64, 128, 4096, 8), (2048, 128, 256, 4)]
)
@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_of_other_activations_or_folded_weights_hold_at_most_the_estimate(
    kind: str, folded: bool, N: int, D: int, M: int, K: int
) -> None:
    sizes = SaeConfig(D, M, K, **KINDS[kind])
    folded = folded and not sizes.transcode
    sae, loss_config = build_sae(sizes), make_loss_config(sizes, 0)
    trainer = SaeTrainer(
        SaeEntry("layers.0", sizes, 0.1, 0),
        sae,
        make_optimizer("signum", sae, 0.1, 0, 9, decoder_norm="fold" if folded else "unit"),
        10**9,
        1.0,
        loss_config,
        StepSettings(decoder_norm="fold" if folded else "unit"),
    )
    peak = peak_of_a_step(trainer, torch.randn(N, D + sizes.width_out * sizes.transcode))
    gradients = sum(map(math.prod, parameter_shapes(sizes))) * FLOAT
    planned = gradients + step_bytes(sizes, "signum", N, folded)
    assert 0.5 * planned <= peak <= planned


def peak_of_a_step(trainer: Any, x: torch.Tensor) -> int:
    """Return the peak bytes that a step allocates."""
    for step in range(2):
        train_step(trainer, x, step)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        train_step(trainer, x.bfloat16(), 2)
    assert seen.profiler is not None
    assert seen.profiler.kineto_results is not None
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return int(peak)


def test_an_estimate_lists_the_saes_of_the_run(options: Callable[..., FitConfig]) -> None:
    config = vary(options(), num_latents=(32, 48), seed=(0, 1), optimizer=("adam", "signum"))
    plan = estimate_fit(config, CPU)
    assert not Path(config.out).exists()
    fit(config)
    entries = read_run(Path(config.out)).saes
    assert [(s.name, s.k, s.lr, s.seed, s.num_latents) for s in plan.saes] == [
        (e.name, e.config.k, e.lr, e.seed, e.config.num_latents) for e in entries
    ]
    assert plan.weights == sum(sae.weights for sae in plan.saes)
    assert plan.gradients == max(sae.gradients for sae in plan.saes)
    own = plan.weights + plan.optimizer_state + plan.gradients + plan.activations + plan.rows
    assert plan.total == plan.libraries + own
    assert plan.libraries > 100e6  # Python and torch
    assert plan.fits
    assert not dataclasses.replace(plan, free=own - 1).fits
    assert dataclasses.replace(plan, free=own).fits  # the libraries are loaded already
    assert plan.rows == 512 * 2 * 16 * 4
    assert plan.free > 0
    alone = estimate_fit(dataclasses.replace(config, saes=config.saes[:1]), CPU)
    assert alone.total - alone.libraries < own
    assert alone.rows == plan.rows


def test_weights_in_bfloat16_take_half(options: Callable[..., FitConfig]) -> None:
    whole, half = estimate_fit(options(), CPU), estimate_fit(options(weights_dtype="bfloat16"), CPU)
    norms = FLOAT * sum(sae.num_latents for sae in whole.saes)  # signum keeps them in float32
    assert half.weights == whole.weights / 2
    assert half.optimizer_state == (whole.optimizer_state + norms) / 2


@pytest.mark.parametrize(
    ("changes", "kept"),
    [
        ({}, 1),
        ({"activation": "batchtopk"}, 1),
        ({"optimizer": "muon"}, 1),
        ({"activation": "relu"}, 0),  # autocast casts by itself
        ({"decoder_norm": "fold"}, 0),
        ({"weights_dtype": "bfloat16"}, 0),
    ],
    ids=str,
)
def test_with_autocast_the_weights_include_a_bfloat16_copy_of_the_encoder(
    changes: dict[str, Any], kept: int, accumulate: Callable[..., Any]
) -> None:
    D, M = 16, 400
    own = {n: changes[n] for n in ("optimizer", "decoder_norm") if n in changes}
    kind = {"activation": changes.get("activation", "topk")}
    sizes = SaeConfig(D, M, 4, **kind)
    entry = SaeEntry("layers.0", sizes, 0.1, 0, options=SaeOptions(**own))
    dtype = changes.get("weights_dtype", "float32")
    plain, under = (
        estimate_sae(entry, FitConfig("c", "r", autocast=autocast, weights_dtype=dtype))
        for autocast in (False, True)
    )
    assert under.weights - plain.weights == kept * 2 * M * D
    assert under.optimizer_state == plain.optimizer_state
    sae = build_sae(sizes, dtype=getattr(torch, dtype))
    norm = own.get("decoder_norm", "unit")
    accumulate(sae, torch.randn(8, D).to(sae.W_enc), autocast=True, decoder_norm=norm)
    assert (bf16_copy_of(sae.W_enc) is not None) is bool(kept)


def test_an_estimate_refuses_what_fit_refuses(
    options: Callable[..., FitConfig],
) -> None:
    for changes in ({"k": 49}, {"hookpoint": ("layers.7",)}, {"cache": "/nowhere"}):
        with pytest.raises(ActcacheError):
            estimate_fit(options(**changes), CPU)


def test_the_learning_rate_is_none_while_the_number_of_steps_is_unknown(
    options: Callable[..., FitConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saetrain.optim.schedule._ADAM_MOST", math.inf)
    config = options(lr=None, optimizer="adam", epochs=2)
    fit(config)
    entries = read_run(Path(config.out)).saes
    rates = [entry.lr for entry in entries]
    assert rates == [default_lr("adam", 48, entry.config.d_in, 24, rows=32) for entry in entries]
    assert [sae.lr for sae in estimate_fit(config, CPU).saes] == rates
    some = dataclasses.replace(config, epochs=1, max_tokens=24 * 32, follow=True)
    assert [sae.lr for sae in estimate_fit(some, CPU).saes] == rates
    goal = dataclasses.replace(config, follow=True)
    assert [sae.lr for sae in estimate_fit(goal, CPU).saes] == [None, None]
    assert [sae.lr for sae in estimate_fit(dataclasses.replace(goal, lr=0.5), CPU).saes] == [
        0.5,
        0.5,
    ]


def test_saes_that_cannot_fit_into_memory_are_refused_before_they_are_built(
    options: Callable[..., FitConfig],
) -> None:
    config = options(num_latents=2**31 - 1, k=4)
    with pytest.raises(ConfigError, match=r"(?s)out of memory.*layers\.0.*free on cpu.*weights"):
        fit(config)
    assert not Path(config.out).exists()
