"""An update under a flag is an update, or nothing at all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saetrain.optim import Optimizer, conditional_step
from saetrain.optim.adam import Adam
from saetrain.optim.adam8bit import Adam8bit
from saetrain.optim.muon import Muon
from saetrain.optim.schedule import Schedule
from saetrain.optim.signum import Signum

LR, STEPS = 0.03, 20
SCHEDULE = Schedule("linear", 0, STEPS)
Parameters = dict[str, nn.Parameter]

ALL: dict[str, Callable[[Parameters], Optimizer]] = {
    "signum": lambda p: Signum(p, LR),
    "signum, cosine": lambda p: Signum(p, LR, Schedule("cosine", 3, STEPS)),
    "signum, unit": lambda p: Signum(p, LR, unit="W"),
    "adam": lambda p: Adam(p, LR, schedule=SCHEDULE),
    "adam, unit": lambda p: Adam(p, LR, schedule=SCHEDULE, unit="W"),
    "adamw": lambda p: Adam(p, LR, schedule=SCHEDULE, weight_decay=0.1),
    "adamw, unit": lambda p: Adam(p, LR, schedule=SCHEDULE, weight_decay=0.1, unit="W"),
    "adam8bit": lambda p: Adam8bit(p, LR, SCHEDULE),
    "muon": lambda p: Muon(p, LR, SCHEDULE, 0.1),
}
EVERY_OPTIMIZER = pytest.mark.parametrize("name", ALL)


def parameters() -> Parameters:
    generator = torch.Generator().manual_seed(0)
    shapes = {"W": (96, 64), "b": (5,), "zero": (3,)}
    made = {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}
    made["zero"] = torch.tensor([0.0, -0.0, 1.0])
    return {name: nn.Parameter(value) for name, value in made.items()}


def give_gradients(parameters: Parameters, step: int, spoil: float = 0.0) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        parameter.grad.view(-1)[1] += spoil


def bits(parameters: Parameters, optimizer: Optimizer) -> dict[str, bytes]:
    tensors: dict[str, Any] = {**parameters, **optimizer.state_tensors()}
    return {name: t.detach().contiguous().numpy().tobytes() for name, t in tensors.items()}


def flag(value: bool) -> Tensor:
    return torch.tensor(value)


@EVERY_OPTIMIZER
@pytest.mark.parametrize("spoil", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("masked", [True, False])
def test_a_gradient_that_is_not_finite_changes_no_bit_of_weights_or_state(
    name: str, spoil: float, masked: bool
) -> None:
    """On the device, as on a GPU, and on the host, as on a CPU."""
    weights = parameters()
    optimizer = ALL[name](weights)
    for step in range(3):
        give_gradients(weights, step)
        optimizer.step(step)
    before = bits(weights, optimizer)
    for step in (3, 4):
        give_gradients(weights, step, spoil)
        if masked:
            optimizer.masked_step(step, flag(False))
        else:
            conditional_step(flag(False), optimizer, step)
        assert all(parameter.grad is None for parameter in weights.values())
    assert bits(weights, optimizer) == before


@EVERY_OPTIMIZER
def test_the_first_step_of_all_may_be_the_one_that_is_not_made(name: str) -> None:
    weights, start = parameters(), parameters()
    optimizer = ALL[name](weights)
    give_gradients(weights, 0, float("nan"))
    optimizer.masked_step(0, flag(False))
    for key in weights:
        assert weights[key].detach().numpy().tobytes() == start[key].detach().numpy().tobytes()
    assert all(bool(t.isfinite().all()) for t in optimizer.state_tensors().values())


@EVERY_OPTIMIZER
def test_an_update_under_a_flag_that_is_true_is_the_update(name: str) -> None:
    plain, masked = parameters(), parameters()
    one, two = ALL[name](plain), ALL[name](masked)
    for step in range(5):
        give_gradients(plain, step)
        give_gradients(masked, step)
        one.step(step)
        two.masked_step(step, flag(True))
    assert bits(plain, one) == bits(masked, two)


@EVERY_OPTIMIZER
@pytest.mark.parametrize("steps_before", [0, 1, 7])
def test_a_loaded_state_continues_bit_for_bit(name: str, steps_before: int) -> None:
    ours = parameters()
    optimizer = ALL[name](ours)
    for step in range(steps_before):
        give_gradients(ours, step)
        optimizer.step(step)
    again = {key: nn.Parameter(value.detach().clone()) for key, value in ours.items()}
    resumed = ALL[name](again)
    saved = {key: t.detach().clone() for key, t in optimizer.state_tensors().items()}
    resumed.load_state(saved, dict(optimizer.state_numbers()))
    for step in range(steps_before, steps_before + 5):
        for weights, one in ((ours, optimizer), (again, resumed)):
            give_gradients(weights, step)
            one.step(step)
    assert bits(ours, optimizer) == bits(again, resumed)
    assert optimizer.state_numbers() == resumed.state_numbers()
    exported, expected = resumed.weights_to_export(), optimizer.weights_to_export()
    assert all(torch.equal(exported[key], expected[key]) for key in expected)
