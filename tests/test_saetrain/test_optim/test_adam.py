"""`saetrain.optim.adam` against torch's Adam under transformers' schedule, as sparsify runs it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import get_linear_schedule_with_warmup

from saetrain.kernels.on_torch import update
from saetrain.optim import AdamConstants
from saetrain.optim.adam import Adam
from saetrain.optim.schedule import Schedule

LR, WARMUP, STEPS = 0.03, 5, 20


def parameters() -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator))
        for name, shape in {"W": (7, 5), "b": (5,)}.items()
    }


def give_gradients(parameters: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def copies(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_weights_follow_torchs_adam_under_transformers_schedule() -> None:
    ours, theirs = parameters(), parameters()
    adam = Adam(ours, LR, Schedule("linear", WARMUP, STEPS))
    peer = torch.optim.Adam(theirs.values(), lr=LR)
    schedule = get_linear_schedule_with_warmup(peer, WARMUP, STEPS)
    for step in range(STEPS):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        adam.step(step)
        peer.step()
        schedule.step()
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-7)
    assert_same(adam.weights_to_export(), copies(ours))


@pytest.mark.parametrize("constants", [AdamConstants(), AdamConstants(0.8, 0.99, 1e-12)])
@pytest.mark.parametrize("weight_decay", [None, 0.1])
def test_weights_and_state_are_torchs_bit_for_bit_whatever_the_parts(
    weight_decay: float | None, constants: AdamConstants, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(update, "_BYTES", 5000)
    generator = torch.Generator().manual_seed(0)
    shapes = {"W": (1001, 57), "b": (1001,), "one": (1,)}
    ours = {n: nn.Parameter(torch.randn(s, generator=generator)) for n, s in shapes.items()}
    theirs = {name: nn.Parameter(value) for name, value in copies(ours).items()}
    schedule = Schedule("cosine", 3, STEPS)
    adam = Adam(ours, LR, schedule, constants=constants, weight_decay=weight_decay)
    kind = torch.optim.Adam if weight_decay is None else torch.optim.AdamW
    beta1, beta2, eps = constants
    peer = kind(
        theirs.values(),
        lr=LR,
        betas=(beta1, beta2),
        eps=eps,
        weight_decay=weight_decay or 0.0,
        fused=True,
    )
    for step in range(STEPS):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        peer.param_groups[0]["lr"] = adam.learning_rate(step)
        adam.step(step)
        peer.step()
    assert_same(copies(ours), copies(theirs))
    state = {f"{n}.{k}": v for n, p in theirs.items() for k, v in peer.state[p].items()}
    assert_same(adam.state_tensors(), state)


def test_gradients_below_1e_8_move_weights_by_the_learning_rate_with_a_smaller_eps() -> None:
    """Gradients of 5e-9 occur with 32,768 rows of width 4,096."""
    moved = []
    for eps in (1e-8, 1e-12):
        weights = {"W": nn.Parameter(torch.zeros(64, 32))}
        adam = Adam(weights, LR, constants=AdamConstants(eps=eps))
        for step in range(3):
            weights["W"].grad = torch.full((64, 32), 5e-9)
            adam.step(step)
        moved.append(-weights["W"].detach() / (3 * LR))
    assert moved[0].max() < 0.4
    assert moved[1].min() > 0.99


def test_the_first_step_of_a_warm_up_changes_nothing_and_drops_the_gradients() -> None:
    ours = parameters()
    adam = Adam(ours, LR, Schedule("linear", WARMUP, STEPS))
    give_gradients(ours, 0)
    adam.step(0)
    assert_same(copies(ours), copies(parameters()))
    assert all(parameter.grad is None for parameter in ours.values())


@pytest.mark.parametrize("steps_before", [0, 1, 9])
def test_a_loaded_state_continues_bit_for_bit(steps_before: int) -> None:
    ours = parameters()
    adam = Adam(ours, LR, Schedule("linear", WARMUP, STEPS))
    for step in range(steps_before):
        give_gradients(ours, step)
        adam.step(step)
    again = {name: nn.Parameter(value) for name, value in copies(ours).items()}
    resumed = Adam(again, LR, Schedule("linear", WARMUP, STEPS))
    resumed.load_state(copies(adam.state_tensors()), adam.state_numbers())
    for step in range(steps_before, STEPS):
        for optimizer, weights in ((adam, ours), (resumed, again)):
            give_gradients(weights, step)
            optimizer.step(step)
    assert_same(copies(ours), copies(again))
    assert_same(adam.state_tensors(), resumed.state_tensors())


@pytest.mark.parametrize("weight_decay", [None, 0.1])
def test_adam_and_adamw_are_the_plain_formula_in_float64(
    weight_decay: float | None,
) -> None:
    ours = {name: nn.Parameter(p.double()) for name, p in parameters().items()}
    schedule = Schedule("stable-then-decay", 3, STEPS, 8)
    adam = Adam(ours, LR, schedule=schedule, weight_decay=weight_decay)
    W = ours["W"].detach().clone()
    first, second = torch.zeros_like(W), torch.zeros_like(W)
    for step in range(STEPS):
        give_gradients(ours, step)
        gradient = ours["W"].grad
        assert gradient is not None
        lr = LR * schedule.factor(step)
        W = W * (1 - lr * (weight_decay or 0.0))
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        unbiased = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
        W = W - lr * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
        adam.step(step)
        torch.testing.assert_close(ours["W"].detach(), W, rtol=1e-10, atol=1e-12)
