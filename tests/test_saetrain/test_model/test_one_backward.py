"""Losses of sparse latents, which share one encoding, decoding and backward pass.

Letters: N tokens, D d_in, E width of the output, M num_latents, K k.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from saetrain.kernels import encode, on_torch
from saetrain.kernels import sorted_pairs as pairs
from saetrain.model import losses
from saetrain.model.activations import Activation, BatchTopK, GroupMax, TopK
from saetrain.model.losses import FVU_ONLY, LossConfig
from saetrain.model.sae import Sae

N, D, E, M, K = 24, 10, 14, 40, 4
MATRYOSHKA = LossConfig(prefixes=(3, 20))
MULTI_TOPK = LossConfig(multi_topk=True)
DEAD = torch.isin(torch.arange(M), torch.tensor([0, 7, 8, 21, 39]))  # [M]
RECIPES = {
    "plain": {},
    "micro-batches": {"micro_batch_size": 10},
    "accumulated": {"grad_acc_steps": 2, "micro_batch_size": 10},
    "folded": {"decoder_norm": "fold"},
    "autocast": {"autocast": True},
}


def make(activation: Activation | None = None, **kind: Any) -> Sae:
    sae = Sae(D, M, K, activation=activation, seed=5, dtype=torch.float64, **kind)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for weight in sae.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)
    return sae


def rows(width: int = D) -> Tensor:
    generator = torch.Generator().manual_seed(8)
    return torch.randn(N, width, generator=generator, dtype=torch.float64)


def gradients(
    accumulate: Callable[..., Any],
    sae: Sae,
    x: Tensor,
    loss_config: LossConfig,
    settings: dict[str, Any],
) -> dict[str, Tensor]:
    """Add up the gradients of two batches."""
    sae.zero_grad()
    for step in range(2):
        given = {"dead": DEAD, "loss_config": loss_config, "step": step, "auxk_alpha": 0.5}
        accumulate(sae, x, variance=2.5, **given, **settings)
    return {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss_config", [FVU_ONLY, MATRYOSHKA, MULTI_TOPK])
@pytest.mark.parametrize("settings", RECIPES.values(), ids=RECIPES.keys())
def test_weight_rows_of_dead_latents_have_the_gradient_of_indexing(
    monkeypatch: pytest.MonkeyPatch,
    loss_config: LossConfig,
    settings: dict[str, Any],
    accumulate: Callable[..., Any],
) -> None:
    sae = make()
    found = gradients(accumulate, sae, rows(), loss_config, settings)
    forward: Callable[..., Any] = losses._forward

    def without_rows(*arguments: Any) -> Any:
        return *forward(*arguments[:-1], None)[:-1], None

    monkeypatch.setattr(losses, "_forward", without_rows)
    want = gradients(accumulate, sae, rows(), loss_config, settings)
    assert found.keys() == want.keys() == dict(sae.named_parameters()).keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, want[name], msg=lambda m, n=name: f"{n}: {m}")


KINDS: dict[str, tuple[Callable[[], Sae], LossConfig, int]] = {
    "topk": (make, FVU_ONLY, D),
    "topk, matryoshka": (make, MATRYOSHKA, D),
    "topk, multi_topk": (make, MULTI_TOPK, D),
    "batchtopk": (lambda: make(BatchTopK(K)), FVU_ONLY, D),
    "batchtopk, matryoshka": (lambda: make(BatchTopK(K)), MATRYOSHKA, D),
    "groupmax": (lambda: make(GroupMax(K)), FVU_ONLY, D),
    "groupmax, matryoshka": (lambda: make(GroupMax(K)), MATRYOSHKA, D),
    "transcoder": (lambda: make(transcode=True, d_out=E), MULTI_TOPK, D + E),
    "skip": (
        lambda: make(transcode=True, d_out=E, skip_connection=True),
        MATRYOSHKA,
        D + E,
    ),
}


@pytest.mark.parametrize(("build", "loss_config", "width"), KINDS.values(), ids=KINDS.keys())
def test_a_step_multiplies_by_the_encoder_once_and_sorts_once(
    monkeypatch: pytest.MonkeyPatch,
    build: Callable[[], Sae],
    loss_config: LossConfig,
    width: int,
    accumulate: Callable[..., Any],
) -> None:
    sorts, products, sort, product = [], [], pairs.sort_pairs, encode.Product
    for module in (pairs, on_torch.decode):
        monkeypatch.setattr(module, "sort_pairs", lambda *a: sorts.append(1) or sort(*a))
    monkeypatch.setattr(encode, "Product", lambda *a: products.append(1) or product(*a))
    accumulate(build(), rows(width), variance=2.5, loss_config=loss_config)
    assert sum(sorts) == 1
    assert sum(products) == 1


@pytest.mark.parametrize(("build", "loss_config", "width"), KINDS.values(), ids=KINDS.keys())
def test_losses_and_gradients_match_the_reference(
    monkeypatch: pytest.MonkeyPatch,
    build: Callable[[], Sae],
    loss_config: LossConfig,
    width: int,
    accumulate: Callable[..., Any],
) -> None:
    results = []
    for backend in ("torch", "reference"):
        monkeypatch.setenv("SAETRAIN_KERNELS", backend)
        sae = build()
        given = {"dead": DEAD, "loss_config": loss_config, "auxk_alpha": 0.5}
        found = accumulate(sae, rows(width), variance=2.5, **given)
        named = {"fvu": found.fvu, "auxk": found.auxk}
        named |= {str(n): term.value for n, term in enumerate(found.terms)}
        results.append(named | {n: p.grad for n, p in sae.named_parameters() if p.grad is not None})
    ours, reference = results
    assert ours.keys() == reference.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, reference[name], msg=lambda m, n=name: f"{n}: {m}")


def test_every_sparse_activation_has_a_selector_and_batchtopk_only_in_training() -> None:
    for activation in (TopK(K), BatchTopK(K), GroupMax(K)):
        assert activation.selector() is not None
        make(activation).eval()
        assert (activation.selector() is None) == isinstance(activation, BatchTopK)
