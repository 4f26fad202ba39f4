"""Only plain files of a run are read or deleted; links, pipes and files of others stay."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from actcache.errors import FormatError
from saetrain.config.fit_config import FitConfig
from saetrain.evaluation import evaluate
from saetrain.launch.run import fit
from saetrain.runs.checkpoint import best_folder, remove_other_bests, remove_others, state_path

Options = Callable[..., FitConfig]


def fill(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True)
    for name in names:
        (folder / name).write_text(name)
    return folder


def test_a_best_folder_is_removed_only_if_it_holds_nothing_but_an_sae(tmp_path: Path) -> None:
    sae, home = tmp_path / "layers.0", fill(tmp_path / "home", "cfg.json", "sae.safetensors")
    fill(best_folder(sae, 1), "cfg.json", "sae.safetensors")
    fill(best_folder(sae, 2), "cfg.json")
    fill(best_folder(sae, 3), ".sae.safetensors.partial-x-1")
    kept = fill(best_folder(sae, 4), "cfg.json", "sae.safetensors")
    notes = fill(best_folder(sae, 5), "cfg.json", "notes.txt")
    fill(best_folder(sae, 6) / ".ipynb_checkpoints", "cfg.json")
    linked = fill(best_folder(sae, 7))
    (linked / "cfg.json").symlink_to(home / "cfg.json")
    best_folder(sae, 8).symlink_to(home)
    best_folder(sae, 9).write_text("a file")
    remove_other_bests(sae, {4})
    left = {int(path.name.removeprefix("best-")) for path in sae.iterdir()}
    assert left == {4, 5, 6, 7, 8, 9}
    assert len(list(kept.iterdir())) == len(list(notes.iterdir())) == len(list(home.iterdir())) == 2


def test_bests_behind_a_linked_folder_stay(tmp_path: Path) -> None:
    fill(best_folder(tmp_path / "elsewhere", 1), "cfg.json")
    (tmp_path / "layers.0").symlink_to(tmp_path / "elsewhere")
    remove_other_bests(tmp_path / "layers.0", set())
    assert best_folder(tmp_path / "elsewhere", 1).is_dir()


def test_a_link_with_the_name_of_a_checkpoint_stays(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    state_path(tmp_path, 3).symlink_to(tmp_path / "mine")
    os.mkfifo(state_path(tmp_path, 4))
    state_path(tmp_path, 5).write_text("{}")
    remove_others(tmp_path, 5)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    "name",
    [
        "layers.0",
        "layers.0/cfg.json",
        "layers.0/sae.safetensors",
        "layers.0/best-000000999",
        "metrics.jsonl",
        "checkpoint-000000012.00000.safetensors",
        "checkpoint-000000012.json",
        "run.json",
        "segments.json",
    ],
)
def test_a_link_in_place_of_a_file_of_a_run_is_refused_and_what_it_points_to_stays(
    options: Options, tmp_path: Path, name: str
) -> None:
    config, home = options(resume=True, keep_last=2), fill(tmp_path / "home", "thesis.tex")
    fit(config)
    path = Path(config.out) / name
    if path.exists():
        path.rename(home / "moved")
    path.symlink_to(home / "moved" if (home / "moved").exists() else home)
    before = sorted(home.rglob("*"))
    with pytest.raises(FormatError, match=f"{name} is a.*link|{name} is not a plain file"):
        fit(config)
    with pytest.raises(FormatError, match=f"{name} is a.*link|{name} is not a plain file"):
        evaluate(config.out)
    assert sorted(home.rglob("*")) == before
    assert path.is_symlink()


def test_files_of_other_programs_neither_end_a_run_nor_are_deleted(
    options: Options, tmp_path: Path
) -> None:
    config = options(resume=True, val_every=4, save_best=True, max_tokens=12 * 32)
    root = Path(config.out)
    fill(root / ".ipynb_checkpoints", "run-checkpoint.json")
    (root / ".nfs0001").write_text("")
    fit(dataclasses.replace(config, epochs=1))
    others = [root / "notes.txt", root / "layers.0" / ".nfs0002", root / "layers.0" / "plot.png"]
    for path in others:
        path.write_text("mine")
    fill(root / "layers.0" / ".ipynb_checkpoints", "cfg-checkpoint.json")
    (root / "layers.1" / "link").symlink_to(tmp_path)
    fit(config)
    evaluate(root)
    assert all(path.read_text() == "mine" for path in others)
    assert (root / "layers.1" / "link").is_symlink()
    assert (root / ".nfs0001").exists()
