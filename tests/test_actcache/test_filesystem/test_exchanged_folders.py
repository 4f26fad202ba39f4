"""A folder that is exchanged for a link between any two system calls leads nowhere outside."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actcache.errors import FormatError
from actcache.filesystem.atomic import digest_file, open_log, remove_partials, write_atomic
from actcache.filesystem.rooted import RootedPath, remove_trees, rooted

CALLS = ("open", "stat", "lstat", "scandir", "listdir", "mkdir", "replace", "unlink", "rmdir")
PARTIAL = ".file.partial-0123456789abcdef"


def append(path: RootedPath) -> None:
    with open_log(path) as file:
        file.write(b"a line")


def overwrite(path: RootedPath) -> None:
    with path.open("wb") as file:
        file.write(b"new")


OPERATIONS: dict[str, Callable[[RootedPath], object]] = {
    "write": lambda path: write_atomic(path, [b"new"]),
    "write a new file": lambda path: write_atomic(path.with_name("new"), [b"new"]),
    "overwrite": overwrite,
    "append": append,
    "delete": lambda path: path.unlink(),
    "move": lambda path: (path.parent.parent / "other").replace(path),
    "move out": lambda path: path.replace(path.parent.parent / "other"),
    "make a folder": lambda path: (path.parent / "inner").mkdir(),
    "delete a folder": lambda path: (path.parent / "empty").rmdir(),
    "delete partial files": lambda path: remove_partials(path.parent.parent),
    "delete trees": lambda path: remove_trees(path.parent.parent, "folder"),
    "read": lambda path: digest_file(path),
}


def fill(folder: Path, content: str) -> None:
    (folder / "empty").mkdir(parents=True)
    for name in ("file", PARTIAL):
        (folder / name).write_text(content)


def contents(folder: Path) -> dict[str, str]:
    paths = sorted(folder.rglob("*"))
    return {str(p.relative_to(folder)): p.read_text() if p.is_file() else "" for p in paths}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_nothing_outside_is_touched(
    operation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exchanged = 0
    for number in itertools.count():
        place = tmp_path / str(number)
        root, folder, outside = place / "root", place / "root" / "folder", place / "outside"
        fill(folder, "ours")
        fill(outside, "precious")
        (root / "other").write_text("other")
        counter = itertools.count()
        with monkeypatch.context() as patch:
            real = {name: getattr(os, name) for name in CALLS}

            def exchange(folder: Path = folder, outside: Path = outside) -> None:
                folder.rename(folder.parent / "away")
                folder.symlink_to(outside)

            for name in CALLS:

                def call(*args: Any, name: str = name, **named: Any) -> Any:
                    if next(counter) == number:  # noqa: B023
                        exchange()
                    return real[name](*args, **named)  # noqa: B023

                patch.setattr(os, name, call)
            try:
                result = OPERATIONS[operation](rooted(root) / "folder" / "file")
            except (FormatError, OSError):
                result = None
            done = next(counter)
        assert contents(outside) == {"empty": "", "file": "precious", PARTIAL: "precious"}
        assert getattr(result, "bytes", 0) != len("precious")  # nothing outside is read
        if done <= number:
            break
        exchanged += 1
    assert exchanged > 2
