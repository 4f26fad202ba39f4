"""Every kind of SAE under every recipe, where the two meet; what cannot be is refused by config.

Letters: N tokens, D d_in, E width of the output, M num_latents, K k.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from saetrain.config.sae import SaeConfig, SaeEntry
from saetrain.model.activations import BatchTopK, JumpRelu, Latents
from saetrain.model.losses import LossConfig, OutputSlice, compute_losses, make_loss_config
from saetrain.model.sae import Sae, build_sae
from saetrain.model.weight_scales import fold, folded_losses
from saetrain.training.sae_trainer import SaeTrainer, StepSettings, make_optimizer
from saetrain.training.step import accumulate_gradient, train_step

N, D, E, M, K = 24, 10, 6, 36, 3
STEPS = 6
VARIANCE = 2.0

TWO = {"widths": (4, 6)}
KINDS: dict[str, dict[str, Any]] = {
    "topk": {},
    "groupmax": {"activation": "groupmax"},
    "jumprelu": {"activation": "jumprelu", "sparsity": 0.1, "threshold": 0.3, "bandwidth": 0.5},
    "relu": {"activation": "relu", "sparsity": 0.1},
    "gated": {"activation": "gated", "sparsity": 0.1},
    "multi-topk": {"multi_topk": True},
    "matryoshka": {"matryoshka": (8, 20)},
    "gated crosscoder": {"activation": "gated", "sparsity": 0.1, **TWO},
    "matryoshka of relu, crosscoder": {"activation": "relu", "matryoshka": (9,), **TWO},
    "batchtopk": {"activation": "batchtopk"},
}
TRANSCODERS: dict[str, dict[str, Any]] = {
    name: {"transcode": True, "skip_connection": True, "d_out": E, **KINDS[name]}
    for name in ("topk", "gated", "jumprelu")
}
ROW_BY_ROW = [name for name in KINDS if name != "batchtopk"]


def config_of(kind: str, transcode: bool = False) -> SaeConfig:
    return SaeConfig(D, M, K, **(TRANSCODERS if transcode else KINDS)[kind])


def objective_for(config: SaeConfig, warmup: int = 0) -> LossConfig:
    parts = (OutputSlice("a", 4, 1.5), OutputSlice("b", 6, 2.5)) if config.widths else ()
    return make_loss_config(config, warmup, parts)


def batches(config: SaeConfig, dtype: torch.dtype = torch.float64) -> Tensor:
    """[STEPS, N, D], of a transcoder [STEPS, N, D + E]"""
    width = config.d_in + config.width_out * config.transcode
    generator = torch.Generator().manual_seed(3)
    return torch.randn(STEPS, N, width, generator=generator, dtype=torch.float64).to(dtype)


def make(
    config: SaeConfig,
    dtype: torch.dtype = torch.float64,
    optimizer: Any = "adam",
    **settings: Any,
) -> SaeTrainer:
    """With dead latents, so that AuxK is at work, and decoder rows of many norms."""
    sae, steps_as = build_sae(config, dtype=dtype), StepSettings(**settings)
    with torch.no_grad():
        sae.b_enc[M // 2 : M // 2 + 5] = -5.0
        noise = torch.randn(M, config.width_out, generator=torch.Generator().manual_seed(8))
        sae.W_dec.copy_(0.4 * noise)
    loss_config = objective_for(config, warmup=4)
    return SaeTrainer(
        SaeEntry("x", config, 0.01, 0),
        sae,
        make_optimizer(optimizer, sae, 0.01, 0, 50, decoder_norm=steps_as.decoder_norm),
        2 * N,
        VARIANCE,
        loss_config,
        steps_as,
    )


def run(trainer: SaeTrainer, rows: Tensor, count: int = STEPS) -> dict[str, float]:
    trainer.settings = dataclasses.replace(trainer.settings, auxk_alpha=1.0)
    for step in range(count):
        train_step(trainer, rows[step], step)
    return trainer.meter.pop_means()


def assert_same_weights(one: SaeTrainer, two: SaeTrainer) -> None:
    for name, parameter in one.sae.named_parameters():
        other = two.sae.get_parameter(name)
        torch.testing.assert_close(
            parameter, other, rtol=1e-8, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
        )


# --- micro-batches, updates of several batches ----------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "transcode", "norm"),
    [
        *((kind, False, norm) for kind in ROW_BY_ROW for norm in ("unit", "fold")),
        *((kind, True, "unit") for kind in TRANSCODERS),
    ],
)
def test_micro_batches_make_the_steps_and_the_log_of_whole_ones(
    kind: str, transcode: bool, norm: Any
) -> None:
    config = config_of(kind, transcode)
    whole, parts = make(config, decoder_norm=norm), make(config, decoder_norm=norm)
    parts.settings = StepSettings(decoder_norm=norm, micro_batch_size=7)
    expected, found = run(whole, batches(config)), run(parts, batches(config))
    assert expected["auxk"] > 0
    assert found == pytest.approx(expected, rel=1e-8)
    assert_same_weights(whole, parts)
    assert torch.equal(whole.dead_tracker.rows_since, parts.dead_tracker.rows_since)


def test_of_dense_activations_a_batch_in_parts_keeps_only_whether_they_are_active() -> None:
    config = config_of("gated")
    trainer, x = make(config), batches(config)[0]
    dense = trainer.sae(x)
    trainer.settings = StepSettings(micro_batch_size=7)
    output = accumulate_gradient(trainer, x, 0).output
    assert torch.equal(output.top_acts, dense.top_acts > 0)
    assert (output.top_indices, output.pre_acts) == (None, None)


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_of_three_batches_has_the_mean_of_their_gradients(kind: str) -> None:
    """BatchTopK chooses among each of them, and learns its threshold from each."""
    config = config_of(kind)
    trainer, alone = make(config, grad_acc_steps=3), make(config, decoder_norm="free")
    alone.sae.normalise_decoder()
    alone.sae.activation.project()
    rows, gradients = batches(config), []
    for step in range(2):
        train_step(trainer, rows[step], step)
    found = {name: p.grad for name, p in trainer.sae.named_parameters()}
    for step in range(2):
        sae = alone.sae
        losses = compute_losses(sae, rows[step], VARIANCE, None, alone.loss_config, step)
        parameters = dict(sae.named_parameters())
        each = torch.autograd.grad(losses.total(0.0), list(parameters.values()))
        gradients.append(dict(zip(parameters, each, strict=True)))
        sae.activation.observe(losses.output.top_acts)
    for name, gradient in found.items():
        expected = (gradients[0][name] + gradients[1][name]) / 3
        torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)
    for name, buffer in trainer.sae.named_buffers():
        torch.testing.assert_close(buffer, alone.sae.get_buffer(name))
        assert buffer > 0


def test_thresholds_are_projected_when_an_update_begins_and_not_between_its_batches() -> None:
    config = config_of("jumprelu")
    trainer, rows = make(config, grad_acc_steps=3, decoder_norm="free"), batches(config)
    threshold = trainer.sae.get_parameter("activation.threshold")
    for step, expected in ((0, 0.0), (1, -0.5)):  # no update is made before step 2
        with torch.no_grad():
            threshold.fill_(-0.5)
        train_step(trainer, rows[step], step)
        assert (threshold == expected).all()


# --- folded decoder norms -------------------------------------------------------------------------


def free_sae(config: SaeConfig) -> Sae:
    """Every parameter random, decoder rows of norm 0.3 to 3."""
    sae = build_sae(config, dtype=torch.float64)
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(sae.named_parameters()):
            generator = torch.Generator().manual_seed(seed)
            noise = 0.4 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(noise.abs() if name == "activation.threshold" else noise)
        sae.W_dec.mul_(torch.linspace(0.3, 3, M, dtype=torch.float64)[:, None])
    return sae


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_folded_is_the_function_that_was_trained(kind: str) -> None:
    config = config_of(kind)
    sae, saved = free_sae(config), build_sae(config, dtype=torch.float64)
    rows, loss_config = batches(config)[0], objective_for(config)
    trained = folded_losses(sae, rows, VARIANCE, None, loss_config, 0)
    sae.activation.observe(trained.output.top_acts)
    saved.load_state_dict(fold(sae.state_dict()))
    torch.testing.assert_close(saved.W_dec.norm(dim=1), torch.ones(M, dtype=torch.float64))
    again = compute_losses(saved, rows, VARIANCE, None, loss_config, 0)
    torch.testing.assert_close(again.output.reconstruction, trained.output.reconstruction)
    torch.testing.assert_close(again.total(0.0), trained.total(0.0))
    if isinstance(saved.activation, BatchTopK):  # learnt from folded activations
        cut = trained.output.top_acts.detach()
        assert float(saved.activation.threshold) == pytest.approx(float(cut[cut > 0].min()))


@pytest.mark.parametrize("kind", ["jumprelu", "relu", "gated", "gated crosscoder"])
def test_folding_changes_no_loss_where_no_latent_is_chosen_for_another(kind: str) -> None:
    """Thresholds and second biases grow with the norm, and penalties are weighted by it."""
    config = config_of(kind)
    sae, rows, loss_config = free_sae(config), batches(config)[0], objective_for(config)
    plain = compute_losses(sae, rows, VARIANCE, None, loss_config, 0)
    folded = folded_losses(sae, rows, VARIANCE, None, loss_config, 0)
    torch.testing.assert_close(folded.output.reconstruction, plain.output.reconstruction)
    assert len(plain.terms) == len(folded.terms) > 0
    for one, other in zip(plain.terms, folded.terms, strict=True):
        torch.testing.assert_close(one.value, other.value)


# --- k that falls ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "multi-topk", "matryoshka"])
def test_k_that_falls_is_the_k_that_chooses(kind: str) -> None:
    config, ks = config_of(kind), [20, 14, 9, 3, 3, 3]
    settings = {"k_start": 20, "k_end": 3, "k_anneal_steps": 3}
    trainer, rows = make(config, decoder_norm="fold", **settings), batches(config)
    trainer.sae.b_enc.data.fill_(3.0)  # latents enough that are positive
    for step, k in enumerate(ks):
        train_step(trainer, rows[step], step)
        assert trainer.sae.k == trainer.sae.activation.k == k
        assert trainer.meter.pop_means()["l0"] == k


def test_a_threshold_of_batchtopk_starts_over_when_k_changes() -> None:
    """Else it would lag behind by twenty batches, and more latents than k be active afterwards."""
    config = config_of("batchtopk")
    trainer = make(config, k_start=20, k_end=3, k_anneal_steps=3)
    rows, cuts = batches(config), []
    observe = trainer.sae.activation.observe

    def spy(top_acts: Tensor, k_changed: bool = False) -> None:
        cuts.append(float(top_acts[top_acts > 0].min()))
        observe(top_acts, k_changed)

    trainer.sae.activation.observe = spy  # type: ignore[method-assign]
    for step in range(STEPS):
        train_step(trainer, rows[step], step)
        threshold = float(trainer.sae.get_buffer("activation.threshold"))
        if step <= 3:
            assert threshold == cuts[-1]
    assert threshold == pytest.approx(0.95 * (0.95 * cuts[3] + 0.05 * cuts[4]) + 0.05 * cuts[5])


# --- bfloat16, optimisers -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "transcode"), [*((kind, False) for kind in KINDS), ("gated", True), ("jumprelu", True)]
)
def test_every_kind_learns_the_same_but_for_rounding_in_bfloat16(
    kind: str, transcode: bool
) -> None:
    config = config_of(kind, transcode)
    rows = batches(config, torch.float32)
    exact = make(config, torch.float32)
    expected = run(exact, rows)
    cast = make(config, torch.float32, autocast=True)
    found = run(cast, rows)
    rounded = make(config, torch.bfloat16)
    coarse = run(rounded, rows)
    assert found["fvu"] != expected["fvu"]
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=0.05), name
        assert coarse[name] == pytest.approx(value, rel=0.15), name
    assert {p.dtype for p in cast.sae.parameters()} == {torch.float32}
    assert {p.dtype for p in rounded.sae.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("kind", ["relu", "gated", "jumprelu", "matryoshka"])
def test_autocast_rounds_products_and_neither_reconstructions_nor_losses(kind: str) -> None:
    """A mean that is long beside what varies would show it."""
    config = config_of(kind)
    trainer, rows = make(config, torch.float32), batches(config, torch.float32)[0] + 1000
    sae, loss_config = trainer.sae, trainer.loss_config
    with torch.no_grad():
        sae.b_dec.fill_(1000)
        exact = compute_losses(sae, rows, VARIANCE, None, loss_config, 0)
        with torch.autocast("cpu", torch.bfloat16):
            losses = compute_losses(sae, rows, VARIANCE, None, loss_config, 0)
    values = [losses.output.reconstruction, losses.fvu, *(term.value for term in losses.terms)]
    assert {value.dtype for value in values} == {torch.float32}
    torch.testing.assert_close(losses.fvu, exact.fvu, rtol=0.02, atol=0)
    for one, other in zip(losses.terms, exact.terms, strict=True):
        torch.testing.assert_close(one.value, other.value, rtol=0.02, atol=0)


def test_jumprelus_number_of_latents_is_not_rounded_under_autocast() -> None:
    activation = JumpRelu(257, 0.5, 0.1)
    pre_acts = torch.ones(2, 257, dtype=torch.bfloat16)  # which has 256 and 258, not 257
    penalty = activation.penalty(Latents(pre_acts, None, pre_acts), torch.ones(257))
    assert penalty.tolist() == [257, 257]


@pytest.mark.parametrize("optimizer", ["signum", "adam", "adamw", "adam8bit", "muon"])
@pytest.mark.parametrize("kind", ["gated", "jumprelu"])
def test_every_optimiser_moves_and_exports_every_parameter(kind: str, optimizer: str) -> None:
    config = config_of(kind, transcode=True)
    trainer = make(config, torch.float32, optimizer)
    before = {name: p.detach().clone() for name, p in trainer.sae.named_parameters()}
    run(trainer, batches(config, torch.float32), 3)
    assert "W_skip" in before
    exported = trainer.optimizer.weights_to_export()
    assert exported.keys() == before.keys()
    for name, value in before.items():
        assert not torch.equal(trainer.sae.get_parameter(name), value), name
        assert not torch.equal(exported[name], value), name


# --- losses that are not finite -------------------------------------------------------------------


def test_a_term_that_is_not_finite_reaches_no_weight_though_the_fvu_is() -> None:
    config = config_of("gated")
    trainer, rows = make(config, torch.float32), batches(config, torch.float32)
    with torch.no_grad():
        trainer.sae.W_enc.mul_(1e25)
        trainer.sae.get_parameter("activation.r_mag").fill_(-100.0)
    trainer.sae.normalise_decoder()
    before = {name: p.detach().clone() for name, p in trainer.sae.named_parameters()}
    train_step(trainer, rows[0], 0)
    losses = trainer.meter.pop_means()
    assert math.isfinite(losses["fvu"])
    assert not math.isfinite(losses["gate_fvu"])
    assert trainer.guard.first_bad() == 0
    for name in ("W_enc", "b_enc", "b_dec", "activation.r_mag", "activation.b_mag"):
        assert torch.equal(trainer.sae.get_parameter(name), before[name])
