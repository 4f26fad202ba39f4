"""--target-l0: the penalties, the weight that is steered, and runs that come to their target.

Letters: N tokens, D d_in, M num_latents.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actcache.errors import ConfigError
from saetrain.config.fit_config import FitConfig
from saetrain.config.grid import vary
from saetrain.config.sae import SaeConfig
from saetrain.launch.run import fit
from saetrain.model.losses import LossConfig, compute_losses, make_loss_config
from saetrain.model.sae import Sae, build_sae
from saetrain.runs.checkpoint import newest_state
from saetrain.tracking.jsonl import METRICS
from saetrain.training.penalty_control import PenaltyController

Options = Callable[..., FitConfig]
Snapshot = Callable[[Path], dict[str, bytes]]

N, D, M, TARGET, BANDWIDTH = 40, 9, 30, 10.0, 0.7
CONFIG = SaeConfig(D, M, 1, activation="jumprelu", sparsity=0.3, threshold=0.4, bandwidth=BANDWIDTH)
KINDS = ("jumprelu", "relu", "gated")


class Killed(BaseException):
    """A simulated SIGKILL: no product code catches it."""


def rows() -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def sae_of(config: SaeConfig = CONFIG) -> Sae:
    """Return an SAE in float64 with random weights."""
    sae = build_sae(config, seed=3, dtype=torch.float64)
    with torch.no_grad():
        noise = torch.randn(M, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        sae.W_enc.mul_(4)
        sae.b_enc.copy_(0.3 * noise)
    return sae


def smooth_count(pre_acts: Tensor, threshold: Tensor) -> Tensor:
    """Return H(p - θ) with the ramp of a rectangular kernel, of which autograd has the gradient."""
    ramp = ((pre_acts - threshold) / BANDWIDTH + 0.5).clamp(0, 1)
    return (pre_acts > threshold).double() + ramp - ramp.detach()  # [N, M]


# --- penalties -----------------------------------------------------------------------------------


@pytest.mark.parametrize("frequency", [None, 0.7])
@pytest.mark.parametrize("log_threshold", [False, True])
def test_the_penalty_of_jumprelu_is_quadratic_in_l0(
    frequency: float | None, log_threshold: bool
) -> None:
    sae = build_sae(CONFIG, seed=3, dtype=torch.float64, log_threshold=log_threshold)
    with torch.no_grad():
        sae.W_enc.mul_(4)
    losses = compute_losses(
        sae, rows(), 2.0, None, make_loss_config(CONFIG, 0, target_l0=TARGET, frequency=frequency)
    )
    (term,) = losses.terms
    assert term.weight == pytest.approx(3 * 0.3)
    assert (sae(rows()).top_acts > 0).sum(dim=1).max() <= 3 * TARGET
    (parameter,) = sae.activation.parameters()  # type: ignore[attr-defined]
    found = torch.autograd.grad(term.value, [parameter, sae.W_enc, sae.b_enc])

    threshold = sae.activation.thresholds()  # type: ignore[attr-defined]
    fires = smooth_count((rows() - sae.b_dec) @ sae.W_enc.T + sae.b_enc, threshold)
    expected = TARGET / 2 * (fires.sum(dim=1) / TARGET - 1).square().mean()
    if frequency is not None:
        expected = expected + frequency / 0.1 * fires.mean(dim=0).square().sum()
    torch.testing.assert_close(term.value, expected)
    of_expected = torch.autograd.grad(expected, [parameter, sae.W_enc, sae.b_enc])
    assert all(gradient.abs().max() > 0 for gradient in of_expected)
    for got, wanted in zip(found, of_expected, strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("steered", [None, 0.7, 3.0])
def test_beyond_three_times_the_target_the_penalty_of_jumprelu_is_linear(
    steered: float | None,
) -> None:
    """L0 of thousands at the start would be pushed down so hard that latents die for good."""
    sae, target = sae_of(), 3.0
    moved = None if steered is None else torch.tensor(steered, dtype=torch.float64)
    loss_config = make_loss_config(CONFIG, 0, target_l0=target)
    (term,) = compute_losses(sae, rows(), 2.0, None, loss_config, steered=moved).terms
    (found,) = torch.autograd.grad(term.value, [sae.b_enc])

    fires = smooth_count(
        (rows() - sae.b_dec) @ sae.W_enc.T + sae.b_enc,
        sae.activation.thresholds(),  # type: ignore[attr-defined]
    )
    l0, at = fires.sum(dim=1), steered or target
    assert l0.min() < 3 * target < l0.max()
    steepest = 3 * target / at - 1
    linear = at / 2 * steepest**2 + steepest * (l0 - 3 * target)
    expected = torch.where(l0 > 3 * target, linear, at / 2 * (l0 / at - 1).square()).mean()
    torch.testing.assert_close(term.value, expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, [sae.b_enc])[0])


def test_the_quadratic_penalty_is_a_quarter_of_that_of_saelens() -> None:
    sae = sae_of()
    (term,) = compute_losses(
        sae, rows(), 2.0, None, make_loss_config(CONFIG, 0, target_l0=TARGET)
    ).terms
    l0 = (sae(rows()).top_acts > 0).sum(dim=1).double()
    of_saelens = (2 / TARGET * (l0 - TARGET) ** 2).mean()
    torch.testing.assert_close(term.value, of_saelens / 4)


@pytest.mark.parametrize("kind", ["relu", "gated"])
def test_other_kinds_keep_their_penalty(kind: str) -> None:
    config = dataclasses.replace(CONFIG, activation=kind)
    found = [
        compute_losses(
            sae_of(config), rows(), 2.0, None, make_loss_config(config, 0, target_l0=target)
        )
        for target in (None, TARGET)
    ]
    assert found[0].terms[0].value == found[1].terms[0].value


@pytest.mark.parametrize("kind", KINDS)
def test_the_steered_value_is_the_target_of_jumprelu_and_the_weight_of_others(kind: str) -> None:
    config = dataclasses.replace(CONFIG, activation=kind)
    losses_config = make_loss_config(config, 8, target_l0=TARGET)
    steered = torch.tensor(9.5, dtype=torch.float64)
    for step, risen in ((0, 1 / 8), (3, 4 / 8), (7, 1.0), (100, 1.0)):
        sae = sae_of(config)
        found = compute_losses(sae, rows(), 2.0, None, losses_config, step, steered=steered)
        target, weight = (9.5, 3 * 0.3) if kind == "jumprelu" else (TARGET, 9.5)
        fixed = dataclasses.replace(losses_config, target_l0=target, sparsity=weight)
        expected = compute_losses(sae, rows(), 2.0, None, fixed, step)
        assert float(found.terms[0].weight) == pytest.approx(weight * risen)
        torch.testing.assert_close(found.total(0.0), expected.total(0.0))


# --- controller ---------------------------------------------------------------------------------


def controller(
    sparsity: float = 0.01, warmup: int = 5, steps: int = 100, quadratic: bool = False
) -> PenaltyController:
    config = LossConfig(sparsity=sparsity, warmup=warmup, target_l0=8.0)
    return PenaltyController(config, steps, torch.device("cpu"), quadratic=quadratic)


def count(steered: PenaltyController, l0: float, steps: int) -> float:
    for _ in range(steps):
        steered.count(torch.tensor(l0, dtype=torch.float64))
    return float(steered.value())


def test_the_weight_starts_at_the_default_and_follows_the_error() -> None:
    assert float(controller().value()) == pytest.approx(0.01)
    assert count(controller(), 8.0, 50) == pytest.approx(0.01)
    assert count(controller(), 12.0, 50) > 0.03
    assert count(controller(), 6.0, 50) < 0.005
    # The error is clipped, so that a start far from the target does not run away.
    assert count(controller(), 1e6, 50) == count(controller(), 8 * 2.72, 50)
    assert count(controller(), 0.0, 50) == count(controller(), 8 / 2.72, 50)


def test_the_target_of_a_quadratic_penalty_moves_against_the_error_within_bounds() -> None:
    assert float(controller(quadratic=True).value()) == 8.0
    assert count(controller(quadratic=True), 8.0, 50) == pytest.approx(8.0)
    assert count(controller(quadratic=True), 9.0, 50) < 8.0
    assert count(controller(quadratic=True), 7.0, 50) > 8.0
    assert count(controller(quadratic=True, steps=1000), 1e6, 1000) == pytest.approx(
        8 * math.exp(-4 - 1)
    )
    assert count(controller(quadratic=True, steps=1000), 1e-6, 1000) == pytest.approx(
        8 * math.exp(2 + 1)
    )


def test_what_the_integral_of_a_quadratic_penalty_has_wound_up_is_unwound_faster() -> None:
    """L0 collapses for 150 of 1,000 steps, and is then half above the target."""
    wound, fresh = (controller(quadratic=True, steps=1000) for _ in range(2))
    count(wound, 1.0, 150)
    count(fresh, 8.0, 150)
    assert float(wound.state[0]) < -1
    moved = []
    for steered in (wound, fresh):
        count(steered, 12.0, 20)  # the average error is that of these steps
        before = float(steered.state[0])
        count(steered, 12.0, 20)
        moved.append(float(steered.state[0]) - before)
    assert moved[0] == pytest.approx(5 * moved[1], rel=0.1)


def test_the_integral_waits_for_the_warm_up() -> None:
    steered = controller(warmup=10)
    count(steered, 100.0, 10)
    assert float(steered.state[0]) == 0
    count(steered, 100.0, 1)
    assert float(steered.state[0]) > 0


@pytest.mark.parametrize("start", [1e-4, 1e-2, 0.3])
def test_a_lagging_l0_comes_to_the_target_from_a_weight_far_off(start: float) -> None:
    """L0 = 8 at weight 0.01, and follows the weight with a lag of a twentieth of the run."""
    steps = 300
    steered, log_l0 = controller(start, 15, steps), 5.0
    for _ in range(steps):
        at = math.log(8) - 0.7 * (float(steered.value().log()) - math.log(0.01))
        log_l0 += (at - log_l0) / (steps / 20)
        steered.count(torch.tensor(log_l0, dtype=torch.float64).exp())
    assert math.exp(log_l0) == pytest.approx(8.0, rel=0.05)


def test_a_quadratic_penalty_that_leads_elsewhere_is_corrected() -> None:
    """L0 follows the target to a fifth less, with a lag of a twentieth of the run."""
    steps, log_l0 = 300, 5.0
    steered = controller(0.02, 15, steps, quadratic=True)
    for _ in range(steps):
        log_l0 += (float(steered.value().log()) + math.log(0.8) - log_l0) / (steps / 20)
        steered.count(torch.tensor(log_l0, dtype=torch.float64).exp())
    assert math.exp(log_l0) == pytest.approx(8.0, rel=0.05)


# --- runs ----------------------------------------------------------------------------------------


def steered_run(options: Options, **changes: Any) -> FitConfig:
    more = {"optimizer": "adam", "hookpoint": ("layers.0",), "lr_warmup_steps": None, "lr": 0.02}
    return options(**more | changes)


def test_short_runs_come_near_their_target(
    make_cache: Callable[..., Path], options: Options
) -> None:
    cache = str(make_cache(shards=16, sequences=32))
    config = options(
        cache=cache,
        hookpoint=("layers.0",),
        epochs=4,
        batch_size=128,
        optimizer="adam",
        lr=None,
        lr_warmup_steps=None,
        dead_after=None,
        activation="relu",
        target_l0=8.0,
    )
    config = vary(config, activation=KINDS)
    summary = fit(config)
    assert summary.held_out.keys() == {f"layers.0/{kind}" for kind in KINDS}
    for name, found in summary.held_out.items():
        assert found["l0"] == pytest.approx(8.0, rel=0.12), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_to_the_same_bytes_from_every_step(
    options: Options, snapshot: Snapshot, kind: str
) -> None:
    frequency = {"frequency_penalty": 1.0} if kind == "jumprelu" else {}
    config = steered_run(
        options, activation=kind, target_l0=5.0, save_every=1, keep_every=1, **frequency
    )
    fit(config)
    root = Path(config.out)
    expected = snapshot(root)
    for first in (1, 5, 11):
        for path in root.glob("checkpoint-*"):
            if int(path.name.split("-")[1].partition(".")[0]) > first:
                path.unlink()
        assert fit(dataclasses.replace(config, resume=True)).new_steps == 12 - first
        assert snapshot(root) == expected
    lines = [json.loads(text) for text in (root / METRICS).read_text().splitlines()]
    key = "target" if kind == "jumprelu" else "sparsity"
    assert all(line["saes"]["layers.0"][key] > 0 for line in lines)


def test_a_run_without_a_target_has_no_state_of_a_steering(options: Options) -> None:
    config = steered_run(options, activation="relu")
    fit(config)
    assert '"sparsity"' not in (Path(config.out) / METRICS).read_text()
    assert newest_state(Path(config.out)) is not None


def test_a_run_that_misses_its_target_warns(options: Options) -> None:
    config = vary(steered_run(options, activation="relu", lr=1e-5), target_l0=(1.0, 2.0))
    (warning,) = [w for w in fit(config).warnings if "--target-l0" in w]
    assert warning.startswith("layers.0/l01: L0 on held-out rows is ")
    assert warning.endswith(
        "--target-l0 1 (1 more SAEs likewise): a longer run, with --epochs or a "
        "smaller --batch-size"
    )


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"optimizer": "signum"}, "signum saves their average"),
        ({"save_best": True, "val_every": 2}, "--save-best keeps the lowest FVU"),
        ({"activation": "topk"}, "is made sparse by --k"),
        ({"sparsity": 0.1}, "--sparsity and --target-l0 are mutually exclusive"),
        ({"frequency_penalty": 1.0, "micro_batch_size": 16}, "in a whole batch"),
        ({"frequency_penalty": 1.0, "parallel": "ddp"}, "in a whole batch"),
        ({"frequency_penalty": 1.0, "activation": "relu"}, "needs --activation jumprelu"),
        ({"target_l0": 0.0}, "--target-l0 is out of range"),
    ],
)
def test_what_cannot_be_steered_is_refused(
    options: Options, given: dict[str, Any], message: str
) -> None:
    good = {"activation": "jumprelu", "target_l0": 5.0}
    with pytest.raises(ConfigError, match=message):
        steered_run(options, **good | given)


def test_a_target_above_the_number_of_latents_is_refused(options: Options) -> None:
    config = steered_run(options, activation="relu", target_l0=49.0)
    with pytest.raises(ConfigError, match="larger than the number of latents"):
        fit(config)
    assert not Path(config.out).exists()
