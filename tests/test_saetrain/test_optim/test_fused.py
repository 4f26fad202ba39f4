"""One pass does what three did. M num_latents, D d_in, K k."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from saetrain.config.sae import SaeConfig, SaeEntry
from saetrain.kernels.on_torch import update
from saetrain.model.sae import Sae
from saetrain.optim.adam import Adam
from saetrain.optim.fused import FusedOptimizer
from saetrain.optim.schedule import Schedule
from saetrain.optim.signum import Signum
from saetrain.training.sae_trainer import SaeTrainer, StepSettings, make_optimizer
from saetrain.training.step import train_step

M, D, K, STEPS = 64, 16, 4, 20
SCHEDULE = Schedule("linear", 0, 2 * STEPS)
BOTH = pytest.mark.parametrize("optimizer", ["signum", "adam"])


class ApartSignum(Signum):
    """As before there was one pass: its caller normalises, projects and measures."""

    is_fused = False


class ApartAdam(Adam):
    """Likewise; its checkpoints did not record that rows have norm 1."""

    is_fused = False


def make(
    optimizer: str, dtype: torch.dtype, apart: bool, unit: bool = True, **settings: Any
) -> SaeTrainer:
    sae = Sae(D, M, K, dtype=dtype)
    parameters = dict(sae.named_parameters())
    name = "W_dec" if unit and not apart else None
    steps_by: FusedOptimizer
    if optimizer == "signum":
        steps_by = (ApartSignum if apart else Signum)(parameters, 0.01, unit=name)
    else:
        kind = ApartAdam if apart else Adam
        steps_by = kind(parameters, 0.01, schedule=SCHEDULE, weight_decay=0.1, unit=name)
    settings = {"decoder_norm": "unit" if unit else "free", **settings}
    return SaeTrainer(
        SaeEntry("layers.0", SaeConfig(D, M, K), 0.01, seed=0),
        sae,
        steps_by,
        10**9,
        1.0,
        settings=StepSettings(**settings),
    )


def close(got: Tensor, want: Tensor) -> None:
    tolerance = 1e-10 if got.dtype == torch.float64 else 2e-5
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


def rows_of_norm_1(W: Tensor) -> bool:
    tolerance = 4 * torch.finfo(W.dtype).eps
    return bool(((W.detach().norm(dim=1) - 1).abs() <= tolerance).all())


@BOTH
@pytest.mark.parametrize("clip", [None, 0.05])
def test_steps_of_one_pass_are_those_of_three_to_rounding(
    batches: Callable[[torch.dtype], Tensor], optimizer: str, clip: float | None
) -> None:
    """The gradient's norm, the weights, and what is exported, which is drawn from those before.

    A gradient that is clipped is projected before it is measured, and once more in the pass.
    """
    one, three = (make(optimizer, torch.float64, apart, grad_clip=clip) for apart in (False, True))
    drawn_too_late = 0.0
    for step, x in enumerate(batches(torch.float64)[:STEPS]):
        train_step(one, x, step)
        train_step(three, x, step)
        assert rows_of_norm_1(one.sae.W_dec)
        ours, theirs = (t.optimizer.weights_to_export() for t in (one, three))
        if optimizer == "adam":  # no average: the weights, of norm 1 now
            theirs["W_dec"] = theirs["W_dec"] / theirs["W_dec"].norm(dim=1, keepdim=True)
        for name, weights in ours.items():
            close(weights, theirs[name])
        y, z = one.sae.W_dec.detach(), one.optimizer.state_tensors().get("W_dec")
        late = y if z is None else torch.lerp(y, z, 1 - 1 / 0.95)
        drawn_too_late = max(drawn_too_late, float((late - theirs["W_dec"]).abs().max()))
    assert (drawn_too_late > 1e-3) is (optimizer == "signum")
    assert one.latent_stats.pop_grad_norm() == pytest.approx(
        three.latent_stats.pop_grad_norm(), rel=1e-9
    )
    one.sae.normalise_decoder()
    three.sae.normalise_decoder()
    for a, b in zip(one.sae.parameters(), three.sae.parameters(), strict=True):
        close(a, b)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_same_gradients_lead_to_the_same_weights_to_rounding(
    optimizer: str, dtype: torch.dtype
) -> None:
    """In float32 gradients are given: one sign that rounding turns would lead elsewhere."""
    one, three = (make(optimizer, dtype, apart) for apart in (False, True))
    for step in range(STEPS):
        norms = []
        for trainer in (one, three):
            if trainer is three:
                trainer.sae.normalise_decoder()
            generator = torch.Generator().manual_seed(step)
            for p in trainer.sae.parameters():
                p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
            if trainer is three:
                trainer.sae.remove_parallel_gradient()
            norms.append(trainer.optimizer.step(step))
            assert all(p.grad is None for p in trainer.sae.parameters())
        assert float(norms[0]) == pytest.approx(float(norms[1]), rel=1e-6)  # type: ignore[arg-type]
        assert rows_of_norm_1(one.sae.W_dec)
    if optimizer == "signum":
        exported = [t.optimizer.weights_to_export()["W_dec"] for t in (one, three)]
        close(*exported)
        assert not rows_of_norm_1(exported[0])
    three.sae.normalise_decoder()
    for a, b in zip(one.sae.parameters(), three.sae.parameters(), strict=True):
        close(a, b)


@BOTH
def test_a_gradient_along_a_row_of_norm_1_does_nothing(optimizer: str) -> None:
    found = []
    for along in (0.0, 3.0):
        trainer = make(optimizer, torch.float64, apart=False)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for p in trainer.sae.parameters():
                p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
            assert trainer.sae.W_dec.grad is not None
            trainer.sae.W_dec.grad += along * trainer.sae.W_dec.detach()
            norm = trainer.optimizer.step(step)
        found.append((trainer.sae.W_dec.detach(), norm))
    close(found[0][0], found[1][0])
    assert float(found[0][1]) == pytest.approx(float(found[1][1]), rel=1e-9)  # type: ignore[arg-type]


@BOTH
def test_the_norm_of_the_gradient_does_not_follow_threads_or_parts(
    optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, found = torch.get_num_threads(), []
    try:
        for threads, size in ((1, 1 << 20), (2, 1 << 20), (5, 1 << 20), (1, 1 << 14)):
            torch.set_num_threads(threads)
            monkeypatch.setattr(update, "_BYTES", size)
            sae = Sae(97, 3000, K)
            made = make_optimizer(optimizer, sae, 0.01, 0, STEPS)  # type: ignore[arg-type]
            generator = torch.Generator().manual_seed(0)
            for p in sae.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            norm = made.step(1)
            assert norm is not None
            found.append([norm, *(p.detach().clone() for p in sae.parameters())])
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], others, strict=True))


@BOTH
@pytest.mark.parametrize("done", [1, 6])
def test_a_run_that_normalised_before_its_steps_continues_as_it_would_have(
    batches: Callable[[torch.dtype], Tensor], optimizer: str, done: int
) -> None:
    """A checkpoint of before: no norms and no word on them, decoder rows not normalised."""
    old, new = (make(optimizer, torch.float64, apart) for apart in (True, False))
    rows = batches(torch.float64)
    for step in range(done):
        train_step(old, rows[step], step)
    tensors, numbers = old.state()
    assert not rows_of_norm_1(tensors["sae.W_dec"])
    assert not any(
        "norms" in name or "unit" in name for name in [*tensors, *numbers] if "vit" not in name
    )
    new.load_state({name: t.detach().clone() for name, t in tensors.items()}, dict(numbers))
    assert rows_of_norm_1(new.sae.W_dec)
    for step in range(done, STEPS):
        ours, theirs = (t.optimizer.weights_to_export()["W_dec"] for t in (new, old))
        close(ours, theirs if optimizer == "signum" else theirs / theirs.norm(dim=1, keepdim=True))
        train_step(old, rows[step], step)
        train_step(new, rows[step], step)
    close(new.sae.W_enc, old.sae.W_enc)
    assert {"optimizer.W_dec.norms", "optimizer.unit_rows"} & {*new.state()[0], *new.state()[1]}


@BOTH
@pytest.mark.parametrize("to", ["free", "unit"])
def test_a_run_that_is_forced_to_another_decoder_norm_exports_the_same_at_first(
    batches: Callable[[torch.dtype], Tensor], optimizer: str, to: str
) -> None:
    """signum's average is drawn from rows before they are divided, wherever that is done."""
    begun, forced = (
        make(optimizer, torch.float64, False, unit) for unit in (to == "free", to == "unit")
    )
    rows = batches(torch.float64)
    for step in range(5):
        train_step(begun, rows[step], step)
    tensors, numbers = begun.state()
    forced.load_state({name: t.detach().clone() for name, t in tensors.items()}, dict(numbers))
    ours, theirs = (t.optimizer.weights_to_export()["W_dec"] for t in (forced, begun))
    if optimizer == "adam" and to == "unit":
        theirs = theirs / theirs.norm(dim=1, keepdim=True)
    close(ours, theirs)
    for step in range(5, 8):
        train_step(forced, rows[step], step)
    assert rows_of_norm_1(forced.sae.W_dec) is (to == "unit")


@pytest.mark.parametrize("name", ["signum", "adam", "adamw", "muon"])
@pytest.mark.parametrize(
    ("norm", "transcode"), [("unit", False), ("unit", True), ("fold", False), ("free", False)]
)
def test_only_the_decoder_of_an_autoencoder_keeps_norm_1_with_unit_norm_only(
    name: Any, norm: Any, transcode: bool
) -> None:
    sae = Sae(D, M, K, transcode=transcode)
    with torch.no_grad():
        sae.W_dec.copy_(torch.randn(M, D))
    made = make_optimizer(name, sae, 0.01, 0, STEPS, decoder_norm=norm)
    for p in sae.parameters():
        p.grad = torch.randn_like(p)
    norm_of_all = made.step(1)
    keeps = norm == "unit" and not transcode and name != "muon"
    assert rows_of_norm_1(sae.W_dec) is keeps
    assert not rows_of_norm_1(sae.W_enc)
    assert made.is_fused is (norm_of_all is not None) is (name != "muon")


def test_low_precision_keeps_the_norms_in_float32() -> None:
    """In bfloat16, the average would be 0.4% off."""
    sae = Sae(D, M, K, dtype=torch.bfloat16)
    made = make_optimizer("signum", sae, 0.01, 0, STEPS)
    for p in sae.parameters():
        p.grad = torch.randn_like(p)
    made.step(0)
    assert made.state_tensors()["W_dec.norms"].dtype == torch.float32
    assert made.weights_to_export()["W_dec"].dtype == torch.bfloat16
