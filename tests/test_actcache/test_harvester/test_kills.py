"""Harvests that die: of SIGKILL a hundred times, and of a disk that is full."""

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
SECONDS = 240  # until a process that hangs is given up

Options = Callable[..., Any]
Tree = Callable[[Path | str], dict[str, str]]

KILLS = 100


@pytest.mark.soak
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_harvest_killed_a_hundred_times_ends_in_the_bytes_of_one_that_was_not(
    world_size: int, options: Options, prose: list[str], tree: Tree, tmp_path: Path
) -> None:
    text = tmp_path / "prose.jsonl"
    lines = [json.dumps({"text": f"{number} {doc}"}) for number in range(6) for doc in prose]
    text.write_text("\n".join(lines))
    config = options(dataset=str(text), max_tokens=16 * 1000, batch_size=2, shard_size=2)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(dataclasses.asdict(config)))
    script = Path(__file__).with_name("lives.py")
    arguments = [str(file), str(world_size), str(KILLS), str(7 + world_size)]
    done = subprocess.run(
        [sys.executable, str(script), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    shards = [life["shards"] for life in told["lives"]]
    assert len(shards) == KILLS
    assert shards == sorted(shards)
    assert shards[-1] < told["shards"]  # so every life had work before it
    assert len(set(shards)) > KILLS / 4  # and many did some of it
    assert any(life["partial"] for life in told["lives"])  # killed in the middle of a file
    assert tree(config.out) == tree(config.out + "-whole")


FULL_DISK = """
import json, os, pathlib, subprocess, sys

place, *command = sys.argv[1:]
out = pathlib.Path(place, "cache")
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", place], check=True)
running = subprocess.Popen([*command, "--out", out], stderr=subprocess.PIPE, text=True)
while len(list(out.glob("shards/0*.json"))) < 5:
    assert running.poll() is None, running.communicate()
ballast = os.open(os.path.join(place, "ballast"), os.O_CREAT | os.O_WRONLY)
size, step = 0, 1 << 24
while step >= 4096:  # somebody else takes all the room that is left
    try:
        os.posix_fallocate(ballast, size, step)
        size += step
    except OSError:
        step //= 2
told = running.communicate(timeout=240)[1]

def look():
    done = subprocess.run([command[0], "verify", out, "--json"], stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)

found = {"code": running.returncode, "told": told, "full": look()}
found["partial"] = len(list(out.rglob("*.partial-*")))
subprocess.run(["mount", "-o", "remount,size=64m", place], check=True)
again = subprocess.run([*command, "--out", out], capture_output=True, text=True)
found |= {"again": again.returncode, "told again": again.stderr, "room": look()}
subprocess.run(["cp", "-r", out, place + "-saved"], check=True)
print(json.dumps(found))
"""


@functools.cache
def refusal() -> str:
    """Why this machine does not let us mount a tmpfs of our own; empty if it does."""
    if shutil.which("unshare") is None:
        return "there is no unshare"
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/mnt"]
    done = subprocess.run(["unshare", "-Urm", *mount], capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else ""


def test_a_disk_that_fills_in_the_middle_is_told_and_the_same_command_goes_on_with_room(
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
    place = tmp_path / "disk"
    place.mkdir()
    script = ["unshare", "-Urm", sys.executable, "-c", FULL_DISK, str(place)]
    done = subprocess.run(
        [*script, *command], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["code"] == 10, found["told"]
    assert "error: no room to write" in found["told"]
    assert "run the same command again" in found["told"]
    assert "Traceback" not in found["told"]
    assert found["partial"] == 0
    assert (found["full"]["sound"], found["full"]["complete"]) == (True, False)
    assert 5 <= found["full"]["shards"] < 150
    assert found["again"] == 0, found["told again"]
    assert (found["room"]["sound"], found["room"]["complete"]) == (True, True)
    harvest(config)
    assert tree(str(place) + "-saved") == tree(config.out)
