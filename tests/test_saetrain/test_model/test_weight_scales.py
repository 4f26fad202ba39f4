"""Decoder norms folded into the weights. Letters: N tokens, D d_in, M num_latents, K k."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from actcache.core.json_codec import read_json
from saetrain.config.fit_config import FitConfig
from saetrain.formats.sparsify import load_sae
from saetrain.launch.run import fit
from saetrain.model.losses import compute_losses
from saetrain.model.sae import Sae
from saetrain.model.weight_scales import fold, folded_losses
from saetrain.training.sae_trainer import SaeTrainer
from saetrain.training.step import train_step

N, D, M, K = 32, 12, 40, 5
VARIANCE = 2.5


def free_sae() -> Sae:
    """Build an SAE with decoder rows of norm 0.2 to 3: the fold changes the selection."""
    sae = Sae(D, M, K, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        sae.W_dec.mul_(torch.linspace(0.2, 3, M, dtype=torch.float64)[:, None])
        sae.b_enc.copy_(0.1 * torch.randn(M, generator=generator, dtype=torch.float64))
        sae.b_dec.copy_(0.1 * torch.randn(D, generator=generator, dtype=torch.float64))
    return sae


def rows() -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(N, D, generator=generator, dtype=torch.float64)


def plain_error(sae: Sae, x: Tensor) -> Tensor:
    """Compute the squared error with selection by activation times norm, without a fold. [N]"""
    acts = torch.relu((x - sae.b_dec) @ sae.W_enc.T + sae.b_enc)  # [N, M]
    selected = (acts * sae.W_dec.norm(dim=1)).topk(K, dim=1).indices
    kept = torch.zeros_like(acts).scatter(1, selected, acts.gather(1, selected))
    return (x - kept @ sae.W_dec - sae.b_dec).pow(2).sum(dim=1)


def test_folded_loss_and_gradients_equal_selection_by_activation_times_norm() -> None:
    ours, plain, x = free_sae(), free_sae(), rows()
    losses = folded_losses(ours, x, VARIANCE, None)
    losses.fvu.backward()
    expected = plain_error(plain, x).sum() / (N * VARIANCE)
    expected.backward()
    fvu = float(expected.detach())
    assert float(losses.fvu.detach()) == pytest.approx(fvu, rel=1e-12)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(
            parameter.grad, plain.get_parameter(name).grad, rtol=1e-9, atol=1e-12
        )
    with torch.no_grad():
        assert float(compute_losses(ours, x, VARIANCE, None).fvu) != pytest.approx(fvu)


def test_folding_gives_unit_rows_and_keeps_the_function() -> None:
    free, unit, x = free_sae(), Sae(D, M, K, dtype=torch.float64), rows()
    unit.load_state_dict(fold(dict(free.state_dict())))
    torch.testing.assert_close(unit.W_dec.norm(dim=1), torch.ones(M, dtype=torch.float64))
    error = (x - unit(x).reconstruction).pow(2).sum(dim=1)
    torch.testing.assert_close(error, plain_error(free, x), rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised by imports of SAELens
def test_folding_equals_saelens_topk_with_rescaled_activations() -> None:
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig

    config = TopKTrainingSAEConfig(
        d_in=D, d_sae=M, k=K, dtype="float64", rescale_acts_by_decoder_norm=True
    )
    theirs_sae, ours, x = TopKTrainingSAE(config), free_sae(), rows()
    with torch.no_grad():
        theirs_sae.W_enc.copy_(ours.W_enc.T)
        theirs_sae.W_dec.copy_(ours.W_dec)
        theirs_sae.b_enc.copy_(ours.b_enc)
        theirs_sae.b_dec.copy_(ours.b_dec)
    reconstruction = folded_losses(ours, x, VARIANCE, None).output.reconstruction
    torch.testing.assert_close(reconstruction, theirs_sae(x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("norm", ["fold", "free"])
def test_free_rows_keep_their_norm_and_the_parallel_gradient(
    make_trainer: Callable[..., SaeTrainer], norm: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(D, M, K, dtype=torch.float64, decoder_norm=norm)
    parallel = []

    def spy(_: int) -> None:
        gradient = trainer.sae.W_dec.grad
        assert gradient is not None
        parallel.append(float((gradient * trainer.sae.W_dec.detach()).sum(dim=1).abs().max()))

    before = trainer.sae.W_dec.detach().clone()
    with torch.no_grad():
        trainer.sae.W_dec.mul_(2)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.optimizer, "step", spy)
        train_step(trainer, rows(), 0)
    assert torch.equal(trainer.sae.W_dec, 2 * before)
    assert parallel[0] > 1e-4
    trainer.optimizer.drop_gradients()
    for step in range(5):
        train_step(trainer, rows(), step)
    assert float((trainer.sae.W_dec.detach().norm(dim=1) - 2).abs().max()) > 1e-3


def test_a_run_that_folds_saves_unit_rows_and_cfg_json_records_free_ones(
    options: Callable[..., FitConfig], sparsify: Any
) -> None:
    for norm in ("unit", "fold", "free"):
        config = options(decoder_norm=norm, out=options().out + norm, optimizer="adam", lr=0.03)
        fit(config)
        folder = Path(config.out) / "layers.0"
        norms = load_file(folder / "sae.safetensors")["W_dec"].norm(dim=1)
        deviation = float((norms - 1).abs().max())
        cfg = read_json(folder / "cfg.json")
        assert isinstance(cfg, dict)
        assert cfg["normalize_decoder"] is (norm != "free")
        assert (deviation > 1e-3) if norm == "free" else (deviation < 1e-6)
        theirs = sparsify.SparseCoder.load_from_disk(folder)
        x = torch.randn(7, 16)
        torch.testing.assert_close(
            theirs(x).sae_out, load_sae(folder)(x).reconstruction, rtol=1e-4, atol=1e-5
        )
