"""Checks on resume: options, cache and library versions."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import saetrain.training.step
from actcache.core.json_codec import to_json
from actcache.errors import CacheMismatchError, EmptyCacheError, RunError
from saetrain.config.fit_config import FitConfig
from saetrain.evaluation import evaluate
from saetrain.launch.run import fit
from saetrain.runs.record import RUN, read_run

Options = Callable[..., FitConfig]
Snapshot = Callable[[Path], dict[str, bytes]]


class Killed(BaseException):
    """Stands in for a signal: no handler may catch it."""


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


def test_resume_starts_a_run_that_does_not_exist_or_was_killed_at_its_first_file(
    options: Options, snapshot: Snapshot
) -> None:
    one, two = options(out=options().out + "-1"), options(resume=True)
    fit(one)
    Path(two.out).mkdir()
    (Path(two.out) / ".run.json.partial-1").write_text("{")
    fit(two)
    assert only_changed(snapshot(Path(one.out)), snapshot(Path(two.out))) == []


def test_resuming_a_finished_run_does_nothing(options: Options, snapshot: Snapshot) -> None:
    config = options()
    first = fit(config)
    before = snapshot(Path(config.out))
    again = fit(dataclasses.replace(config, resume=True))
    assert (again.steps, again.new_steps, again.rows_per_second) == (12, 0, 0.0)
    assert again.saes == first.saes
    assert only_changed(before, snapshot(Path(config.out))) == []


def test_a_run_resumes_after_it_and_its_cache_were_moved(
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


def test_shards_added_to_the_cache_do_not_change_a_resumed_run(
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


def test_an_existing_run_is_refused_without_resume_and_unchanged(
    options: Options, snapshot: Snapshot
) -> None:
    config = options()
    fit(config)
    before = snapshot(Path(config.out))
    with pytest.raises(RunError, match=r"holds a run already(.|\n)*--resume"):
        fit(config)
    assert only_changed(before, snapshot(Path(config.out))) == []


def test_changed_options_are_refused_by_name(options: Options) -> None:
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
    text = text.replace('"xxh3_128": "', '"xxh3_128": "0', 1)
    receipt.write_bytes(to_json(json.loads(text), sealed=True))
    with pytest.raises(CacheMismatchError, match="have changed since this run began"):
        fit(config)
    receipt.unlink()
    with pytest.raises(CacheMismatchError, match="no longer holds"):
        fit(config)


def test_changed_library_versions_give_warnings_on_resume(options: Options) -> None:
    config = options(resume=True)
    assert fit(config).warnings == ()
    path = Path(config.out) / RUN
    run = json.loads(path.read_text())
    now = run["versions"]["torch"]
    run["versions"]["torch"] = "0.1"
    path.write_bytes(to_json(run, sealed=True))
    assert fit(config).warnings == (f"torch is {now} now; this run was started with 0.1",)


def test_a_resumed_run_records_the_absolute_path_of_its_cache(
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
