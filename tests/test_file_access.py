"""Every file of a cache and of a run is opened relative to the descriptor of its folder.

Python's audit events show what is opened, listed, renamed and deleted by its path.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from actcache_cli.programs import actcache_app, saetrain_app

_EVENTS = frozenset(
    [
        "open",
        "os.listdir",
        "os.scandir",
        "os.remove",
        "os.rename",
        "os.mkdir",
        "os.rmdir",
        "os.link",
        "os.symlink",
        "os.truncate",
        "os.utime",
        "os.chmod",
        "shutil.rmtree",
        "shutil.copyfile",
        "shutil.move",
    ]
)
_watched: list[tuple[str, list[str]]] = []


def _hook(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watched or event not in _EVENTS:
        return
    for path in arguments[:2]:
        if isinstance(path, str | os.PathLike):
            absolute = os.path.abspath(path)  # noqa: PTH100 (without following links)
            for root, found in _watched:
                if absolute.startswith(f"{root}{os.sep}"):
                    found.append(f"{event} {absolute}")


@contextmanager
def watched(*roots: Path) -> Iterator[list[str]]:
    """Collect what is opened, listed, renamed or deleted by a path that leads below a folder."""
    if not hasattr(sys, "_actcache_hook"):  # a hook cannot be removed
        sys.addaudithook(_hook)
        sys._actcache_hook = True  # type: ignore[attr-defined]
    found: list[str] = []
    _watched.extend((str(root), found) for root in roots)
    try:
        yield found
    finally:
        _watched.clear()


def test_the_watch_detects_a_file_that_is_opened_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with watched(tmp_path) as found:
        (tmp_path / "x").read_text()
        os.listdir(tmp_path)  # noqa: PTH208
    assert found == [f"open {tmp_path / 'x'}"]


def run(app: Any, *arguments: object) -> str:
    """Run a command in this process."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output
    return result.output


def test_commands_open_nothing_below_a_cache_or_run_by_its_path(
    tiny_model: Path, prose_file: Path, tmp_path: Path
) -> None:
    cache, other, trained = tmp_path / "cache", tmp_path / "zarr", tmp_path / "run"
    harvest = [tiny_model, prose_file, "--ctx-len", 16, "--batch-size", 2, "--shard-size", 8]
    harvest += ["--hookpoint", "layers.1"]
    fit = ["fit", cache, "--out", trained, "--num-latents", 64, "--k", 4, "--batch-size", 32]
    fit += ["--save-every", 3, "--save-best", "--val-every", 3, "--val-rows", 32, "--device", "cpu"]
    with watched(cache, other, trained) as found:
        run(actcache_app(), "harvest", *harvest, "--out", cache, "--max-tokens", 320)
        run(actcache_app(), "harvest", *harvest, "--out", cache, "--max-tokens", 640, "--extend")
        run(actcache_app(), "convert", cache, "--out", other, "--backend", "zarr")
        run(actcache_app(), "inspect", cache, "--verbose", "--sample", 2)
        run(saetrain_app(), *fit, "--max-tokens", 256)
        run(saetrain_app(), *fit, "--max-tokens", 512, "--resume", "--force-config")
        run(saetrain_app(), "eval", trained, "--device", "cpu")
        run(saetrain_app(), "eval", trained, "--device", "cpu", "--best")
        assert not found
    for root in (cache, other):
        for path in (root / "tokens" / "00001.safetensors", root / "shards" / "00003.json"):
            path.write_bytes(path.read_bytes()[:-1] + b"?")
        with watched(root) as found:
            CliRunner().invoke(actcache_app(), ["verify", str(root), "--repair"])
            assert not found
    with watched(cache) as found:
        run(actcache_app(), "harvest", *harvest, "--out", cache, "--max-tokens", 640)
        run(actcache_app(), "verify", cache)
        assert not found


# Links and pipes in place of the files of a cache and a run.

FIT = ["--num-latents", 64, "--k", 4, "--batch-size", 32, "--save-every", 3, "--device", "cpu"]
FIT += ["--hookpoint", "layers.0", "--save-best", "--val-every", 3, "--val-rows", 32]


@pytest.fixture(scope="module")
def sound(make_cache: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a cache, the same cache in zarr arrays, and a run with a best SAE."""
    folder = tmp_path_factory.mktemp("sound")
    make_cache(folder / "cache")
    run(actcache_app(), "convert", folder / "cache", "--out", folder / "zarr", "--backend", "zarr")
    fit = ["fit", folder / "cache", "--out", folder / "run", *FIT]
    run(saetrain_app(), *fit, "--max-tokens", 256)
    run(saetrain_app(), "eval", folder / "run", "--device", "cpu")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """What is in a folder: names, and the bytes of files."""
    found = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in found}


def commands(kind: str, sound: Path, work: Path) -> list[tuple[Any, list[object]]]:
    """The commands that read, continue and repair a cache or a run."""
    cache = sound / "cache"
    if kind == "run":
        fit = ["fit", cache, "--out", work, *FIT, "--max-tokens", 512, "--resume", "--force-config"]
        evaluate = ["eval", work, "--device", "cpu"]
        return [(saetrain_app(), each) for each in (fit, evaluate, [*evaluate, "--best"])]
    backend = "zarr" if kind == "zarr" else "memmap"
    convert = ["convert", cache, "--out", work, "--backend", backend]
    inspect, verify = ["inspect", work, "--sample", 1], ["verify", work]
    every = [inspect, verify, [*verify, "--quick"], convert, [*verify, "--repair"], convert]
    fit = ["fit", work, "--out", work.parent / "new", *FIT, "--max-tokens", 64]
    return [*((actcache_app(), each) for each in every), (saetrain_app(), fit)]


def require_untouched(kind: str, name: str, make: str, sound: Path, place: Path) -> None:
    """Put a link or pipe in place of a file or folder, and run the commands."""
    work, outside = place / "work", place / "outside"
    shutil.copytree(sound / kind, work)
    outside.mkdir()
    path = work / name
    path.rename(outside / "moved")
    if make == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(outside / ("moved" if make == "link" else "nowhere"))
    before, special = contents(outside), path.lstat()
    for app, arguments in commands(kind, sound, work):
        result = CliRunner().invoke(app, [str(argument) for argument in arguments])
        what = f"{make} {name}: {arguments}: {result.output}"
        assert result.exception is None or isinstance(result.exception, SystemExit), what
        assert contents(outside) == before, what
        assert path.lstat().st_ino == special.st_ino, what
    shutil.rmtree(place)


@pytest.mark.parametrize(
    ("kind", "name", "make"),
    [
        ("cache", "tokens/00001.safetensors", "pipe"),
        ("zarr", "activations/layers.0/c/1", "link"),
        ("run", "metrics.jsonl", "link"),
        ("run", "layers.0/sae.safetensors", "pipe"),
    ],
)
def test_a_link_or_pipe_is_neither_followed_nor_replaced(
    kind: str, name: str, make: str, sound: Path, tmp_path: Path
) -> None:
    require_untouched(kind, name, make, sound, tmp_path / "place")


@pytest.mark.soak
@pytest.mark.parametrize("make", ["link", "nowhere", "pipe"])
@pytest.mark.parametrize("kind", ["cache", "zarr", "run"])
def test_no_link_or_pipe_in_place_of_any_file_or_folder_is_followed_or_replaced(
    kind: str, make: str, sound: Path, tmp_path: Path
) -> None:
    names = [str(path.relative_to(sound / kind)) for path in sorted((sound / kind).rglob("*"))]
    assert len(names) > 12
    for name in names:
        require_untouched(kind, name, make, sound, tmp_path / "place")
