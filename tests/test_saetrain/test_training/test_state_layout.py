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
    batches: Callable[[torch.dtype], Tensor], make_trainee: Callable[..., SaeTrainer]
) -> Callable[..., State]:
    """A function that trains an SAE for some steps and returns its state."""

    def train(steps: int, **options: Any) -> State:
        trainer = make_trainee(D, M, K, **options)
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
    ],
    ids=str,
)
def test_the_state_that_a_trainer_saves_is_accepted(
    trained: Callable[..., State],
    make_trainee: Callable[..., SaeTrainer],
    optimizer: str,
    steps: int,
    options: dict[str, Any],
) -> None:
    if optimizer == "adam8bit" and options.get("dtype") is torch.bfloat16:
        pytest.skip("bitsandbytes cannot step bfloat16 on a CPU")
    state = trained(steps, optimizer=optimizer, **options)
    check(make_trainee(D, M, K, optimizer=optimizer, **options), state, steps)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_tensor_of_another_shape_or_dtype_missing_or_surplus_is_refused(
    trained: Callable[..., State], make_trainee: Callable[..., SaeTrainer], optimizer: str
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
                check(make_trainee(D, M, K, optimizer=optimizer), (changed, numbers), 3)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("value", [-1, 0.5, 1e30, 4 * ROWS])
def test_counters_out_of_range_are_refused(
    trained: Callable[..., State],
    make_trainee: Callable[..., SaeTrainer],
    optimizer: str,
    value: float,
) -> None:
    tensors, numbers = trained(3, optimizer=optimizer)
    counters = ("meter.steps", "vitals.rows", "vitals.updates", "optimizer.k")
    for name in numbers:
        if name in counters or name.endswith(".step"):
            state = tensors, numbers | {name: value}
            with pytest.raises(FormatError, match=name):
                check(make_trainee(D, M, K, optimizer=optimizer), state, 3)
    for name, tensor in tensors.items():
        if name in ("firing", "vitals.active") or name.endswith(".step"):
            if value in (0.5, 1e30) and not tensor.is_floating_point():
                continue
            state = tensors | {name: torch.full_like(tensor, value)}, numbers
            with pytest.raises(FormatError, match=name):
                check(make_trainee(D, M, K, optimizer=optimizer), state, 3)


def test_a_number_missing_or_surplus_is_refused(
    trained: Callable[..., State], make_trainee: Callable[..., SaeTrainer]
) -> None:
    tensors, numbers = trained(3, optimizer="signum")
    for name in numbers:
        for changed in (
            {key: value for key, value in numbers.items() if key != name},
            numbers | {f"{name}.more": 1.0},
        ):
            with pytest.raises(FormatError, match="other numbers"):
                check(make_trainee(D, M, K, optimizer="signum"), (tensors, changed), 3)
