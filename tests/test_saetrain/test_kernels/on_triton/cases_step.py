"""Whole training steps by Triton's kernels. Letters: N tokens, M num_latents, D d_in, K k."""

import pytest
import torch

from saetrain.config.sae import SaeConfig, SaeEntry
from saetrain.kernels.update import bf16_copy_of
from saetrain.model.sae import Sae
from saetrain.training.sae_trainer import SaeTrainer, StepSettings, make_optimizer
from saetrain.training.step import train_step

N, D, M, K = 12, 12, 20, 3


def trainee_on(device, optimizer, autocast=False):
    device = torch.device(device)
    sae, entry = Sae(D, M, K, device=device), SaeEntry("x", SaeConfig(D, M, K), 0.01, 0)
    return SaeTrainer(
        entry,
        sae,
        make_optimizer(optimizer, sae, 0.01, 0, 50),
        10**9,
        1.0,
        settings=StepSettings(autocast=autocast),
    )


def rows(count, device):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, N, D, generator=generator).to(device)


def in_bfloat16(W):
    """As Triton rounds; its interpreter cuts off what a bfloat16 has no room for."""
    if W.is_cuda:
        return W.bfloat16()
    return (W.view(torch.int32) >> 16).to(torch.int16).view(torch.bfloat16)


def run(trainer, batches):
    for step, x in enumerate(batches):
        train_step(trainer, x, step)
    return trainer


@pytest.mark.parametrize("optimizer", ["signum", "adam"])
def test_steps_are_those_of_the_torch_path(optimizer, device, monkeypatch):
    """Of signum's signs, rounding turns few."""
    found = []
    for path in ("triton", "torch"):
        monkeypatch.setenv("SAETRAIN_KERNELS", path)
        found.append(run(trainee_on(device, optimizer), rows(3, device)))
    ours, theirs = found
    exported = [t.optimizer.weights_to_export() for t in found]
    for name, weights in ours.sae.named_parameters():
        far = (weights - theirs.sae.get_parameter(name)).abs() > 1e-5
        assert far.double().mean() < 0.01, name
        far = (exported[0][name] - exported[1][name]).abs() > 1e-5
        assert far.double().mean() < 0.01, name
    norms = [t.latent_stats.pop_grad_norm()["grad_norm"] for t in found]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    deviation = (ours.sae.W_dec.detach().norm(dim=1) - 1).abs().max()
    assert float(deviation) < 1e-6


@pytest.mark.parametrize("optimizer", ["signum", "adam"])
def test_under_autocast_every_step_leaves_a_right_copy_of_the_encoder(optimizer, device):
    """Triton's writes are none that torch would count by itself."""
    trainer = trainee_on(device, optimizer, autocast=True)
    memory = None
    for step, x in enumerate(rows(4, device)):
        before = trainer.sae.W_enc.detach().clone()
        train_step(trainer, x, step)
        assert not torch.equal(trainer.sae.W_enc, before)
        copy = bf16_copy_of(trainer.sae.W_enc)
        assert torch.equal(copy, in_bfloat16(trainer.sae.W_enc.detach()))
        memory = memory or copy.data_ptr()
        assert copy.data_ptr() == memory


@pytest.mark.parametrize("optimizer", ["signum", "adam"])
def test_an_update_is_a_write_that_torch_counts(optimizer, device):
    trainer = run(trainee_on(device, optimizer), rows(1, device))
    tensors = {**trainer.optimizer.state_tensors(), **dict(trainer.sae.named_parameters())}
    before = {n: (t, t._version) for n, t in tensors.items() if not n.endswith("step")}
    train_step(trainer, rows(2, device)[1], 1)
    assert all(tensor._version > version for tensor, version in before.values())


@pytest.mark.parametrize("optimizer", ["signum", "adam"])
def test_a_bad_batch_changes_no_bit_of_weights_state_norms_or_copy(optimizer, device, monkeypatch):
    """Under the flag where it lies, as on a GPU."""
    by_flag = lambda ok, optimizer, step: optimizer.masked_step(step, ok)  # noqa: E731
    monkeypatch.setattr("saetrain.training.step.conditional_step", by_flag)
    trainer = run(trainee_on(device, optimizer, autocast=True), rows(2, device))

    def bits():
        copy = {"copy": bf16_copy_of(trainer.sae.W_enc)}
        tensors = {**trainer.sae.state_dict(), **trainer.optimizer.state_tensors(), **copy}
        return {name: t.detach().clone() for name, t in tensors.items()}

    before, bad = bits(), rows(1, device)[0]
    bad[3, 4] = torch.nan
    for step in (2, 3):
        train_step(trainer, bad, step)
        bad = rows(1, device)[0]
    after = bits()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert trainer.guard.first_bad() == 2
