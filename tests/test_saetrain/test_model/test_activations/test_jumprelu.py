"""Thresholds learnt as logarithms. Letters: N tokens, D d_in, M num_latents."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from saetrain.config.sae import SaeConfig, SaeEntry
from saetrain.model.activations import JumpRelu, compiled, jumprelu, to_saved
from saetrain.model.losses import compute_losses, make_loss_config
from saetrain.model.sae import Sae, build_sae
from saetrain.model.weight_scales import fold, folded_losses, input_scaling

N, D, M = 40, 9, 30
CONFIG = SaeConfig(D, M, 1, activation="jumprelu", sparsity=0.3, threshold=0.4, bandwidth=0.7)


def make(log_threshold: bool) -> tuple[Sae, JumpRelu]:
    """Return an SAE in float64 with random weights and thresholds."""
    sae = build_sae(CONFIG, dtype=torch.float64, log_threshold=log_threshold)
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(sorted(sae.named_parameters())):
            generator = torch.Generator().manual_seed(seed)
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            theta = 0.2 + 0.4 * noise.abs()
            values = {"activation.threshold": theta, "activation.log_threshold": theta.log()}
            parameter.copy_(values.get(name, 0.4 * noise))
        sae.activation.project()
    assert isinstance(sae.activation, JumpRelu)
    return sae, sae.activation


def rows() -> Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("losses_of", [compute_losses, folded_losses])
def test_the_gradient_of_a_logarithm_is_theta_times_that_of_theta(losses_of: Any) -> None:
    (plain, of_theta), (log, of_log) = make(False), make(True)
    torch.testing.assert_close(of_log.thresholds(), of_theta.thresholds())
    for sae in (plain, log):
        losses_of(sae, rows(), 2.0, None, make_loss_config(CONFIG, 0)).total(0.0).backward()
    assert of_theta.threshold.grad is not None
    assert of_theta.threshold.grad.abs().min() > 0
    expected = of_theta.threshold * of_theta.threshold.grad
    torch.testing.assert_close(of_log.log_threshold.grad, expected)
    torch.testing.assert_close(log.W_enc.grad, plain.W_enc.grad)
    torch.testing.assert_close(log.b_enc.grad, plain.b_enc.grad)


@pytest.mark.parametrize("folds", [False, True])
def test_a_saved_sae_has_the_thresholds_of_unscaled_rows_and_computes_the_same(folds: bool) -> None:
    sae, _ = make(True)
    sae.normalise_decoder()
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.3, 3, M, dtype=torch.float64)[:, None] if folds else 1)
    scaling = input_scaling(
        SaeEntry("h", CONFIG, 1.0, 0, scales=(0.03,)), torch.device("cpu"), torch.float64
    )
    assert scaling is not None
    weights = dict(sae.named_parameters())
    raw = to_saved(scaling.fold_into(fold(weights) if folds else weights))
    saved = build_sae(CONFIG, dtype=torch.float64)
    saved.load_state_dict(raw)
    unscaled, scaled = saved(rows() / 0.03), sae(rows())
    assert 0 < int((unscaled.top_acts > 0).sum()) < N * M
    torch.testing.assert_close(unscaled.reconstruction * 0.03, scaled.reconstruction)


def test_saved_thresholds_are_loaded_as_logarithms_and_those_of_0_as_small_ones() -> None:
    plain, of_theta = make(False)
    _, of_log = make(True)
    with torch.no_grad():
        of_theta.threshold[:2] = torch.tensor([0.0, -0.5], dtype=torch.float64)
    loaded = build_sae(CONFIG, dtype=torch.float64, log_threshold=True)
    assert isinstance(loaded.activation, JumpRelu)
    loaded.load_state_dict(loaded.activation.from_saved(plain.state_dict()))
    least = 1e-3 * of_log.bandwidth
    expected = of_theta.threshold.clamp(min=least)
    torch.testing.assert_close(loaded.activation.thresholds(), expected)
    assert of_theta.from_saved(plain.state_dict()).keys() == plain.state_dict().keys()


def test_a_logarithm_is_not_clamped() -> None:
    _, activation = make(True)
    before = activation.log_threshold.detach().clone()
    assert before.min() < 0
    activation.project()
    assert torch.equal(activation.log_threshold, before)


@pytest.mark.parametrize("of", [torch.float32, torch.bfloat16])
def test_some_rows_at_a_time_give_the_bits_of_all_rows(
    of: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for size in (1 << 30, 1000):
        monkeypatch.setattr(compiled, "_BYTES", size)
        generator = torch.Generator().manual_seed(0)
        pre_acts, d_acts = torch.randn(2, 101, 37, generator=generator).to(of)
        pre_acts.requires_grad_()
        threshold = torch.rand(37, generator=generator).requires_grad_()
        acts = jumprelu._jump(pre_acts, threshold, 0.5)
        count = jumprelu._count(pre_acts.detach(), threshold, 0.5)
        slopes = [d_acts, torch.rand(101, generator=generator)]
        gradients = torch.autograd.grad([acts, count], [pre_acts, threshold], slopes)
        found.append([acts, count, *gradients])
    assert all(map(torch.equal, *found))
