"""Validation during training, and the best SAEs of a run."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

import saetrain.training.step
from actcache.cache.reader import Cache
from actcache.errors import ConfigError, RunError
from actcache.stream.order import split_shards
from saetrain.config.fit_config import FitConfig
from saetrain.config.grid import vary
from saetrain.evaluation import BEST_EVALUATION, evaluate
from saetrain.launch.run import fit
from saetrain.runs.checkpoint import newest_state
from saetrain.runs.record import read_run
from saetrain.tracking.jsonl import METRICS
from saetrain.training.validation import spread

Options = Callable[..., FitConfig]
Snapshot = Callable[[Path], dict[str, bytes]]

BOTH_OPTIMIZERS = pytest.mark.parametrize("optimizer", ["signum", "adam"])


class Killed(BaseException):
    """A simulated SIGKILL: no product code catches it."""


def lines(root: Path, key: str) -> list[dict[str, Any]]:
    found = [json.loads(line) for line in (root / METRICS).read_text().splitlines()]
    return [line for line in found if key in line]


def bests(root: Path) -> dict[str, str]:
    """Return the name of each SAE's best-STEP folder."""
    return {str(p.parent.relative_to(root)): p.name for p in sorted(root.rglob("best-*"))}


def keeping_best(options: Options, **changes: Any) -> FitConfig:
    """Validate every 2 steps; the first SAE (lr 0.1) is best before the end of the run."""
    old = {"defaults": 1, **changes}  # with those of version 2 the last SAE is the best
    return vary(options(val_every=2, save_best=True, **old), lr=(0.1, 0.01))


# --- validation -----------------------------------------------------------------------------------


@BOTH_OPTIMIZERS
def test_the_last_validation_equals_the_evaluation_of_the_exported_saes(
    options: Options, optimizer: str
) -> None:
    """For schedule-free optimisers, both measure the averaged weights."""
    config = vary(options(optimizer=optimizer, val_every=5), k=(3, 4))
    summary = fit(config)
    root = Path(config.out)
    assert [line["step"] for line in lines(root, "val")] == [5, 10, 12]
    last = lines(root, "val")[-1]
    assert (last["rows"], last["val_rows"], last["val"]) == (384, 128, summary.held_out)
    for sae in evaluate(root).saes:
        assert last["val"][sae.name]["fvu"] == pytest.approx(sae.fvu, rel=1e-6)
        assert last["val"][sae.name]["l0"] == pytest.approx(sae.l0, rel=1e-12)


@pytest.mark.parametrize("decoder_norm", ["fold", "free"])
def test_validation_measures_the_exported_weights_and_k(
    options: Options, decoder_norm: str
) -> None:
    """The final k is used while k is still annealed, and decoder norms are folded."""
    settings = {"decoder_norm": decoder_norm, "k_anneal_steps": 12, "k_start": 40, "lr": 0.05}
    config = options(optimizer="adam", val_every=2, save_best=True, **settings)
    summary = fit(config)
    for line in lines(Path(config.out), "val"):
        assert all(figure["l0"] <= 3 for figure in line["val"].values())
    for sae in evaluate(Path(config.out), best=True).saes:
        assert sae.fvu == pytest.approx(summary.best[sae.name].fvu, rel=1e-6)
    for sae in evaluate(Path(config.out)).saes:
        assert sae.fvu == pytest.approx(summary.held_out[sae.name]["fvu"], rel=1e-6)


def test_a_validation_equals_that_of_a_run_that_ends_at_this_step(options: Options) -> None:
    fit(options(val_every=4, save_every=100))
    shorter = options(val_every=4, max_tokens=8 * 32, out=options().out + "-shorter")
    fit(shorter)
    then, ended = (lines(Path(out), "val")[1] for out in (options().out, shorter.out))
    assert then == ended
    assert then["step"] == 8


@BOTH_OPTIMIZERS
def test_validation_does_not_change_training(
    options: Options, snapshot: Snapshot, optimizer: str
) -> None:
    plain, validated = options(optimizer=optimizer), keeping_best(options, optimizer=optimizer)
    validated = dataclasses.replace(plain, out=plain.out + "-v", val_every=1, save_best=True)
    fit(plain)
    fit(validated)
    assert lines(Path(plain.out), "saes") == lines(Path(validated.out), "saes")
    expected, found = snapshot(Path(plain.out)), snapshot(Path(validated.out))
    for name in expected:
        if name.endswith(".safetensors"):
            assert found[name] == expected[name]


@pytest.mark.parametrize("verify", ["first-read", "never"])
def test_val_rows_limits_the_rows_and_they_come_from_every_shard(
    make_cache: Callable[..., Path],
    options: Options,
    monkeypatch: pytest.MonkeyPatch,
    verify: str,
) -> None:
    path = make_cache(shards=8)
    config = options(
        cache=str(path), val_every=6, val_rows=100, val_fraction=0.5, verify=verify, batch_size=16
    )
    read, real = [], Cache.read_views

    def seen(self: Cache, hookpoint: str, shard: int, start: int, views: Any, *how: Any) -> None:
        read.append((hookpoint, shard, start, sum(map(len, views["activations"])) // 64))
        real(self, hookpoint, shard, start, views, *how)

    monkeypatch.setattr(Cache, "read_views", seen)
    fit(config)
    held_out = read_run(Path(config.out)).held_out
    assert len(held_out) == 4
    expected = {(name, s, 0, 25) for s in held_out for name in ("layers.0", "layers.1")}
    assert sorted(item for item in read if item[1] in held_out) == sorted(expected)
    assert all(line["val_rows"] == 100 for line in lines(Path(config.out), "val"))


@given(st.lists(st.integers(0, 50), min_size=1, max_size=8), st.integers(1, 300))
@settings(deadline=None)
def test_rows_are_spread_evenly_over_shards(rows: list[int], most: int) -> None:
    spans = spread(dict(enumerate(rows)), most)
    taken = {span.shard: span.rows for span in spans}
    assert [span.shard for span in spans] == sorted(taken)
    assert all(span.start == 0 and 0 < span.rows <= rows[span.shard] for span in spans)
    total = sum(taken.values())
    assert total == min(most, sum(rows))
    whole = [taken.get(s, 0) == n for s, n in enumerate(rows)]
    cut = [taken.get(s, 0) for s, all_of_it in enumerate(whole) if not all_of_it]
    assert not cut or max(cut) - min(cut) <= 1
    full = [n for n, all_of_it in zip(rows, whole, strict=True) if all_of_it]
    assert not cut or not full or max(full) <= max(cut) + 1


# --- best SAEs -----------------------------------------------------------------------------------


@BOTH_OPTIMIZERS
def test_the_best_sae_is_kept_in_addition_to_the_last(options: Options, optimizer: str) -> None:
    config = keeping_best(options, optimizer=optimizer)
    summary = fit(config)
    root = Path(config.out)
    figures = lines(root, "val")
    steps = {}
    for entry in read_run(root).saes:
        by_step = {line["step"]: line["val"][entry.name]["fvu"] for line in figures}
        steps[entry.name] = min(by_step, key=lambda step: by_step[step])
        best = summary.best[entry.name]
        assert (best.step, best.fvu) == (steps[entry.name], min(by_step.values()))
    assert bests(root) == {name: f"best-{step:09d}" for name, step in steps.items()}
    assert steps["layers.0/lr0.1"] < 12  # precondition
    if optimizer == "adam":
        return  # its learning rate depends on the run's length
    for name, step in steps.items():
        ends = dataclasses.replace(config, max_tokens=step * 32, out=f"{root}-{step}", resume=True)
        fit(ends)
        for file in ("cfg.json", "sae.safetensors"):
            best_file = root / name / f"best-{step:09d}" / file
            assert best_file.read_bytes() == (Path(ends.out) / name / file).read_bytes()


@pytest.mark.parametrize(
    "rising",
    [
        {"activation": "batchtopk", "k_anneal_steps": 8, "k_start": 40},
        {"activation": "relu", "sparsity": 3.0, "sparsity_warmup_steps": 8},
    ],
)
def test_no_sae_is_best_before_k_and_penalty_are_constant(
    options: Options, rising: dict[str, Any]
) -> None:
    config = options(val_every=2, save_best=True, optimizer="adam", lr=0.05, **rising)
    summary = fit(config)
    for name, best in summary.best.items():
        by_step = {v["step"]: v["val"][name]["fvu"] for v in lines(Path(config.out), "val")}
        assert min(by_step, key=lambda step: by_step[step]) < 8  # precondition
        assert best.step >= 8
        assert best.fvu == min(fvu for step, fvu in by_step.items() if step >= 8)


def test_best_saes_are_evaluated_on_all_held_out_rows(options: Options) -> None:
    config = keeping_best(options)
    summary = fit(config)
    root = Path(config.out)
    evaluation = evaluate(root, best=True)
    for sae in evaluation.saes:
        assert sae.fvu == pytest.approx(summary.best[sae.name].fvu, rel=1e-6)
        assert sae.step == summary.best[sae.name].step
        assert (sae.dead_percent is None) == (sae.step < 12)
    assert json.loads((root / BEST_EVALUATION).read_text())["saes"][0]["step"] < 12
    assert evaluate(root).saes[0].fvu > evaluation.saes[0].fvu
    name, folder = next(iter(bests(root).items()))
    shutil.copy(root / name / "sae.safetensors", root / name / folder / "sae.safetensors")
    with pytest.raises(RunError, match=f"{folder}.* is not that of the last checkpoint"):
        evaluate(root, best=True)


def test_evaluating_the_best_of_a_run_without_save_best_raises_an_error(options: Options) -> None:
    fit(options(val_every=2))
    with pytest.raises(RunError, match=r"keeps no best SAE of layers\.0(.|\n)*--save-best"):
        evaluate(Path(options().out), best=True)
    assert bests(Path(options().out)) == {}


def test_sparsify_loads_a_run_with_best_saes(options: Options, sparsify: ModuleType) -> None:
    config = options(val_every=2, save_best=True)
    fit(config)
    assert sparsify.SparseCoder.load_many(config.out, local=True).keys() == {"layers.0", "layers.1"}
    for name, folder in bests(Path(config.out)).items():
        best = sparsify.SparseCoder.load_from_disk(Path(config.out) / name / folder)
        assert best.cfg.k == 3


@pytest.mark.parametrize(
    ("optimizer", "stop_at", "save_every"), [("signum", 5, 3), ("adam", 11, 100)]
)
def test_a_resumed_run_keeps_the_same_best_saes(
    options: Options,
    snapshot: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
    stop_at: int,
    save_every: int,
) -> None:
    whole = keeping_best(
        options, optimizer=optimizer, save_every=save_every, out=options().out + "-whole"
    )
    stopped = dataclasses.replace(whole, out=options().out)
    fit(whole)
    real = saetrain.training.step.train_step

    def step(trainer: Any, rows: Any, number: int) -> None:
        if number == stop_at and trainer.entry.name == "layers.1/lr0.1":
            raise Killed
        real(trainer, rows, number)

    with monkeypatch.context() as patch:
        patch.setattr(saetrain.training.step, "train_step", step)
        with pytest.raises(Killed):
            fit(stopped)
    root = Path(stopped.out)
    state = newest_state(root)
    for number, entry in enumerate(read_run(root).saes):
        if state is not None and (best := state.saes[number].best) is not None:
            # The best SAE that the checkpoint names exists.
            assert (root / entry.name / f"best-{best.step:09d}" / "sae.safetensors").exists()
    fit(dataclasses.replace(stopped, resume=True))
    assert snapshot(Path(whole.out)) == snapshot(root)


@pytest.mark.parametrize("call", ["replace", "unlink", "rmdir"])
def test_a_kill_before_or_after_any_write_or_removal_loses_no_best_sae(
    options: Options, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    small = {"max_tokens": 4 * 32, "save_every": 2, "log_every": 3, "hookpoint": ("layers.0",)}
    whole = options(**small, val_every=1, save_best=True, out=options().out + "-whole")
    real, seen = getattr(os, call), []

    def counts(arguments: Any, named: Any) -> bool:
        """Select calls on best SAEs and checkpoints; other files are tested elsewhere."""
        return any(word in target(arguments, named) for word in ("best-", ".json"))

    def target(arguments: Any, named: Any) -> str:
        folder = named.get("dst_dir_fd", named.get("dir_fd"))
        base = "" if folder is None else os.readlink(f"/proc/self/fd/{folder}")  # noqa: PTH115
        return f"{base}/{arguments[-1]}"

    def count(*arguments: Any, **named: Any) -> None:
        seen.extend([target(arguments, named)] if counts(arguments, named) else [])
        real(*arguments, **named)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, count)
        fit(whole)
    assert any("best-" in path for path in seen)
    expected = snapshot(Path(whole.out))
    for number in range(len(seen)):
        after = number % 2 == 1  # little lies between the end of a call and the next one
        out = f"{options().out}-{call}-{number}"
        config = dataclasses.replace(whole, out=out, resume=True)
        left = number

        def die(*arguments: Any, after: bool = after, **named: Any) -> None:
            nonlocal left
            counted = counts(arguments, named)
            last = left == 0 and counted
            if last and not after:
                raise Killed
            left -= counted
            try:
                real(*arguments, **named)
            finally:  # what is missing already is no error
                if last:
                    raise Killed

        with monkeypatch.context() as patch:
            patch.setattr(os, call, die)
            with pytest.raises(Killed):
                fit(config)
        fit(config)
        assert snapshot(Path(out)) == expected, (number, after)
        assert not list(Path(out).rglob("*partial*"))


# --- errors --------------------------------------------------------------------------------------


def test_validation_without_rows_and_save_best_without_validation_raise_errors() -> None:
    with pytest.raises(ConfigError, match=r"--save-best needs validations(.|\n)*--val-every"):
        FitConfig("c", "r", save_best=True)
    with pytest.raises(
        ConfigError, match=r"--val-every needs held-out rows(.|\n)*--val-fraction above 0"
    ):
        FitConfig("c", "r", val_every=5, val_fraction=0.0)
    with pytest.raises(ConfigError, match="--val-rows is out of range"):
        FitConfig("c", "r", val_every=5, val_rows=0)


def test_held_out_shards_without_rows_raise_an_error(
    make_cache: Callable[..., Path], options: Options
) -> None:
    _, held_out = split_shards(range(4), options().val_fraction, options().seed)
    path = make_cache(most_rows=dict.fromkeys(held_out, 0))
    config = options(cache=str(path), val_every=5)
    with pytest.raises(ConfigError, match=r"--val-every needs rows(.|\n)*--val-fraction"):
        fit(config)
    assert not Path(config.out).exists()


def test_held_out_rows_that_are_not_finite_raise_an_error_before_training(
    make_cache: Callable[..., Path], options: Options
) -> None:
    _, held_out = split_shards(range(4), options().val_fraction, options().seed)

    def rows(hookpoint: str, shard: int, count: int, width: int) -> NDArray[np.float32]:
        made = np.random.RandomState(shard).standard_normal((count, width)).astype(np.float32)
        made[5, 3] = np.inf if shard in held_out else 0
        return made

    config = options(cache=str(make_cache(rows=rows)), val_every=5)
    with pytest.raises(RunError, match=r"layers\.0 cannot be validated on"):
        fit(config)
    assert not Path(config.out).exists()


def test_a_run_with_follow_validates_on_held_out_rows_of_its_first_segment(
    options: Options, snapshot: Snapshot
) -> None:
    config = options(val_every=5, save_best=True, follow=True)
    summary = fit(config)
    assert summary.held_out.keys() == {"layers.0", "layers.1"}
    plain = options(val_every=5, save_best=True, out=options().out + "-plain")
    assert fit(plain).held_out == summary.held_out
