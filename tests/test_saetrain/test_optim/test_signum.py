"""`saetrain.optim.signum` against sparsify's SignSGD inside schedulefree's wrapper."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from schedulefree import ScheduleFreeWrapper
from torch import Tensor, nn

from saetrain.optim.schedule import Schedule
from saetrain.optim.signum import Signum

LR = 0.03
SHAPES = {"W": (7, 5), "b": (5,)}


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator))
        for name, shape in SHAPES.items()
    }


def give_gradients(parameters: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters.values():
        gradient = torch.randn(parameter.shape, generator=generator)
        gradient[gradient.abs() < 0.1] = 0.0  # the sign of 0 is 0
        parameter.grad = gradient.to(parameter.dtype)


def copies(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def assert_same(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture
def make_sparsify_optimizer(sparsify: ModuleType) -> Callable[[dict[str, nn.Parameter]], Any]:
    from sparsify.sign_sgd import SignSGD

    def make(parameters: dict[str, nn.Parameter]) -> Any:
        wrapper = ScheduleFreeWrapper(SignSGD(parameters.values(), lr=LR), momentum=0.95)
        wrapper.train()
        return wrapper

    return make


def test_the_trained_and_the_exported_weights_are_the_peers_bit_for_bit(
    make_sparsify_optimizer: Callable[..., Any],
) -> None:
    ours, theirs = parameters(), parameters()
    signum, peer = Signum(ours, LR), make_sparsify_optimizer(theirs)
    for step in range(30):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        signum.step(step)
        peer.step()
        assert_same(ours, theirs)
        averaged_weights, averaged = copy.deepcopy((theirs, peer))
        averaged.eval()
        assert_same(signum.weights_to_export(), averaged_weights)


def test_exporting_does_not_change_the_live_weights_by_a_bit() -> None:
    ours = parameters()
    signum = Signum(ours, LR)
    for step in range(20):
        give_gradients(ours, step)
        signum.step(step)
    before, z = copies(ours), copies(signum.state_tensors())
    exported = signum.weights_to_export()
    assert_same(copies(ours), before)
    assert_same(copies(signum.state_tensors()), z)
    assert not torch.equal(exported["W"], ours["W"])
    exported["W"].zero_()  # what was exported shares no memory with what is trained
    assert_same(copies(ours), before)


def test_before_the_first_step_the_parameters_are_exported() -> None:
    ours = parameters()
    assert_same(Signum(ours, LR).weights_to_export(), copies(ours))


def test_a_step_drops_the_gradients() -> None:
    ours = parameters()
    signum = Signum(ours, LR)
    give_gradients(ours, 0)
    signum.step(0)
    assert all(parameter.grad is None for parameter in ours.values())


@pytest.mark.parametrize("steps_before", [0, 1, 9])
def test_a_loaded_state_continues_bit_for_bit(steps_before: int) -> None:
    ours = parameters()
    signum = Signum(ours, LR)
    for step in range(steps_before):
        give_gradients(ours, step)
        signum.step(step)
    again = {name: nn.Parameter(value) for name, value in copies(ours).items()}
    resumed = Signum(again, LR)
    resumed.load_state(copies(signum.state_tensors()), signum.state_numbers())
    for step in range(steps_before, steps_before + 9):
        for optimizer, weights in ((signum, ours), (resumed, again)):
            give_gradients(weights, step)
            optimizer.step(step)
    assert_same(copies(ours), copies(again))
    assert_same(signum.state_tensors(), resumed.state_tensors())
    assert_same(signum.weights_to_export(), resumed.weights_to_export())
    assert signum.state_numbers() == resumed.state_numbers()


def test_with_a_schedule_it_is_the_plain_formula_in_float64() -> None:
    """Defazio et al. (2024), with signs for the gradient; a warm-up begins above 0."""
    schedule, momentum = Schedule("cosine", 4, 20), 0.95
    ours = {name: nn.Parameter(p.double()) for name, p in parameters().items()}
    signum = Signum(ours, LR, schedule)
    x, z = ours["W"].detach().clone(), ours["W"].detach().clone()
    largest = weights = 0.0
    for step in range(20):
        y = (1 - momentum) * z + momentum * x
        torch.testing.assert_close(ours["W"].detach(), y, rtol=1e-12, atol=1e-12)
        give_gradients(ours, step)
        gradient = ours["W"].grad
        assert gradient is not None
        lr = LR * ([0.25, 0.5, 0.75, 1.0][step] if step < 4 else schedule.factor(step))
        z = z - lr * gradient.sign()
        largest = max(largest, lr)
        weights += largest**2
        x = x + largest**2 / weights * (z - x)
        signum.step(step)
    torch.testing.assert_close(signum.weights_to_export()["W"], x, rtol=1e-12, atol=1e-12)
