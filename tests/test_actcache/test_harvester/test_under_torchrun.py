"""Harvests of several processes under torchrun with gloo, also through SIGKILL."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from actcache.cache.reader import Cache
from actcache.core.process import World
from actcache.errors import ConfigError
from actcache.harvester.run import harvest

BIN = Path(sys.executable).parent
SECONDS = 240  # timeout of a process that hangs

Tree = Callable[[Path | str], dict[str, str]]


def test_a_process_started_alone_is_the_only_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert World.from_environment() == World(0, 1)
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    assert World.from_environment() == World(3, 8)


@pytest.mark.parametrize(("rank", "world_size"), [("0", "2"), ("2", "2"), ("x", "1"), ("", "2")])
def test_incomplete_environment_variables_are_refused(
    rank: str, world_size: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world_size)
    with pytest.raises(ConfigError, match=r"(?s)rank of this process.*torchrun"):
        World.from_environment()


def test_a_single_process_acts_without_a_process_group() -> None:
    acted: list[str] = []
    World(0, 1).check_equal_then_run_on_rank_zero(b"x", lambda: acted.append("yes"))
    assert acted == ["yes"]


ATTEMPT = """
import os, sys
from actcache.core.process import World

world = World.from_environment()

def attempt(port, value, act):
    os.environ["MASTER_PORT"] = port
    try:
        world.check_equal_then_run_on_rank_zero(value, act)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return "equal"

def write():
    open("made", "a").write(f"by {world.rank}")

def refuse():
    raise PermissionError("no such right")

print(attempt(sys.argv[1], b"same", write))
print(attempt(sys.argv[2], f"rank {world.rank}".encode(), write))
print(attempt(sys.argv[3], b"same", refuse))
"""


def free_ports(count: int) -> list[str]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [str(s.getsockname()[1]) for s in sockets]
    for s in sockets:
        s.close()
    return ports


def test_rank_zero_acts_once_if_all_ranks_are_equal_and_all_ranks_fail_if_not(
    tmp_path: Path,
) -> None:
    ports = free_ports(3)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ATTEMPT, *ports],
            env=os.environ | {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"},
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=SECONDS)[0].splitlines() for process in processes]
    differ = "CacheMismatchError: the processes of this harvest would make different caches"
    assert outputs[0] == ["equal", differ, "PermissionError: no such right"]
    ended = "CacheMismatchError: rank 0 refused this harvest, so rank 1 ends too"
    assert outputs[1] == ["equal", differ, ended]
    assert (tmp_path / "made").read_text() == "by 0"


@pytest.fixture
def whole(options: Callable[..., Any], tmp_path: Path) -> Any:
    """A harvest of 150 shards, made without interruption by this process."""
    config = options(
        out=str(tmp_path / "whole"), max_tokens=16 * 300, shard_size=2, batch_size=2, seed=5
    )
    harvest(config)
    return config


def command(config: Any, out: Path, processes: int | None = None) -> list[str]:
    """The same harvest as a command line."""
    given = [str(BIN / "actcache"), "harvest", config.model, config.dataset, "--out", str(out)]
    for hookpoint in config.hookpoint:
        given += ["--hookpoint", hookpoint]
    for name in ("ctx_len", "max_tokens", "batch_size", "shard_size", "seed"):
        given += ["--" + name.replace("_", "-"), str(getattr(config, name))]
    if processes is None:
        return given
    launcher = [str(BIN / "torchrun"), "--no-python", "--standalone", "--nproc_per_node"]
    return [*launcher, str(processes), *given]


def run(arguments: list[str]) -> None:
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr


def kill_half_way(arguments: list[str], out: Path, shards: int = 5, delay: float = 0) -> None:
    """Start a command and SIGKILL it, with its children, once a number of shards is published.

    Args:
        arguments: the command.
        out: folder of its cache.
        shards: number of shards, with those of before the command.
        delay: seconds between the last shard and the signal.
    """
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + SECONDS
    while len(list(out.glob("shards/0*.json"))) < shards:
        assert process.poll() is None, "the command ended before the signal"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    time.sleep(delay)
    # torchrun's workers are in sessions of their own, and outlive it otherwise.
    workers = descendants_of(process.pid)
    for pid in [process.pid, *workers]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    while any(is_alive(pid) for pid in workers):
        time.sleep(0.01)


def descendants_of(parent: int) -> list[int]:
    """Return the process ids of all descendants of a process."""
    lists = Path(f"/proc/{parent}/task").glob("*/children")
    children = [int(pid) for text in lists for pid in text.read_text().split()]
    return [*children, *(pid for child in children for pid in descendants_of(child))]


def is_alive(pid: int) -> bool:
    """Return whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_two_processes_write_the_same_bytes_as_one(whole: Any, tree: Tree, tmp_path: Path) -> None:
    run(command(whole, tmp_path / "two", processes=2))
    assert tree(tmp_path / "two") == tree(whole.out)


def test_two_processes_write_one_zarr_array(whole: Any, tree: Tree, tmp_path: Path) -> None:
    one = dataclasses.replace(whole, out=str(tmp_path / "one"), backend="zarr", compress="zstd")
    harvest(one)
    arguments = command(whole, tmp_path / "two", processes=2)
    run([*arguments, "--backend", "zarr", "--compress", "zstd"])
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


def test_a_command_killed_five_times_resumes_to_the_same_bytes(
    whole: Any, tree: Tree, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    state = random.Random(2)
    for shards in (1, 20, 40, 60, 80):
        kill_half_way(command(whole, out), out, shards, state.uniform(0, 0.05))
        cache = Cache.open(out)
        assert shards <= len(cache.shards) < 150
        assert not cache.complete
        assert all(len(cache.read("layers.0", shard)) == 30 for shard in cache.shards)
    run(command(whole, out))
    assert tree(out) == tree(whole.out)


def test_three_processes_finish_a_killed_harvest_of_one(
    whole: Any, tree: Tree, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    kill_half_way(command(whole, out), out)
    assert 5 <= len(Cache.open(out).shards) < 150
    run(command(whole, out, processes=3))
    assert tree(out) == tree(whole.out)


def test_one_process_finishes_a_killed_harvest_of_two(
    whole: Any, tree: Tree, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    kill_half_way(command(whole, out, processes=2), out)
    assert len(Cache.open(out).shards) < 150
    summary = harvest(dataclasses.replace(whole, out=str(out)))
    assert summary.complete
    assert tree(out) == tree(whole.out)


def test_one_process_finishes_a_killed_extension_by_two(
    options: Callable[..., Any], tree: Tree, tmp_path: Path
) -> None:
    first = options(max_tokens=16 * 101, shard_size=2, batch_size=2, out=str(tmp_path / "one"))
    more = dataclasses.replace(first, max_tokens=16 * 300)
    harvest(first)
    out = tmp_path / "two"
    shutil.copytree(first.out, out)
    harvest(dataclasses.replace(more, extend=True))
    kill_half_way([*command(more, out, processes=2), "--extend"], out, shards=56)
    assert 56 <= len(Cache.open(out).shards) < 151
    assert not Cache.open(out).complete
    run([*command(more, out), "--extend"])
    assert tree(out) == tree(first.out)


def test_an_error_of_rank_zero_ends_the_command_with_its_message(whole: Any, tree: Tree) -> None:
    before = tree(whole.out)
    arguments = [*command(whole, Path(whole.out), processes=2), "--bos", "never"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode != 0
    assert "bos_id: 0, not None" in done.stderr
    assert "RuntimeError" not in done.stderr
    assert tree(whole.out) == before


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")],
)
def test_a_signal_ends_a_harvest_cleanly_with_a_message_on_how_to_resume(
    number: signal.Signals, code: int, word: str, whole: Any, tree: Tree, tmp_path: Path
) -> None:
    out = tmp_path / "stopped"
    process = subprocess.Popen(
        command(whole, out),
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with SIGINT ignored, which children inherit.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while len(list(out.glob("shards/0*.json"))) < 5:
        assert process.poll() is None, "the command ended before the signal"
        time.sleep(0.002)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=SECONDS)
    assert process.returncode == code
    assert f"{word}: published files remain" in stderr
    assert "Traceback" not in stderr
    assert 5 <= len(Cache.open(out).shards) < 150
    assert not list(out.rglob("*.partial-*"))
    assert harvest(dataclasses.replace(whole, out=str(out))).complete
    assert tree(out) == tree(whole.out)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_torchrun_ends_two_processes_cleanly_with_the_message(
    number: signal.Signals, whole: Any, tree: Tree, tmp_path: Path
) -> None:
    out = tmp_path / "stopped"
    process = subprocess.Popen(
        command(whole, out, processes=2),
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    while len(list(out.glob("shards/0*.json"))) < 5:
        assert process.poll() is None, "the command ended before the signal"
        time.sleep(0.002)
    workers = descendants_of(process.pid)
    process.send_signal(number)  # torchrun forwards it to its workers
    _, stderr = process.communicate(timeout=SECONDS)
    assert process.returncode != 0
    assert stderr.count("published files remain; the same command resumes") == 2
    assert "actcache_cli" not in stderr  # only torchrun prints a traceback
    assert not any(is_alive(pid) for pid in workers)
    assert 5 <= len(Cache.open(out).shards) < 150
    assert not list(out.rglob("*.partial-*"))
    assert harvest(dataclasses.replace(whole, out=str(out))).complete
    assert tree(out) == tree(whole.out)


@pytest.mark.parametrize("processes", [None, 2])
def test_of_two_commands_at_once_one_harvests_and_the_other_is_refused(
    processes: int | None, whole: Any, tree: Tree, tmp_path: Path
) -> None:
    out = tmp_path / "shared"
    both = [
        subprocess.Popen(command(whole, out, processes), stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    texts = [process.communicate(timeout=SECONDS)[1] for process in both]
    codes = [process.returncode for process in both]
    assert 0 in codes
    # The slower one may start after the faster has finished, and has nothing to do.
    for code, text in zip(codes, texts, strict=True):
        refused = 1 if processes else 12  # torchrun swallows exit codes
        assert code == 0 or (code == refused and "another harvest is running" in text)
    assert tree(out) == tree(whole.out)
