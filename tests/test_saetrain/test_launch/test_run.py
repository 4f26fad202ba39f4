"""Whole runs: their files, metrics and errors."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import IO, Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from actcache.cache.reader import Cache
from actcache.errors import DiskFullError, RunError
from actcache.filesystem.atomic import open_log
from actcache.stream.order import batch_rows
from saetrain.config.fit_config import FitConfig
from saetrain.evaluation import evaluate
from saetrain.launch.run import fit
from saetrain.runs.checkpoint import load_checkpoint
from saetrain.runs.record import RUN, read_run
from saetrain.tracking.jsonl import METRICS, TIMINGS

Options = Callable[..., FitConfig]
Snapshot = Callable[[Path], dict[str, bytes]]
Rows = NDArray[np.float32]
BOTH_OPTIMIZERS = pytest.mark.parametrize("optimizer", ["signum", "adam"])


def metrics(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / METRICS).read_text().splitlines()]


def only_changed(old: dict[str, bytes], new: dict[str, bytes]) -> list[str]:
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def test_a_run_writes_its_files(options: Options, cache_path: Path) -> None:
    config = options(save_every=5)
    summary = fit(config)
    root, cache = Path(config.out), Cache.open(cache_path)
    assert {str(p.relative_to(root)) for p in root.rglob("*") if p.is_file()} == {
        "run.json",
        "metrics.jsonl",
        "timings.jsonl",
        "layers.0/cfg.json",
        "layers.0/sae.safetensors",
        "layers.1/cfg.json",
        "layers.1/sae.safetensors",
        "checkpoint-000000012.00000.safetensors",
        "checkpoint-000000012.00001.safetensors",
        "checkpoint-000000012.json",
        "fit.lock",
        "exit.json",
    }
    assert (summary.steps, summary.new_steps, summary.rows) == (12, 12, 384)
    assert summary.rows_per_second > 0
    assert summary.saes == metrics(root)[-1]["saes"]
    record = read_run(root)
    assert record.cache_id == cache.manifest.cache_id
    assert record.receipts_digest == cache.digest([*record.training_shards, *record.held_out])
    assert record.versions.keys() >= {"actcache", "torch"}
    assert record.options == config
    assert sorted([*record.training_shards, *record.held_out]) == cache.shards
    assert len(record.held_out) == 1


def test_sparsify_loads_all_saes_of_a_run(options: Options, sparsify: ModuleType) -> None:
    config = options()
    fit(config)
    loaded = sparsify.SparseCoder.load_many(config.out, local=True)
    assert loaded.keys() == {"layers.0", "layers.1"}
    for name, sae in loaded.items():
        stored = load_file(Path(config.out) / name / "sae.safetensors")
        assert torch.equal(sae.W_dec, stored["W_dec"])


def test_each_line_of_metrics_covers_the_steps_since_the_last(options: Options) -> None:
    config = options(log_every=5)
    fit(config)
    root = Path(config.out)
    assert [(line["step"], line["rows"]) for line in metrics(root)] == [
        (5, 160),
        (10, 320),
        (12, 384),
    ]
    names = {"fvu", "auxk", "l0", "dead_percent", "dead_after", "lr", "k", "grad_norm"}
    names |= {"decoder_norm_min", "decoder_norm_max"}
    *others, last = metrics(root)
    assert all(sae.keys() == names for line in others for sae in line["saes"].values())
    assert all(sae.keys() == names | {"log10_density"} for sae in last["saes"].values())
    every_step = options(log_every=1, out=config.out + "-finer")
    fit(every_step)
    steps = [line["saes"]["layers.0"] for line in metrics(Path(every_step.out))]
    for line, covered in zip(metrics(root), (steps[:5], steps[5:10], steps[10:]), strict=True):
        for name in ("fvu", "auxk", "l0", "grad_norm"):
            mean = sum(step[name] for step in covered) / len(covered)
            assert line["saes"]["layers.0"][name] == pytest.approx(mean, rel=1e-12)


@BOTH_OPTIMIZERS
def test_two_equal_runs_differ_only_in_their_timings(
    options: Options, snapshot: Snapshot, optimizer: str
) -> None:
    one, two = (options(out=options().out + name, optimizer=optimizer) for name in ("1", "2"))
    fit(one)
    fit(two)
    assert only_changed(snapshot(Path(one.out)), snapshot(Path(two.out))) == []
    timings = (Path(one.out) / TIMINGS).read_text()
    assert [json.loads(line)["step"] for line in timings.splitlines()] == [4, 8, 12]


def test_another_seed_gives_another_run(options: Options, snapshot: Snapshot) -> None:
    one, two = (options(out=options().out + str(seed), seed=seed) for seed in (0, 2))
    fit(one)
    fit(two)
    changed = only_changed(snapshot(Path(one.out)), snapshot(Path(two.out)))
    assert {"metrics.jsonl", "layers.0/sae.safetensors"} <= set(changed)


def test_an_sae_does_not_depend_on_other_saes_of_its_run(
    options: Options, snapshot: Snapshot
) -> None:
    both, alone = options(out=options().out + "-both"), options(hookpoint=("*.1",))
    fit(both)
    assert fit(alone).saes.keys() == {"layers.1"}
    for name in ("cfg.json", "sae.safetensors"):
        path = f"layers.1/{name}"
        assert snapshot(Path(both.out))[path] == snapshot(Path(alone.out))[path]


@pytest.mark.parametrize("backend", ["memmap", "zarr"])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3"])
def test_a_run_on_8_bit_rows_reaches_the_loss_of_one_on_exact_rows(
    dtype: str, backend: str, make_cache: Callable[..., Path], options: Options, tmp_path: Path
) -> None:
    exact = fit(options(epochs=4))
    path = make_cache(dtype=dtype, backend=backend)
    found = fit(options(cache=str(path), out=str(tmp_path / "eight"), epochs=4))
    for hookpoint in ("layers.0", "layers.1"):
        assert found.saes[hookpoint]["fvu"] == pytest.approx(exact.saes[hookpoint]["fvu"], rel=0.05)


@pytest.mark.parametrize(("optimizer", "lr"), [("signum", 0.02), ("adam", 0.01)])
def test_a_run_learns_sparse_rows(
    make_cache: Callable[..., Path], options: Options, optimizer: str, lr: float
) -> None:
    path = make_cache(shards=9, sequences=16, ctx_len=33, hookpoints={"layers.0": 24})
    config = options(
        cache=str(path),
        optimizer=optimizer,
        lr=lr,
        num_latents=64,
        k=4,
        batch_size=64,
        epochs=12,
        dead_after=None,
        lr_warmup_steps=20,
        log_every=8,
        save_every=10_000,
    )
    fit(config)
    start = metrics(Path(config.out))[0]["saes"]["layers.0"]["fvu"]
    (held_out,) = evaluate(Path(config.out)).saes
    assert start > 0.4
    assert held_out.fvu < 0.1


def test_dead_latents_are_null_before_dead_after_rows(options: Options) -> None:
    config = options(dead_after=129, log_every=1, save_every=100)
    fit(config)
    known = [line["saes"]["layers.0"]["dead_percent"] for line in metrics(Path(config.out))]
    assert known[:4] == [None] * 4
    assert None not in known[4:]  # from 160 rows on


def test_a_full_disk_names_resume_as_the_remedy(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskFullError, match=r"the same command with --resume continues"):
        fit(options())


@pytest.mark.parametrize("name", [METRICS, TIMINGS])
def test_a_full_disk_during_a_line_of_metrics_is_reported_with_the_file(
    options: Options, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def full(path: Path) -> IO[bytes]:
        return Path("/dev/full").open("ab", 0) if path.name == name else open_log(path)

    monkeypatch.setattr("saetrain.tracking.jsonl.open_log", full)
    with pytest.raises(DiskFullError, match=rf"no room to write .*{name}(.|\n)*with --resume"):
        fit(options(save_every=100))
    assert json.loads((Path(options().out) / "exit.json").read_text())["code"] == 10


def test_one_line_reports_the_read_settings_if_steps_are_left(
    options: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    config = options(resume=True)
    fit(config)
    reading, *_ = capsys.readouterr().err.splitlines()
    assert reading == (
        "fit: 384 rows are mixed in memory (49.2 kB); read by 2 threads, 262 kB at a time, "
        "up to 2 of 32 windows ahead (too little to probe)"
    )
    fit(config)
    assert capsys.readouterr().err == ""


@BOTH_OPTIMIZERS
@pytest.mark.parametrize(("save_every", "log_every"), [(1, 1000), (1, 1), (5, 3), (1000, 1000)])
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_row_that_is_not_finite_stops_the_run_and_reaches_no_checkpoint(
    make_cache: Callable[..., Path],
    options: Options,
    optimizer: str,
    save_every: int,
    log_every: int,
    value: float,
) -> None:
    def rows(hookpoint: str, shard: int, count: int, width: int) -> Rows:
        made = np.random.RandomState(shard).standard_normal((count, width)).astype(np.float32)
        if shard == 2 and hookpoint == "layers.1":
            made[77, 3] = value
        return made

    path = make_cache(rows=rows, row_order="sequence")
    config = options(
        cache=str(path), optimizer=optimizer, save_every=save_every, log_every=log_every, seed=3
    )
    with pytest.raises(RunError, match=r"layers\.1 is not finite(.|\n)*--lr") as caught:
        fit(config)
    root = Path(config.out)
    plan = read_run(root).plan
    poisoned = next(step for step in range(12) if [2, 77] in batch_rows(plan, 0, step).tolist())
    assert poisoned > 0
    checkpoint = load_checkpoint(root)
    last_saved = poisoned // save_every * save_every
    assert (checkpoint[0].step if checkpoint else 0) == last_saved
    saved = f"Step {last_saved} is saved, from before" if checkpoint else "Nothing is saved yet"
    assert saved in str(caught.value)
    weights = checkpoint[1] if checkpoint else []
    weights += [load_file(file) for file in root.glob("layers.*/sae.safetensors")]
    assert all(torch.isfinite(t).all() for part in weights for t in part.values())
    assert (last_saved > 0) == bool(weights)
    assert all(line["step"] <= poisoned for line in metrics(root))


@pytest.mark.parametrize(("optimizer", "lr"), [("signum", 1e25), ("adam", 1e30)])
def test_a_diverging_loss_stops_the_run(options: Options, optimizer: str, lr: float) -> None:
    config = options(optimizer=optimizer, lr=lr, lr_warmup_steps=0)
    with pytest.raises(RunError, match="not finite"):
        fit(config)
    assert load_checkpoint(Path(config.out)) is None
    assert not list(Path(config.out).glob("layers.*"))
    assert (Path(config.out) / RUN).exists()


def test_sinks_in_the_training_rows_are_reported_at_the_start(
    sinks_path: Path, options: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    config = options(cache=str(sinks_path), resume=True)
    fit(config)
    told = [line for line in capsys.readouterr().err.splitlines() if "max-norm-ratio" in line]
    (line,) = told
    assert line.startswith("warning: 9 rows (2.34%) above 10 median norms hold ")  # of 3 shards
    assert "of the variance of layers.1 (" in line
    assert "): --max-norm-ratio 10 of saetrain fit leaves them out of training" in line
    fit(config)
    assert capsys.readouterr().err == ""  # no step is left
    fit(options(cache=str(sinks_path), hookpoint=("layers.0",), out=options().out + "-other"))
    assert "max-norm-ratio" not in capsys.readouterr().err


def test_sinks_in_the_held_out_rows_are_part_of_an_evaluation(
    sinks_path: Path, options: Options
) -> None:
    config = options(cache=str(sinks_path))
    fit(config)
    (found,) = evaluate(Path(config.out)).sinks
    assert (found.hookpoint, found.sinks, found.rows) == ("layers.1", 3, 128)
    written = json.loads((Path(config.out) / "eval.json").read_text())
    assert written["sinks"][0]["sinks"] == 3
