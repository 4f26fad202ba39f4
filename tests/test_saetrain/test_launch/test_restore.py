"""Resume of runs that were stopped, killed or damaged."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import saetrain.launch.run
import saetrain.training.step
from actcache.core.json_codec import to_json
from actcache.errors import DiskFullError, FormatError
from actcache.filesystem.atomic import digest_file
from actcache.filesystem.rooted import RootedPath
from saetrain.config.fit_config import FitConfig
from saetrain.evaluation import evaluate
from saetrain.launch.run import fit
from saetrain.tracking.jsonl import METRICS, TIMINGS

Options = Callable[..., FitConfig]
Snapshot = Callable[[Path], dict[str, bytes]]


class Killed(BaseException):
    """Stands in for a signal: no handler may catch it."""


def metrics(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / METRICS).read_text().splitlines()]


def only_changed(old: dict[str, bytes], new: dict[str, bytes]) -> list[str]:
    return sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name))


def stop_in_step(monkeypatch: pytest.MonkeyPatch, stop_at: int) -> None:
    """Raise in step `stop_at` (from 0), between the first hookpoint's update and the second's."""
    real = saetrain.training.step.train_step

    def step(trainer: Any, rows: Any, number: int) -> None:
        if number == stop_at and trainer.entry.hookpoint == "layers.1":
            raise Killed
        real(trainer, rows, number)

    monkeypatch.setattr(saetrain.training.step, "train_step", step)


@pytest.mark.parametrize(
    ("optimizer", "stop_at", "save_every"),
    [
        ("signum", 1, 3),
        ("adam", 7, 3),
        ("signum", 9, 3),
        ("adam", 13, 7),
        ("signum", 16, 5),
        ("adam", 19, 1),
    ],
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_stopped_run_resumes_to_the_same_bytes(
    options: Options,
    snapshot: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
    optimizer: str,
    stop_at: int,
    save_every: int,
    device: str,
) -> None:
    """Across an epoch (step 12), between lines of metrics (every 4 steps), with AuxK."""
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
            file.write('{"step": 1')  # a partial line, as after a kill during a write
    fit(dataclasses.replace(stopped, resume=True))
    assert only_changed(snapshot(Path(whole.out)), snapshot(root)) == []


def test_a_run_killed_before_or_after_any_rename_resumes_to_the_same_bytes(
    options: Options, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file of a run appears by an atomic rename of a partial file."""
    small = {"max_tokens": 4 * 32, "save_every": 2, "log_every": 3}
    whole = options(**small, out=options().out + "-whole")
    real, seen = os.replace, 0

    def count(*names: Any, **folders: Any) -> None:
        nonlocal seen
        seen += 1
        real(*names, **folders)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", count)
        fit(whole)
    # run.json, exit.json; per save two SAEs' files, and a checkpoint
    assert seen == 2 + 2 * (2 * 2 + 2 + 1)
    expected = snapshot(Path(whole.out))
    for number in range(seen):
        after = number % 2 == 1  # little lies between the end of a rename and the next one
        config = options(**small, out=f"{options().out}-{number}", resume=True)
        left = number

        def die(*names: Any, after: bool = after, **folders: Any) -> None:
            nonlocal left
            if left == 0 and not after:
                raise Killed
            real(*names, **folders)
            if left == 0:
                raise Killed
            left -= 1

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", die)
            with pytest.raises(Killed):
                fit(config)
        fit(config)
        assert only_changed(expected, snapshot(Path(config.out))) == [], (number, after)


def test_a_run_killed_while_it_removes_checkpoints_resumes_to_the_same_bytes(
    options: Options, snapshot: Snapshot, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, config = options(out=options().out + "-whole"), options()
    fit(whole)
    real = RootedPath.unlink

    def unlink(path: RootedPath, missing_ok: bool = False) -> None:
        real(path, missing_ok)
        if path.name == "checkpoint-000000003.00000.safetensors":
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(RootedPath, "unlink", unlink)
        with pytest.raises(Killed):
            fit(config)
    left = {path.name for path in Path(config.out).glob("checkpoint-000000003.*")}
    assert left == {"checkpoint-000000003.00001.safetensors"}
    fit(dataclasses.replace(config, resume=True))
    assert only_changed(snapshot(Path(whole.out)), snapshot(Path(config.out))) == []


def test_a_run_stopped_by_a_full_disk_resumes_once_there_is_room(
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
    "name",
    [
        "run.json",
        "metrics.jsonl",
        "timings.jsonl",
        "exit.json",
        "non-finite.json",
        "layers.0",
        "layers.0/cfg.json",
        "layers.0/sae.safetensors",
        "layers.0/best-000000003",
        "checkpoint-000000013.json",
        "checkpoint-000000012.00000.safetensors",
    ],
)
def test_a_folder_in_place_of_a_file_of_a_run_is_refused_before_the_work(
    options: Options, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a file in place of a folder."""
    config = options(resume=True)
    fit(config)
    path = Path(config.out) / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    if "." in path.name and not path.name.startswith("layers"):
        path.mkdir()
    else:
        path.write_text("")
    monkeypatch.setattr(saetrain.launch.run, "set_up_run", None)
    with pytest.raises(FormatError, match=rf"{path.name} is (a file|a folder|not a plain file)"):
        fit(config)
    with pytest.raises(FormatError, match=rf"{path.name} is (a file|a folder|not a plain file)"):
        evaluate(config.out)


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
def test_a_checkpoint_with_another_stream_position_is_refused(
    options: Options, change: dict[str, Any]
) -> None:
    config = options(resume=True)
    fit(config)
    (path,) = Path(config.out).glob("checkpoint-*.json")
    text = path.read_text()
    path.write_text(json.dumps(json.loads(text) | change))
    with pytest.raises(FormatError, match=r"json differs from its seal"):
        fit(config)
    path.write_bytes(to_json(json.loads(text) | change, sealed=True))
    with pytest.raises(FormatError, match=r"of (another run|its step|an impossible step)"):
        fit(config)


def rewrite_newest(root: Path, change: Callable[[dict[str, Any]], None], **state: Any) -> int:
    """Change tensors of a run's newest checkpoint, and seal it again; return its step."""
    path = sorted(root.glob("checkpoint-*.json"))[-1]
    tensors_path = path.with_suffix(".00001.safetensors")
    tensors = load_file(tensors_path)
    change(tensors)
    save_file(tensors, tensors_path)
    obj = json.loads(path.read_text()) | state
    obj["saes"][1]["file"] = dataclasses.asdict(digest_file(tensors_path))
    path.write_bytes(to_json(obj, sealed=True))
    return obj["step"]


BAD_CONTENTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "another shape": lambda tensors: tensors.update(meter=torch.zeros(1)),
    "a missing tensor": lambda tensors: tensors.pop("firing"),
    "a weight that is not finite": lambda tensors: tensors["sae.b_enc"].fill_(math.nan),
    "a counter out of range": lambda tensors: tensors["firing"].fill_(-1),
}


@pytest.mark.parametrize("kind", BAD_CONTENTS)
def test_a_checkpoint_with_impossible_contents_is_named_and_an_older_one_resumed(
    kind: str, options: Options, snapshot: Snapshot, capsys: pytest.CaptureFixture[str]
) -> None:
    config = options(resume=True, keep_last=2)
    fit(config)
    whole = snapshot(Path(config.out))
    step = rewrite_newest(Path(config.out), BAD_CONTENTS[kind])
    summary = fit(config)
    assert 0 < summary.new_steps < step
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "is damaged" in line]
    assert f"checkpoint-{step:09d}.00001.safetensors" in line
    assert "; expected " in line
    assert f"resuming from step {step - summary.new_steps}," in line
    assert only_changed(whole, snapshot(Path(config.out))) == []


def test_without_a_good_checkpoint_a_resume_is_refused_and_changes_nothing(
    options: Options, snapshot: Snapshot
) -> None:
    config = options(resume=True)
    fit(config)
    rewrite_newest(Path(config.out), BAD_CONTENTS["another shape"])
    before = snapshot(Path(config.out))
    with pytest.raises(FormatError, match=r"meter(.|\n)*no other checkpoint is whole"):
        fit(config)
    assert only_changed(before, snapshot(Path(config.out))) in ([], ["exit.json"])


def test_a_checkpoint_whose_contents_are_of_another_run_is_no_reason_to_fall_back(
    options: Options,
) -> None:
    config = options(resume=True, keep_last=2)
    fit(config)
    rewrite_newest(Path(config.out), lambda _: None, stream={"epoch": 7, "step": 1})
    with pytest.raises(FormatError, match="of another run"):
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
    for path in [*Path(foreign.out).glob("checkpoint-*"), Path(foreign.out) / METRICS]:
        shutil.copy(path, config.out)
    with pytest.raises(FormatError, match="of another run"):
        fit(config)
