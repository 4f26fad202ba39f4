"""Harvests that are killed a hundred times, or that fill a real disk."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BIN = Path(sys.executable).parent
SECONDS = 240  # timeout of a process

Options = Callable[..., Any]
Tree = Callable[[Path | str], dict[str, str]]

KILLS = 100


@pytest.mark.soak
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_harvest_killed_a_hundred_times_ends_in_the_same_bytes(
    world_size: int, options: Options, prose: list[str], tree: Tree, tmp_path: Path
) -> None:
    text = tmp_path / "prose.jsonl"
    lines = [json.dumps({"text": f"{number} {doc}"}) for number in range(6) for doc in prose]
    text.write_text("\n".join(lines))
    config = options(dataset=str(text), max_tokens=16 * 1000, batch_size=2, shard_size=2)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(dataclasses.asdict(config)))
    script = Path(__file__).with_name("repeated_kills.py")
    arguments = [str(file), str(world_size), str(KILLS), str(7 + world_size)]
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    shards = [run["shards"] for run in result["runs"]]
    assert len(shards) == KILLS
    assert shards == sorted(shards)
    assert shards[-1] < result["shards"]  # every run had shards left to write
    assert len(set(shards)) > KILLS / 4  # many runs published shards
    assert any(run["partial"] for run in result["runs"])  # killed while writing a file
    assert tree(config.out) == tree(config.out + "-whole")


FULL_DISK = """
import json, os, pathlib, subprocess, sys

disk, *command = sys.argv[1:]
out = pathlib.Path(disk, "cache")
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", disk], check=True)
running = subprocess.Popen([*command, "--out", out], stderr=subprocess.PIPE, text=True)
while len(list(out.glob("shards/0*.json"))) < 5:
    assert running.poll() is None, running.communicate()
ballast = os.open(os.path.join(disk, "ballast"), os.O_CREAT | os.O_WRONLY)
size, step = 0, 1 << 24
while step >= 4096:  # fill the disk
    try:
        os.posix_fallocate(ballast, size, step)
        size += step
    except OSError:
        step //= 2
stderr = running.communicate(timeout=240)[1]

def verify():
    done = subprocess.run([command[0], "verify", out, "--json"], stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)

found = {"code": running.returncode, "stderr": stderr, "full": verify()}
found["partial"] = len(list(out.rglob("*.partial-*")))
subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
again = subprocess.run([*command, "--out", out], capture_output=True, text=True)
found |= {"again": again.returncode, "stderr again": again.stderr, "room": verify()}
subprocess.run(["cp", "-r", out, disk + "-saved"], check=True)
print(json.dumps(found))
"""


@functools.cache
def refusal() -> str:
    """Return why a tmpfs cannot be mounted in a user namespace here; empty if it can."""
    if shutil.which("unshare") is None:
        return "unshare is not installed"
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/mnt"]
    done = subprocess.run(["unshare", "-Urm", *mount], capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else ""


@pytest.mark.soak
def test_a_harvest_that_filled_the_disk_resumes_once_there_is_space(
    options: Options, tree: Tree, tmp_path: Path
) -> None:
    from actcache.harvester.run import harvest

    if refusal():
        pytest.skip(f"no tmpfs in a user namespace here: {refusal()}")
    config = options(max_tokens=16 * 300, batch_size=2, shard_size=2)
    command = [str(BIN / "actcache"), "harvest", config.model, config.dataset]
    command += ["--hookpoint", config.hookpoint[0], "--hookpoint", config.hookpoint[1]]
    for name in ("ctx_len", "max_tokens", "batch_size", "shard_size"):
        command += ["--" + name.replace("_", "-"), str(getattr(config, name))]
    disk = tmp_path / "disk"
    disk.mkdir()
    script = ["unshare", "-Urm", sys.executable, "-c", FULL_DISK, str(disk)]
    done = subprocess.run(
        [*script, *command], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["code"] == 10, found["stderr"]
    assert "error: no room to write" in found["stderr"]
    assert "run the same command again" in found["stderr"]
    assert "Traceback" not in found["stderr"]
    assert found["partial"] == 0
    assert (found["full"]["sound"], found["full"]["complete"]) == (True, False)
    assert 5 <= found["full"]["shards"] < 150
    assert found["again"] == 0, found["stderr again"]
    assert (found["room"]["sound"], found["room"]["complete"]) == (True, True)
    harvest(config)
    assert tree(str(disk) + "-saved") == tree(config.out)
