"""What a whole training step allocates, counted: the formulas of the kernels' README.

Letters: N tokens, D d_in, M num_latents, K k.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from saetrain.kernels import dense
from saetrain.kernels.dense import tokens_at_once
from saetrain.kernels.on_torch import update
from saetrain.model.activations import Activation, BatchTopK, GroupMax, TopK
from saetrain.model.losses import LossConfig
from saetrain.training.metrics import MEANS, MeanMeter
from saetrain.training.sae_trainer import SaeTrainer
from saetrain.training.step import train_step

N, D, M, K = 1024, 48, 8192, 32
BYTES = 4
WEIGHTS = M * D * BYTES
ALL_PRE_ACTS = N * M * BYTES
ALL_ROWS = N * K * D * BYTES
PER_TOKEN = N * (24 * D + 80 * K) * BYTES
"""Rows, reconstructions and errors; activations, indices and pairs, 8 bytes each."""
PER_LATENT = 64 * M * BYTES


@pytest.fixture(autouse=True)
def small_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "_BYTES", 1 << 21)
    monkeypatch.setattr(update, "_BYTES", 1 << 18)


def allocations(trainer: SaeTrainer, auxk_alpha: float = 0.0) -> list[int]:
    """Bytes that one step takes (+) and gives back (-), in order; after two steps."""
    x = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    trainer.settings = dataclasses.replace(trainer.settings, auxk_alpha=auxk_alpha)
    for step in range(2):
        train_step(trainer, x, step)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        train_step(trainer, x, 2)
    events = [e for e in seen.profiler.kineto_results.events() if e.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


def peak(taken: list[int]) -> int:
    """Most bytes beyond those at the start."""
    now = most = 0
    for size in taken:
        now += size
        most = max(most, now)
    return most


@pytest.mark.parametrize("optimizer", ["signum", "adam"])
def test_a_step_forms_no_row_for_each_pair_and_no_pre_act_for_all_tokens(
    make_trainer: Callable[..., Any], optimizer: str
) -> None:
    trainer = make_trainer(D, M, K, optimizer=optimizer)
    at_once = tokens_at_once(N, trainer.sae.W_enc) * M * BYTES
    assert at_once == ALL_PRE_ACTS // 16
    taken = allocations(trainer)
    assert max(taken) <= max(at_once, WEIGHTS)
    assert max(taken) < min(ALL_PRE_ACTS, ALL_ROWS) / 2
    # Pre-activations of some tokens and then, when they are gone, both weights' gradients.
    assert peak(taken) <= max(1.25 * at_once, 2 * WEIGHTS) + WEIGHTS // 2 + PER_TOKEN + PER_LATENT


MATRYOSHKA, MULTI_TOPK = LossConfig(prefixes=(64, 512, 4096)), LossConfig(multi_topk=True)
TRAINED_ON = {"auxk": LossConfig(), "matryoshka and auxk": MATRYOSHKA, "matryoshka": MATRYOSHKA}
OF_TOPK = {"multi_topk and auxk": MULTI_TOPK, "multi_topk": MULTI_TOPK}


@pytest.mark.parametrize(
    ("activation", "name", "loss_config"),
    [(kind, *item) for kind in (TopK, BatchTopK, GroupMax) for item in TRAINED_ON.items()]
    + [(TopK, *item) for item in OF_TOPK.items()],
)
def test_whatever_is_trained_on_each_weight_has_one_gradient(
    make_trainer: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    activation: type[Activation],
    name: str,
    loss_config: LossConfig,
) -> None:
    monkeypatch.setattr(dense, "_MANY", 0)  # nor an order of W for the product, as large
    trainer = make_trainer(D, M, K, dead_after=N)
    trainer.sae.activation = activation(K)
    names = (*MEANS, *loss_config.names)
    trainer.loss_config, trainer.meter = (
        loss_config,
        MeanMeter(names, torch.zeros(len(names), dtype=torch.float64)),
    )
    with torch.no_grad():
        trainer.sae.b_enc[:200] = -100.0
    trainer.dead_tracker.rows_since[:200] = 10 * N
    taken = allocations(trainer, 1 / 32 if "auxk" in name else 0.0)
    assert int(trainer.dead_tracker.dead().sum()) >= 200
    assert taken.count(WEIGHTS) == 2


def test_gradients_are_written_where_the_last_steps_were(
    make_trainer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saetrain.kernels.grad_memory._LEAST", 1)
    taken = allocations(make_trainer(D, M, K))
    assert taken.count(WEIGHTS) <= 1  # in the order of a product's own
    at_once = ALL_PRE_ACTS // 16
    assert peak(taken) <= 1.25 * at_once + WEIGHTS // 2 + PER_TOKEN + PER_LATENT


@pytest.mark.parametrize("optimizer", ["signum", "adam"])
def test_under_autocast_no_step_makes_a_copy_of_the_encoder(
    make_trainer: Callable[..., Any], optimizer: str
) -> None:
    """One is kept. oneDNN makes its own of that, in its order and in memory of its own."""
    trainer = make_trainer(D, M, K, optimizer=optimizer, autocast=True)
    taken, in_bfloat16 = allocations(trainer), WEIGHTS // 2
    assert in_bfloat16 not in taken
    at_once = tokens_at_once(N, trainer.sae.W_enc) * M * BYTES
    room = WEIGHTS // 2 + PER_TOKEN + PER_LATENT
    assert peak(taken) <= max(1.25 * at_once + in_bfloat16, 2 * WEIGHTS) + room


def test_with_chunks_of_latents_no_pre_acts_are_wider(make_trainer: Callable[..., Any]) -> None:
    chunk = 256
    trainer = make_trainer(D, M, K, chunk_latents=chunk)
    taken = allocations(trainer)
    assert max(taken) <= max(N * chunk * BYTES, WEIGHTS)
    assert peak(taken) <= 2 * WEIGHTS + WEIGHTS // 2 + PER_TOKEN + PER_LATENT
