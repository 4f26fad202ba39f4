"""Sparsify's laws, and ours for runs that are short."""

from __future__ import annotations

import pytest
import torch
from transformers import get_linear_schedule_with_warmup

from saetrain.config.fit_config import FitConfig
from saetrain.config.sae import LrSchedule, OptimizerName
from saetrain.optim import default_lr
from saetrain.optim.schedule import Schedule, make_schedule, warmup_steps, warmup_then_decay


@pytest.mark.parametrize(
    ("optimizer", "num_latents", "lr"),
    [
        ("signum", 2**14, 5e-3),
        ("signum", 2**16, 2.5e-3),
        ("signum", 4608, 5e-3 / (4608 / 2**14) ** 0.5),
        ("adam", 2**14, 2e-4),
        ("adam", 2**12, 4e-4),
    ],
)
def test_the_default_learning_rate_falls_with_the_root_of_the_width(
    optimizer: str, num_latents: int, lr: float
) -> None:
    assert default_lr(optimizer, num_latents, 64) == pytest.approx(lr, rel=1e-15)  # type: ignore[arg-type]
    assert default_lr(optimizer, num_latents, 64, 2**20) == pytest.approx(lr, rel=1e-15)  # type: ignore[arg-type]


def test_adams_learning_rate_rises_with_the_root_of_the_steps_that_a_short_run_lacks() -> None:
    long = default_lr("adam", 2**14, 64)
    assert default_lr("adam", 2**14, 64, 2**17) == long
    assert default_lr("adam", 2**14, 64, 2**13) == pytest.approx(4 * long, rel=1e-15)
    assert default_lr("adam", 2**16, 64, 2**9) == pytest.approx(8 * long, rel=1e-15)


def test_adams_learning_rate_never_makes_a_step_as_long_as_a_row_of_norm_1() -> None:
    for width in (64, 576, 4096):
        assert default_lr("adam", 2**10, width, 1) * width**0.5 == pytest.approx(0.24)


@pytest.mark.parametrize("optimizer", ["signum", "muon"])
def test_that_of_the_others_does_not_follow_the_steps(optimizer: OptimizerName) -> None:
    assert default_lr(optimizer, 4608, 64, 1) == default_lr(optimizer, 4608, 64)


@pytest.mark.parametrize(
    ("optimizer", "updates", "rows", "lr"),
    [
        ("adam", 137, 2048, 0.18 / 576**0.5),
        ("adam", 137, 4096, 0.18 / 576**0.5),
        ("adam", 137, 128, 0.09 / 576**0.5),
        ("adam", 2**15, 2048, 8e-4),
        ("adam8bit", 2**15, 128, 4e-4),
        ("adam", None, 128, 2e-4),
        ("muon", 137, 2048, 1.6e-2),
        ("muon", 20, 2048, 1.6e-2),
        ("muon", 548, 2048, 8e-3),
        ("muon", 548, 128, 4e-3),
        ("muon", 10**5, 4096, 2e-3),
        ("muon", None, 128, 1e-3),
        ("signum", 137, 512, 1e-2),
    ],
)
def test_the_rates_of_few_rows_an_update_and_of_muon_in_short_runs(
    optimizer: OptimizerName, updates: int | None, rows: int, lr: float
) -> None:
    found = default_lr(optimizer, 2**12, 576, updates, rows=rows)
    assert found == pytest.approx(lr, rel=1e-12)


def test_a_warm_up_has_the_given_steps_or_a_twentieth_of_the_run_up_to_a_thousand() -> None:
    assert [warmup_steps(None, steps) for steps in (9, 137, 20_000, 10**6)] == [0, 6, 1000, 1000]
    assert warmup_steps(0, 10**6) == 0
    assert warmup_steps(1500, 9) == 1500


@pytest.mark.parametrize(("warmup", "steps"), [(0, 7), (3, 10), (10, 10), (20, 10), (1, 1), (0, 1)])
def test_warm_up_and_decay_are_those_of_transformers(warmup: int, steps: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = get_linear_schedule_with_warmup(optimizer, warmup, steps)
    for step in range(steps):
        assert warmup_then_decay(step, warmup, steps) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-15
        )
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("optimizer", ["adamw", "adam8bit"])
def test_all_kinds_of_adam_have_adams_learning_rate(optimizer: OptimizerName) -> None:
    for steps in (100, 10**6):
        assert default_lr(optimizer, 4608, 64, steps) == default_lr("adam", 4608, 64, steps)


def test_the_learning_rate_of_muon_does_not_follow_the_width() -> None:
    assert default_lr("muon", 2**10, 64) == default_lr("muon", 2**17, 64) == 2e-3


HALF = 0.5
TABLE = {
    # Ten steps, of them two of warm-up.
    ("constant", None, 0.0): [0, HALF, 1, 1, 1, 1, 1, 1, 1, 1],
    ("linear", None, 0.0): [0, HALF, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125],
    ("linear", None, 0.2): [0, HALF, 1, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3],
    ("cosine", None, 0.0): [0, HALF, 1, 0.96194, 0.85355, 0.69134, 0.5, 0.30866, 0.14645, 0.03806],
    ("cosine", None, 0.5): [0, HALF, 1, 0.98097, 0.92678, 0.84567, 0.75, 0.65433, 0.57322, 0.51903],
    ("stable-then-decay", 4, 0.0): [0, HALF, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25],
    ("stable-then-decay", 4, 0.6): [0, HALF, 1, 1, 1, 1, 1, 0.9, 0.8, 0.7],
    ("stable-then-decay", None, 0.0): [0, HALF, 1, 1, 1, 1, 1, 1, 1, 0.5],
    ("stable-then-decay", 10, 0.0): [0, HALF, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125],
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE, ids=str)
def test_each_schedule_takes_the_values_of_its_table(
    case: tuple[LrSchedule, int | None, float],
) -> None:
    shape, decay, end = case
    schedule = Schedule(shape, 2, 10, decay, end)
    assert [schedule.factor(step) for step in range(10)] == pytest.approx(TABLE[case], abs=1e-5)


def test_a_linear_schedule_is_warm_up_then_decay_to_the_last_bit() -> None:
    schedule = Schedule("linear", 7, 31)
    for step in range(31):
        assert schedule.factor(step) == warmup_then_decay(step, 7, 31)


def test_by_default_signum_has_no_schedule_and_the_others_a_linear_one() -> None:
    assert make_schedule(FitConfig("cache", "run", optimizer="signum"), 9) is None
    adam = make_schedule(FitConfig("cache", "run"), 100)
    assert adam == Schedule("linear", 5, 100, None, 0.0)
    cosine = FitConfig("cache", "run", lr_schedule="cosine", lr_warmup_steps=2, lr_end=0.1)
    assert make_schedule(cosine, 9) == Schedule("cosine", 2, 9, None, 0.1)
