"""Annealing of k as in sparsify, batches of an update, and precision of products."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from actcache.errors import ConfigError
from saetrain.config.fit_config import (
    DEFAULTS,
    FitConfig,
    Precision,
    with_defaults,
    with_precision,
)
from saetrain.config.sae import SaeConfig
from saetrain.training.sae_trainer import (
    StepSettings,
    make_step_settings,
    precision_on,
    use_precision,
)


def annealed(**options: int) -> StepSettings:
    config = with_defaults(FitConfig("cache", "run", **options), 2)  # type: ignore[arg-type]
    return make_step_settings(config, SaeConfig(16, 48, 3))


@pytest.mark.parametrize(("d_in", "num_latents", "k", "steps"), [(16, 48, 3, 7), (4, 99, 5, 20)])
def test_k_is_annealed_as_in_sparsify_from_ten_times_the_width_or_all_latents(
    sparsify: object, d_in: int, num_latents: int, k: int, steps: int
) -> None:
    from sparsify.trainer import Trainer

    options = with_defaults(FitConfig("cache", "run", k=k, k_anneal_steps=steps), 2)
    settings = make_step_settings(options, SaeConfig(d_in, num_latents, k))
    peer = SimpleNamespace(
        initial_k=min(num_latents, 10 * d_in), final_k=k, cfg=SimpleNamespace(k_decay_steps=steps)
    )
    for step in range(steps + 5):
        peer.global_step = step
        assert settings.k(step) == Trainer.get_current_k(peer)
    assert settings.k(0) == min(num_latents, 10 * d_in)
    assert settings.k(steps) == k


def test_k_starts_at_k_start_and_is_constant_without_annealing() -> None:
    settings = annealed(k=3, k_anneal_steps=4, k_start=11)
    assert [settings.k(step) for step in range(6)] == [11, 9, 7, 5, 3, 3]
    assert annealed(k=3).k(0) is None
    assert [settings.changes_k(step) for step in range(6)] == [False, True, True, True, True, False]
    assert not annealed(k=3).changes_k(1)


def test_all_batches_of_an_update_have_the_same_k() -> None:
    settings = annealed(k=3, k_anneal_steps=4, k_start=11, grad_acc_steps=2)
    assert [settings.k(step) for step in range(6)] == [11, 11, 7, 7, 3, 3]
    assert [settings.ends_update(step) for step in range(4)] == [False, True, False, True]


def test_a_k_start_above_num_latents_raises_an_error() -> None:
    with pytest.raises(ConfigError, match=r"--k-start is larger(.|\n)*<= 48(.|\n)*49"):
        annealed(k=3, k_anneal_steps=4, k_start=49)


@pytest.mark.parametrize(("version", "by_residual"), [(1, False), (2, True)])
def test_auxk_is_divided_by_the_variance_of_the_residual_from_version_2_of_the_defaults_on(
    version: int, by_residual: bool
) -> None:
    options = with_defaults(FitConfig("cache", "run"), version)
    assert make_step_settings(options, SaeConfig(16, 48, 3)).auxk_by_residual == by_residual


CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("device", "version", "given", "recorded", "expected"),
    [
        (CPU, 1, {}, None, "float32"),
        (CPU, 2, {}, None, "float32"),
        (CUDA, 1, {}, None, "tf32"),
        (CUDA, 2, {}, None, "bfloat16"),
        (CUDA, 2, {"precision": "float32"}, None, "float32"),
        (CUDA, 1, {"autocast": True}, None, "bfloat16"),
        (CPU, 2, {"precision": "bfloat16", "autocast": True}, None, "bfloat16"),
        (CUDA, 2, {}, "float32", "float32"),
        (CPU, 2, {}, "tf32", "tf32"),
        (CUDA, 2, {"precision": "tf32"}, "bfloat16", "tf32"),
    ],
)
def test_precision_is_as_given_then_as_at_the_start_then_that_of_the_device(
    monkeypatch: pytest.MonkeyPatch,
    device: torch.device,
    version: int,
    given: dict[str, Any],
    recorded: Precision | None,
    expected: Precision,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    config = FitConfig("cache", "out", **given)
    assert precision_on(device, config, DEFAULTS[version], recorded) == expected
    assert with_precision(config, expected).autocast == (expected == "bfloat16")


def test_a_gpu_without_bfloat16_takes_tf32_unless_told_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: False)
    assert precision_on(CUDA, FitConfig("cache", "out"), DEFAULTS[2]) == "tf32"


@pytest.mark.parametrize(
    ("precision", "allowed"), [("float32", "highest"), ("tf32", "high"), ("bfloat16", "high")]
)
def test_float32_forbids_tf32_in_products_on_cuda(
    monkeypatch: pytest.MonkeyPatch, precision: Precision, allowed: str
) -> None:
    calls: list[str] = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", calls.append)
    use_precision(precision, CPU)
    use_precision(precision, CUDA)
    assert calls == [allowed]
