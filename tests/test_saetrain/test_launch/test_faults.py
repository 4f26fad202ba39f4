"""Faults of the cache during a run: it stops with its steps saved, or slows down."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import saetrain.training.checkpointing
import saetrain.training.step
from actcache.cache.reader import Cache
from actcache.errors import ActcacheError, CorruptShardError
from actcache.storage import BACKENDS
from actcache.stream.verified_reads import VerifiedReader
from saetrain.config.fit_config import FitConfig
from saetrain.launch.run import fit
from saetrain.runs.checkpoint import newest_step

Options = Callable[..., FitConfig]
Snapshot = Callable[[Path], dict[str, bytes]]

LONG = {"epochs": 12, "save_every": 10_000, "log_every": 7, "pool_rows": 64}
"""Options with which most rows are read late, and no checkpoint is due."""


@pytest.fixture
def own_cache(cache_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cache_path, tmp_path / "cache"))


def act_at(monkeypatch: pytest.MonkeyPatch, step: int, act: Callable[[], None]) -> None:
    """Run a function on the cache before step `step` (from 0)."""
    real = saetrain.training.step.train_step

    def train_step(trainer: Any, rows: Any, number: int) -> None:
        if number == step and trainer.entry.hookpoint == "layers.0":
            act()
        real(trainer, rows, number)

    monkeypatch.setattr(saetrain.training.step, "train_step", train_step)


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def remove(path: Path) -> None:
    path.unlink()


def shard_files(cache: Path) -> list[Path]:
    """Return the files with the rows of layers.1."""
    backend = BACKENDS["memmap"]
    return [backend.path(cache, "layers.1", shard) for shard in Cache.open(cache).shards]


@pytest.mark.parametrize("fault", [damage, remove])
def test_a_changed_or_missing_shard_stops_the_run_with_a_checkpoint_and_it_resumes_once_restored(
    fault: Callable[[Path], None],
    own_cache: Path,
    cache_path: Path,
    options: Options,
    snapshot: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = options(**LONG, out=options().out + "-whole")
    config = options(**LONG, cache=str(own_cache))
    fit(whole)
    with monkeypatch.context() as patch:
        act_at(patch, 10, lambda: [fault(path) for path in shard_files(own_cache)] and None)
        with pytest.raises(CorruptShardError, match=r"layers\.1/0000\d\.safetensors"):
            fit(config)
    saved = newest_step(Path(config.out))
    assert saved is not None
    assert saved >= 11
    assert f"step {saved:,} is saved" in capsys.readouterr().err
    for path in shard_files(own_cache):
        shutil.copy(cache_path / path.relative_to(own_cache), path)
    assert fit(dataclasses.replace(config, resume=True)).new_steps == 144 - saved
    assert snapshot(Path(whole.out)) == snapshot(Path(config.out))


@pytest.mark.parametrize("follow", [False, True])
def test_the_command_names_a_damaged_shard_and_exits_with_code_8(
    own_cache: Path, tmp_path: Path, fork_server: Any, follow: bool
) -> None:
    damage(shard_files(own_cache)[1])
    command = ["saetrain", "fit", str(own_cache), "--out", str(tmp_path / "run"), "--k", "3"]
    command += ["--batch-size", "32", "--device", "cpu", *(["--follow"] if follow else [])]
    done = fork_server.start(*command)
    done.communicate()
    assert done.returncode == 8, done.stderr
    assert "layers.1/00001.safetensors differs from the receipt of shard 1" in done.stderr
    assert "Traceback" not in done.stderr
    assert newest_step(tmp_path / "run") is None  # no step has used the damaged rows
    again = [*command, "--resume", "--verify", "never"]
    assert fork_server.start(*again).wait() == 0


def test_verify_changes_no_byte_of_a_run(options: Options, snapshot: Snapshot) -> None:
    runs = []
    for verify in ("first-read", "always", "never"):
        config = options(verify=verify, out=f"{options().out}-{verify}")
        fit(config)
        runs.append(snapshot(Path(config.out)))
    assert runs[0] == runs[1] == runs[2]


def test_a_slow_disk_changes_no_byte_of_a_run(
    options: Options, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"pool_rows": 64}
    whole, slow = options(**small, out=options().out + "-whole"), options(**small)
    fit(whole)
    real = os.preadv

    def preadv(*args: Any) -> int:
        time.sleep(0.003)
        return real(*args)

    monkeypatch.setattr(os, "preadv", preadv)
    assert fit(slow).data_wait > 0
    assert snapshot(Path(whole.out)) == snapshot(Path(slow.out))


def test_fit_raises_an_exception_of_the_reader_with_its_traceback(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, reads = VerifiedReader.load, 0

    def load(self: VerifiedReader, *args: Any) -> None:
        nonlocal reads
        reads += 1
        if reads == 60:
            raise OSError(5, "Input/output error") from ValueError("an error of the driver")
        real(self, *args)

    monkeypatch.setattr(VerifiedReader, "load", load)
    config = options(**LONG)
    with pytest.raises(OSError, match="Input/output error") as caught:
        fit(config)
    text = "".join(traceback.format_exception(caught.value))
    assert "an error of the driver" in text
    assert re.search(r"in load\n", text)  # in the reader thread
    assert re.search(r"in train\n", text)  # in the main thread
    saved = newest_step(Path(config.out))
    assert saved


def test_a_failed_checkpoint_does_not_hide_the_read_error(
    own_cache: Path,
    options: Options,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any) -> None:
        raise ActcacheError("no room to write it")

    monkeypatch.setattr(saetrain.training.checkpointing, "save", fail)
    act_at(monkeypatch, 10, lambda: [remove(path) for path in shard_files(own_cache)] and None)
    with pytest.raises(CorruptShardError, match="is gone"):
        fit(options(**LONG, cache=str(own_cache)))
    assert "could not be saved: no room to write it" in capsys.readouterr().err
