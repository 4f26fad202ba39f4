"""A saved state is compared with what an SAE needs before any of it is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from actcache.errors import FormatError
from saetrain.training.sae_trainer import SaeTrainer
from saetrain.training.state_layout import require_state
from saetrain.training.step import train_step

D, M, K, ROWS = 16, 320, 4, 64  # M: adam8bit keeps matrices of 4,096 numbers and more in 8 bits
OPTIMIZERS = ("adam", "adamw", "signum", "muon", "adam8bit")
State = tuple[dict[str, Tensor], dict[str, float]]


@pytest.fixture
def trained(
    batches: Callable[[torch.dtype], Tensor], make_trainer: Callable[..., SaeTrainer]
) -> Callable[..., State]:
    """A function that trains an SAE for some steps and returns its state."""

    def train(steps: int, **options: Any) -> State:
        trainer = make_trainer(D, M, K, **options)
        rows = batches(trainer.sae.W_enc.dtype)
        for step in range(steps):
            train_step(trainer, rows[step], step)
        return trainer.state()

    return train


def check(trainer: SaeTrainer, state: State, steps: int) -> None:
    require_state(trainer, *state, Path("checkpoint"), steps, steps * ROWS)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("steps", "options"),
    [
        (0, {}),
        (3, {}),
        (3, {"decoder_norm": "fold"}),
        (1, {"grad_acc_steps": 2}),
        (3, {"grad_acc_steps": 2}),
        (4, {"grad_acc_steps": 2}),
        (2, {"dtype": torch.bfloat16}),
        (0, {"auxk_alpha": 1.0, "auxk_by_residual": True}),
        (2, {"auxk_alpha": 1.0, "auxk_by_residual": True}),
    ],
    ids=str,
)
def test_the_state_that_a_trainer_saves_is_accepted(
    trained: Callable[..., State],
    make_trainer: Callable[..., SaeTrainer],
    optimizer: str,
    steps: int,
    options: dict[str, Any],
) -> None:
    if optimizer == "adam8bit" and options.get("dtype") is torch.bfloat16:
        pytest.skip("bitsandbytes cannot step bfloat16 on a CPU")
    state = trained(steps, optimizer=optimizer, **options)
    check(make_trainer(D, M, K, optimizer=optimizer, **options), state, steps)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_tensor_of_another_shape_or_dtype_missing_or_surplus_is_refused(
    trained: Callable[..., State], make_trainer: Callable[..., SaeTrainer], optimizer: str
) -> None:
    tensors, numbers = trained(3, optimizer=optimizer)
    for name, tensor in tensors.items():
        other = torch.float16 if tensor.is_floating_point() else torch.int16
        for changed in (
            tensors | {name: torch.zeros(7, dtype=tensor.dtype)},
            tensors | {name: tensor.unsqueeze(0)},
            tensors | {name: tensor.to(other)},
            {key: value for key, value in tensors.items() if key != name},
            tensors | {f"{name}.more": tensor},
        ):
            if optimizer == "signum" and name not in changed and name.endswith(".norms"):
                continue  # older checkpoints have no norms
            with pytest.raises(FormatError, match="checkpoint"):
                check(make_trainer(D, M, K, optimizer=optimizer), (changed, numbers), 3)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("value", [-1, 0.5, 1e30, 4 * ROWS])
def test_counters_out_of_range_are_refused(
    trained: Callable[..., State],
    make_trainer: Callable[..., SaeTrainer],
    optimizer: str,
    value: float,
) -> None:
    tensors, numbers = trained(3, optimizer=optimizer)
    counters = ("meter.steps", "vitals.rows", "vitals.updates", "optimizer.k")
    for name in numbers:
        if name in counters or name.endswith(".step"):
            state = tensors, numbers | {name: value}
            with pytest.raises(FormatError, match=name):
                check(make_trainer(D, M, K, optimizer=optimizer), state, 3)
    for name, tensor in tensors.items():
        if name in ("firing", "vitals.active") or name.endswith(".step"):
            if value in (0.5, 1e30) and not tensor.is_floating_point():
                continue
            state = tensors | {name: torch.full_like(tensor, value)}, numbers
            with pytest.raises(FormatError, match=name):
                check(make_trainer(D, M, K, optimizer=optimizer), state, 3)


def test_a_number_missing_or_surplus_is_refused(
    trained: Callable[..., State], make_trainer: Callable[..., SaeTrainer]
) -> None:
    tensors, numbers = trained(3, optimizer="signum")
    for name in numbers:
        for changed in (
            {key: value for key, value in numbers.items() if key != name},
            numbers | {f"{name}.more": 1.0},
        ):
            with pytest.raises(FormatError, match="other numbers"):
                check(make_trainer(D, M, K, optimizer="signum"), (tensors, changed), 3)


@pytest.mark.parametrize(
    "change",
    [
        {"lr_max": 1e308},
        {"lr_max": 0.0},
        {"lr_max": -0.01},
        {"lr_max": 5e-324},
        {"lr_max": 0.02},
        {"weight_sum": 1e308},
        {"weight_sum": 0.0},
        {"weight_sum": -1.0},
        {"weight_sum": 0.9e-4},
        {"weight_sum": 3.1e-4},
    ],
    ids=str,
)
def test_an_average_of_signum_that_no_steps_make_is_refused(
    trained: Callable[..., State], make_trainer: Callable[..., SaeTrainer], change: dict[str, float]
) -> None:
    tensors, numbers = trained(3, optimizer="signum", lr=0.01)
    changed = numbers | {f"optimizer.{name}": value for name, value in change.items()}
    with pytest.raises(FormatError, match=r"number optimizer\.(lr_max|weight_sum)"):
        check(make_trainer(D, M, K, optimizer="signum"), (tensors, changed), 3)


def test_an_average_of_signum_over_changing_rates_is_accepted(
    batches: Callable[[torch.dtype], Tensor], make_trainer: Callable[..., SaeTrainer]
) -> None:
    """With a warm-up, or another --lr by --force-config, the largest rate so far counts."""
    trainer = make_trainer(D, M, K, optimizer="signum")
    for step, lr in enumerate((1e-3, 2e-2, 1e-6)):
        trainer.optimizer._lr = lr  # type: ignore[attr-defined]
        train_step(trainer, batches(torch.float32)[step], step)
        check(make_trainer(D, M, K, optimizer="signum", lr=lr), trainer.state(), step + 1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_moments_and_means_that_are_not_finite_are_refused(
    trained: Callable[..., State], make_trainer: Callable[..., SaeTrainer], optimizer: str
) -> None:
    tensors, numbers = trained(3, optimizer=optimizer)
    names = [n for n, t in tensors.items() if t.is_floating_point() and n != "vitals.norms"]
    assert any(name.startswith("optimizer.") for name in names)
    for name in names:
        squares = name.endswith(("_sq", "state2", "absmax2", "norms"))
        for value in (torch.nan, -1.0 if squares else torch.inf):
            changed = tensors[name].clone()
            changed.view(-1)[-1] = value
            state = tensors | {name: changed}, numbers
            with pytest.raises(FormatError, match=f"tensor {name}"):
                check(make_trainer(D, M, K, optimizer=optimizer), state, 3)
