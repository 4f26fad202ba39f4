"""--force-config: allowed changes, refused changes, and the history in run.json."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actcache.core.json_codec import to_json
from actcache.errors import CacheMismatchError, ConfigError, RunError
from actcache_cli.options import field_docs
from saetrain.config.fit_config import FitConfig
from saetrain.config.grid import vary
from saetrain.config.sae import HookpointOverride, SaeOptions
from saetrain.launch.run import fit
from saetrain.optim import default_lr
from saetrain.runs.checkpoint import tensors_path
from saetrain.runs.overrides import OVERRIDABLE
from saetrain.runs.record import RUN, read_run
from saetrain.tracking.jsonl import METRICS

Options = Callable[..., FitConfig]
Snapshot = Callable[[Path], dict[str, bytes]]

ALLOWED: dict[str, dict[str, Any]] = {
    "learning rate": {"lr": 0.001, "lr_schedule": "cosine", "lr_warmup_steps": 9, "lr_end": 0.5},
    "decay": {"lr_schedule": "stable-then-decay", "lr_decay_steps": 7, "epochs": 4},
    "update": {"weight_decay": 0.3, "grad_clip": 1e-3, "decoder_norm": "fold", "log_every": 1},
    "loss": {"k_anneal_steps": 20, "k_start": 9, "auxk_alpha": 2.0, "dead_after": 33},
    "batches": {"max_tokens": 32 * 31, "micro_batch_size": 12, "autocast": True},
    "validation": {"val_every": 2, "val_rows": 50, "save_best": True},
    "hookpoints": {"hookpoints": {"layers.1": HookpointOverride(lr=1e-3)}},
}
"""Options that may change, several in one run."""


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `begun` is made once."""
    return tmp_path_factory.mktemp("template") / "run"


@pytest.fixture
def begun(options: Options, template: Path) -> FitConfig:
    """A run of 24 steps, of which 12 are done, with a schedule that depends on its length."""
    config = options(epochs=2, optimizer="adamw", auxk_alpha=0.5, keep_every=12, resume=True)
    if not template.exists():
        fit(dataclasses.replace(config, out=str(template)))
        for path in template.glob("checkpoint-000000024*"):
            path.unlink()
    shutil.copytree(template, config.out)
    return config


def test_every_overridable_option_is_tested_and_in_the_help() -> None:
    elsewhere = {"sparsity", "sparsity_warmup_steps", "cuda_graphs", "chunk_latents", "compile"}
    elsewhere |= {"beta1", "beta2", "eps", "precision"}
    # tested separately
    assert set().union(*ALLOWED.values()) | elsewhere == OVERRIDABLE
    help_ = field_docs(FitConfig)["force_config"]
    for name in OVERRIDABLE - {"hookpoints"}:
        assert name.replace("_", "-") in help_


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed_changes_take_effect_from_the_checkpoint_on(
    begun: FitConfig, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    import torch

    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    root, changes = Path(begun.out), ALLOWED[name]
    before = read_run(root)
    now = dataclasses.replace(begun, **changes)
    with pytest.raises(RunError, match=r"started with other options(.|\n)*--force-config"):
        fit(now)
    assert read_run(root) == before
    lines = (root / METRICS).read_text().splitlines()[:3]
    summary = fit(dataclasses.replace(now, force_config=True))
    assert summary.new_steps == summary.steps - 12
    assert (root / METRICS).read_text().splitlines()[:3] == lines
    record = read_run(root)
    assert record.options == now
    (change,) = record.history
    assert (change.step, change.versions) == (12, record.versions)
    described = "; ".join(change.changes)
    assert all(f"--{option.replace('_', '-')}: " in described for option in changes)
    # Now the old options raise an error, and the new ones need no --force-config. Resuming from the
    # same checkpoint gives the same bytes.
    done = snapshot(root)
    with pytest.raises(RunError):
        fit(begun)
    for path in root.glob("checkpoint-*"):
        if "000000012" not in path.name:
            path.unlink()
    assert fit(now).new_steps == summary.new_steps
    assert snapshot(root) == done


def test_the_penalty_and_its_warmup_may_change(options: Options) -> None:
    config = options(activation="relu", sparsity=0.1, keep_every=6, resume=True)
    fit(config)
    root = Path(config.out)
    for path in root.glob("checkpoint-000000012*"):
        path.unlink()
    other = {"sparsity": 0.5, "sparsity_warmup_steps": 9}
    assert fit(dataclasses.replace(config, **other, force_config=True)).new_steps == 6
    record = read_run(root)
    assert {sae.config.sparsity for sae in record.saes} == {0.5}
    assert record.history[0].changes == (
        "--sparsity: 0.1 then, 0.5 now",
        "--sparsity-warmup-steps: None then, 9 now",
    )
    assert json.loads((root / "layers.0" / "cfg.json").read_text())["sparsity"] == 0.5


@pytest.mark.parametrize(
    ("activation", "changes"), [("topk", {"chunk_latents": 7}), ("gated", {"compile": True})]
)
def test_options_that_change_rounding_may_change(
    options: Options, monkeypatch: pytest.MonkeyPatch, activation: Any, changes: dict[str, Any]
) -> None:
    monkeypatch.setattr("saetrain.model.activations.gated.compiled", lambda function: function)
    monkeypatch.setattr("saetrain.launch.setup.require_compiler", lambda _: None)
    config = options(activation=activation, keep_every=6, resume=True)
    fit(config)
    for path in Path(config.out).glob("checkpoint-000000012*"):
        path.unlink()
    assert fit(dataclasses.replace(config, **changes, force_config=True)).new_steps == 6
    (change,) = read_run(Path(config.out)).history[0].changes
    assert change.startswith(f"--{next(iter(changes)).replace('_', '-')}: ")


def test_changed_length_and_learning_rate_take_effect(begun: FitConfig, options: Options) -> None:
    """The run gets longer, and with lr 1e-30 the FVU stays constant."""
    longer = dataclasses.replace(begun, epochs=5, lr=1e-30, weight_decay=0.0, force_config=True)
    summary = fit(longer)
    assert (summary.steps, summary.new_steps) == (60, 48)
    record = read_run(Path(begun.out))
    assert (record.steps, record.options.epochs, record.saes[0].lr) == (60, 5, 1e-30)
    lines = [json.loads(t) for t in (Path(begun.out) / METRICS).read_text().splitlines()]
    fvu = [line["saes"]["layers.0"]["fvu"] for line in lines]
    assert sum(fvu[3:6]) == pytest.approx(sum(fvu[6:9]), rel=1e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"k": 4},
        {"num_latents": 40},
        {"seed": 5},
        {"data_seed": 5},
        {"optimizer": "adam"},
        {"batch_size": 64},
        {"pool_rows": 64},
        {"val_fraction": 0.3},
        {"hookpoint": ("layers.0",)},
        {"weights_dtype": "bfloat16"},
        {"grad_acc_steps": 2},
        {"follow": True},
        {"lr": 0.5, "k": 4},
        {"hookpoints": {"layers.1": HookpointOverride(k=2)}},
        {"saes": (SaeOptions(num_latents=48, k=3, lr=0.01), SaeOptions(num_latents=48, k=3))},
    ],
    ids=str,
)
def test_changed_shapes_names_or_order_raise_an_error_and_leave_the_run_unchanged(
    begun: FitConfig, snapshot: Snapshot, changes: dict[str, Any]
) -> None:
    root = Path(begun.out)
    before, record = snapshot(root), (root / RUN).read_bytes()
    if "saes" in changes:
        defaults = {f.name: f.default for f in dataclasses.fields(SaeOptions)}
        changes = defaults | changes
    with pytest.raises(RunError, match=r"--force-config cannot resume (.|\n)*then, (.|\n)* now"):
        fit(dataclasses.replace(begun, **changes, force_config=True))
    after = snapshot(root)
    assert {k: v for k, v in after.items() if k != "exit.json"} == {
        k: v for k, v in before.items() if k != "exit.json"
    }
    assert (root / RUN).read_bytes() == record


def test_a_run_cannot_be_made_shorter_than_the_steps_done(begun: FitConfig) -> None:
    with pytest.raises(RunError, match=r"the 12 steps that are done(.|\n)*11 steps"):
        fit(dataclasses.replace(begun, max_tokens=11 * 32, force_config=True))
    assert fit(dataclasses.replace(begun, max_tokens=13 * 32, force_config=True)).new_steps == 1


def test_an_option_in_the_names_of_saes_may_not_change(options: Options) -> None:
    config = vary(options(epochs=2), lr=(0.01, 0.02))
    fit(config)
    other = vary(options(epochs=2, resume=True, force_config=True), lr=(0.01, 0.03))
    with pytest.raises(RunError, match=r"the same SAEs: layers\.0/lr1e-2, layers\.0/lr2e-2"):
        fit(other)
    both = dataclasses.replace(config, resume=True, force_config=True, epochs=3)
    assert fit(both).steps == 36


def test_the_length_of_a_run_with_follow_may_not_change(options: Options) -> None:
    config = options(follow=True, resume=True)
    fit(config)
    with pytest.raises(RunError, match="--epochs: 1 then, 2 now"):
        fit(dataclasses.replace(config, epochs=2, force_config=True))
    assert fit(dataclasses.replace(config, lr=0.5, force_config=True)).new_steps == 0


def test_another_cache_raises_an_error_with_force_config(
    begun: FitConfig, make_cache: Callable[..., Path]
) -> None:
    with pytest.raises(CacheMismatchError):
        fit(dataclasses.replace(begun, cache=str(make_cache(seed=1)), force_config=True))


def test_force_config_without_resume_raises_an_error() -> None:
    with pytest.raises(ConfigError, match="--force-config needs --resume"):
        FitConfig("c", "r", force_config=True)


def test_a_finished_run_keeps_its_record(begun: FitConfig) -> None:
    fit(begun)
    before = read_run(Path(begun.out))
    assert fit(dataclasses.replace(begun, lr=0.5, force_config=True)).new_steps == 0
    assert read_run(Path(begun.out)) == before


def test_falling_back_to_an_older_checkpoint_moves_later_changes_to_its_step(
    begun: FitConfig,
) -> None:
    root = Path(begun.out)
    now = dataclasses.replace(begun, lr=0.001, keep_last=9)
    fit(dataclasses.replace(now, force_config=True))
    again = dataclasses.replace(now, lr=0.002, epochs=3)
    fit(dataclasses.replace(again, force_config=True))
    assert [change.step for change in read_run(root).history] == [12, 24]
    for path in root.glob("checkpoint-*.00000.safetensors"):
        if path not in (tensors_path(root, 12, 0), tensors_path(root, 15, 0)):
            path.write_bytes(b"")
    fit(again)
    assert [change.step for change in read_run(root).history] == [12, 15]


def test_changed_library_versions_are_recorded_with_the_step(begun: FitConfig) -> None:
    path = Path(begun.out) / RUN
    run = json.loads(path.read_text())
    now = run["versions"]["torch"]
    run["versions"]["torch"] = "0.1"
    path.write_bytes(to_json(run, sealed=True))
    assert fit(begun).warnings == (f"torch is {now} now; this run was started with 0.1",)
    (change,) = read_run(Path(begun.out)).history
    assert (change.step, change.changes) == (12, (f"torch: 0.1 then, {now} now",))
    assert change.versions["torch"] == now
    fit(dataclasses.replace(begun, epochs=3, force_config=True))
    first, second = read_run(Path(begun.out)).history
    assert (first, second.changes) == (change, ("--epochs: 2 then, 3 now",))


def test_auxk_can_be_switched_on_and_off(options: Options) -> None:
    config = options(auxk_alpha=0.0)
    fit(config)
    on = dataclasses.replace(config, auxk_alpha=1.0, epochs=2, resume=True, force_config=True)
    fit(on)
    lines = [json.loads(line) for line in (Path(config.out) / METRICS).read_text().splitlines()]
    auxk = [line["saes"]["layers.0"]["auxk"] for line in lines if "saes" in line]
    assert auxk[0] == 0 < auxk[-1]
    fit(dataclasses.replace(on, auxk_alpha=0.0, epochs=3))


def test_a_default_learning_rate_is_recomputed_from_the_new_steps(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saetrain.optim.schedule._ADAM_MOST", math.inf)
    config = options(lr=None, optimizer="adam")
    fit(config)
    more = dataclasses.replace(config, epochs=3, resume=True, force_config=True)
    fit(more)
    for sae in read_run(Path(config.out)).saes:
        assert sae.lr == default_lr("adam", 48, sae.config.d_in, 36, rows=32)
