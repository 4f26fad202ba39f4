"""Whole runs with every optimizer and schedule: exact on resume; invalid options are refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor

import saetrain.training.step
from actcache.core.json_codec import read_json
from actcache.errors import ConfigError, RunError
from saetrain.config.fit_config import FitConfig
from saetrain.evaluation import evaluate
from saetrain.launch.run import fit
from saetrain.runs.record import read_run

Options = Callable[..., FitConfig]
Snapshot = Callable[[Path], dict[str, bytes]]

RUNS: dict[str, dict[str, Any]] = {
    "signum with a schedule": {"lr_schedule": "cosine", "lr_end": 0.1},
    "signum, folded, k falls": {"decoder_norm": "fold", "k_anneal_steps": 13},
    "adam, clipped, in parts": {"optimizer": "adam", "grad_clip": 0.01, "micro_batch_size": 12},
    "adam, free, three batches an update": {
        "optimizer": "adam",
        "decoder_norm": "free",
        "grad_acc_steps": 3,
    },
    "adamw": {
        "optimizer": "adamw",
        "weight_decay": 0.1,
        "lr_schedule": "stable-then-decay",
        "lr_decay_steps": 9,
    },
    "adam8bit": {"optimizer": "adam8bit", "num_latents": 512},
    "muon": {"optimizer": "muon", "k_anneal_steps": 15, "k_start": 20},
    "adam, from the median, rows and encoder scaled": {
        "optimizer": "adam",
        "b_dec_init": "geometric-median",
        "input_scale": "rms",
        "encoder_scale": "auto",
    },
    "muon in bfloat16": {"optimizer": "muon", "autocast": True},
    "adam with weights in bfloat16": {
        "optimizer": "adam",
        "weights_dtype": "bfloat16",
        "defaults": 1,
    },
}


class Killed(BaseException):
    """Stands in for a signal."""


@pytest.fixture(autouse=True)
def _any_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Allow bfloat16 products on CPUs where they are slow."""
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)


@pytest.mark.parametrize("name", RUNS)
def test_a_stopped_run_resumes_to_the_same_bytes(
    options: Options, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """The checkpoint is of step 13, between two batches of an update of three."""
    common = {"max_tokens": 21 * 32, "save_every": 13, **RUNS[name]}
    whole, stopped = options(**common, out=options().out + "-whole"), options(**common)
    fit(whole)
    real = saetrain.training.step.train_step

    def step(trainer: Any, rows: Tensor, number: int) -> None:
        if number == 16 and trainer.entry.hookpoint == "layers.1":
            raise Killed
        real(trainer, rows, number)

    with monkeypatch.context() as patch:
        patch.setattr(saetrain.training.step, "train_step", step)
        with pytest.raises(Killed):
            fit(stopped)
    summary = fit(dataclasses.replace(stopped, resume=True))
    assert summary.new_steps == 8
    expected, found = snapshot(Path(whole.out)), snapshot(Path(stopped.out))
    assert expected.keys() == found.keys()
    assert [path for path in expected if expected[path] != found[path]] == []
    evaluation = evaluate(Path(whole.out))
    assert all(0 < sae.fvu < 1.5 and sae.k == 3 for sae in evaluation.saes)


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "adam8bit", "muon"])
def test_each_optimizer_learns_sparse_rows(
    make_cache: Callable[..., Path], options: Options, optimizer: str
) -> None:
    path = make_cache(shards=9, sequences=16, ctx_len=33, hookpoints={"layers.0": 24})
    config = options(
        cache=str(path),
        optimizer=optimizer,
        lr=0.01,
        num_latents=192,
        k=4,
        batch_size=64,
        epochs=6,
        dead_after=None,
        lr_warmup_steps=20,
        lr_schedule="stable-then-decay",
        save_every=10_000,
    )
    fit(config)
    (held_out,) = evaluate(Path(config.out)).saes
    assert held_out.fvu < 0.15  # 0.5 untrained


def test_default_learning_rates_of_a_long_run_are_those_of_other_trainers(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saetrain.optim.schedule._LONG", 1)  # so that one step counts as a long run
    monkeypatch.setattr("saetrain.optim.schedule._BATCH", 32)
    monkeypatch.setattr("saetrain.optim.schedule._MUON_SHORT", 0)
    rates = {"signum": 5e-3, "adam": 2e-4, "adamw": 2e-4, "adam8bit": 2e-4}
    for optimizer, base in rates.items():
        config = options(lr=None, optimizer=optimizer, max_tokens=32, out=options().out + optimizer)
        fit(config)
        entry = read_run(Path(config.out)).saes[0]
        assert entry.lr == pytest.approx(base / (48 / 2**14) ** 0.5)
    config = options(lr=None, optimizer="muon", max_tokens=32)
    fit(config)
    assert read_run(Path(config.out)).saes[0].lr == 2e-3


def test_annealing_trains_at_the_k_of_each_step_and_saves_the_last(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, seen = saetrain.training.step.train_step, []

    def step(trainer: Any, rows: Tensor, number: int) -> None:
        real(trainer, rows, number)
        seen.append(trainer.sae.k)

    monkeypatch.setattr(saetrain.training.step, "train_step", step)
    config = options(hookpoint=("layers.0",), k_anneal_steps=9, log_every=1)
    fit(config)
    expected = [round(48 * (1 - s / 9) + 3 * s / 9) for s in range(9)] + [3, 3, 3]
    assert seen == expected
    cfg = read_json(Path(config.out) / "layers.0" / "cfg.json")
    assert isinstance(cfg, dict)
    assert cfg["k"] == 3


def test_a_run_keeps_the_precision_that_it_began_with_unless_forced(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = options(hookpoint=("layers.0",), max_tokens=64)
    fit(config)
    assert read_run(Path(config.out)).precision == "float32"
    seen = []

    def note(precision: str, device: torch.device) -> None:
        seen.append(precision)

    monkeypatch.setattr("saetrain.launch.setup.use_precision", note)
    fit(dataclasses.replace(config, resume=True))
    with pytest.raises(RunError, match="--precision: None then, 'tf32' now"):
        fit(dataclasses.replace(config, resume=True, precision="tf32"))
    forced = dataclasses.replace(config, resume=True, precision="tf32", force_config=True)
    fit(dataclasses.replace(forced, max_tokens=128))
    record = read_run(Path(config.out))
    assert (record.precision, record.options.precision) == ("tf32", "tf32")
    # Without the option again, the device's precision at that time is recorded.
    fit(dataclasses.replace(forced, max_tokens=192, precision=None))
    record = read_run(Path(config.out))
    assert (record.precision, record.options.precision) == ("float32", None)
    assert seen == ["float32", "tf32", "float32"]


def test_new_weights_in_bfloat16_are_refused(options: Options) -> None:
    with pytest.raises(ConfigError, match=r"has been removed(.|\n)*--precision bfloat16"):
        fit(options(weights_dtype="bfloat16"))


def test_weights_in_bfloat16_are_saved_so_and_float32_is_the_default(options: Options) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        config = options(weights_dtype=name, out=options().out + name, defaults=1)
        fit(config)
        weights = load_file(Path(config.out) / "layers.0" / "sae.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {dtype}


def test_steps_that_fill_no_update_are_dropped(options: Options) -> None:
    assert fit(options(grad_acc_steps=5)).steps == 10  # of 12


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"grad_acc_steps": 13}, r"--grad-acc-steps is longer(.|\n)*<= 12"),
        ({"k_anneal_steps": 13}, r"--k-anneal-steps is longer(.|\n)*<= 12"),
        (
            {"lr_schedule": "stable-then-decay", "lr_decay_steps": 13},
            r"--lr-decay-steps is longer(.|\n)*<= 12",
        ),
        ({"k_anneal_steps": 3, "k_start": 49}, r"--k-start is larger(.|\n)*<= 48"),
    ],
)
def test_options_longer_than_the_run_are_refused_before_the_start(
    options: Options, changes: dict[str, Any], words: str
) -> None:
    config = options(**changes)
    with pytest.raises(ConfigError, match=words):
        fit(config)
    assert not (Path(config.out) / "run.json").exists()


def test_a_resume_with_other_training_options_is_refused(options: Options) -> None:
    config = options(optimizer="adam")
    fit(config)
    from actcache.errors import RunError

    with pytest.raises(RunError, match=r"--lr-schedule: None then, 'cosine' now"):
        fit(dataclasses.replace(config, resume=True, lr_schedule="cosine"))


def test_the_command_accepts_all_training_options(
    options: Options, snapshot: Snapshot, fork_server: Any
) -> None:
    config = options(
        optimizer="muon",
        lr_schedule="cosine",
        lr_end=0.1,
        weight_decay=0.0,
        grad_clip=1.0,
        grad_acc_steps=2,
        micro_batch_size=16,
        decoder_norm="fold",
        k_anneal_steps=6,
        k_start=20,
    )
    command = ["saetrain", "fit", config.cache]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name != "cache" and type(value) in (int, float, str):
            command += ["--" + field.name.replace("_", "-"), str(value)]
    done = fork_server.start(*command)
    done.communicate()
    assert done.returncode == 0, done.stderr
    by_command = snapshot(Path(config.out))
    again = dataclasses.replace(config, out=config.out + "-2")
    fit(again)
    other = snapshot(Path(again.out))
    assert [path for path in other if other[path] != by_command[path]] == []


def test_few_latents_die_in_a_short_run(make_cache: Callable[..., Path], tmp_path: Path) -> None:
    """At a high rate and on rows of one unit, so that the versions differ in AuxK alone."""
    directions = np.random.RandomState(5).standard_normal((256, 24))
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    often = np.arange(1, 257) ** -0.8
    often *= 5 / often.sum()

    def rows(_: str, shard: int, count: int, width: int) -> NDArray[np.float32]:
        state = np.random.RandomState(shard)
        codes = state.uniform(size=(count, 256)) * (state.uniform(size=(count, 256)) < often)
        noise = 0.02 * state.standard_normal((count, width))
        return (codes @ directions + 0.3 + noise).astype(np.float32)

    cache = make_cache(shards=10, sequences=100, hookpoints={"layers.0": 24}, rows=rows)
    found = []
    for version in (1, 2):
        config = FitConfig(
            cache=str(cache),
            out=str(tmp_path / f"run-{version}"),
            defaults=version,
            num_latents=192,
            k=5,
            batch_size=64,
            epochs=2,
            lr=0.02,
            input_scale="rms",
            device="cpu",
        )
        fit(config)
        found += evaluate(Path(config.out)).saes
    before, now = found
    assert before.fired_percent < 75
    assert now.fired_percent > 85
    assert now.fvu < before.fvu
