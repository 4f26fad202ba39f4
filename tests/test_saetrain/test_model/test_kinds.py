"""Losses of every kind of SAE, and all their gradients, against plain formulas in float64.

Letters: N tokens, D d_in, E width of the output, M num_latents, K k.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from saetrain.config.sae import SaeConfig
from saetrain.model.activations import BatchTopK, Gated, JumpRelu
from saetrain.model.losses import LossConfig, OutputSlice, compute_losses, make_loss_config
from saetrain.model.sae import Sae, build_sae

N, D, E, M, K = 13, 11, 7, 30, 3
VARIANCE, ALPHA = 7.5, 0.25
DEAD = torch.isin(torch.arange(M), torch.tensor([4, 17, 22]))  # [M]

ACTIVATIONS = ["topk", "batchtopk", "groupmax", "jumprelu", "relu", "gated"]
CONFIGS = {
    "topk": {},
    "batchtopk": {},
    "groupmax": {},
    "jumprelu": {"sparsity": 0.3, "threshold": 0.4, "bandwidth": 0.7},
    "relu": {"sparsity": 0.3},
    "gated": {"sparsity": 0.3},
}
SHAPES: dict[str, dict[str, Any]] = {
    "autoencoder": {},
    "transcoder": {"transcode": True, "d_out": E},
    "skip transcoder": {"transcode": True, "d_out": E, "skip_connection": True},
    "crosscoder": {"widths": (5, 6)},
}


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(config: SaeConfig) -> Sae:
    """Build an SAE in float64 with random parameters."""
    sae = build_sae(config, dtype=torch.float64)
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(sae.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator(seed), dtype=torch.float64)
            parameter.copy_(0.4 * noise.abs() if name == "activation.threshold" else 0.4 * noise)
    return sae


def rows_for(config: SaeConfig) -> Tensor:
    width = config.d_in + config.width_out * config.transcode
    return torch.randn(N, width, generator=generator(99), dtype=torch.float64)


def loss_config_for(config: SaeConfig) -> LossConfig:
    parts = (OutputSlice("a", 5, 3.0), OutputSlice("b", 6, 4.5)) if config.widths else ()
    return make_loss_config(config, 0, parts)


# --- the formulas, densely -----------------------------------------------------------------------


def keep(pre_acts: Tensor, selected: Tensor) -> Tensor:
    return torch.where(selected, pre_acts.relu(), 0)


def plain_acts(sae: Sae, config: SaeConfig, pre: Tensor) -> Tensor:
    """Compute z [N, M]; straight-through estimates are a term: the slope times θ - θ.detach()."""
    if config.activation == "topk":
        return keep(pre, pre >= pre.sort(dim=1, descending=True).values[:, K - 1 : K])
    if config.activation == "batchtopk":
        return keep(pre, pre >= pre.flatten().sort(descending=True).values[K * N - 1])
    if config.activation == "groupmax":
        groups = pre.reshape(N, K, M // K)
        return keep(groups, groups == groups.max(dim=2, keepdim=True).values).reshape(N, M)
    if config.activation == "relu":
        return pre.relu()
    if config.activation == "gated":
        assert isinstance(sae.activation, Gated)
        without_bias = pre - sae.b_enc
        magnitudes = without_bias * sae.activation.r_mag.exp() + sae.activation.b_mag
        return (pre > 0) * magnitudes.relu()
    theta, width, window = jump(sae, pre)
    slope = -(theta / width * window).detach()
    return torch.where(pre > theta, pre, 0) + slope * (theta - theta.detach())


def jump(sae: Sae, pre: Tensor) -> tuple[Tensor, float, Tensor]:
    assert isinstance(sae.activation, JumpRelu)
    theta, width = sae.activation.threshold, sae.activation.bandwidth
    return theta, width, ((pre - theta).abs() < width / 2).double()


def plain_penalty(sae: Sae, config: SaeConfig, pre: Tensor, parts: list[slice]) -> Tensor:
    """Compute the penalty, summed over the batch."""
    if config.activation == "jumprelu":
        theta, width, window = jump(sae, pre)
        slope = -(window / width).detach()
        return ((pre > theta).double() + slope * (theta - theta.detach())).sum()
    norms = sum(sae.W_dec[:, part].pow(2).sum(dim=1).sqrt() for part in parts)  # [M]
    return (pre.relu() * norms).sum() / VARIANCE**0.5


def plain_loss(sae: Sae, config: SaeConfig, rows: Tensor, dead: Tensor | None) -> Tensor:
    loss_config = loss_config_for(config)
    x, y = (rows[:, :D], rows[:, D:]) if config.transcode else (rows, rows)
    pre = (x if config.transcode else x - sae.b_dec) @ sae.W_enc.T + sae.b_enc  # [N, M]
    parts, variances = [slice(None)], [VARIANCE]
    if loss_config.parts:
        parts, variances = [slice(0, 5), slice(5, 11)], [3.0, 4.5]

    def fvu(error: Tensor) -> Tensor:
        each = [error[:, p].pow(2).sum() / (N * v) for p, v in zip(parts, variances, strict=True)]
        return sum(each) / len(each)  # type: ignore[return-value]

    def decode(z: Tensor, frozen: bool = False) -> Tensor:
        W, b = (sae.W_dec.detach(), sae.b_dec.detach()) if frozen else (sae.W_dec, sae.b_dec)
        out = z @ W + b
        if sae.W_skip is not None:
            out = out + x @ (sae.W_skip.detach() if frozen else sae.W_skip).T
        return out

    z = plain_acts(sae, config, pre)
    residual = y - decode(z)
    loss = fvu(residual)
    if config.multi_topk:
        wide = keep(pre, pre >= pre.sort(dim=1, descending=True).values[:, 4 * K - 1 : 4 * K])
        loss = loss + fvu(y - decode(wide)) / 8
    for prefix in config.matryoshka:
        loss = loss + fvu(y - decode(torch.where(torch.arange(M) < prefix, z, 0)))
    if config.sparsity:
        loss = loss + config.sparsity * plain_penalty(sae, config, pre, parts) / N
    if config.activation == "gated":
        loss = loss + fvu(y - decode(pre.relu(), frozen=True))
    if dead is not None:
        k_aux = config.width_out // 2
        among = pre.masked_fill(~dead, -torch.inf).topk(min(k_aux, int(dead.sum())), dim=1).indices
        z_dead = keep(pre, torch.zeros_like(pre).scatter(1, among, 1.0).bool())
        scale = min(1.0, int(dead.sum()) / k_aux)
        loss = loss + ALPHA * scale * fvu(residual.detach() - z_dead @ sae.W_dec)
    return loss


def assert_equal_with_gradients(config: SaeConfig, dead: Tensor | None) -> None:
    sae, rows = make(config), rows_for(config)
    names, parameters = zip(*sae.named_parameters(), strict=True)
    ours = compute_losses(sae, rows, VARIANCE, dead, loss_config_for(config)).total(ALPHA)
    plain = plain_loss(sae, config, rows, dead)
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=0)
    found = torch.autograd.grad(ours, parameters, allow_unused=True)
    expected = torch.autograd.grad(plain, parameters, allow_unused=True)
    for name, one, other in zip(names, found, expected, strict=True):
        assert other is not None, name
        assert other.abs().max() > 0, name
        assert one is not None, name
        torch.testing.assert_close(
            one, other, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_loss_and_all_gradients_of_every_activation_and_shape_match_the_formulas(
    activation: str, shape: str
) -> None:
    config = SaeConfig(D, M, K, activation=activation, **CONFIGS[activation], **SHAPES[shape])  # type: ignore[arg-type]
    assert_equal_with_gradients(config, DEAD)
    assert_equal_with_gradients(config, None)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_prefixes_work_with_every_activation_and_shape(activation: str, shape: str) -> None:
    config = SaeConfig(D, M, K, activation=activation, **CONFIGS[activation], **SHAPES[shape])  # type: ignore[arg-type]
    assert_equal_with_gradients(replace(config, matryoshka=(4, 19)), DEAD)


@pytest.mark.parametrize("shape", SHAPES)
def test_multi_topk_has_a_gradient_to_the_encoder(shape: str) -> None:
    """Check a difference from sparsify, where pre_acts have no gradient."""
    assert_equal_with_gradients(SaeConfig(D, M, K, multi_topk=True, **SHAPES[shape]), DEAD)


@pytest.mark.parametrize("path", ["reference", "torch"])
@pytest.mark.parametrize("activation", ["batchtopk", "groupmax"])
def test_selections_have_the_same_gradients_with_every_backend(
    activation: str, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAETRAIN_KERNELS", path)
    assert_equal_with_gradients(SaeConfig(D, M, K, activation=activation), DEAD)  # type: ignore[arg-type]


# --- what each activation promises besides -------------------------------------------------------


def test_batchtopk_activates_more_than_four_times_k_latents_in_a_row_if_they_are_the_largest() -> (
    None
):
    sae = make(SaeConfig(D, M, K, activation="batchtopk"))
    rows = rows_for(SaeConfig(D, M, K)) * 0.01
    with torch.no_grad():
        sae.b_dec.zero_()
        sae.b_enc.fill_(0.1)
    rows[5] *= 3000  # this row's latents are the strongest of the batch
    output = sae(rows)
    counts = (output.top_acts > 0).sum(dim=1)
    assert counts[5] > 4 * K
    assert counts.sum() == K * N
    pre = (rows - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    z = keep(pre, pre >= pre.flatten().sort(descending=True).values[K * N - 1])
    torch.testing.assert_close(output.reconstruction, z @ sae.W_dec + sae.b_dec)


def test_batchtopk_activates_no_latent_that_is_not_positive() -> None:
    sae = make(SaeConfig(D, M, K, activation="batchtopk"))
    with torch.no_grad():
        sae.b_enc.sub_(3.5)
    output = sae(rows_for(SaeConfig(D, M, K)))
    assert 0 < (output.top_acts > 0).sum() < K * N
    assert (output.top_acts >= 0).all()


def test_the_threshold_of_batchtopk_is_a_running_mean_of_smallest_activations() -> None:
    activation = BatchTopK(K)
    assert activation.threshold == -1
    activation.observe(torch.zeros(2, 3))  # nothing fired: nothing learnt
    assert activation.threshold == -1
    activation.observe(torch.tensor([[0.0, 2.0], [5.0, 0.0]]))
    assert activation.threshold == 2
    activation.observe(torch.tensor([[4.0, 0.0]]))
    assert float(activation.threshold) == pytest.approx(0.95 * 2 + 0.05 * 4)
    activation.observe(torch.zeros(2, 3))
    assert float(activation.threshold) == pytest.approx(2.1)


def test_batchtopk_after_training_is_independent_of_the_batch() -> None:
    sae = make(SaeConfig(D, M, K, activation="batchtopk")).eval()
    assert isinstance(sae.activation, BatchTopK)
    sae.activation.threshold.fill_(0.8)
    rows = rows_for(SaeConfig(D, M, K))
    output = sae(rows)
    assert output.top_indices is None
    pre = (rows - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    torch.testing.assert_close(output.top_acts, torch.where(pre > 0.8, pre, 0))
    alone = torch.cat([sae(row[None]).reconstruction for row in rows])
    torch.testing.assert_close(output.reconstruction, alone)


def test_thresholds_of_jumprelu_are_clamped_at_zero_and_activations_are_not_negative() -> None:
    sae = make(SaeConfig(D, M, K, activation="jumprelu"))
    assert isinstance(sae.activation, JumpRelu)
    with torch.no_grad():
        sae.activation.threshold.fill_(-0.5)
    assert (sae(rows_for(SaeConfig(D, M, K))).top_acts >= 0).all()
    sae.activation.project()
    assert (sae.activation.threshold == 0).all()


def test_jumprelu_starts_at_its_threshold_in_the_unit_of_the_rows() -> None:
    config = SaeConfig(D, M, K, activation="jumprelu", threshold=0.5, bandwidth=0.25)
    activation = build_sae(config, unit=8.0).activation
    assert isinstance(activation, JumpRelu)
    assert (activation.threshold == 4.0).all()
    assert activation.bandwidth == 2.0


def test_a_penalty_rises_over_its_warm_up_and_is_logged_unweighted() -> None:
    config = SaeConfig(D, M, K, activation="relu", sparsity=0.3)
    sae, rows = make(config), rows_for(config)
    loss_config = make_loss_config(config, 4)
    losses = [compute_losses(sae, rows, VARIANCE, None, loss_config, step) for step in range(6)]
    weights = [step.terms[0].weight for step in losses]
    assert weights == pytest.approx([0.075, 0.15, 0.225, 0.3, 0.3, 0.3])
    assert len({float(step.terms[0].value.detach()) for step in losses}) == 1
    assert loss_config.names == ("penalty",)


@pytest.mark.parametrize("scale", [0.01, 100.0])
@pytest.mark.parametrize("activation", ["relu", "gated", "jumprelu"])
def test_the_penalty_is_independent_of_the_scale_of_the_rows(activation: str, scale: float) -> None:
    config = SaeConfig(D, M, K, activation=activation, sparsity=0.3)  # type: ignore[arg-type]
    sae, rows = make(config), rows_for(config)
    once = compute_losses(sae, rows, VARIANCE, None, make_loss_config(config, 0)).total(0.0)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name not in ("W_enc", "W_dec", "activation.r_mag"):
                parameter.mul_(scale)
    rescaled = compute_losses(
        sae, scale * rows, scale**2 * VARIANCE, None, make_loss_config(config, 0)
    ).total(0.0)
    torch.testing.assert_close(once, rescaled)


def test_a_crosscoder_weights_its_hookpoints_equally_and_logs_each() -> None:
    config = SaeConfig(D, M, K, widths=(5, 6))
    sae, rows = make(config), rows_for(config)
    loss_config = loss_config_for(config)
    losses = compute_losses(sae, rows, VARIANCE, None, loss_config)
    error = (rows - sae(rows).reconstruction).pow(2)
    parts = [error[:, :5].sum() / (N * 3.0), error[:, 5:].sum() / (N * 4.5)]
    assert loss_config.names == ("fvu/a", "fvu/b")
    assert [term.weight for term in losses.terms] == [0, 0]
    torch.testing.assert_close([term.value for term in losses.terms], parts)
    torch.testing.assert_close(losses.fvu, (parts[0] + parts[1]) / 2)


def test_a_transcoder_starts_with_a_zero_decoder_and_its_rows_are_not_normalised() -> None:
    sae = build_sae(SaeConfig(D, M, K, transcode=True, d_out=E))
    assert sae.W_dec.shape == (M, E)
    assert (sae.W_dec == 0).all()
    with torch.no_grad():
        sae.W_dec.fill_(3.0)
    sae.W_dec.grad = torch.ones(M, E)
    sae.normalise_decoder()
    sae.remove_parallel_gradient()
    assert (sae.W_dec == 3).all()
    assert (sae.W_dec.grad == 1).all()


def test_batchtopk_has_as_many_slots_as_the_fullest_row() -> None:
    sae, rows = make(SaeConfig(D, M, K, activation="batchtopk")), rows_for(SaeConfig(D, M, K))
    top_acts = sae(rows).top_acts
    assert top_acts.shape[1] == (top_acts > 0).sum(dim=1).max()
    with torch.no_grad():
        sae.b_enc.sub_(100.0)
    assert sae(rows).top_acts.tolist() == [[0.0]] * N
