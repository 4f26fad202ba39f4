"""Killed and damaged runs end in the same bytes as an uninterrupted run."""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import saetrain.training.step
from actcache.errors import FormatError
from actcache.filesystem.atomic import digest_file
from saetrain.config.fit_config import FitConfig
from saetrain.config.grid import values_of, vary
from saetrain.evaluation import evaluate
from saetrain.launch.run import EXIT, fit
from saetrain.runs.checkpoint import newest_step, read_state, state_path, tensors_path
from saetrain.runs.record import read_run
from saetrain.tracking.jsonl import METRICS, TIMINGS

Options = Callable[..., FitConfig]
Snapshot = Callable[[Path], dict[str, bytes]]

SECONDS = 120  # timeout of a process that hangs
STEPS = 200


class Killed(BaseException):
    """Stands in for a signal."""


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


# --- by real signals -----------------------------------------------------------------------------


def kind(options: Options, name: str, **changes: Any) -> FitConfig:
    """Return options of a run of STEPS steps, of one of several kinds."""
    config = options(max_tokens=STEPS * 32, log_every=25, **changes)
    if name == "grid":
        return vary(config, optimizer=("signum", "adam"))
    if name == "best":
        return dataclasses.replace(config, val_every=20, save_best=True)
    return config


def start(fork_server: Any, config: FitConfig, file: Path) -> Any:
    given = {name: value for name, value in values_of(config).items() if value is not None}
    file.write_text(json.dumps(given | {"resume": True}))
    return fork_server.start("saetrain", "fit", "--config", file)


def strike(process: Any, root: Path, number: signal.Signals, beyond: int) -> str:
    """Send a signal at a random time after a checkpoint beyond a step; return stderr."""
    deadline = time.monotonic() + SECONDS
    while (newest_step(root) if root.is_dir() else None) in (None, *range(beyond + 1)):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.003)
    time.sleep(random.uniform(0, 0.1))
    process.send_signal(number)
    return process.communicate(timeout=SECONDS)[1]


@pytest.mark.parametrize(("name", "number"), [("grid", signal.SIGINT), ("best", signal.SIGTERM)])
def test_a_run_that_was_stopped_and_killed_resumes_to_the_same_bytes(
    options: Options,
    snapshot: Snapshot,
    fork_server: Any,
    tmp_path: Path,
    name: str,
    number: signal.Signals,
) -> None:
    whole = kind(options, name, out=options().out + "-whole", save_every=100)
    hit = kind(options, name, save_every=1)  # slow, so that a signal comes before the end
    fit(whole)
    root, file = Path(hit.out), tmp_path / "fit.json"
    process = start(fork_server, dataclasses.replace(hit, save_every=10_000, keep_every=20), file)
    stderr = strike(process, root, number, 0)
    assert process.returncode == 128 + number, stderr
    done = newest_step(root) or 0
    assert 0 < done < STEPS
    assert f"{number.name}: step {done} is saved; --resume continues from it" in stderr
    assert "Traceback" not in stderr
    ending = json.loads((root / EXIT).read_text())
    assert ending == {"code": 128 + number, "reason": number.name, "step": done}
    process = start(fork_server, hit, file)
    stderr = strike(process, root, signal.SIGKILL, done)
    assert process.returncode == -signal.SIGKILL, stderr
    assert not (root / EXIT).exists()
    assert (newest_step(root) or 0) < STEPS
    fit(dataclasses.replace(hit, save_every=100, resume=True))
    assert snapshot(Path(whole.out)) == snapshot(root)


@pytest.mark.soak
@pytest.mark.parametrize("name", ["single", "grid", "best"])
def test_a_run_killed_many_times_resumes_to_the_same_bytes(
    options: Options, snapshot: Snapshot, fork_server: Any, tmp_path: Path, name: str
) -> None:
    whole = kind(options, name, out=options().out + "-whole", save_every=100)
    hit = kind(options, name, save_every=1)
    fit(whole)
    root, done = Path(hit.out), 0
    for number in range(10):
        process = start(fork_server, hit, tmp_path / "fit.json")
        strike(process, root, (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM)[number % 3], done)
        done = newest_step(root) or 0
        if done > STEPS - 20:
            break
    fit(dataclasses.replace(hit, save_every=100, resume=True))
    assert snapshot(Path(whole.out)) == snapshot(root)


# --- a damaged checkpoint ------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage(root: Path, how: str) -> None:
    """Damage the newest checkpoint, of step 12."""
    if how == "tensors":
        flip(tensors_path(root, 12, 1))
    elif how == "missing":
        tensors_path(root, 12, 0).unlink()
    elif how == "state":
        flip(state_path(root, 12))
    elif how == "cut":
        path = state_path(root, 12)
        path.write_bytes(path.read_bytes()[:-20])
    else:
        best = read_state(root, 12).saes[0].best
        assert best is not None
        assert best.step == 12
        shutil.rmtree(root / read_run(root).saes[0].name / "best-000000012")


@pytest.mark.parametrize("how", ["tensors", "missing", "state", "cut", "best"])
def test_a_run_with_a_damaged_newest_checkpoint_resumes_from_the_one_before(
    options: Options,
    snapshot: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    how: str,
) -> None:
    config = vary(options(keep_last=2, val_every=1, save_best=True), lr=(0.01, 0.02))
    fit(config)
    root = Path(config.out)
    expected = snapshot(root)
    damage(root, how)
    resume = dataclasses.replace(config, resume=True)

    def look(*_: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(saetrain.training.step, "train_step", look)
        with pytest.raises(Killed):
            fit(resume)
    # Files of later steps are removed; the exports are those of step 9.
    assert newest_step(root) == 9
    assert steps_in(root / METRICS)[-1] == steps_in(root / TIMINGS)[-1] + 1 == 9
    state = read_state(root, 9)
    for entry, sae in zip(read_run(root).saes, state.saes, strict=True):
        assert digest_file(root / entry.name / "sae.safetensors") == sae.export
        assert sae.best is not None
        bests = {int(path.name[5:]) for path in (root / entry.name).glob("best-*")}
        assert max(bests) == sae.best.step <= 9
    assert {sae.step for sae in evaluate(root).saes} == {9}
    (root / "eval.json").unlink()
    assert "checkpoint is damaged; resuming from step 9" in capsys.readouterr().err
    fit(resume)  # the damaged checkpoint has been removed
    assert "damaged" not in capsys.readouterr().err
    found = snapshot(root)
    assert {name for name in expected if "000000006" in name} == set()
    assert expected == found


def test_a_fallback_is_in_the_summary_and_fails_without_an_older_checkpoint(
    options: Options,
) -> None:
    config = options(resume=True)
    fit(config)
    flip(tensors_path(Path(config.out), 12, 0))
    with pytest.raises(FormatError, match=r"no other checkpoint is whole \(--keep-last 2"):
        fit(config)
    config = options(resume=True, keep_last=2, out=options().out + "-two")
    fit(config)
    flip(tensors_path(Path(config.out), 12, 0))
    summary = fit(config)
    assert summary.new_steps == 3
    (warning,) = summary.warnings
    assert "00000.safetensors is not what its checkpoint wrote" in warning
    assert "resuming from step 9" in warning


def test_a_run_with_follow_falls_back_to_an_earlier_segment(
    options: Options, snapshot: Snapshot
) -> None:
    config = options(follow=True, segment_shards=2, epochs=2, save_every=1, keep_last=99)
    steps = fit(config).steps
    root = Path(config.out)
    expected = snapshot(root)
    for back in range(1, steps, 5):
        for step in range(steps - back + 1, steps + 1):
            flip(tensors_path(root, step, 0))
        assert fit(dataclasses.replace(config, resume=True)).new_steps == back
        assert snapshot(root) == expected


# --- which checkpoints stay ----------------------------------------------------------------------


def checkpoints(root: Path) -> list[int]:
    return sorted(int(path.name[11:20]) for path in root.glob("checkpoint-*.json"))


def test_retention_options_keep_checkpoints_and_change_nothing_else(
    options: Options, snapshot: Snapshot
) -> None:
    plain = options(save_every=2)
    fit(plain)
    assert checkpoints(Path(plain.out)) == [12]
    kept = options(save_every=2, keep_last=2, keep_every=5, out=options().out + "-kept")
    fit(kept)
    root = Path(kept.out)
    assert checkpoints(root) == [5, 10, 12]
    expected, found = snapshot(Path(plain.out)), snapshot(root)
    assert {name: found[name] for name in expected} == expected
    fit(dataclasses.replace(kept, keep_last=1, keep_every=None, resume=True))
    assert checkpoints(root) == [12]


def test_a_run_resumes_exactly_from_any_older_checkpoint(
    options: Options, snapshot: Snapshot
) -> None:
    """Also when a later best SAE has replaced the one that the checkpoint names."""
    common = {"keep_every": 3, "val_every": 2, "save_best": True, "optimizer": "adam"}
    config = options(**common)
    fit(config)
    root = Path(config.out)
    expected = snapshot(root)
    for step in (6, 9, 12):
        for path in root.glob(f"checkpoint-{step:09d}.*"):
            path.unlink()
    assert fit(dataclasses.replace(config, resume=True)).new_steps == 9
    assert snapshot(root) == expected
