"""Means and dead latents."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from saetrain.config.sae import SaeConfig
from saetrain.model.losses import DeadLatents, Losses, LossTerm, OutputSlice, auxk_loss
from saetrain.model.sae import SaeOutput, build_sae
from saetrain.training import metrics
from saetrain.training.metrics import (
    MEANS,
    DeadLatentBound,
    DeadLatentTracker,
    MeanMeter,
    ResidualShare,
    fired,
)


def new_meter() -> MeanMeter:
    return MeanMeter(MEANS, torch.zeros(3, dtype=torch.float64))


def losses(fvu: float, auxk: float, top_acts: list[list[float]]) -> Losses:
    acts = torch.tensor(top_acts)  # [N, K]
    output = SaeOutput(torch.zeros(len(acts), 2), acts, torch.zeros_like(acts, dtype=torch.int64))
    return Losses(torch.tensor(fvu), torch.tensor(auxk), output)


def test_means_are_over_the_steps_since_the_last_pop() -> None:
    meter = new_meter()
    meter.add(losses(0.5, 0.25, [[1.0, 0.0], [2.0, 3.0]]))
    meter.add(losses(1.5, 0.75, [[0.0, 0.0], [0.0, 1.0]]))
    assert meter.pop_means() == {"fvu": 1.0, "auxk": 0.5, "l0": 1.0}
    meter.add(losses(3.0, 0.0, [[1.0, 1.0]]))
    assert meter.pop_means() == {"fvu": 3.0, "auxk": 0.0, "l0": 2.0}


def test_the_residuals_share_is_a_moving_average_of_each_hookpoints_fvu() -> None:
    fvus = [0.9, 0.5, 0.2]
    one = MeanMeter(MEANS, torch.zeros(3, dtype=torch.float64))
    two = MeanMeter((*MEANS, "fvu/a", "fvu/b"), torch.zeros(5, dtype=torch.float64))
    for meter, hookpoints in ((one, 1), (two, 2)):
        meter.residual = ResidualShare(torch.zeros(hookpoints + 1, dtype=torch.float64))
    for fvu in fvus:
        step = losses(fvu, 0.0, [[1.0]])
        one.add(step)
        parts = (LossTerm(torch.tensor(value), 0.0) for value in (fvu / 3, 1.0))
        two.add(step._replace(terms=tuple(parts)))
    mean = (0.81 * 0.9 + 0.9 * 0.5 + 0.2) / (0.81 + 0.9 + 1)
    assert one.residual is not None
    assert two.residual is not None
    assert one.residual.share().tolist() == pytest.approx([mean])
    assert two.residual.share().tolist() == pytest.approx([mean / 3, 1.0])


def test_auxk_of_a_residual_of_0_is_finite() -> None:
    residual = ResidualShare(torch.zeros(2, dtype=torch.float64))
    residual.count(torch.zeros(3, dtype=torch.float64))
    sae = build_sae(SaeConfig(4, 8, 2), seed=0)
    x, nothing = torch.randn(6, 4), torch.zeros(6, 4)
    dead = DeadLatents(torch.arange(8), 8)
    part = (OutputSlice("", 4, 1.0),)
    for error in (nothing, 1e-30 * x):
        loss = auxk_loss(sae, x, error, dead, part, share=residual.share())
        loss.backward()  # type: ignore[no-untyped-call]
        assert loss.isfinite()
        assert sae.W_enc.grad is not None
        assert sae.W_enc.grad.square().isfinite().all()


def test_l0_counts_latents_with_positive_activations() -> None:
    meter = new_meter()
    meter.add(losses(0.0, 0.0, [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1e-30, 2.0, 0.0]]))
    assert meter.pop_means()["l0"] == pytest.approx(1.0)


def test_the_meter_holds_no_autograd_graph() -> None:
    meter = new_meter()
    step = losses(1.0, 0.0, [[1.0]])
    meter.add(step._replace(fvu=step.fvu.requires_grad_()))
    assert not meter.sums.requires_grad


def test_a_latent_has_fired_where_one_of_its_activations_is_positive() -> None:
    top_acts = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.0, 2.0]])
    top_indices = torch.tensor([[0, 1], [0, 2], [3, 1]])
    # Latents 0 and 1 occur active and inactive, in either order. Latent 2 is inactive.
    assert fired(top_acts, top_indices, 5).tolist() == [True, True, False, False, False]


def test_rows_since_a_latent_fired_grow_by_whole_batches() -> None:
    dead_tracker = DeadLatentTracker(torch.zeros(4, dtype=torch.int64), dead_after=5)
    dead_tracker.add((torch.tensor([[1.0], [0.0]]), torch.tensor([[0], [1]])))
    assert dead_tracker.rows_since.tolist() == [0, 2, 2, 2]
    dead_tracker.add((torch.tensor([[1.0], [1.0], [0.0]]), torch.tensor([[1], [1], [1]])))
    assert dead_tracker.rows_since.tolist() == [3, 0, 5, 5]


def test_a_latent_is_dead_after_exactly_dead_after_rows_until_it_fires() -> None:
    dead_tracker = DeadLatentTracker(torch.zeros(2, dtype=torch.int64), dead_after=4)
    nothing = (torch.zeros(3, 1), torch.zeros(3, 1, dtype=torch.int64))
    dead_tracker.add(nothing)
    assert dead_tracker.dead().tolist() == [False, False]
    dead_tracker.add((torch.tensor([[1.0]]), torch.tensor([[1]])))
    assert dead_tracker.dead().tolist() == [True, False]
    assert dead_tracker.dead_percent(3) is None  # too few rows to know
    assert dead_tracker.dead_percent(4) == 50.0
    dead_tracker.add((torch.tensor([[1.0]]), torch.tensor([[0]])))
    assert dead_tracker.dead_percent(4) == 0.0


@pytest.mark.parametrize("slowest", [0, 1, 5, 30])
def test_the_host_never_rules_out_a_latent_that_is_dead_however_late_copies_arrive(
    monkeypatch: pytest.MonkeyPatch, slowest: int
) -> None:
    chance = random.Random(slowest)
    step = 0

    def copy(number: Tensor) -> Callable[[], int | None]:
        value, arrives = int(number), step + chance.randint(0, slowest)
        return lambda: value if step >= arrives else None

    monkeypatch.setattr(metrics, "copy_to_host", copy)
    tracker = DeadLatentTracker(torch.zeros(3, dtype=torch.int64), dead_after=120)
    bound = DeadLatentBound(tracker)
    ruled_out = wrongly = 0
    for step in range(2000):
        rows = chance.randint(1, 8)
        bound.advance(rows)
        ruled_out += not bound.may_be_dead
        wrongly += not bound.may_be_dead and bool(tracker.dead().any())
        unused = step // 300 % 2 == 1  # for a while, one latent never fires
        tracker.count(torch.tensor([chance.random() < 0.3, True, not unused]), rows)
    assert wrongly == 0
    assert ruled_out > (600 if slowest < 30 else 0)


def test_what_is_recorded_keeps_auxk_for_some_steps_after_no_latent_is_dead(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics, "copy_to_host", lambda number: lambda: int(number))
    tracker = DeadLatentTracker(torch.zeros(1, dtype=torch.int64), dead_after=4)
    bound = DeadLatentBound(tracker)
    kept = []
    for fires in (True, False, False, True, True, True, True, True, True):
        bound.advance(2, hold=2)
        kept.append(bound.may_be_dead)
        tracker.count(torch.tensor([fires]), 2)
    # A copy arrives one step late: the last step with a bound of dead_after is number 4.
    assert kept == [True] * 7 + [False] * 2
