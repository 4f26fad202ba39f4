"""Refusals before a run starts, which leave no file."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

import saetrain.distributed.coordinator
import saetrain.launch.run
import saetrain.launch.setup
import saetrain.training.checkpointing
import saetrain.training.loop
import saetrain.training.step
from actcache.core.json_codec import decode_json, parse_dataclass, to_json
from actcache.errors import CacheBusyError, ConfigError, EmptyCacheError, HookpointError, RunError
from actcache.filesystem.lock import DirectoryLock
from saetrain.config.fit_config import FitConfig
from saetrain.distributed.coordinator import Coordinator
from saetrain.launch.resolve import open_cache, resolve_run
from saetrain.launch.run import RunSession, fit, start_or_resume
from saetrain.launch.setup import RunBroadcast

Options = Callable[..., FitConfig]
Snapshot = Callable[[Path], dict[str, bytes]]
Rows = NDArray[np.float32]


def only_changed(old: dict[str, bytes], new: dict[str, bytes]) -> list[str]:
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


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
def test_invalid_options_are_refused_and_leave_no_file(
    options: Options, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    out = Path(options().out)
    with pytest.raises(error, match=message):
        fit(options(**changes))
    assert not out.exists()


class OfRankOne(Coordinator):
    """Receives what rank 0 sends."""

    is_rank_zero = False

    def __init__(self, sent: RunBroadcast) -> None:
        super().__init__()
        self._sent = sent

    def receive(self, kind: type[Any]) -> Any:
        """Return the run as it arrives from rank 0."""
        return parse_dataclass(kind, decode_json(to_json(self._sent)), "rank 0")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 64}, "--batch-size: 32 on rank 0, 64 here"),
        ({"lr": 0.02}, "--lr: 0.01 on rank 0, 0.02 here"),
        ({"save_every": 4}, "--save-every: 3 on rank 0, 4 here"),
        ({"verify": "always"}, "--verify"),
        ({"seed": 1}, "--seed"),
        ({"device": "auto", "out": "other", "parallel": "ddp"}, None),
    ],
    ids=str,
)
def test_a_process_with_other_options_than_rank_0_is_refused(
    options: Options, changes: dict[str, Any], message: str | None
) -> None:
    config = options()
    record = resolve_run(config, open_cache(config), torch.device("cpu"), 2)
    own = dataclasses.replace(config, **changes)
    root = Path(config.out)
    coordinator = OfRankOne(RunBroadcast(False, record))
    session = RunSession(own, root, DirectoryLock(root), coordinator)
    if message is None:
        assert start_or_resume(session).record == record
        return
    with pytest.raises(RunError, match=rf"differ between the processes(.|\n)*{message}"):
        start_or_resume(session)


def test_a_cache_without_a_complete_shard_is_refused(
    make_cache: Callable[..., Path], options: Options
) -> None:
    path = make_cache(shards=0, end=False)
    for fraction in (0.0, 0.05):
        with pytest.raises(EmptyCacheError, match="no complete shard"):
            fit(options(cache=str(path), val_fraction=fraction))


def test_a_cache_of_one_shard_is_refused_only_with_a_validation_fraction(
    make_cache: Callable[..., Path], options: Options
) -> None:
    path = make_cache(shards=1)
    with pytest.raises(EmptyCacheError, match=r"one shard(.|\n)*--val-fraction 0"):
        fit(options(cache=str(path)))
    assert fit(options(cache=str(path), val_fraction=0.0)).steps == 4


def test_rows_that_do_not_vary_are_refused_and_leave_no_file(
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


def test_one_process_refuses_what_several_with_the_same_options_refuse(options: Options) -> None:
    config = options(activation="batchtopk", parallel="ddp")
    with pytest.raises(ConfigError, match="chooses among a whole batch"):
        fit(config)
    assert not Path(config.out).exists()


def test_an_out_that_cannot_be_used_is_refused(
    options: Options, make_cache: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="is a file"):
        fit(options(out=str(tmp_path / "file")))
    (tmp_path / "link").symlink_to("nowhere")
    with pytest.raises(RunError, match="a link that leads nowhere"):
        fit(options(out=str(tmp_path / "link")))
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


def test_a_run_starts_in_an_empty_folder(options: Options, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert fit(options(out=str(tmp_path / "empty"))).steps == 12


def test_a_second_fit_in_the_folder_is_refused_with_the_process_of_the_first(
    options: Options, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, real, refused = options(), saetrain.training.step.train_step, []

    def step(trainer: Any, rows: Any, number: int) -> None:
        if number == 4 and not refused:
            before = snapshot(Path(config.out))
            with pytest.raises(
                CacheBusyError, match=rf"another fit(.|\n)*process {os.getpid()} on"
            ):
                fit(dataclasses.replace(config, resume=True))
            assert only_changed(before, snapshot(Path(config.out))) == []
            refused.append(number)
        real(trainer, rows, number)

    monkeypatch.setattr(saetrain.training.step, "train_step", step)
    fit(config)
    assert refused == [4]
    assert fit(dataclasses.replace(config, resume=True)).new_steps == 0  # the lock is released


def test_of_two_concurrent_starts_in_one_folder_the_slower_is_refused(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other fit has written run.json after the check of the folder."""
    config, real = options(), saetrain.launch.setup.make_trainers

    def build(*arguments: Any) -> Any:
        monkeypatch.setattr(saetrain.launch.setup, "make_trainers", real)
        fit(config)
        return real(*arguments)

    monkeypatch.setattr(saetrain.launch.setup, "make_trainers", build)
    with pytest.raises(RunError, match="another fit has started a run"):
        fit(config)


def test_a_run_starts_in_a_folder_with_only_a_lock(options: Options) -> None:
    Path(options().out).mkdir()
    (Path(options().out) / "fit.lock").write_text("process 1 on a machine\n")
    assert fit(options()).steps == 12


class Killed(BaseException):
    """Ends a run as SIGKILL does: nothing but a `finally` runs after it."""


BEFORE_THE_FIRST_STEP = [
    (saetrain.launch.run, "set_up_run"),
    (saetrain.launch.run, "write_run"),
    (saetrain.launch.run, "train"),
    (saetrain.training.loop, "_open_stream"),
    (saetrain.distributed.coordinator, "JsonlTracker"),
    (saetrain.training.loop, "open_wandb"),
    (saetrain.training.loop, "Checkpointer"),
    (saetrain.training.loop, "_next_batch"),
    (saetrain.training.step, "train_step"),
]


@pytest.mark.parametrize("error", [Killed(), RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_run_that_ended_before_its_first_step_is_run_again_by_the_same_command(
    options: Options, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    config, whole = options(), options(out=options().out + "-whole")
    fit(whole)

    def end(*_: Any, **__: Any) -> None:
        raise error

    for module, name in BEFORE_THE_FIRST_STEP:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, end)
            with pytest.raises(type(error)):
                fit(config)
    assert fit(config).new_steps == 12
    assert snapshot(Path(config.out)) == snapshot(Path(whole.out))
    assert list(Path(config.out).glob(".*")) == []


def test_a_run_without_a_step_is_begun_anew_with_other_options(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("out of memory")

    config = options(follow=True, segment_shards=2)  # pins its first segment before the step
    with monkeypatch.context() as patch:
        patch.setattr(saetrain.training.step, "train_step", full)
        with pytest.raises(RuntimeError, match="out of memory"):
            fit(config)
    assert (Path(config.out) / "segments.json").exists()
    smaller = dataclasses.replace(config, batch_size=16, segment_shards=4)
    assert fit(smaller).steps == 24


def test_a_run_with_a_step_is_protected(
    options: Options, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One whose steps are only logged, one killed while it saves, and one that is at work."""

    def end(*_: Any, **__: Any) -> None:
        raise Killed

    logged = options(save_every=100, log_every=1, out=options().out + "-logged")
    with monkeypatch.context() as patch:
        patch.setattr(saetrain.training.checkpointing, "save", end)
        with pytest.raises(Killed):
            fit(logged)
    saved = options(log_every=100, out=options().out + "-saved")
    with monkeypatch.context() as patch:
        patch.setattr(saetrain.training.checkpointing, "save_sae_state", end)
        with pytest.raises(Killed):
            fit(saved)
    for config in (logged, saved):
        before = snapshot(Path(config.out))
        with pytest.raises(RunError, match=r"holds a run already(.|\n)*--resume"):
            fit(config)
        assert only_changed(before, snapshot(Path(config.out))) == []
    real, refused = saetrain.training.loop.train_batch, []

    def step(*arguments: Any) -> None:
        if not refused:
            with pytest.raises(RunError, match="holds a run already"):
                fit(working)
            refused.append(working)
        real(*arguments)

    working = options()
    monkeypatch.setattr(saetrain.training.loop, "train_batch", step)
    assert fit(working).steps == 12
    assert refused == [working]


def test_files_of_others_beside_a_run_without_a_step_are_not_taken_for_it(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(*_: Any) -> None:
        raise Killed

    config = options()
    monkeypatch.setattr(saetrain.training.step, "train_step", end)
    with pytest.raises(Killed):
        fit(config)
    (Path(config.out) / "notes.txt").write_text("mine")
    with pytest.raises(RunError, match="holds a run already"):
        fit(config)
    assert (Path(config.out) / "run.json").exists()


def test_a_run_json_of_something_else_and_a_finished_run_are_kept(
    options: Options, snapshot: Snapshot
) -> None:
    """The finished one's SAEs, checkpoints and metrics were moved away."""
    foreign, finished = Path(options().out + "-foreign"), options(out=options().out + "-finished")
    foreign.mkdir()
    (foreign / "run.json").write_text('{"name": "of a launcher"}')
    fit(finished)
    for path in Path(finished.out).iterdir():
        if path.name in ("metrics.jsonl", "timings.jsonl"):
            path.write_text("")
        elif path.is_dir():
            shutil.rmtree(path)
        elif path.name.startswith("checkpoint-"):
            path.unlink()
    for folder in (foreign, Path(finished.out)):
        before = snapshot(folder)
        with pytest.raises(RunError, match="holds a run already"):
            fit(options(out=str(folder)))
        assert snapshot(folder) == before


def test_a_run_without_a_step_is_kept_until_the_new_one_is_set_up(
    options: Options, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    def end(*_: Any) -> None:
        raise Killed

    config = options()
    with monkeypatch.context() as patch:
        patch.setattr(saetrain.training.step, "train_step", end)
        with pytest.raises(Killed):
            fit(config)
    before = snapshot(Path(config.out))
    monkeypatch.setattr(saetrain.launch.run, "set_up_run", end)
    with pytest.raises(Killed):
        fit(dataclasses.replace(config, batch_size=16))
    assert snapshot(Path(config.out)) == before


@pytest.mark.soak
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", ["write_run", "_open_stream", "_next_batch", "train_batch"])
def test_a_command_killed_before_its_first_step_is_simply_run_again(
    options: Options, tmp_path: Path, processes: int, name: str
) -> None:
    config, bare = options(), "import sys; from actcache_cli.main import saetrain; saetrain()"
    module = "launch.run" if name == "write_run" else "training.loop"
    dying = f"""
import os, saetrain.{module} as module
real = module.{name}
def die(*arguments, **named):
    if {name in ("write_run", "_open_stream")}:
        real(*arguments, **named)
    os.kill(os.getpid(), {int(signal.SIGKILL)})
module.{name} = die
"""
    arguments = ["fit", config.cache, "--out", config.out, "--num-latents", "48", "--k", "3"]
    arguments += ["--batch-size", "32", "--device", "cpu"]
    start = [sys.executable]
    if processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        arguments += ["--parallel", "modules"]
    codes = []
    for number, code in enumerate([dying + bare, bare]):
        script = tmp_path / f"{number}.py"
        script.write_text(code)
        done = subprocess.run([*start, script, *arguments], capture_output=True, text=True)
        codes.append(done.returncode)
    assert codes[0] != 0
    assert codes[1] == 0, done.stderr
    assert "finished, 12 steps" in done.stdout
