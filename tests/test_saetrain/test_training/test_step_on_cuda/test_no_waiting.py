"""Nothing in a step makes the host wait for the device, whatever is trained and how.

Letters: N tokens, D d_in, M num_latents, K k.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from actcache.stream.activation_stream import Batch
from saetrain.kernels import UpdateOptions, adam_update_, backend_of, signum_update_
from saetrain.model.losses import OutputSlice
from saetrain.training.sae_trainer import SaeTrainer, StepSettings
from saetrain.training.step import train_batch, train_step

pytest.importorskip("triton")

N, D = 96, 64
PARTS = (OutputSlice("layers.0", 24, 2.0), OutputSlice("layers.1", D - 24, 3.0))
KINDS: dict[str, dict[str, Any]] = {
    "topk": {},
    "batchtopk": {"activation": "batchtopk"},
    "groupmax": {"activation": "groupmax"},
    "jumprelu": {"activation": "jumprelu", "sparsity": 1e-3},
    "relu": {"activation": "relu", "sparsity": 1e-3},
    "gated": {"activation": "gated", "sparsity": 1e-3},
    "multi-topk": {"multi_topk": True},
    "matryoshka": {"matryoshka": (64, 256)},
    "matryoshka-relu": {"activation": "relu", "sparsity": 1e-3, "matryoshka": (64, 256)},
    "transcoder": {"transcode": True, "d_out": 40},
    "skip-transcoder": {"transcode": True, "skip_connection": True, "d_out": 40},
    "crosscoder": {"widths": (24, D - 24), "parts": PARTS},
    "crosscoder-relu": {
        "activation": "relu",
        "sparsity": 1e-3,
        "widths": (24, D - 24),
        "parts": PARTS,
    },
    "scaled": {"scales": (0.5,)},
}
RECIPES = {
    "unit": StepSettings(),
    "fold": StepSettings(decoder_norm="fold"),
    "free": StepSettings(decoder_norm="free"),
    "annealed": StepSettings(k_start=32, k_end=4, k_anneal_steps=3),
    "annealed from products to gathers": StepSettings(
        autocast=True, k_start=100, k_end=4, k_anneal_steps=2
    ),
    "clipped": StepSettings(grad_clip=1.0),
    "accumulated": StepSettings(grad_acc_steps=2),
    "parts": StepSettings(micro_batch_size=40),
    "autocast": StepSettings(autocast=True),
    "chunks": StepSettings(chunk_latents=200),
}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "signum": {},
    "adam": {},
    "adamw": {"weight_decay": 0.01},
    "muon": {},
}
PATHS = pytest.mark.parametrize("path", ["triton", "torch"])


def width(trainer: SaeTrainer) -> int:
    config = trainer.entry.config
    return config.d_in + (config.width_out if config.transcode else 0)


@pytest.fixture
def steps(cuda: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Three steps, with dead latents from the second on; whatever waits raises."""

    def run(trainer: SaeTrainer, path: str, auxk_alpha: float = 1 / 32) -> None:
        trainer.settings = dataclasses.replace(trainer.settings, auxk_alpha=auxk_alpha)
        if path == "torch":  # the other is what a device gets by itself
            monkeypatch.setenv("SAETRAIN_KERNELS", path)
        with cuda.building():
            rows = torch.empty(N, width(trainer), dtype=torch.bfloat16)
        with cuda.watched():
            for step in range(3):
                train_step(trainer, rows, step)
        assert bool(cuda.launches) == (path == "triton")

    return run


@PATHS
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_every_kind_waits_for_nothing(
    make_trainee_on: Callable[..., SaeTrainer], steps: Callable[..., None], path: str, kind: str
) -> None:
    steps(make_trainee_on(**KINDS[kind]), path)


@PATHS
@pytest.mark.parametrize("settings", RECIPES)
def test_a_step_by_every_recipe_waits_for_nothing(
    make_trainee_on: Callable[..., SaeTrainer], steps: Callable[..., None], path: str, settings: str
) -> None:
    steps(make_trainee_on(settings=RECIPES[settings]), path)


AUTOENCODERS = [kind for kind in KINDS if "transcode" not in KINDS[kind]]  # others are not folded


@pytest.mark.parametrize(
    ("kind", "settings"),
    [(kind, "fold") for kind in AUTOENCODERS] + [(kind, "autocast") for kind in KINDS],
)
def test_kinds_with_recipes_that_change_their_weights_wait_for_nothing(
    make_trainee_on: Callable[..., SaeTrainer], steps: Callable[..., None], kind: str, settings: str
) -> None:
    steps(make_trainee_on(**KINDS[kind], settings=RECIPES[settings]), "triton")


@PATHS
@pytest.mark.parametrize("kind", ["topk", "skip-transcoder"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_step_of_every_optimiser_waits_for_nothing(
    make_trainee_on: Callable[..., SaeTrainer],
    steps: Callable[..., None],
    path: str,
    kind: str,
    optimizer: str,
) -> None:
    if optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    name = optimizer.removesuffix("w")
    steps(make_trainee_on(**KINDS[kind], optimizer=name, **OPTIMIZERS[optimizer]), path)


@PATHS
@pytest.mark.parametrize("unit", [True, False])
def test_an_update_under_a_flag_waits_for_nothing(cuda: Any, path: str, unit: bool) -> None:
    with cuda.building():
        w, first, second, grad = (torch.empty(40, D) for _ in range(4))
        options: dict[str, Any] = {"norms": torch.empty(40), "squares": torch.empty(40)}
        options |= {
            "bf16_copy": torch.empty(40, D, dtype=torch.bfloat16),
            "unit": unit,
        }
        options |= {"ok": torch.empty((), dtype=torch.bool), "lr": 1e-3}
    adam = {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.1, "step": 3}
    with cuda.watched():
        ops = backend_of(w, path)
        signum_update_(w, first, grad, UpdateOptions(mix=0.1, momentum=0.95, **options), ops)
        adam_update_(w, first, second, grad, UpdateOptions(**adam, **options), ops)


def test_rows_are_copied_to_the_device_once_for_all_saes_without_a_wait(
    cuda: Any, make_trainee_on: Callable[..., SaeTrainer]
) -> None:
    group = [make_trainee_on(), make_trainee_on(optimizer="adam")]
    for trainer in group:
        trainer.settings = dataclasses.replace(trainer.settings, auxk_alpha=1 / 32)
    rows = torch.zeros(N, D, dtype=torch.bfloat16)
    batch = Batch(0, 0, {"layers.0": rows}, np.zeros((N, 2), dtype=np.int64))
    with cuda.watched(rows) as device:
        for step in range(2):
            device.forget()
            train_batch({"layers.0": group}, batch, step)
            arrived = [t for t in device.taken if t.operator == "aten._to_copy.default"]
            assert [t.dtype for t in arrived if t.shape == (N, D)] == [
                torch.bfloat16,
                torch.float32,
            ]


WAITS: dict[str, Callable[[Tensor], object]] = {
    "a number": lambda x: float(x.sum()),
    "a truth": lambda x: bool((x > 0).any()),
    "a list": lambda x: x.tolist(),
    "a copy": lambda x: x.cpu(),
    "places": lambda x: (x > 0).nonzero(),
    "a mask": lambda x: x[x > 0],
    "a mask that is written": lambda x: x.__setitem__(x > 0, 0),
    "a number that is sent": lambda x: torch.tensor(3.0, device=x.device),
    "numbers that are sent": lambda x: x + torch.zeros(8).to(x.device),
    "numbers of two devices": lambda x: x * torch.ones(8),
    "equality": lambda x: torch.equal(x, x),
    "counted repeats": lambda x: x.repeat_interleave(torch.ones_like(x).long()),
}


@pytest.mark.parametrize("what", WAITS)
def test_a_wait_is_caught(cuda: Any, what: str) -> None:
    with cuda.building():
        x = torch.empty(8)
    with cuda.watched(), pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        WAITS[what](x)


def test_work_without_a_wait_is_let_through(cuda: Any) -> None:
    with cuda.building():
        x = torch.empty(8)
    with cuda.watched() as device:
        y = torch.where(x > 0, x, 0).masked_fill(x.isnan(), 1.0)
        y[2:4] = 0
        y += torch.full((8,), 2.0, device=x.device) * torch.tensor(2.0)
        assert y.device == cuda.device
        assert y.is_cuda
    assert device.most > 0
