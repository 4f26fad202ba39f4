"""A loss or gradient that is not finite changes no weight; the error names its rows."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

import saetrain.training.step
from actcache.cache.reader import Cache
from actcache.errors import RunError
from actcache.stream.order import batch_rows
from saetrain.config.fit_config import FitConfig
from saetrain.config.sae import PENALISED, SaeConfig, SaeEntry
from saetrain.kernels import backends
from saetrain.kernels.update import bf16_copy_of
from saetrain.launch.run import fit
from saetrain.model.losses import make_loss_config
from saetrain.model.sae import Sae, build_sae
from saetrain.runs.checkpoint import load_checkpoint
from saetrain.runs.record import read_run
from saetrain.training.non_finite import ROWS, NonFiniteError
from saetrain.training.sae_trainer import SaeTrainer, StepSettings, make_optimizer
from saetrain.training.step import largest_square, train_step

Options = Callable[..., FitConfig]

N, D, M, K = 40, 12, 64, 4
OPTIMIZERS = ["signum", "adam", "adamw", "adam8bit", "muon"]


def batches(count: int) -> Tensor:
    """[count, N, D]"""
    return torch.randn(count, N, D, generator=torch.Generator().manual_seed(0))


def bits(trainer: SaeTrainer) -> dict[str, bytes]:
    """Return the weights, the optimiser's state and the encoder's bfloat16 copy, if it has one."""
    tensors = {**trainer.sae.state_dict(), **trainer.optimizer.state_tensors()}
    bf16_copy = bf16_copy_of(trainer.sae.W_enc)
    if trainer.optimizer.is_fused and bf16_copy is not None:
        tensors["bf16_copy"] = bf16_copy.view(torch.int16)
    return {name: t.detach().contiguous().numpy().tobytes() for name, t in tensors.items()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e38])
@pytest.mark.parametrize("device_flag", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_from_a_step_that_is_not_finite_on_weights_and_state_stay_bit_for_bit(
    make_trainer: Callable[..., SaeTrainer],
    optimizer: str,
    value: float,
    device_flag: bool,
    autocast: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`device_flag` makes the update conditional on the device, as on a GPU."""
    if device_flag:
        monkeypatch.setattr(
            saetrain.training.step,
            "conditional_step",
            lambda ok, optimizer, step: optimizer.masked_step(step, ok),
        )
    # The other optimisers normalise the decoder before the loss is known.
    norm = "unit" if optimizer in ("signum", "adam", "adamw") else "free"
    trainer = make_trainer(D, M, K, optimizer=optimizer, decoder_norm=norm, autocast=autocast)
    rows = batches(6)
    rows[3, 7, 2] = value
    for step in range(3):
        train_step(trainer, rows[step], step)
    assert trainer.guard.first_bad() is None
    before = bits(trainer)
    assert ("bf16_copy" in before) is (autocast and norm == "unit")
    for step in range(3, 6):
        train_step(trainer, rows[step], step)
        assert bits(trainer) == before
    assert trainer.guard.first_bad() == 3


@pytest.mark.parametrize("settings", [{"grad_acc_steps": 3}, {"micro_batch_size": 9}])
def test_one_bad_batch_of_an_update_or_part_of_a_batch_skips_the_update(
    make_trainer: Callable[..., SaeTrainer], settings: dict[str, Any]
) -> None:
    trainer, rows = make_trainer(D, M, K, **settings), batches(6)
    for step in range(3):
        train_step(trainer, rows[step], step)
    before, rows[4, 20, 0] = bits(trainer), math.nan
    if "micro_batch_size" in settings:
        rows[3] = rows[4]
    for step in range(3, 6):
        train_step(trainer, rows[step], step)
    assert bits(trainer) == before
    assert trainer.guard.first_bad() == (3 if "micro_batch_size" in settings else 4)


def spoil_gradient(patch: pytest.MonkeyPatch, spoilt: int, value: float) -> None:
    """Put `value` into one number of W_enc's gradient in step `spoilt`, under a finite loss."""
    real = saetrain.training.step.accumulate_gradient

    def accumulate(trainer: SaeTrainer, x: Tensor, step: int) -> Any:
        losses = real(trainer, x, step)
        if step == spoilt:
            assert trainer.sae.W_enc.grad is not None
            trainer.sae.W_enc.grad[5, 3] = value
        return losses

    patch.setattr(saetrain.training.step, "accumulate_gradient", accumulate)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -1e20])
@pytest.mark.parametrize(
    "settings", [{}, {"grad_acc_steps": 3}, {"micro_batch_size": 9}, {"grad_clip": 1.0}], ids=str
)
def test_from_a_gradient_that_overflows_under_a_finite_loss_on_no_bit_changes(
    make_trainer: Callable[..., SaeTrainer],
    optimizer: str,
    value: float,
    settings: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The square of 1e20 overflows: Adam's second moment would stay infinite."""
    norm = "unit" if optimizer in ("signum", "adam", "adamw") else "free"
    trainer = make_trainer(D, M, K, optimizer=optimizer, decoder_norm=norm, **settings)
    rows = batches(6)
    spoil_gradient(monkeypatch, 4, value)
    for step in range(3):
        train_step(trainer, rows[step], step)
    if "grad_acc_steps" not in settings:
        train_step(trainer, rows[3], 3)
    before = bits(trainer)
    for step in range(3 if "grad_acc_steps" in settings else 4, 6):
        train_step(trainer, rows[step], step)
    assert bits(trainer) == before
    assert trainer.guard.first_bad() == 4
    assert trainer.guard.is_in_gradient()


def test_a_large_gradient_whose_square_is_finite_makes_a_step(
    make_trainer: Callable[..., SaeTrainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(D, M, K, optimizer="adam")
    spoil_gradient(monkeypatch, 0, 1e19)
    before = bits(trainer)
    train_step(trainer, batches(1)[0], 0)
    assert bits(trainer)["W_enc"] != before["W_enc"]
    assert trainer.guard.first_bad() is None
    assert all(bool(t.isfinite().all()) for t in trainer.optimizer.state_tensors().values())


@pytest.mark.parametrize("of", [torch.float32, torch.float64, torch.bfloat16])
def test_the_largest_square_of_a_gradient_is_the_same_on_a_device(
    of: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    for value in (0.0, -7.0, 3.0, math.inf, -math.inf, math.nan):
        weights = [torch.nn.Parameter(torch.zeros(3, 5, dtype=of)) for _ in range(3)]
        for weight in weights[:2]:
            weight.grad = torch.ones(3, 5, dtype=of)
        assert weights[1].grad is not None
        weights[1].grad[2, 1] = value
        found = [largest_square(weights)]
        with monkeypatch.context() as patch:
            patch.setattr(backends, "host_can_read", lambda _: False)
            found.append(largest_square(weights))
        wanted = torch.tensor(max(1.0, value**2) if value == value else value).to(found[0])
        for square in found:
            torch.testing.assert_close(square, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("optimizer", ["signum", "adam", "adamw", "muon"])
@pytest.mark.parametrize("norm", ["unit", "fold", "free"])
@pytest.mark.parametrize("clip", [1.0, None])
def test_a_step_never_waits_for_the_device(
    monkeypatch: pytest.MonkeyPatch, optimizer: Any, norm: Any, clip: Any
) -> None:
    """Meta tensors hold no values, so reading one raises. AuxK is included."""
    # autocast has no meta device; the kernels disable it around one product.
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    device = torch.device("meta")
    settings = StepSettings(
        decoder_norm=norm,
        k_start=9,
        k_end=K,
        k_anneal_steps=3,
        grad_clip=clip,
        grad_acc_steps=2,
        micro_batch_size=9,
        auxk_alpha=0.1,
    )
    sae = Sae(D, M, K, device=device)
    entry = SaeEntry("layers.0", SaeConfig(D, M, K), 0.01, 0)
    update = make_optimizer(optimizer, sae, 0.01, 2, 6, decoder_norm=norm)
    trainer = SaeTrainer(entry, sae, update, 10**9, 1.0, settings=settings)
    for step in range(6):
        train_step(trainer, torch.zeros(N, D, device=device), step)
    with pytest.raises((RuntimeError, NotImplementedError)):
        trainer.guard.first_bad()  # logging reads it


@pytest.mark.parametrize("activation", ["batchtopk", "groupmax", "jumprelu", "relu", "gated"])
def test_a_step_of_another_activation_never_waits_for_the_device(
    monkeypatch: pytest.MonkeyPatch, activation: Any
) -> None:
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    sparsity = 0.1 * (activation in PENALISED)
    config = SaeConfig(D, M, K, activation=activation, sparsity=sparsity)
    device = torch.device("meta")
    sae, loss_config = build_sae(config, device=device), make_loss_config(config, 2)
    entry, update = SaeEntry("layers.0", config, 0.01, 0), make_optimizer("adam", sae, 0.01, 2, 6)
    settings = StepSettings(micro_batch_size=9, grad_clip=1.0)
    trainer = SaeTrainer(entry, sae, update, 10**9, 1.0, loss_config, settings)
    for step in range(2):
        train_step(trainer, torch.zeros(N, D, device=device), step)


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["signum", "adam", "adamw", "muon"])
@pytest.mark.parametrize("clip", [1.0, None])
def test_a_step_on_a_gpu_never_waits_and_a_bad_batch_changes_no_bit(
    optimizer: Any, clip: float | None
) -> None:
    device = torch.device("cuda")
    sae = Sae(D, M, K, device=device)
    norm = "free" if optimizer == "muon" else "unit"
    update = make_optimizer(optimizer, sae, 0.01, 0, 8, decoder_norm=norm)
    entry = SaeEntry("layers.0", SaeConfig(D, M, K), 0.01, 0)
    settings = StepSettings(decoder_norm=norm, grad_clip=clip, autocast=True)
    trainer = SaeTrainer(entry, sae, update, 10**9, 1.0, settings=settings)
    rows = batches(6).to(device)
    rows[4, 7, 2] = math.nan
    for step in range(2):  # warm-up: compilation and allocation
        train_step(trainer, rows[step], step)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for step in range(2, 4):
            train_step(trainer, rows[step], step)
        torch.cuda.set_sync_debug_mode("default")
        before = {n: t.detach().cpu().numpy().tobytes() for n, t in trainer.state()[0].items()}
        torch.cuda.set_sync_debug_mode("error")
        for step in range(4, 6):
            train_step(trainer, rows[step], step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    after = {n: t.detach().cpu().numpy().tobytes() for n, t in trainer.state()[0].items()}
    kept = [n for n in before if n.startswith(("sae.", "optimizer."))]
    assert [n for n in kept if before[n] != after[n]] == []
    assert trainer.guard.first_bad() == 4


def poisoned(
    make_cache: Callable[..., Path], value: float = math.nan, **changes: Any
) -> tuple[Path, tuple[int, int]]:
    """Return a cache in which one row of layers.1 holds `value`, and that row's address."""

    def rows(hookpoint: str, shard: int, count: int, width: int) -> NDArray[np.float32]:
        made = np.random.RandomState(shard).standard_normal((count, width)).astype(np.float32)
        if shard == 2 and hookpoint == "layers.1":
            made[77, 3] = value
        return made

    return make_cache(rows=rows, row_order="sequence", **changes), (2, 77)


def read_rows_file(root: Path) -> dict[str, Any]:
    return json.loads((root / ROWS).read_text())  # type: ignore[no-any-return]


@pytest.mark.parametrize("optimizer", ["signum", "muon"])
def test_the_command_names_sae_step_rows_and_remedy_and_exits_with_code_11(
    make_cache: Callable[..., Path], tmp_path: Path, fork_server: Any, optimizer: str
) -> None:
    cache, bad = poisoned(make_cache)
    root = tmp_path / "run"
    command = ["saetrain", "fit", str(cache), "--out", str(root), "--k", "3", "--num-latents", "48"]
    command += ["--batch-size", "32", "--device", "cpu", "--optimizer", optimizer, "--seed", "3"]
    command += ["--log-every", "100"]
    done = fork_server.start(*command)
    done.communicate()
    plan = read_run(root).plan
    step = next(s for s in range(12) if list(bad) in batch_rows(plan, 0, s).tolist())
    assert done.returncode == 11, done.stderr
    assert "Traceback" not in done.stderr
    message = " ".join(done.stderr.split())
    assert f"the loss of layers.1 is not finite by step {step + 1}" in message
    assert f"of the batch of epoch 0: shard {plan.shards[0][0]} rows" in message
    assert "shard 2 row 77: not finite on disk, so no --lr helps" in message
    assert "Nothing is saved yet" in message
    found = read_rows_file(root)
    assert found["rows"] == batch_rows(plan, 0, step).tolist()
    assert found["rows_not_finite"] == [list(bad)]
    assert (found["hookpoint"], found["step"], found["epoch"], found["step_in_plan"]) == (
        "layers.1",
        step + 1,
        0,
        step,
    )


def test_divergence_is_distinguished_from_rows_that_are_not_finite(
    options: Options,
) -> None:
    config = options(lr=1e25, optimizer="signum", log_every=3)
    with pytest.raises(NonFiniteError, match=r"its rows are finite(.|\n)*a smaller --lr") as caught:
        fit(config)
    assert caught.value.step is not None
    assert read_rows_file(Path(config.out))["rows_not_finite"] == []


def test_a_gradient_that_overflows_ends_the_run_with_the_step_before_saved(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_gradient(monkeypatch, 4, math.inf)
    config = options(optimizer="adam", hookpoint=("layers.0",), save_every=1, log_every=3)
    with pytest.raises(NonFiniteError) as caught:
        fit(config)
    message = " ".join(str(caught.value).split())
    assert "the gradient of layers.0 overflows under a finite loss by step 5" in message
    assert "of the batch of epoch 0" in message
    assert "--input-scale rms" in message
    assert "Step 4 is saved, from before" in message
    assert read_rows_file(Path(config.out))["rows_not_finite"] == []
    checkpoint = load_checkpoint(Path(config.out))
    assert checkpoint is not None
    assert checkpoint[0].step == 4


def test_the_rows_of_a_later_epoch_and_segment_are_named(
    make_cache: Callable[..., Path], options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run without and with --follow; one batch is multiplied by NaN after it was read."""
    real, seen = saetrain.training.step.train_step, []

    class Spoil:
        step = 0

    def train_step(trainer: Any, rows: Tensor, number: int) -> None:
        real(trainer, rows * math.nan if number == Spoil.step else rows, number)

    monkeypatch.setattr(saetrain.training.step, "train_step", train_step)
    cache = Cache.open(options().cache)
    for follow in (False, True):
        shards = {"segment_shards": 2, "follow": True, "val_fraction": 0.25} if follow else {}
        common: dict[str, Any] = {"epochs": 3, "log_every": 1, "hookpoint": ("layers.0",)} | shards
        Spoil.step = 10**9
        whole = options(**common, out=f"{options().out}-{follow}-whole")
        batches: list[NDArray[np.int64]] = []
        with monkeypatch.context() as patch:
            keep_addresses(patch, batches)
            steps = fit(whole).steps
        for Spoil.step in (0, steps // 2, steps - 1):
            config = options(**common, out=f"{options().out}-{follow}-{Spoil.step}")
            with pytest.raises(NonFiniteError, match=f"by step {Spoil.step + 1}\n"):
                fit(config)
            found = read_rows_file(Path(config.out))
            assert found["rows"] == batches[Spoil.step].tolist()
            seen.append(found["epoch"])
            rows = found["rows_not_finite"]  # finite on disk
            assert rows == []
    assert seen[:3] == [0, 1, 2]
    assert cache.shards


def keep_addresses(patch: pytest.MonkeyPatch, batches: list[NDArray[np.int64]]) -> None:
    """Record the row addresses of every batch of a run."""
    from actcache.stream.activation_stream import ActivationStream

    real = ActivationStream.__next__

    def following(self: ActivationStream) -> Any:
        batch = real(self)
        batches.append(batch.addresses.copy())
        return batch

    patch.setattr(ActivationStream, "__next__", following)


def test_a_run_resumes_from_the_checkpoint_before_and_fails_at_the_same_step(
    make_cache: Callable[..., Path], options: Options
) -> None:
    cache, _ = poisoned(make_cache)
    config = options(cache=str(cache), seed=3, save_every=1, log_every=1)
    messages = []
    for resume in (False, True):
        with pytest.raises(RunError) as caught:
            fit(dataclasses.replace(config, resume=resume))
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    checkpoint = load_checkpoint(Path(config.out))
    assert checkpoint is not None
    assert checkpoint[0].step == read_rows_file(Path(config.out))["step"] - 1
