"""`saetrain.fit`: whole runs; how they end, go on, and what they refuse."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

import saetrain.fit
import saetrain.trainer
from actcache.errors import (
    CacheBusyError,
    CacheMismatchError,
    ConfigError,
    DiskFullError,
    EmptyCacheError,
    FormatError,
    HookpointError,
    RunError,
)
from actcache.order import POOL_ROWS, batch_rows
from actcache.reader import Cache
from saetrain.checkpoint import load_checkpoint
from saetrain.config import FitConfig
from saetrain.evaluate import evaluate
from saetrain.fit import fit
from saetrain.optim import default_lr
from saetrain.run import RUN, read_run
from saetrain.tracking import METRICS, TIMINGS

Options = Callable[..., FitConfig]
Snapshot = Callable[[Path], dict[str, bytes]]
Rows = NDArray[np.float32]

BOTH_OPTIMIZERS = pytest.mark.parametrize("optimizer", ["signum", "adam"])


class Killed(BaseException):
    """Stands for a signal: nothing in the project may catch it."""


def metrics(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / METRICS).read_text().splitlines()]


def only_changed(old: dict[str, bytes], new: dict[str, bytes]) -> list[str]:
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def stop_in_step(monkeypatch: pytest.MonkeyPatch, stop_at: int) -> None:
    """Die in step `stop_at` (from 0), between the first hookpoint's update and the second's."""
    real = saetrain.trainer.train_step

    def step(trainee: Any, rows: Any, number: int, alpha: float) -> None:
        if number == stop_at and trainee.entry.hookpoint == "layers.1":
            raise Killed
        real(trainee, rows, number, alpha)

    monkeypatch.setattr(saetrain.trainer, "train_step", step)


# --- what a run leaves ---------------------------------------------------------------------------


def test_a_run_leaves_what_it_promises(options: Options, cache_path: Path) -> None:
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
    assert record.versions.keys() >= {"actcache", "torch", "schedulefree"}
    assert record.options == config
    assert sorted([*record.training_shards, *record.held_out]) == cache.shards
    assert len(record.held_out) == 1


def test_sparsify_loads_every_sae_of_a_run_at_once(options: Options, sparsify: ModuleType) -> None:
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
def test_two_runs_differ_in_nothing_but_their_timings(
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


def test_an_sae_does_not_depend_on_its_company(options: Options, snapshot: Snapshot) -> None:
    both, alone = options(out=options().out + "-both"), options(hookpoint=("*.1",))
    fit(both)
    assert fit(alone).saes.keys() == {"layers.1"}
    for name in ("cfg.json", "sae.safetensors"):
        path = f"layers.1/{name}"
        assert snapshot(Path(both.out))[path] == snapshot(Path(alone.out))[path]


def test_patterns_choose_hookpoints_once_and_in_the_caches_order(options: Options) -> None:
    config = options(hookpoint=("layers.1", "*", "layers.*"))
    fit(config)
    assert [entry.hookpoint for entry in read_run(Path(config.out)).saes] == [
        "layers.0",
        "layers.1",
    ]


def test_b_dec_begins_at_the_mean_of_the_training_rows_alone(
    make_cache: Callable[..., Path], options: Options
) -> None:
    def rows(hookpoint: str, shard: int, count: int, width: int) -> Rows:
        made = np.random.RandomState(shard).standard_normal((count, width)) + 10.0**shard
        return made.astype(np.float32)

    path = make_cache(rows=rows, hookpoints={"layers.0": 16})
    config = options(cache=str(path), lr=1e-30, max_tokens=32)
    fit(config)
    cache, record = Cache.open(path), read_run(Path(config.out))
    training = [cache.read("layers.0", shard).values for shard in record.training_shards]
    mean = np.concatenate(training).astype(np.float64).mean(axis=0)
    b_dec = load_file(Path(config.out) / "layers.0" / "sae.safetensors")["b_dec"]
    assert b_dec.numpy() == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("backend", ["memmap", "zarr"])
@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3"])
def test_a_run_learns_from_rows_of_8_bits_what_it_learns_from_exact_ones(
    dtype: str, backend: str, make_cache: Callable[..., Path], options: Options, tmp_path: Path
) -> None:
    exact = fit(options(epochs=4))
    path = make_cache(dtype=dtype, backend=backend)
    found = fit(options(cache=str(path), out=str(tmp_path / "eight"), epochs=4))
    for hookpoint in ("layers.0", "layers.1"):
        assert found.saes[hookpoint]["fvu"] == pytest.approx(exact.saes[hookpoint]["fvu"], rel=0.05)


def test_the_loss_of_a_run_divides_by_the_variance_of_its_training_rows(
    make_cache: Callable[..., Path], options: Options
) -> None:
    """Were it the batch's, every batch of a cache of constant blocks would divide by almost 0."""
    path = make_cache(hookpoints={"layers.0": 16})
    config = options(cache=str(path), lr=1e-30, max_tokens=384, log_every=12, auxk_alpha=0.0)
    fvu = fit(config).saes["layers.0"]["fvu"]
    cache, record = Cache.open(path), read_run(Path(config.out))
    stored = [cache.read("layers.0", shard).values for shard in record.training_shards]
    x = np.concatenate(stored).astype(np.float64)
    from saetrain.formats.sparsify import load_sae

    sae = load_sae(Path(config.out) / "layers.0").double()
    with torch.no_grad():
        reconstruction = sae(torch.from_numpy(x)).reconstruction.numpy()
    expected = ((x - reconstruction) ** 2).sum() / ((x - x.mean(axis=0)) ** 2).sum()
    assert fvu == pytest.approx(expected, rel=1e-5)


def test_dead_after_is_an_epochs_rows_or_the_runs_or_ten_million(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows that an epoch trains on: a latent that never fires in one epoch is dead after it."""
    config = options(dead_after=None, batch_size=100, out=options().out + "-small")
    summary = fit(config)
    assert summary.steps * 100 == summary.dead_after == 300
    short = options(dead_after=None, max_tokens=64, out=options().out + "-short")
    assert fit(short).dead_after == 64
    monkeypatch.setattr("saetrain.fit._DEAD_AFTER", 200)
    assert fit(options(dead_after=None)).dead_after == 200
    assert fit(options(dead_after=7, out=options().out + "-given")).dead_after == 7


def test_default_learning_rates_follow_each_saes_own_width(
    make_cache: Callable[..., Path], options: Options
) -> None:
    path = make_cache(hookpoints={"layers.0": 16, "layers.1": 8})
    for optimizer in ("signum", "adam"):
        config = options(
            cache=str(path),
            lr=None,
            num_latents=None,
            expansion_factor=4,
            optimizer=optimizer,
            max_tokens=64,
            out=options().out + optimizer,
        )
        fit(config)
        for entry, latents in zip(read_run(Path(config.out)).saes, (64, 32), strict=True):
            assert entry.config.num_latents == latents
            assert entry.lr == default_lr(optimizer, latents)  # type: ignore[arg-type]


def test_max_tokens_counts_instead_of_epochs_and_epochs_may_be_many(options: Options) -> None:
    assert fit(options(max_tokens=32 * 15 + 31, epochs=9)).steps == 15
    assert fit(options(epochs=2, out=options().out + "-two")).steps == 24


@pytest.mark.parametrize(("optimizer", "lr"), [("signum", 0.02), ("adam", 0.01)])
def test_it_learns_rows_that_are_sparse(
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


# --- going on ------------------------------------------------------------------------------------


@BOTH_OPTIMIZERS
@pytest.mark.parametrize(
    ("stop_at", "save_every"), [(1, 3), (7, 3), (9, 3), (13, 7), (16, 5), (19, 1)]
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_run_that_was_stopped_and_resumed_equals_one_that_was_not(
    options: Options,
    snapshot: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
    stop_at: int,
    save_every: int,
    device: str,
) -> None:
    """Over an epoch's end (step 12), between lines of metrics (every 4 steps), with AuxK on."""
    common = {"optimizer": optimizer, "max_tokens": 20 * 32, "save_every": save_every}
    common["device"] = device
    whole, stopped = options(**common, out=options().out + "-whole"), options(**common)
    fit(whole)
    assert metrics(Path(whole.out))[1]["saes"]["layers.0"]["auxk"] > 0
    with monkeypatch.context() as patch:
        stop_in_step(patch, stop_at)
        with pytest.raises(Killed):
            fit(stopped)
    assert only_changed(snapshot(Path(whole.out)), snapshot(Path(stopped.out)))
    summary = fit(dataclasses.replace(stopped, resume=True))
    assert summary.new_steps == 20 - stop_at // save_every * save_every
    assert only_changed(snapshot(Path(whole.out)), snapshot(Path(stopped.out))) == []
    timings = (Path(stopped.out) / TIMINGS).read_text().splitlines()
    assert [json.loads(line)["step"] for line in timings] == [4, 8, 12, 16, 20]


def test_lines_written_after_the_last_checkpoint_are_written_again(
    options: Options, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, stopped = options(out=options().out + "-whole", save_every=6), options(save_every=6)
    fit(whole)
    with monkeypatch.context() as patch:
        stop_in_step(patch, 11)
        with pytest.raises(Killed):
            fit(stopped)
    root = Path(stopped.out)
    assert [line["step"] for line in metrics(root)] == [4, 8]  # the checkpoint is of step 6
    for name in (METRICS, TIMINGS):
        with (root / name).open("a") as file:
            file.write('{"step": 1')  # as a kill in the middle of a write leaves it
    fit(dataclasses.replace(stopped, resume=True))
    assert only_changed(snapshot(Path(whole.out)), snapshot(root)) == []


def test_a_kill_before_or_after_any_rename_leaves_a_run_that_resumes_to_the_same(
    options: Options, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file of a run appears by a rename; before it there is a partial file."""
    small = {"max_tokens": 4 * 32, "save_every": 2, "log_every": 3}
    whole = options(**small, out=options().out + "-whole")
    real, seen = os.replace, 0

    def count(source: Any, target: Any) -> None:
        nonlocal seen
        seen += 1
        real(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", count)
        fit(whole)
    # run.json, exit.json; per save two SAEs' files, and a checkpoint
    assert seen == 2 + 2 * (2 * 2 + 2 + 1)
    expected = snapshot(Path(whole.out))
    for number in range(seen):
        for after in (False, True):
            config = options(**small, out=f"{options().out}-{number}-{after}", resume=True)
            left = number

            def die(source: Any, target: Any, after: bool = after) -> None:
                nonlocal left
                if left == 0 and not after:
                    raise Killed
                real(source, target)
                if left == 0:
                    raise Killed
                left -= 1

            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", die)
                with pytest.raises(Killed):
                    fit(config)
            fit(config)
            assert only_changed(expected, snapshot(Path(config.out))) == [], (number, after)


def test_a_kill_while_older_checkpoints_are_removed_leaves_a_run_that_resumes_to_the_same(
    options: Options, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, config = options(out=options().out + "-whole"), options()
    fit(whole)
    real = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        real(path, missing_ok)
        if path.name == "checkpoint-000000003.00000.safetensors":
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(Killed):
            fit(config)
    left = {path.name for path in Path(config.out).glob("checkpoint-000000003.*")}
    assert left == {"checkpoint-000000003.00001.safetensors"}
    fit(dataclasses.replace(config, resume=True))
    assert only_changed(snapshot(Path(whole.out)), snapshot(Path(config.out))) == []


def test_a_full_disk_stops_the_run_and_more_room_lets_it_go_on(
    options: Options, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, config = options(out=options().out + "-whole"), options()
    fit(whole)
    real, left = os.posix_fallocate, 10

    def full(fd: int, offset: int, size: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(fd, offset, size)

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(DiskFullError):
            fit(config)
    fit(dataclasses.replace(config, resume=True))
    assert only_changed(snapshot(Path(whole.out)), snapshot(Path(config.out))) == []


def test_a_command_killed_by_the_system_resumes_to_the_bytes_of_one_that_was_not(
    options: Options, snapshot: Snapshot
) -> None:
    long = {"max_tokens": 400 * 32, "save_every": 1000}
    whole = options(**long, out=options().out + "-whole")
    killed = options(**long | {"save_every": 1})  # slow, so that the signal finds it at work
    fit(whole)
    root = Path(killed.out)
    process = subprocess.Popen(command(killed), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(root.glob("checkpoint-*.json")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    checkpoint = load_checkpoint(root)
    assert checkpoint is not None
    assert checkpoint[0].step < 400
    go_on = [*command(dataclasses.replace(killed, save_every=1000)), "--resume"]
    again = subprocess.run(go_on, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "finished, 400 steps" in again.stdout
    assert only_changed(snapshot(Path(whole.out)), snapshot(root)) == []


def command(config: FitConfig) -> list[str]:
    """The command line of a configuration."""
    program = str(Path(sys.executable).with_name("saetrain"))
    words = [program, "fit", config.cache]
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        option = "--" + field.name.replace("_", "-")
        if value is True and field.name != "resume":
            words.append(option)
        elif field.name not in ("cache", "saes") and isinstance(value, tuple):
            words += [word for item in value for word in (option, str(item))]
        elif field.name != "cache" and type(value) in (int, float, str):
            words += [option, str(value)]
    return words


def test_resume_begins_a_run_that_is_not_there_or_was_killed_at_its_first_file(
    options: Options, snapshot: Snapshot
) -> None:
    one, two = options(out=options().out + "-1"), options(resume=True)
    fit(one)
    Path(two.out).mkdir()
    (Path(two.out) / ".run.json.partial-1").write_text("{")
    fit(two)
    assert only_changed(snapshot(Path(one.out)), snapshot(Path(two.out))) == []


def test_a_finished_run_finds_its_work_done(options: Options, snapshot: Snapshot) -> None:
    config = options()
    first = fit(config)
    before = snapshot(Path(config.out))
    again = fit(dataclasses.replace(config, resume=True))
    assert (again.steps, again.new_steps, again.rows_per_second) == (12, 0, 0.0)
    assert again.saes == first.saes
    assert only_changed(before, snapshot(Path(config.out))) == []


def test_a_run_goes_on_where_it_and_its_cache_were_moved_to(
    options: Options, snapshot: Snapshot, cache_path: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    whole, config = options(out=options().out + "-whole"), options()
    fit(whole)
    with monkeypatch.context() as patch:
        stop_in_step(patch, 8)
        with pytest.raises(Killed):
            fit(config)
    run, cache = Path(config.out).rename(tmp_path / "elsewhere"), tmp_path / "cache"
    shutil.copytree(cache_path, cache)
    fit(dataclasses.replace(config, out=str(run), cache=str(cache), resume=True, save_every=100))
    assert only_changed(snapshot(Path(whole.out)), snapshot(run)) == []


def test_a_cache_that_has_grown_meanwhile_does_not_change_the_run(
    make_cache: Callable[..., Path],
    options: Options,
    snapshot: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    path = make_cache(shards=5)
    late = [path / "shards" / name for name in ("00004.json", "END.json")]
    for receipt in late:
        receipt.rename(tmp_path / receipt.name)
    whole, config = (options(cache=str(path), out=options().out + name) for name in "12")
    fit(whole)
    with monkeypatch.context() as patch:
        stop_in_step(patch, 8)
        with pytest.raises(Killed):
            fit(config)
    for receipt in late:
        (tmp_path / receipt.name).rename(receipt)
    fit(dataclasses.replace(config, resume=True))
    assert only_changed(snapshot(Path(whole.out)), snapshot(Path(config.out))) == []


# --- refusals ------------------------------------------------------------------------------------


def test_a_run_that_exists_is_refused_without_resume_and_stays(
    options: Options, snapshot: Snapshot
) -> None:
    config = options()
    fit(config)
    before = snapshot(Path(config.out))
    with pytest.raises(RunError, match=r"holds a run already(.|\n)*--resume"):
        fit(config)
    assert only_changed(before, snapshot(Path(config.out))) == []


def test_other_options_are_refused_with_their_names(options: Options) -> None:
    fit(options())
    with pytest.raises(RunError) as caught:
        fit(options(resume=True, k=4, lr=0.02, optimizer="adam"))
    for text in ("--k: 3 then, 4 now", "--lr: 0.01 then, 0.02 now", "--optimizer: 'signum'"):
        assert text in str(caught.value)


def test_another_or_a_changed_cache_is_refused_on_resume(
    make_cache: Callable[..., Path], options: Options, tmp_path: Path, cache_path: Path
) -> None:
    own = shutil.copytree(cache_path, tmp_path / "cache")
    config = options(cache=str(own), resume=True)
    fit(config)
    with pytest.raises(CacheMismatchError, match="not the cache of this run"):
        fit(dataclasses.replace(config, cache=str(make_cache(seed=1))))
    receipt = own / "shards" / "00001.json"
    text = receipt.read_text()
    receipt.write_text(text.replace('"xxh3_128": "', '"xxh3_128": "0', 1))
    with pytest.raises(CacheMismatchError, match="have changed since this run began"):
        fit(config)
    receipt.unlink()
    with pytest.raises(CacheMismatchError, match="no longer holds"):
        fit(config)


def test_a_damaged_checkpoint_is_refused_on_resume(options: Options) -> None:
    config = options(resume=True)
    fit(config)
    (path,) = Path(config.out).glob("checkpoint-*.00001.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(FormatError, match=r"00001\.safetensors"):
        fit(config)


@pytest.mark.parametrize(
    "change",
    [
        {"step": 13},
        {"step": 11},
        {"step": -1},
        {"stream": {"epoch": 0, "step": 11}},
        {"stream": {"epoch": 1, "step": 0, "rank": 1}},
        {"stream": {}},
    ],
    ids=str,
)
def test_a_checkpoint_whose_place_is_not_of_this_run_is_refused(
    options: Options, change: dict[str, Any]
) -> None:
    config = options(resume=True)
    fit(config)
    (path,) = Path(config.out).glob("checkpoint-*.json")
    text = path.read_text()
    path.write_text(json.dumps(json.loads(text) | change))
    with pytest.raises(FormatError, match=r"json is damaged"):
        fit(config)
    path.write_text(json.dumps(json.loads(text) | change | {"seal": None}))
    with pytest.raises(FormatError, match=r"not of (this run|its step)"):
        fit(config)


@pytest.mark.parametrize(
    ("mine", "other"),
    [
        ({}, {"hookpoint": ("layers.0",)}),
        ({}, {"num_latents": 40}),
        ({}, {"optimizer": "adam"}),
        ({"optimizer": "adam"}, {}),
        ({}, {"max_tokens": 640}),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_run_is_refused(
    options: Options, mine: dict[str, Any], other: dict[str, Any]
) -> None:
    config, foreign = options(**mine, resume=True), options(**other, out=options().out + "-other")
    fit(config)
    fit(foreign)
    for path in Path(config.out).glob("checkpoint-*"):
        path.unlink()
    for path in Path(foreign.out).glob("checkpoint-*"):
        shutil.copy(path, config.out)
    with pytest.raises(FormatError, match="not of this run"):
        fit(config)


def test_a_finished_run_that_lost_its_metrics_says_so(options: Options) -> None:
    config = options(resume=True)
    fit(config)
    (Path(config.out) / METRICS).unlink()
    with pytest.raises(FormatError, match=r"metrics\.jsonl is missing"):
        fit(config)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"k": 49}, ConfigError, r"--k is larger(.|\n)*<= 48"),
        ({"batch_size": 385}, ConfigError, r"batch is larger(.|\n)*--batch-size <= 384"),
        ({"max_tokens": 31}, ConfigError, r"--max-tokens is less than one batch"),
        ({"val_fraction": 0.6}, ConfigError, r"--val-fraction"),
        ({"val_fraction": -0.1}, ConfigError, r"--val-fraction"),
        ({"val_fraction": float("nan")}, ConfigError, r"--val-fraction"),
        ({"device": "nonsense"}, ConfigError, r"--device"),
        (
            {"hookpoint": ("layers.0", "layers.7")},
            HookpointError,
            r"layers\.7(.|\n)*layers\.0 \| layers\.1",
        ),
        ({"cache": "/nonexistent/cache"}, EmptyCacheError, r"is not a cache"),
    ],
    ids=str,
)
def test_what_cannot_be_done_is_refused_and_leaves_nothing_behind(
    options: Options, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    config = options(**changes)
    with pytest.raises(error, match=message):
        fit(config)
    assert not Path(config.out).exists()


def test_a_cache_without_a_complete_shard_is_refused(
    make_cache: Callable[..., Path], options: Options
) -> None:
    path = make_cache(shards=0, end=False)
    for fraction in (0.0, 0.05):
        with pytest.raises(EmptyCacheError, match="no complete shard"):
            fit(options(cache=str(path), val_fraction=fraction))


def test_a_cache_of_one_shard_is_refused_only_where_a_part_is_to_be_held_out(
    make_cache: Callable[..., Path], options: Options
) -> None:
    path = make_cache(shards=1)
    with pytest.raises(EmptyCacheError, match=r"one shard(.|\n)*--val-fraction 0"):
        fit(options(cache=str(path)))
    assert fit(options(cache=str(path), val_fraction=0.0)).steps == 4


def test_rows_that_do_not_vary_are_refused_and_leave_nothing_behind(
    make_cache: Callable[..., Path], options: Options
) -> None:
    def rows(hookpoint: str, shard: int, count: int, width: int) -> Rows:
        varying = np.random.RandomState(shard).standard_normal((count, width))
        return (varying * (hookpoint == "layers.1") + 1).astype(np.float32)

    path = make_cache(rows=rows)
    config = options(cache=str(path))
    with pytest.raises(RunError, match=r"layers\.0 do not vary(.|\n)*leave this hookpoint out"):
        fit(config)
    assert not Path(config.out).exists()
    fit(dataclasses.replace(config, hookpoint=("layers.1",)))  # the remedy, with the same --out


def test_an_out_that_cannot_be_used_is_refused(
    options: Options, make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="is a file"):
        fit(options(out=str(tmp_path / "file")))
    for resume in (False, True):
        with pytest.raises(RunError, match="holds other things"):
            fit(options(out=str(tmp_path / "folder"), resume=resume))
        with pytest.raises(RunError, match="holds a cache"):
            fit(options(out=str(make_cache()), resume=resume))
    with pytest.raises(OSError, match="Not a directory"):
        fit(options(out=str(tmp_path / "file" / "run")))
    assert (tmp_path / "file").read_text() == "mine"
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["notes.txt"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_out_without_permission_is_refused(options: Options, tmp_path: Path) -> None:
    (tmp_path / "locked").mkdir(mode=0o500)
    with pytest.raises(PermissionError):
        fit(options(out=str(tmp_path / "locked" / "run")))


def test_an_empty_folder_is_a_place_for_a_run(options: Options, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert fit(options(out=str(tmp_path / "empty"))).steps == 12


# --- one at a time, in one process ---------------------------------------------------------------


def test_a_second_fit_in_the_folder_is_refused_by_the_name_of_the_first(
    options: Options, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, real, refused = options(), saetrain.trainer.train_step, []

    def step(trainee: Any, rows: Any, number: int, alpha: float) -> None:
        if number == 4 and not refused:
            before = snapshot(Path(config.out))
            with pytest.raises(
                CacheBusyError, match=rf"another fit(.|\n)*process {os.getpid()} on"
            ):
                fit(dataclasses.replace(config, resume=True))
            assert only_changed(before, snapshot(Path(config.out))) == []
            refused.append(number)
        real(trainee, rows, number, alpha)

    monkeypatch.setattr(saetrain.trainer, "train_step", step)
    fit(config)
    assert refused == [4]
    assert fit(dataclasses.replace(config, resume=True)).new_steps == 0  # the lock is free again


def test_two_that_begin_a_run_at_once_do_not_both_begin_it(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The slower one finds that a run has been begun since it looked."""
    config, real = options(), saetrain.fit._build

    def build(*arguments: Any) -> Any:
        monkeypatch.setattr(saetrain.fit, "_build", real)
        fit(config)
        return real(*arguments)

    monkeypatch.setattr(saetrain.fit, "_build", build)
    with pytest.raises(RunError, match="another fit has begun a run"):
        fit(config)


def test_a_folder_that_holds_nothing_but_a_lock_is_a_place_for_a_run(options: Options) -> None:
    Path(options().out).mkdir()
    (Path(options().out) / "fit.lock").write_text("process 1 on a machine\n")
    assert fit(options()).steps == 12


# --- what is told --------------------------------------------------------------------------------


def test_dead_latents_are_not_counted_before_they_can_be_known(options: Options) -> None:
    config = options(dead_after=129, log_every=1, save_every=100)
    fit(config)
    known = [line["saes"]["layers.0"]["dead_percent"] for line in metrics(Path(config.out))]
    assert known[:4] == [None] * 4
    assert None not in known[4:]  # from 160 rows on


def test_other_library_versions_are_told_when_a_run_goes_on(options: Options) -> None:
    config = options(resume=True)
    assert fit(config).warnings == ()
    path = Path(config.out) / RUN
    run = json.loads(path.read_text())
    now = run["versions"]["torch"]
    run["versions"]["torch"] = "0.1"
    path.write_text(json.dumps(run))
    assert fit(config).warnings == (f"torch is {now} now; this run was begun with 0.1",)


def test_a_cache_that_is_not_complete_is_told_with_the_numbers(
    make_cache: Callable[..., Path], options: Options
) -> None:
    path = make_cache(shards=4)
    (path / "shards" / "END.json").unlink()
    (path / "shards" / "00003.json").unlink()
    config = options(cache=str(path))
    (warning,) = fit(config).warnings
    assert "is not complete: shards there 3, planned 4" in warning
    assert "--follow waits for more" in warning
    record = read_run(Path(config.out))
    assert sorted([*record.training_shards, *record.held_out]) == [0, 1, 2]
    assert record.steps == 2 * 128 // 32


def test_a_full_disk_names_resume_as_the_remedy(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskFullError, match=r"the same command with --resume goes on"):
        fit(options())


def test_a_run_records_where_its_cache_is_now_whatever_the_working_directory(
    make_cache: Callable[..., Path],
    options: Options,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    here = make_cache(tmp_path / "here")
    monkeypatch.chdir(tmp_path)
    config = options(cache="here")
    fit(config)
    root = Path(config.out)
    assert read_run(root).cache == str(here)
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert evaluate(root).rows == 128
    there = here.rename(tmp_path / "there")
    with pytest.raises(EmptyCacheError, match=r"is not at .*/here(.|\n)*--cache"):
        evaluate(root)
    before = read_run(root)
    fit(dataclasses.replace(config, cache="../there", resume=True))
    assert read_run(root) == dataclasses.replace(before, cache=str(there))
    assert evaluate(root).rows == 128


def test_the_pool_of_rows_is_part_of_the_order(options: Options, snapshot: Snapshot) -> None:
    one, two = options(out=options().out + "1"), options(pool_rows=64)
    fit(one)
    fit(two)
    assert read_run(Path(one.out)).pool_rows == POOL_ROWS
    assert read_run(Path(two.out)).plan.window == 2
    assert "metrics.jsonl" in only_changed(snapshot(Path(one.out)), snapshot(Path(two.out)))


def test_a_run_says_what_its_limit_was_and_every_line_how_fast_it_was(options: Options) -> None:
    config = options(resume=True)
    summary = fit(config)
    assert summary.limit is not None
    assert "of the time went into waiting for rows" in summary.limit
    assert summary.bytes_per_second == pytest.approx(summary.rows_per_second * 2 * 16 * 4)
    for text in (Path(config.out) / TIMINGS).read_text().splitlines():
        line = json.loads(text)
        assert 0 <= line["data_wait"] <= 1
        assert line["bytes_per_second"] == pytest.approx(line["rows_per_second"] * 2 * 16 * 4)
    assert fit(config).limit is None


def test_how_rows_are_read_is_told_in_one_line_where_there_is_something_to_read(
    options: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    config = options(resume=True)
    fit(config)
    assert capsys.readouterr().err == (
        "fit: 384 rows are mixed in memory (49.2 kB); read by 2 threads, 262 kB at a time, "
        "up to 2 of 32 windows ahead (too little to probe)\n"
    )
    fit(config)
    assert capsys.readouterr().err == ""


def test_a_finished_run_whose_metrics_lack_a_hookpoint_is_refused(options: Options) -> None:
    config = options(resume=True)
    fit(config)
    path = Path(config.out) / METRICS
    path.write_text(path.read_text().replace("layers.1", "layers.2"))
    with pytest.raises(FormatError, match=r"metrics\.jsonl lacks figures of layers\.1 at step 12"):
        fit(config)


# --- losses that are not finite ------------------------------------------------------------------


@BOTH_OPTIMIZERS
@pytest.mark.parametrize(("save_every", "log_every"), [(1, 1000), (1, 1), (5, 3), (1000, 1000)])
@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_row_that_is_not_finite_stops_the_run_and_spoils_no_checkpoint(
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
    told = f"Step {last_saved} is saved, from before" if checkpoint else "Nothing is saved yet"
    assert told in str(caught.value)
    weights = checkpoint[1] if checkpoint else []
    weights += [load_file(file) for file in root.glob("layers.*/sae.safetensors")]
    assert all(torch.isfinite(t).all() for part in weights for t in part.values())
    assert (last_saved > 0) == bool(weights)
    assert all(line["step"] <= poisoned for line in metrics(root))


@pytest.mark.parametrize(("optimizer", "lr"), [("signum", 1e25), ("adam", 1e30)])
def test_a_learning_rate_that_explodes_stops_the_run(
    options: Options, optimizer: str, lr: float
) -> None:
    config = options(optimizer=optimizer, lr=lr, lr_warmup_steps=0)
    with pytest.raises(RunError, match="not finite"):
        fit(config)
    assert load_checkpoint(Path(config.out)) is None
    assert not list(Path(config.out).glob("layers.*"))
    assert (Path(config.out) / RUN).exists()
