"""The step against sparsify's own. N tokens, D d_in, M num_latents, K k."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from schedulefree import ScheduleFreeWrapper
from torch import Tensor
from transformers import get_linear_schedule_with_warmup

from saetrain.training.sae_trainer import SaeTrainer
from saetrain.training.step import train_step

N, D, M, K = 64, 16, 64, 4
STEPS, WARMUP = 50, 10
LR = {"signum": 0.01, "adam": 0.003}
BOTH_OPTIMIZERS = pytest.mark.parametrize("optimizer", ["signum", "adam"])


class Peer:
    """sparsify's module and optimiser, run as its trainer runs them on a given denominator."""

    def __init__(self, module: Any, trainer: SaeTrainer, optimizer: str) -> None:
        from sparsify.sign_sgd import SignSGD

        self.module, self.variance = module, trainer.variance
        with torch.no_grad():
            for ours, theirs in zip(trainer.sae.parameters(), self.weights(), strict=True):
                theirs.copy_(ours)
        self.schedule: Any = None
        if optimizer == "signum":
            base = SignSGD(module.parameters(), lr=LR[optimizer])
            self.optimizer: Any = ScheduleFreeWrapper(base, momentum=0.95)
            self.optimizer.train()
        else:
            self.optimizer = torch.optim.Adam(module.parameters(), lr=LR[optimizer])
            self.schedule = get_linear_schedule_with_warmup(self.optimizer, WARMUP, STEPS)

    def weights(self) -> list[Tensor]:
        """In the order of our parameters."""
        module = self.module
        return [module.encoder.weight, module.encoder.bias, module.W_dec, module.b_dec]

    def step(self, x: Tensor) -> float:
        """One step; returns its FVU."""
        self.module.set_decoder_norm_to_unit_norm()
        denominator = torch.tensor(len(x) * self.variance, dtype=x.dtype)
        output = self.module(x, total_variance=denominator)
        output.fvu.backward()
        self.module.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.schedule is not None:
            self.schedule.step()
        return float(output.fvu.detach())


def our_step(trainer: SaeTrainer, x: Tensor, step: int, alpha: float = 0.0) -> dict[str, float]:
    trainer.settings = dataclasses.replace(trainer.settings, auxk_alpha=alpha)
    train_step(trainer, x, step)
    return trainer.meter.pop_means()


@pytest.fixture
def make_pair(
    batches: Callable[[torch.dtype], Tensor],
    make_trainer: Callable[..., SaeTrainer],
    make_sparse_coder: Callable[..., Any],
    sparsify: ModuleType,
) -> Callable[[str, torch.dtype], tuple[SaeTrainer, Peer]]:
    """Ours and the peer's, with equal weights, b_dec at the first batch's mean."""

    def make(optimizer: str, dtype: torch.dtype) -> tuple[SaeTrainer, Peer]:
        trainer = make_trainer(
            D,
            M,
            K,
            optimizer=optimizer,
            lr=LR[optimizer],
            warmup=WARMUP,
            steps=STEPS,
            dtype=dtype,
            variance=3.7,
        )
        with torch.no_grad():
            trainer.sae.b_dec.copy_(batches(dtype)[0].mean(dim=0))
        return trainer, Peer(make_sparse_coder(D, M, K, dtype=dtype), trainer, optimizer)

    return make


@BOTH_OPTIMIZERS
def test_fifty_steps_in_float64_have_the_peers_losses_and_leave_its_weights(
    batches: Callable[[torch.dtype], Tensor],
    make_pair: Callable[..., tuple[SaeTrainer, Peer]],
    optimizer: str,
) -> None:
    trainer, peer = make_pair(optimizer, torch.float64)
    ours, theirs = [], []
    for step, x in enumerate(batches(torch.float64)):
        ours.append(our_step(trainer, x, step)["fvu"])
        theirs.append(peer.step(x))
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert ours[-1] < 0.8 * ours[0]  # the steps did something
    if optimizer == "signum":
        peer.optimizer.eval()  # as the peer does before it saves
    else:
        peer.module.set_decoder_norm_to_unit_norm()  # which it does before its next step
    exported = trainer.optimizer.weights_to_export().values()
    for weights, expected in zip(exported, peer.weights(), strict=True):
        torch.testing.assert_close(weights, expected.detach(), rtol=1e-6, atol=1e-8)


@BOTH_OPTIMIZERS
def test_the_first_step_in_float32_has_the_peers_loss_and_update(
    batches: Callable[[torch.dtype], Tensor],
    make_pair: Callable[..., tuple[SaeTrainer, Peer]],
    optimizer: str,
) -> None:
    trainer, peer = make_pair(optimizer, torch.float32)
    x = batches(torch.float32)[0]
    step = WARMUP if optimizer == "adam" else 0  # Adam's learning rate begins at 0
    if peer.schedule is not None:
        peer.optimizer.param_groups[0]["lr"] = LR[optimizer]
    assert our_step(trainer, x, step)["fvu"] == pytest.approx(peer.step(x), rel=1e-6)
    peer.module.set_decoder_norm_to_unit_norm()  # which it does before its next step
    for ours, theirs in zip(trainer.sae.parameters(), peer.weights(), strict=True):
        # The sign of a gradient that is zero but for rounding may differ; nothing else may.
        differing = ((ours - theirs).abs() > 1e-6).double().mean()
        assert differing < 0.01


@BOTH_OPTIMIZERS
def test_decoder_rows_have_unit_norm_wherever_a_gradient_is_taken(
    batches: Callable[[torch.dtype], Tensor],
    make_trainer: Callable[..., SaeTrainer],
    optimizer: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = make_trainer(D, M, K, optimizer=optimizer, lr=0.1)
    deviations, autoencode = [], trainer.sae.autoencode

    def spy(*arguments: Any) -> Any:
        deviations.append(float((trainer.sae.W_dec.detach().norm(dim=1) - 1).abs().max()))
        return autoencode(*arguments)

    monkeypatch.setattr(trainer.sae, "autoencode", spy)
    for step, x in enumerate(batches(torch.float32)[:10]):
        train_step(trainer, x, step)
    assert len(deviations) == 10
    assert max(deviations) < 1e-6


@pytest.mark.parametrize(
    ("optimizer", "clip"), [("muon", None), ("muon", 1.0), ("signum", 1.0), ("adam", 1.0)]
)
def test_an_optimiser_gets_no_gradient_along_a_decoder_row_but_where_it_projects_itself(
    batches: Callable[[torch.dtype], Tensor],
    make_trainer: Callable[..., SaeTrainer],
    monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
    clip: float | None,
) -> None:
    """A gradient that is to be clipped has to be measured before the one pass."""
    trainer = make_trainer(D, M, K, optimizer=optimizer, dtype=torch.float64, grad_clip=clip)
    along = []

    def spy(_: int) -> None:
        W_dec, gradient = trainer.sae.W_dec.detach(), trainer.sae.W_dec.grad
        assert gradient is not None
        along.append(float((gradient * W_dec).sum(dim=1).abs().max() / gradient.abs().max()))

    monkeypatch.setattr(trainer.optimizer, "step", spy)
    train_step(trainer, batches(torch.float64)[0], 0)
    assert along[0] < 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rows_of_any_type_train_as_the_same_numbers_in_the_weights_type(
    batches: Callable[[torch.dtype], Tensor],
    make_trainer: Callable[..., SaeTrainer],
    dtype: torch.dtype,
) -> None:
    rows = batches(torch.float32)[0].to(dtype)
    ours, same = make_trainer(D, M, K), make_trainer(D, M, K)
    train_step(ours, rows, 0)
    train_step(same, rows.float(), 0)
    assert torch.equal(ours.sae.W_enc, same.sae.W_enc)
    assert torch.equal(ours.meter.sums, same.meter.sums)


def test_auxk_begins_when_latents_are_dead_and_revives_them(
    batches: Callable[[torch.dtype], Tensor],
    make_trainer: Callable[..., SaeTrainer],
) -> None:
    trainer = make_trainer(D, M, K, dead_after=2 * N, lr=0.02)
    with torch.no_grad():
        trainer.sae.b_enc[M // 2 :] = -0.7  # never among the strongest at first
    auxk, dead = [], []
    for step, x in enumerate(batches(torch.float32)):
        auxk.append(our_step(trainer, x, step, alpha=1.0)["auxk"])
        dead.append(trainer.dead_tracker.dead_percent(2 * N))
    assert auxk[:2] == [0.0, 0.0]
    assert min(auxk[2:5]) > 0
    assert dead[1] > 20
    assert dead[-1] < dead[1] / 2


def test_with_auxk_off_dead_latents_cost_nothing_and_feel_nothing(
    batches: Callable[[torch.dtype], Tensor],
    make_trainer: Callable[..., SaeTrainer],
) -> None:
    trainer = make_trainer(D, M, K, dead_after=1)
    with torch.no_grad():
        trainer.sae.b_enc[7] = -100.0
    before = trainer.sae.W_enc[7].detach().clone()
    for step, x in enumerate(batches(torch.float32)[:5]):
        assert our_step(trainer, x, step, alpha=0.0)["auxk"] == 0
    assert trainer.dead_tracker.dead()[7]
    assert torch.equal(trainer.sae.W_enc[7], before)
