"""Parts of batches, batches of an update, clipping, bfloat16."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from actcache.errors import ConfigError
from saetrain.model.sae import Sae
from saetrain.training.sae_trainer import SaeTrainer
from saetrain.training.step import clip_gradient, require_bfloat16_products, train_step

N, D, M, K = 60, 12, 40, 5
STEPS = 6


def batches(dtype: torch.dtype = torch.float64) -> Tensor:
    """[STEPS, N, D]"""
    generator = torch.Generator().manual_seed(3)
    return torch.randn(STEPS, N, D, generator=generator, dtype=torch.float64).to(dtype)


@pytest.fixture
def make(make_trainer: Callable[..., SaeTrainer]) -> Callable[..., SaeTrainer]:
    """Trainees with dead latents from the third batch on, and a recipe."""

    def build(
        dtype: torch.dtype = torch.float64, auxk_alpha: float = 0.0, **settings: Any
    ) -> SaeTrainer:
        settings["auxk_alpha"] = auxk_alpha
        trainer = make_trainer(
            D, M, K, dtype=dtype, optimizer="adam", dead_after=2 * N, variance=2.0, **settings
        )
        with torch.no_grad():
            trainer.sae.b_enc[M // 2 :] = -5.0
        return trainer

    return build


def run(
    trainer: SaeTrainer, rows: Tensor, count: int = STEPS, alpha: float = 1.0
) -> dict[str, float]:
    trainer.settings = dataclasses.replace(trainer.settings, auxk_alpha=alpha)
    for step in range(count):
        train_step(trainer, rows[step], step)
    return trainer.meter.pop_means()


def assert_same_weights(one: SaeTrainer, two: SaeTrainer, rtol: float = 1e-9) -> None:
    for a, b in zip(one.sae.parameters(), two.sae.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=rtol, atol=1e-9)


@pytest.mark.parametrize(
    ("norm", "by_residual"), [("unit", False), ("fold", False), ("free", False), ("unit", True)]
)
@pytest.mark.parametrize("rows", [1, 7, 30, 60, 1000])
def test_micro_batches_make_the_steps_of_whole_ones(
    make: Callable[..., SaeTrainer], rows: int, norm: Any, by_residual: bool
) -> None:
    """Also where they do not divide the batch."""
    how = {"auxk_alpha": 1.0, "decoder_norm": norm, "auxk_by_residual": by_residual}
    whole, parts = make(**how), make(**how, micro_batch_size=rows)
    expected, found = run(whole, batches()), run(parts, batches())
    assert expected["auxk"] > 0
    assert found == pytest.approx(expected, rel=1e-9)
    assert_same_weights(whole, parts)
    assert torch.equal(whole.dead_tracker.rows_since, parts.dead_tracker.rows_since)


def test_no_more_rows_than_a_micro_batch_are_in_a_forward_pass(
    make: Callable[..., SaeTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, sizes, alive = make(micro_batch_size=7), [], []
    autoencode, backward = trainer.sae.autoencode, torch.autograd.backward

    def spy(x: Tensor, *others: Any) -> Any:
        sizes.append(len(x))
        alive.append("forward")
        return autoencode(x, *others)

    def note(*arguments: Any) -> None:
        alive.append("backward")
        backward(*arguments)

    monkeypatch.setattr(trainer.sae, "autoencode", spy)
    monkeypatch.setattr(torch.autograd, "backward", note)
    train_step(trainer, batches()[0], 0)
    assert sizes == [7] * 8 + [4]
    assert alive == ["forward", "backward"] * 9  # the graph of one part is gone before the next


@pytest.mark.parametrize("micro_batch_size", [None, 20])
def test_accumulated_batches_make_the_step_of_their_union(
    make: Callable[..., SaeTrainer], micro_batch_size: int | None
) -> None:
    rows = batches()
    acc = make(grad_acc_steps=3, micro_batch_size=micro_batch_size)
    union = make()
    start = acc.sae.W_enc.detach().clone()
    for step in range(STEPS):
        train_step(acc, rows[step], step)
        if step < 2:
            assert torch.equal(acc.sae.W_enc, start)
    # Adam's schedule takes the step of the first batch of an update.
    for step, batch in ((0, rows[:3]), (3, rows[3:])):
        train_step(union, batch.reshape(3 * N, D), step)
    assert_same_weights(acc, union)
    assert acc.meter.steps == STEPS
    assert acc.meter.pop_means()["fvu"] == pytest.approx(union.meter.pop_means()["fvu"], rel=1e-9)


def test_batches_that_wait_for_their_update_are_part_of_the_state(
    make: Callable[..., SaeTrainer],
) -> None:
    rows = batches(torch.float32)
    ours, resumed = (make(torch.float32, 1.0, grad_acc_steps=4) for _ in range(2))
    for step in range(2):
        train_step(ours, rows[step], step)
    tensors, numbers = ours.state()
    assert {name for name in tensors if name.startswith("gradient.")} == {
        "gradient.W_enc",
        "gradient.b_enc",
        "gradient.W_dec",
        "gradient.b_dec",
    }
    resumed.load_state({name: t.detach().clone() for name, t in tensors.items()}, dict(numbers))
    for step in range(2, 4):
        train_step(ours, rows[step], step)
        train_step(resumed, rows[step], step)
    (expected, _), (got, _) = ours.state(), resumed.state()
    assert expected.keys() == got.keys()
    assert all(torch.equal(expected[name], got[name]) for name in expected)
    assert not any(name.startswith("gradient.") for name in got)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_clipping_is_torchs(scale: float) -> None:
    def parameters() -> list[nn.Parameter]:
        generator = torch.Generator().manual_seed(5)
        made = []
        for shape in ((40, 12), (40,), (12,)):
            made.append(nn.Parameter(torch.zeros(shape, dtype=torch.float64)))
            made[-1].grad = scale * torch.randn(shape, generator=generator, dtype=torch.float64)
        return made

    ours, theirs = parameters(), parameters()
    norm = clip_gradient(ours, 1.0)
    expected = nn.utils.clip_grad_norm_(theirs, 1.0)
    torch.testing.assert_close(norm, expected)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=0)


def test_a_step_clips_the_gradient_that_the_optimiser_gets(
    make: Callable[..., SaeTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, norms = make(grad_clip=1e-3), []

    def spy(_: int) -> None:
        gradients = [p.grad.flatten() for p in trainer.sae.parameters() if p.grad is not None]
        norms.append(float(torch.cat(gradients).norm()))

    monkeypatch.setattr(trainer.optimizer, "step", spy)
    train_step(trainer, batches()[0], 0)
    assert norms[0] == pytest.approx(1e-3, rel=1e-2)


def test_the_norm_of_a_gradient_does_not_follow_the_number_of_threads() -> None:
    parameter = nn.Parameter(torch.zeros(3000, 97))
    parameter.grad = torch.randn(3000, 97, generator=torch.Generator().manual_seed(0))
    before, norms = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            norms.append(float(clip_gradient([parameter], 1e9)))
    finally:
        torch.set_num_threads(before)
    assert len(set(norms)) == 1


def test_a_gradient_that_overflows_under_a_finite_loss_reaches_no_weight(
    make: Callable[..., SaeTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(torch.float32, grad_clip=1.0)
    rows = batches(torch.float32)
    train_step(trainer, rows[0], 0)
    trainer.sae.normalise_decoder()
    before = [p.detach().clone() for p in trainer.sae.parameters()]
    assert trainer.sae.W_enc.grad is None
    trainer.sae.W_enc.grad = torch.full_like(trainer.sae.W_enc, 1e30)  # its square is not finite
    monkeypatch.setattr(Sae, "normalise_decoder", lambda _: None)
    train_step(trainer, rows[1], 1)
    assert trainer.guard.first_bad() == 1
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.sae.parameters(), strict=True))


# --- bfloat16 ------------------------------------------------------------------------------------


def test_autocast_takes_products_in_bfloat16_and_learns_the_same_but_for_rounding(
    make: Callable[..., SaeTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact, cast = make(torch.float32), make(torch.float32, autocast=True)
    expected, found = run(exact, batches(torch.float32)), run(cast, batches(torch.float32))
    assert found["fvu"] == pytest.approx(expected["fvu"], rel=0.02)
    assert found["fvu"] != expected["fvu"]
    assert all(p.dtype == torch.float32 for p in cast.sae.parameters())
    tensors, _ = cast.state()
    assert {t.dtype for n, t in tensors.items() if n.startswith("optimizer")} == {torch.float32}


def test_a_cpu_without_bfloat16_products_is_refused_and_a_gpu_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    require_bfloat16_products(torch.device("cuda"))
    with pytest.raises(ConfigError, match=r"--autocast(.|\n)*AVX512-BF16"):
        require_bfloat16_products(torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    require_bfloat16_products(torch.device("cpu"))
