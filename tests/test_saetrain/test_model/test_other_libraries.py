"""Training of every kind compared step by step with SAELens and sparsify, in float64.

Both sides start from equal weights, read equal batches and take plain Adam steps on their losses,
so that the losses alone are compared, without gradient clipping and projections of the decoder.
Letters: N tokens, D d_in, M num_latents, K k.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from saetrain.config.sae import SaeConfig
from saetrain.model.activations import BatchTopK
from saetrain.model.losses import compute_losses, make_loss_config
from saetrain.model.sae import Sae, build_sae

N, D, M, K = 24, 10, 36, 3
STEPS, LR = 40, 0.01
FORGET = 0.05  # of the threshold of batchtopk
NO_VARIANCE = 1.0  # SAELens divides by nothing


def batches(width: int = D) -> Tensor:
    """Generate rows that are sparse combinations of M directions. [STEPS, N, D]"""
    generator = torch.Generator().manual_seed(11)
    directions = torch.randn(M, width, generator=generator, dtype=torch.float64)
    codes = torch.rand(STEPS, N, M, generator=generator, dtype=torch.float64)
    codes *= torch.rand(STEPS, N, M, generator=generator) < K / M
    noise = torch.randn(STEPS, N, width, generator=generator, dtype=torch.float64)
    return codes @ directions + 0.1 * noise


def make(config: SaeConfig) -> Sae:
    sae = build_sae(config, dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in (sae.b_enc, sae.b_dec):
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.05 * noise)
    return sae


def follow(
    ours: Sae,
    loss: Callable[[Tensor, int], Tensor],
    theirs: nn.Module,
    their_loss: Callable[..., Tensor],
) -> tuple[list[float], list[float]]:
    """Train both sides and return their losses of all steps."""
    sides: list[tuple[Any, Any]] = [(ours, loss), (theirs, their_loss)]
    histories: list[list[float]] = [[], []]
    for (module, minimised), history in zip(sides, histories, strict=True):
        adam = torch.optim.Adam(module.parameters(), lr=LR)
        for step, rows in enumerate(batches(D)):
            adam.zero_grad()
            value = minimised(rows, step)
            value.backward()
            adam.step()
            history.append(float(value.detach()))
    return histories[0], histories[1]


# --- SAELens -------------------------------------------------------------------------------------


def lens(architecture: str, ours: Sae, **options: Any) -> Any:
    """Build SAELens's training SAE with the weights of ours."""
    with warnings.catch_warnings():  # what it imports warns of its own imports
        warnings.simplefilter("ignore")
        pytest.importorskip("sae_lens", reason="the extra `peers` is not installed")
    from sae_lens.saes import batchtopk_sae, gated_sae, jumprelu_sae, standard_sae
    from sae_lens.saes import matryoshka_batchtopk_sae as matryoshka

    classes = {
        "standard": (standard_sae.StandardTrainingSAE, standard_sae.StandardTrainingSAEConfig),
        "gated": (gated_sae.GatedTrainingSAE, gated_sae.GatedTrainingSAEConfig),
        "jumprelu": (jumprelu_sae.JumpReLUTrainingSAE, jumprelu_sae.JumpReLUTrainingSAEConfig),
        "batchtopk": (
            batchtopk_sae.BatchTopKTrainingSAE,
            batchtopk_sae.BatchTopKTrainingSAEConfig,
        ),
        "matryoshka": (
            matryoshka.MatryoshkaBatchTopKTrainingSAE,
            matryoshka.MatryoshkaBatchTopKTrainingSAEConfig,
        ),
    }
    sae_class, config_class = classes[architecture]
    config = config_class(d_in=D, d_sae=M, dtype="float64", apply_b_dec_to_input=True, **options)
    sae = sae_class(config)
    with torch.no_grad():
        sae.W_enc.copy_(ours.W_enc.T)
        sae.W_dec.copy_(ours.W_dec)
        sae.b_dec.copy_(ours.b_dec)
        (sae.b_gate if architecture == "gated" else sae.b_enc).copy_(ours.b_enc)
    return sae


def lens_loss(sae: Any, coefficients: dict[str, float], dead: Tensor | None = None) -> Any:
    from sae_lens.saes.sae import TrainStepInput

    def minimised(rows: Tensor, step: int) -> Tensor:
        given = TrainStepInput(
            sae_in=rows,
            dead_neuron_mask=dead,
            coefficients=coefficients,
            n_training_steps=step,
            is_logging_step=False,
        )
        loss: Tensor = sae.training_forward_pass(given).loss
        return loss

    return minimised


def our_loss(
    sae: Sae, config: SaeConfig, dead: Tensor | None = None, alpha: float = 0.0
) -> Callable[[Tensor, int], Tensor]:
    loss_config = make_loss_config(config, 0)

    def minimised(rows: Tensor, step: int) -> Tensor:
        sae.activation.project()
        losses = compute_losses(sae, rows, NO_VARIANCE, dead, loss_config, step)
        sae.activation.observe(losses.output.top_acts)
        return losses.total(alpha)

    return minimised


def assert_same_weights(ours: Sae, theirs: Any) -> None:
    bias = theirs.b_gate if hasattr(theirs, "b_gate") else theirs.b_enc
    for name, expected in (
        ("W_enc", theirs.W_enc.T),
        ("W_dec", theirs.W_dec),
        ("b_enc", bias),
        ("b_dec", theirs.b_dec),
    ):
        torch.testing.assert_close(getattr(ours, name), expected, rtol=1e-7, atol=1e-9)


def assert_followed(ours: list[float], theirs: list[float]) -> None:
    assert ours == pytest.approx(theirs, rel=1e-9)
    assert ours[-1] < 0.9 * ours[0]  # the steps did something


def test_relu_follows_the_standard_sae_of_saelens() -> None:
    """Compare the same loss; our penalty is divided by the root of the variance, here 1."""
    config = SaeConfig(D, M, K, activation="relu", sparsity=0.2)
    ours = make(config)
    theirs = lens("standard", ours, l1_coefficient=0.2)
    assert_followed(*follow(ours, our_loss(ours, config), theirs, lens_loss(theirs, {"l1": 0.2})))
    assert_same_weights(ours, theirs)


def test_jumprelu_follows_saelens_to_its_thresholds() -> None:
    """Compare the same loss ("step"), with SAELens's thresholds in float64, not float32."""
    config = SaeConfig(D, M, K, activation="jumprelu", sparsity=0.1, threshold=0.1, bandwidth=0.3)
    ours = make(config)
    theirs = lens(
        "jumprelu",
        ours,
        jumprelu_init_threshold=0.1,
        jumprelu_bandwidth=0.3,
        l0_coefficient=0.1,
    )
    theirs.threshold.data = theirs.threshold.data.double().fill_(0.1)
    assert_followed(*follow(ours, our_loss(ours, config), theirs, lens_loss(theirs, {"l0": 0.1})))
    assert_same_weights(ours, theirs)
    thresholds = ours.get_parameter("activation.threshold")
    torch.testing.assert_close(thresholds, theirs.threshold, rtol=1e-7, atol=1e-9)
    assert (thresholds - 0.1).abs().max() > 0.01


DEAD = torch.isin(torch.arange(M), torch.tensor([1, 30]))  # [M]


@pytest.mark.parametrize("prefixes", [(), (9, 20)], ids=["batchtopk", "matryoshka"])
def test_batchtopk_and_its_prefixes_follow_saelens_to_the_threshold(
    prefixes: tuple[int, ...],
) -> None:
    """Compare without decoder norms in the activations and without AuxK (see
    `test_auxk_follows_saelens_where_dead_latents_are_positive`). Our threshold starts at the first
    batch's value and theirs at 0: the difference decays by 1 - FORGET per step."""
    config = SaeConfig(D, M, K, activation="batchtopk", matryoshka=prefixes)
    ours = make(config)
    options: dict[str, Any] = {"matryoshka_widths": [*prefixes, M]} if prefixes else {}
    theirs = lens(
        "matryoshka" if prefixes else "batchtopk",
        ours,
        k=K,
        topk_threshold_lr=FORGET,
        rescale_acts_by_decoder_norm=False,
        **options,
    )
    first = ours(batches()[0]).top_acts
    smallest = float(first[first > 0].min().detach())
    assert_followed(*follow(ours, our_loss(ours, config), theirs, lens_loss(theirs, {})))
    assert_same_weights(ours, theirs)
    assert isinstance(ours.activation, BatchTopK)
    head_start = (1 - FORGET) ** STEPS * smallest
    assert float(ours.activation.threshold - theirs.topk_threshold) == pytest.approx(head_start)


def test_auxk_follows_saelens_where_dead_latents_are_positive() -> None:
    """Compare where SAELens's AuxK, which has no ReLU, equals ours."""
    config = SaeConfig(D, M, K, activation="batchtopk")
    ours = make(config)
    theirs = lens(
        "batchtopk",
        ours,
        k=K,
        aux_loss_coefficient=0.5,
        rescale_acts_by_decoder_norm=False,
    )
    with torch.no_grad():  # always positive, and so weak that the strongest of the batch are others
        ours.b_enc[DEAD] = theirs.b_enc[DEAD] = 0.5
        for weights in (ours.W_enc, theirs.W_enc.T):
            weights[DEAD] *= 1e-3
        ours.b_enc[~DEAD] += 1.0
        theirs.b_enc.copy_(ours.b_enc)
    rows = batches()[0]
    loss = our_loss(ours, config, DEAD, 0.5)(rows, 0)
    expected = lens_loss(theirs, {}, DEAD)(rows, 0)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    loss.backward()
    expected.backward()
    for one, other in (
        (ours.W_enc.grad, theirs.W_enc.grad.T),
        (ours.b_enc.grad, theirs.b_enc.grad),
        (ours.W_dec.grad, theirs.W_dec.grad),
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_gated_follows_saelens_but_freezes_the_decoder_of_the_gate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Compare the first loss, and all losses with SAELens's decoder detached in the gate's
    reconstruction. The paper detaches it, as we do; SAELens does not."""
    config = SaeConfig(D, M, K, activation="gated", sparsity=0.1)
    ours = make(config)
    theirs = lens("gated", ours, l1_coefficient=0.1)
    rows = batches()[0]
    minimised = lens_loss(theirs, {"l1": 0.1})
    torch.testing.assert_close(our_loss(ours, config)(rows, 0), minimised(rows, 0))
    real = theirs.calculate_aux_loss

    def frozen(**given: Any) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = real(**given)
        centred = given["step_input"].sae_in - theirs.b_dec
        gate = torch.relu(centred @ theirs.W_enc + theirs.b_gate)
        error = gate @ theirs.W_dec.detach() + theirs.b_dec.detach() - given["step_input"].sae_in
        return losses | {"auxiliary_reconstruction_loss": error.pow(2).sum(dim=-1).mean()}

    monkeypatch.setattr(theirs, "calculate_aux_loss", frozen)
    assert_followed(*follow(ours, our_loss(ours, config), theirs, minimised))
    assert_same_weights(ours, theirs)
    torch.testing.assert_close(ours.get_parameter("activation.b_mag"), theirs.b_mag)
    torch.testing.assert_close(ours.get_parameter("activation.r_mag"), theirs.r_mag)


# --- sparsify ------------------------------------------------------------------------------------

KINDS_OF_SPARSIFY: dict[str, dict[str, Any]] = {
    "topk": {},
    "groupmax": {"activation": "groupmax"},
    "transcoder": {"transcode": True},
    "skip transcoder": {"transcode": True, "skip_connection": True},
    "groupmax transcoder": {"transcode": True, "activation": "groupmax"},
}


def sparsify_pair(sparsify: ModuleType, config: SaeConfig) -> tuple[Sae, Any]:
    """Build our SAE and sparsify's with equal weights."""
    ours = make(config)
    sparsify_config = sparsify.SparseCoderConfig(
        num_latents=M,
        k=K,
        activation=config.activation,
        transcode=config.transcode,
        skip_connection=config.skip_connection,
        multi_topk=config.multi_topk,
    )
    theirs = sparsify.SparseCoder(D, sparsify_config, dtype=torch.float64)
    with torch.no_grad():
        theirs.encoder.weight.copy_(ours.W_enc)
        theirs.encoder.bias.copy_(ours.b_enc)
        theirs.W_dec.copy_(ours.W_dec)
        theirs.b_dec.copy_(ours.b_dec)
    return ours, theirs


@pytest.mark.parametrize("kind", KINDS_OF_SPARSIFY)
def test_every_kind_of_sparsify_has_its_losses_step_by_step(
    sparsify: ModuleType, kind: str
) -> None:
    """Compare losses divided by the batch's own variance, as sparsify does. A transcoder's targets
    are a fixed function of its inputs."""
    config = SaeConfig(D, M, K, **KINDS_OF_SPARSIFY[kind])
    ours, theirs = sparsify_pair(sparsify, config)
    mixing = torch.randn(D, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def targets(rows: Tensor) -> Tensor:
        return torch.relu(rows @ mixing)

    def our_side(rows: Tensor, step: int) -> Tensor:
        both = torch.cat([rows, targets(rows)], dim=1) if config.transcode else rows
        return compute_losses(ours, both, 2.5, None, make_loss_config(config, 0), step).total(0.0)

    def their_side(rows: Tensor, step: int) -> Tensor:
        y = targets(rows) if config.transcode else None
        denominator = torch.tensor(2.5 * N, dtype=torch.float64)
        fvu: Tensor = theirs(rows, y, total_variance=denominator).fvu
        return fvu

    assert_followed(*follow(ours, our_side, theirs, their_side))
    for one, other in (
        (ours.W_enc, theirs.encoder.weight),
        (ours.W_dec, theirs.W_dec),
        (ours.b_dec, theirs.b_dec),
        (ours.W_skip, theirs.W_skip),
    ):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_multi_topk_has_the_loss_of_sparsify(sparsify: ModuleType) -> None:
    """Compare one batch: sparsify has no gradient to the encoder, so later steps differ."""
    config = SaeConfig(D, M, K, multi_topk=True)
    ours, theirs = sparsify_pair(sparsify, config)
    rows = batches()[0]
    losses = compute_losses(ours, rows, 2.5, None, make_loss_config(config, 0))
    output = theirs(rows, total_variance=torch.tensor(2.5 * N, dtype=torch.float64))
    torch.testing.assert_close(losses.fvu, output.fvu)
    torch.testing.assert_close(losses.terms[0].value, output.multi_topk_fvu)
    torch.testing.assert_close(losses.total(0.0), output.fvu + output.multi_topk_fvu / 8)
