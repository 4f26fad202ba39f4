"""Copies of weights in bfloat16. Letters: N tokens, M num_latents, D d_in, K k."""

import contextlib
import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from saetrain.kernels import (
    UpdateOptions,
    adam_update_,
    backend_of,
    keep_bf16_copy,
    signum_update_,
)
from saetrain.kernels.dense import Product
from saetrain.kernels.update import bf16_copy_of
from saetrain.model.sae import Sae
from saetrain.training import step as step_module
from saetrain.training.sae_trainer import StepSettings, make_optimizer
from saetrain.training.step import train_step

N, D, M, K = 64, 16, 96, 4
SIGNUM = {"lr": 0.01, "mix": 0.3, "momentum": 0.95}
ADAM = {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "step": 3}


def weight(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return torch.nn.Parameter(torch.randn(M, D, generator=generator).to(dtype))


def kept():
    W = weight()
    keep_bf16_copy(W)
    return W


def step_of(name):
    def write(W):
        sae = Sae(D, M, K)
        sae.W_enc = W
        optimizer = make_optimizer(name, sae, 0.01, 0, 9)
        for parameter in sae.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(1)

    return write


def load(W):
    sae = Sae(D, M, K, seed=3)
    other = sae.state_dict()
    sae.W_enc = W
    sae.load_state_dict(other)


WRITES = {
    "load_state_dict": load,
    "in place": lambda W: W.mul_(2),
    "rows": lambda W: W[3:5].zero_(),
    "copied": lambda W: W.copy_(torch.ones(M, D)),
    "through an alias": lambda W: W.detach().add_(1),
    "muon": step_of("muon"),
    "adam8bit": step_of("adam8bit"),
}


def test_a_copy_has_the_bits_of_a_cast_and_is_freed_with_its_weight():
    W = kept()
    copy = bf16_copy_of(W)
    assert torch.equal(copy, W.detach().bfloat16())
    keep_bf16_copy(W)
    assert bf16_copy_of(W) is copy
    assert torch.equal(bf16_copy_of(W[3:9]), W[3:9].detach().bfloat16())
    gone = weakref.ref(copy)
    del W, copy
    gc.collect()
    assert gone() is None


def test_there_is_no_copy_by_default_or_where_no_cast_is_needed():
    assert bf16_copy_of(weight()) is None
    for dtype in (torch.bfloat16, torch.float64):
        W = weight(dtype)
        keep_bf16_copy(W)
        assert bf16_copy_of(W) is None


@pytest.mark.parametrize("name", WRITES)
def test_after_any_other_write_the_copy_is_not_used_until_it_is_renewed(name):
    W = kept()
    memory, before = bf16_copy_of(W).data_ptr(), W.detach().clone()
    with torch.no_grad():
        WRITES[name](W)
    assert not torch.equal(W, before)
    assert bf16_copy_of(W) is None
    assert bf16_copy_of(W[2:4]) is None
    keep_bf16_copy(W)
    assert torch.equal(bf16_copy_of(W), W.detach().bfloat16())
    assert bf16_copy_of(W).data_ptr() == memory


def update(kind, W, backend=None, **options):
    generator = torch.Generator().manual_seed(1)
    first, grad = (torch.randn(M, D, generator=generator) for _ in range(2))
    ops = backend_of(W, backend)
    if kind == "signum":
        signum_update_(W, first, grad, UpdateOptions(**SIGNUM, **options), ops)
        return first
    adam_update_(W, first, first.square(), grad, UpdateOptions(**ADAM, **options), ops)
    return first


@pytest.mark.parametrize("kind", ["signum", "adam"])
@pytest.mark.parametrize("unit", [True, False])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_an_update_writes_the_copy_and_increments_the_version_with_every_backend(
    kind, unit, backend
):
    """Check the version counter, which torch's own fused Adam does not increment."""
    W, norms = kept(), torch.ones(M)
    before, version, counted = W.detach().clone(), W._version, norms._version
    with torch.no_grad():
        state = update(kind, W, backend=backend, unit=unit, norms=norms)
    assert not torch.equal(W, before)
    assert torch.equal(bf16_copy_of(W), W.detach().bfloat16())
    assert W._version > version
    assert norms._version > counted
    assert state._version > 0


@pytest.mark.parametrize("kind", ["signum", "adam"])
def test_a_skipped_update_keeps_a_copy_valid_or_invalid_as_it_is(kind):
    W = kept()
    with torch.no_grad():
        update(kind, W, unit=True, ok=torch.tensor(False))
        assert torch.equal(bf16_copy_of(W), W.detach().bfloat16())
        W.mul_(2)
        update(kind, W, unit=True, ok=torch.tensor(False))
    assert bf16_copy_of(W) is None


def product_of(W, x):
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        return Product(W, torch.zeros(len(W)), len(x))(x)


def test_a_product_reads_the_copy_while_it_is_valid():
    W, x = kept(), torch.randn(N, D, generator=torch.Generator().manual_seed(2))
    expected = product_of(weight(), x)
    assert torch.equal(product_of(W, x), expected)
    bf16_copy_of(W).zero_()  # no other code does
    assert not product_of(W, x).any()
    assert not product_of(W[4:8], x).any()
    assert product_of(W.detach().clone(), x).any()
    with torch.no_grad():
        W.mul_(2)
    assert torch.equal(product_of(W, x), 2 * expected)


def test_without_autocast_no_product_reads_the_copy():
    W, x = kept(), torch.randn(N, D)
    bf16_copy_of(W).zero_()
    with torch.no_grad():
        assert Product(W, torch.zeros(M), N)(x).any()


class Casts(TorchDispatchMode):
    """A mode that counts casts of whole weights."""

    count = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        result = operator(*args, **(kwargs or {}))
        if operator is torch.ops.aten._to_copy.default and result.shape == (M, D):
            self.count += 1
        return result


@pytest.mark.parametrize(
    ("settings", "each"),
    [
        ({}, 0),
        ({"micro_batch_size": 20, "grad_acc_steps": 2}, 0),
        ({"chunk_latents": 24}, 0),
        ({"grad_clip": 1.0}, 0),
        ({"decoder_norm": "free"}, 0),
        ({"decoder_norm": "fold"}, 1),  # these are not the parameters
    ],
    ids=str,
)
@pytest.mark.parametrize("optimizer", ["signum", "adam"])
def test_steps_under_autocast_cast_no_weight_and_have_the_same_bits(
    make_trainer, batches, monkeypatch, optimizer, settings, each
):
    found = []
    for keeps in (True, False):
        with monkeypatch.context() as patch:
            if not keeps:
                patch.setattr(step_module, "keep_bf16_copy", lambda _: None)
            trainer = make_trainer(D, M, K, optimizer=optimizer, autocast=True, **settings)
            for step, x in enumerate(batches(torch.float32)[:6]):
                with Casts() if keeps and step else contextlib.nullcontext() as casts:
                    train_step(trainer, x, step)
                assert casts is None or casts.count == each
            found.append(trainer.state()[0])
            assert (bf16_copy_of(trainer.sae.W_enc) is not None) is (keeps and not each)
    assert all(torch.equal(found[0][name], tensor) for name, tensor in found[1].items())


def test_without_autocast_a_step_keeps_no_copy(make_trainer, batches):
    trainer = make_trainer(D, M, K)
    train_step(trainer, batches(torch.float32)[0], 0)
    assert bf16_copy_of(trainer.sae.W_enc) is None
    trainer.settings = StepSettings(autocast=True)
    train_step(trainer, batches(torch.float32)[1], 1)
    assert bf16_copy_of(trainer.sae.W_enc) is not None
