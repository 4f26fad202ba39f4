"""`saetrain.optim.muon` against sparsify's Muon, and a plain formula in float64."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from actcache.errors import ConfigError
from saetrain.optim import AdamConstants
from saetrain.optim.muon import Muon
from saetrain.optim.schedule import Schedule

LR, STEPS, DECAY = 0.01, 12, 0.1
CONSTANT = Schedule("constant", 0, STEPS)


def parameters(dtype: torch.dtype = torch.float32) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in {"W_enc": (24, 8), "b_enc": (24,), "W_dec": (8, 24)}.items()
    }


def give_gradients(parameters: dict[str, nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(100 + step)
    for parameter in parameters.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


@pytest.mark.parametrize("constants", [AdamConstants(), AdamConstants(0.5, 0.9, 0.1)])
def test_its_steps_are_those_of_sparsifys_muon_and_adam(
    sparsify: ModuleType, constants: AdamConstants
) -> None:
    from sparsify.muon import Muon as Theirs

    ours, theirs = parameters(), parameters()
    muon = Muon(ours, LR, CONSTANT, DECAY, constants)
    beta1, beta2, eps = constants
    store_group = [
        Theirs([theirs["W_enc"], theirs["W_dec"]], lr=LR, ddp=False),
        torch.optim.Adam([theirs["b_enc"]], lr=LR, betas=(beta1, beta2), eps=eps),
    ]
    start = {name: p.detach().clone() for name, p in ours.items()}
    for step in range(STEPS):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        muon.step(step)
        for peer in store_group:
            peer.step()
    for name, weights in ours.items():
        moved = float((weights.detach() - start[name]).norm())
        # Both iterate in bfloat16, in another order of products.
        assert float((weights - theirs[name]).detach().norm()) < 0.02 * moved, name


def orthogonalised(G: Tensor) -> Tensor:
    """Five Newton-Schulz iterations in G's type, Jordan et al. (2024)."""
    X = G / G.norm()
    X = X.T if G.shape[0] > G.shape[1] else X
    for _ in range(5):
        A = X @ X.T
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return X.T if G.shape[0] > G.shape[1] else X


def test_a_step_is_the_plain_formula_in_float64_but_for_bfloat16() -> None:
    ours = parameters(torch.float64)
    muon = Muon(ours, LR, CONSTANT, DECAY)
    W, momentum = ours["W_enc"].detach().clone(), torch.zeros(24, 8, dtype=torch.float64)
    for step in range(STEPS):
        give_gradients(ours, step)
        G = ours["W_enc"].grad
        assert G is not None
        momentum = 0.95 * momentum + 0.05 * G
        update = orthogonalised(0.05 * G + 0.95 * momentum) * 0.2 * 24**0.5
        expected = W - LR * DECAY * W - LR * update
        muon.step(step)
        moved = float((expected - W).norm())
        W = ours["W_enc"].detach().clone()
        assert float((W - expected).norm()) < 0.03 * moved


def test_both_parts_follow_the_schedule() -> None:
    ours = parameters()
    muon = Muon(ours, LR, Schedule("linear", 4, STEPS), DECAY)
    before = {name: p.detach().clone() for name, p in ours.items()}
    give_gradients(ours, 0)
    muon.step(0)  # at a learning rate of 0
    assert all(torch.equal(p, before[name]) for name, p in ours.items())
    give_gradients(ours, 1)
    muon.step(1)
    assert not any(torch.equal(p, before[name]) for name, p in ours.items())


def test_a_torch_without_muon_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ConfigError, match=r"torch\.optim\.Muon(.|\n)*2\.9"):
        Muon(parameters(), LR, CONSTANT, DECAY)
