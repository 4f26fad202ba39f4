"""FVU and AuxK against their formulas. N tokens, D d_in, M num_latents."""

from __future__ import annotations

import pytest
import torch

from saetrain.model.losses import (
    LossConfig,
    Losses,
    OutputSlice,
    auxk_loss,
    compute_losses,
    list_dead,
    list_dead_in,
)
from saetrain.model.sae import Sae

N, D, M, K = 12, 10, 30, 3
VARIANCE = 7.5


@pytest.fixture
def sae() -> Sae:
    sae = Sae(D, M, K, seed=5, dtype=torch.float64)
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for bias in (sae.b_enc, sae.b_dec):
            bias.copy_(0.1 * torch.randn(bias.shape, generator=generator, dtype=torch.float64))
    return sae


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


def dead_mask(*latents: int) -> torch.Tensor:
    return torch.isin(torch.arange(M), torch.tensor(latents, dtype=torch.int64))  # [M]


def plain_auxk(sae: Sae, x: torch.Tensor, dead: torch.Tensor) -> torch.Tensor:
    """Compute the formula of Gao et al. densely, over all latents at once."""
    pre_acts = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc).relu()  # [N, M]
    z = torch.zeros_like(pre_acts).scatter(1, *reversed(pre_acts.topk(K, dim=1)))
    residual = (x - (z @ sae.W_dec + sae.b_dec)).detach()  # [N, D]
    number, k_aux = int(dead.sum()), D // 2
    among_dead = pre_acts.masked_fill(~dead, -1)  # below every dead one
    values, indices = among_dead.topk(min(k_aux, number), dim=1)
    z_dead = torch.zeros_like(pre_acts).scatter(1, indices, values)
    error = (residual - z_dead @ sae.W_dec).pow(2).sum()
    return min(1.0, number / k_aux) * error / (N * VARIANCE)


def gradients(loss: torch.Tensor, sae: Sae) -> dict[str, torch.Tensor]:
    names, parameters = zip(*sae.named_parameters(), strict=True)
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    return {
        name: torch.zeros_like(parameter) if gradient is None else gradient
        for name, parameter, gradient in zip(names, parameters, found, strict=True)
    }


def test_fvu_is_the_squared_error_over_n_times_the_variance(sae: Sae, x: torch.Tensor) -> None:
    losses = compute_losses(sae, x, VARIANCE, None)
    expected = (x - sae(x).reconstruction).pow(2).sum() / (N * VARIANCE)
    torch.testing.assert_close(losses.fvu, expected)
    assert losses.auxk == 0


def test_the_loss_is_divided_by_the_given_variance_and_not_by_the_batchs(
    sae: Sae, x: torch.Tensor
) -> None:
    dead = dead_mask(1, 2, 3, 4, 5, 6)
    once, twice = (compute_losses(sae, x, variance, dead) for variance in (1.0, 2.0))
    torch.testing.assert_close(once.fvu, 2 * twice.fvu)
    torch.testing.assert_close(once.auxk, 2 * twice.auxk)
    # A batch whose own variance is 0 has the loss of any one of its rows.
    same = x[:1].expand(N, D)
    torch.testing.assert_close(
        compute_losses(sae, same, VARIANCE, None).fvu,
        compute_losses(sae, x[:1], VARIANCE, None).fvu,
    )


@pytest.mark.parametrize(
    "dead",
    [dead_mask(*range(8, 28)), dead_mask(2, 11, 29), dead_mask(17), dead_mask(*range(M))],
    ids=["more than k_aux", "fewer than k_aux", "one", "all"],
)
def test_auxk_and_all_its_gradients_equal_the_dense_formula(
    sae: Sae, x: torch.Tensor, dead: torch.Tensor
) -> None:
    ours, plain = compute_losses(sae, x, VARIANCE, dead).auxk, plain_auxk(sae, x, dead)
    torch.testing.assert_close(ours, plain)
    expected = gradients(plain, sae)
    for name, gradient in gradients(ours, sae).items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda m, n=name: f"{n}: {m}")


def test_auxk_has_gradients_to_the_weights_of_dead_latents_only(sae: Sae, x: torch.Tensor) -> None:
    dead = dead_mask(3, 9, 12, 20, 21)
    found = gradients(compute_losses(sae, x, VARIANCE, dead).auxk, sae)
    for name in ("W_enc", "b_enc", "W_dec"):
        reached = found[name].reshape(M, -1).abs().sum(dim=1) > 0  # [M]
        assert torch.equal(reached, dead), name


def test_auxk_has_no_gradient_through_the_residual(sae: Sae, x: torch.Tensor) -> None:
    """Check that the residual is detached: other latents have no gradient of AuxK."""
    dead = dead_mask(0, 1, 2)
    with torch.no_grad():
        sae.b_enc[dead] = -100.0  # dead latents predict nothing, so AuxK is the residual itself
    losses = compute_losses(sae, x, VARIANCE, dead)
    assert losses.auxk > 0
    assert all(gradient.abs().sum() == 0 for gradient in gradients(losses.auxk, sae).values())


def test_auxk_is_scaled_down_while_few_latents_are_dead(sae: Sae, x: torch.Tensor) -> None:
    with torch.no_grad():
        sae.b_enc.fill_(-100.0)  # nothing fires: x̂ = b_dec, and AuxK predicts 0
    residual = (x - sae.b_dec).pow(2).sum() / (N * VARIANCE)
    for number, scale in ((1, 0.2), (3, 0.6), (5, 1.0), (9, 1.0)):
        auxk = compute_losses(sae, x, VARIANCE, dead_mask(*range(number))).auxk
        torch.testing.assert_close(auxk, scale * residual)


@pytest.mark.parametrize("number", [1, 4, 20])
def test_by_the_share_of_the_residual_auxk_is_the_authors_loss(
    sae: Sae, x: torch.Tensor, number: int
) -> None:
    """Σ‖ê - e‖² / Σ‖e - mean e‖², `normalized_mse` of openai/sparse_autoencoder."""
    dead = dead_mask(*range(number))
    with torch.no_grad():  # the mean of the residual is 0 once b_dec is trained
        sae.b_dec += (x - sae(x).reconstruction).mean(dim=0)
        for _ in range(200):
            sae.b_dec += 0.5 * (x - sae(x).reconstruction).mean(dim=0)
        e = x - sae(x).reconstruction
    variance_of_e = (e - e.mean(dim=0)).pow(2).sum() / N
    share = (variance_of_e / VARIANCE).reshape(1)
    unscaled = LossConfig(auxk_scaled_down=False)
    ours = compute_losses(sae, x, VARIANCE, dead, unscaled, share=share).auxk
    by_target = plain_auxk(sae, x, dead) / min(1.0, number / (D // 2))  # Σ‖ê - e‖² / (N VARIANCE)
    torch.testing.assert_close(ours, by_target * VARIANCE / variance_of_e)
    scaled_down = compute_losses(sae, x, VARIANCE, dead, share=share).auxk
    torch.testing.assert_close(scaled_down, ours * min(1.0, number / (D // 2)))
    fixed = list_dead_in(dead, 25, 0)  # as on a GPU: of fixed length
    part = (OutputSlice("", D, VARIANCE),)
    by_list = auxk_loss(sae, x, e, fixed, part, share=share, scaled_down=False)
    torch.testing.assert_close(by_list, ours)


def test_a_leaky_relu_gives_a_gradient_to_dead_latents_that_are_below_0_on_every_row(
    sae: Sae, x: torch.Tensor
) -> None:
    dead = dead_mask(1, 7, *range(20, 25))
    with torch.no_grad():
        sae.b_enc[dead] = -100.0
        sae.b_enc[7] = 0.5  # this one fires on some rows
    leaky = LossConfig(auxk_slope=0.1)
    relu, found = (
        gradients(compute_losses(sae, x, VARIANCE, dead, config).auxk, sae)["W_enc"]
        for config in (LossConfig(), leaky)
    )
    moved = [gradient.abs().sum(dim=1) > 0 for gradient in (relu, found)]
    assert moved[0].nonzero().flatten().tolist() == [7]
    assert torch.equal(moved[1], dead & moved[1])
    assert int(moved[1].sum()) > 3
    # The plain formula, and a list of fixed length, as on a GPU.
    e = (x - sae(x).reconstruction).detach()
    pre_acts = ((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)[:, dead]
    acts = torch.where(pre_acts > 0, pre_acts, 0.1 * pre_acts)
    values, indices = acts.topk(D // 2, dim=1)
    z = torch.zeros_like(acts).scatter(1, indices, values)
    plain = (z @ sae.W_dec[dead] - e).pow(2).sum() / (N * VARIANCE)
    torch.testing.assert_close(compute_losses(sae, x, VARIANCE, dead, leaky).auxk, plain)
    fixed, part = list_dead_in(dead, 25, 0), (OutputSlice("", D, VARIANCE),)
    torch.testing.assert_close(auxk_loss(sae, x, e, fixed, part, slope=0.1), plain)


def test_auxk_of_each_hookpoint_is_divided_by_its_own_share(sae: Sae, x: torch.Tensor) -> None:
    dead = dead_mask(*range(8, 28))
    parts = (OutputSlice("a", 4, 3.0), OutputSlice("b", 6, 4.5))
    e = (x - sae(x).reconstruction).detach()
    listed = list_dead(dead, D // 2, 0)
    assert listed is not None
    by_part = [
        auxk_loss(sae, x, e, listed, parts, share=torch.tensor(share))
        for share in ([1.0, 1e30], [1e30, 1.0], [0.5, 0.1])
    ]
    torch.testing.assert_close(by_part[2], by_part[0] / 0.5 + by_part[1] / 0.1)


@pytest.mark.parametrize("scaled_down", [True, False])
def test_on_a_device_a_list_without_a_dead_latent_is_no_loss(
    sae: Sae, x: torch.Tensor, scaled_down: bool
) -> None:
    """As without the list: whether the host knows that none is dead changes no metric."""
    residual = (x - sae(x).reconstruction).detach()
    listed = list_dead_in(dead_mask(), 20, 3)
    parts = (OutputSlice("", D, VARIANCE),)
    auxk = auxk_loss(sae, x, residual, listed, parts, scaled_down=scaled_down)
    assert auxk == 0
    gradients = torch.autograd.grad(auxk, tuple(sae.parameters()), allow_unused=True)
    assert not any(g is not None and bool(g.any()) for g in gradients)


@pytest.mark.parametrize("dead", [None, dead_mask()], ids=["off", "none dead"])
def test_without_dead_latents_auxk_is_zero(
    sae: Sae, x: torch.Tensor, dead: torch.Tensor | None
) -> None:
    losses: Losses = compute_losses(sae, x, VARIANCE, dead)
    assert losses.auxk == 0
    assert losses.auxk.dtype == torch.float64
    (losses.fvu + losses.auxk / 32).backward()


def test_a_list_of_fixed_length_has_dead_latents_first_and_lists_all_in_rotation() -> None:
    dead, seen = dead_mask(*range(0, M, 2)), set()
    for step in range(M // 3 + 1):
        listed = list_dead_in(dead, 3, step)
        same = list_dead_in(dead, 3, torch.tensor(step))  # as a recorded step reads it
        assert torch.equal(listed.indices, same.indices)
        assert listed.listed is not None
        assert listed.listed.all()
        assert int(listed.number) == M // 2
        seen |= set(listed.indices.tolist())
    assert seen == set(range(0, M, 2))


@pytest.mark.parametrize("dead", [dead_mask(2, 11, 29), dead_mask(*range(8, 28)), dead_mask()])
def test_auxk_of_a_list_longer_than_the_number_of_dead_latents_uses_dead_ones_only(
    sae: Sae, x: torch.Tensor, dead: torch.Tensor
) -> None:
    """Check the list of fixed length that is used on a GPU."""
    parts = (OutputSlice("", D, VARIANCE),)
    residual = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(5))
    padded = auxk_loss(sae, x, residual, list_dead_in(dead, M, 4), parts)
    exact = list_dead(dead, D // 2, 4)
    if exact is None:
        assert padded == 0
        assert all(g.abs().sum() == 0 for g in gradients(padded, sae).values())
        return
    torch.testing.assert_close(padded, auxk_loss(sae, x, residual, exact, parts))
    want = gradients(auxk_loss(sae, x, residual, exact, parts), sae)
    for name, gradient in gradients(padded, sae).items():
        torch.testing.assert_close(gradient, want[name])
