"""Calls of Python, pip and uv by make: scripts in their place log them; nothing is installed."""

import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [line.split("==") for line in lines if not line.startswith("#")]


def stand_in(path, *, refuses="nothing", says=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'#!/bin/sh\necho "{path.name} $*" >>log\n'
        f'case "$*" in *{refuses}*) exit 1;; *--version*) echo "{says}";; esac\n'
    )
    path.chmod(0o755)
    return path


@pytest.fixture
def folder(tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def make(folder, *arguments):
    """Exit code and output of the installation, and the calls of the stand-ins."""
    done = subprocess.run(
        ["make", ".venv/demo.stamp", *arguments],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if not name.startswith("MAKE")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    log = folder / "log"
    return done.returncode, done.stdout, log.read_text() if log.exists() else ""


@needs_make
@pytest.mark.parametrize("there", [False, True])
def test_make_names_the_python_that_is_too_old_or_not_there(folder, there):
    python = folder / "python3.10"
    if there:
        stand_in(python, refuses="version_info", says="Python 3.10.13")
    code, printed, _ = make(folder, f"PYTHON={python}")
    assert code != 0
    assert f"wanted Python 3.11, 3.12 or 3.13 with its venv, got {python}" in printed
    assert ("Python 3.10.13" if there else "not found") in printed
    assert "make PYTHON=/path/to/python3" in printed
    assert not (folder / ".venv").exists()


@needs_make
def test_make_takes_the_cpu_build_where_pip_finds_one(folder):
    stand_in(folder / ".venv/bin/python")
    stand_in(folder / ".venv/bin/uv")
    code, printed, asked = make(folder, "TORCH=cpu")
    assert code == 0, printed
    torch = dict(pins())["torch"]
    assert f"torch {torch}, the CPU build" in printed
    assert f"pip install --no-deps torch=={torch}+cpu" in asked
    assert "uv " not in asked


@needs_make
def test_make_installs_the_cpu_build_by_uv_where_pip_finds_none(folder):
    stand_in(folder / ".venv/bin/python", refuses="+cpu")
    stand_in(folder / ".venv/bin/uv")
    code, printed, asked = make(folder, "TORCH=cpu")
    assert code == 0, printed
    known = dict(pins())
    assert f"pip install uv=={known['uv']}" in asked
    assert re.search(rf"uv pip install .*--torch-backend cpu .*torch=={known['torch']}\n", asked)
    assert "no CPU build" not in printed


@needs_make
def test_make_continues_with_pips_choice_where_neither_finds_a_cpu_build(folder):
    stand_in(folder / ".venv/bin/python", refuses="+cpu")
    stand_in(folder / ".venv/bin/uv", refuses="torch")
    code, printed, asked = make(folder, "TORCH=cpu")
    assert code == 0, printed
    assert "no CPU build of torch is within reach" in printed
    assert "-c constraints.txt -e .[demo]" in asked.splitlines()[-3]


@needs_make
def test_make_leaves_the_choice_to_pip_with_torch_any(folder):
    stand_in(folder / ".venv/bin/python")
    code, printed, asked = make(folder, "TORCH=any")
    assert code == 0, printed
    assert "pip's choice" in printed
    assert "+cpu" not in asked


@needs_make
def test_make_reports_that_pip_failed_and_leaves_no_stamp(folder):
    stand_in(folder / ".venv/bin/python", refuses="demo]")
    code, printed, _ = make(folder, "TORCH=any")
    assert code != 0
    assert "pip failed; its reason stands above" in printed
    assert not (folder / ".venv/demo.stamp").exists()


def test_every_name_is_pinned_once_in_the_order_of_names():
    names = [re.sub(r"[-_.]+", "-", name).lower() for name, _ in pins()]
    assert names == sorted(set(names))


def test_the_classifiers_begin_with_the_python_that_is_required():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = [c.rpartition(" :: ")[2] for c in project["classifiers"] if ":: Python :: 3." in c]
    assert project["requires-python"] == f">={named[0]}"
    assert f"Python {', '.join(named[:-1])} and {named[-1]}." in (
        ROOT / "constraints.txt"
    ).read_text().replace("\n# ", " ")
