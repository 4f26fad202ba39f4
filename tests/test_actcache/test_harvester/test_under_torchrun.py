"""Harvests of several processes, started as torchrun starts them, also through SIGKILL."""

from __future__ import annotations

import dataclasses
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
from actcache.config import HarvestConfig
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
from actcache.config import HarvestConfig
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
    fork_server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without torchrun, rank 0 holds the store."""
    monkeypatch.chdir(tmp_path)
    script, ports = tmp_path / "attempt.py", free_ports(3)
    script.write_text(ATTEMPT)
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    processes = [
        fork_server.start(script, *ports, env=together | {"RANK": str(rank)}) for rank in (0, 1)
    ]
    outputs = [process.communicate()[0].splitlines() for process in processes]
    differ = "CacheMismatchError: the processes of this harvest would make different caches"
    assert outputs[0] == ["equal", differ, "PermissionError: no such right"]
    ended = "CacheMismatchError: rank 0 refused this harvest, so rank 1 ends too"
    assert outputs[1] == ["equal", differ, ended]
    assert (tmp_path / "made").read_text() == "by 0"


BROADCAST = """
import os, sys
from actcache.core.process import World

os.environ["MASTER_PORT"] = sys.argv[1]
world = World.from_environment()
for number in range(2):
    print(world.broadcast(f"{number} of rank {world.rank}"))
    world.check_equal_then_run_on_rank_zero(b"same", lambda: None)
"""


def test_every_rank_receives_the_value_of_rank_zero(fork_server: Any, tmp_path: Path) -> None:
    """Without torchrun, rank 0 holds the store."""
    script, (port,) = tmp_path / "broadcast.py", free_ports(1)
    script.write_text(BROADCAST)
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    ranks = [fork_server.start(script, port, env=together | {"RANK": str(n)}) for n in (0, 1)]
    outputs = [rank.communicate()[0].splitlines() for rank in ranks]
    assert outputs == [["0 of rank 0", "1 of rank 0"]] * 2


@pytest.fixture(scope="module")
def whole(tiny_model: Path, prose_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Options of a harvest of 100 shards, made without interruption by this process."""
    config = HarvestConfig(
        str(tiny_model),
        str(prose_file),
        out=str(tmp_path_factory.mktemp("harvest") / "whole"),
        hookpoint=("layers.0", "layers.1.mlp:in"),
        ctx_len=16,
        max_tokens=16 * 200,
        shard_size=2,
        batch_size=2,
        seed=5,
    )
    harvest(config)
    return config


def command(config: Any, out: Path) -> list[str]:
    """The same harvest as a command line."""
    given = ["actcache", "harvest", config.model, config.dataset, "--out", str(out)]
    for hookpoint in config.hookpoint:
        given += ["--hookpoint", hookpoint]
    for name in ("ctx_len", "max_tokens", "batch_size", "shard_size", "seed"):
        given += ["--" + name.replace("_", "-"), str(getattr(config, name))]
    return given


def finish(ranks: list[Any]) -> None:
    for rank in ranks:
        assert rank.wait() == 0, rank.stderr


def kill_half_way(ranks: list[Any], out: Path, shards: int = 5, delay: float = 0) -> None:
    """Send SIGKILL to the processes of a harvest once a number of shards is published.

    Args:
        ranks: the processes.
        out: folder of their cache.
        shards: number of shards, with those of before the command.
        delay: seconds between the last shard and the signal.
    """
    wait_for_shards(ranks[0], out, shards)
    time.sleep(delay)
    for rank in ranks:
        rank.send_signal(signal.SIGKILL)
    for rank in ranks:
        rank.wait()


def wait_for_shards(process: Any, out: Path, shards: int = 5) -> None:
    deadline = time.monotonic() + SECONDS
    while len(list(out.glob("shards/0*.json"))) < shards:
        assert process.poll() is None, "the command ended before the signal"
        assert time.monotonic() < deadline
        time.sleep(0.002)


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


def test_two_processes_write_one_zarr_array_in_the_bytes_of_one_process(
    whole: Any, tree: Tree, fork_server: Any, tmp_path: Path
) -> None:
    one = dataclasses.replace(whole, out=str(tmp_path / "one"), backend="zarr", compress="zstd")
    harvest(one)
    arguments = [*command(whole, tmp_path / "two"), "--backend", "zarr", "--compress", "zstd"]
    finish(fork_server.start_ranks(2, *arguments))
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


def test_two_processes_harvest_a_model_without_a_head_in_the_bytes_of_one_process(
    whole: Any, tree: Tree, fork_server: Any, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(whole.model, tmp_path / "headless")
    weights = load_file(tmp_path / "headless" / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "headless" / "model.safetensors", {"format": "pt"})
    config = dataclasses.replace(whole, model=str(tmp_path / "headless"), max_tokens=16 * 40)
    one = dataclasses.replace(config, out=str(tmp_path / "one"))
    harvest(one)
    finish(fork_server.start_ranks(2, *command(config, tmp_path / "two")))
    assert tree(tmp_path / "two") == tree(tmp_path / "one")
    (tmp_path / "two" / "shards" / "END.json").unlink()
    (tmp_path / "two" / "shards" / "00003.json").unlink()
    finish(fork_server.start_ranks(2, *command(config, tmp_path / "two")))
    assert tree(tmp_path / "two") == tree(tmp_path / "one")


def test_three_processes_finish_a_harvest_of_one_that_was_killed_three_times(
    whole: Any, tree: Tree, fork_server: Any, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    state = random.Random(2)
    for shards in (1, 20, 40):
        kill_half_way([fork_server.start(*command(whole, out))], out, shards, state.uniform(0, 0.1))
        cache = Cache.open(out)
        assert shards <= len(cache.shards) < 100
        assert not cache.complete
        assert all(len(cache.read("layers.0", shard)) == 30 for shard in cache.shards)
    finish(fork_server.start_ranks(3, *command(whole, out)))
    assert tree(out) == tree(whole.out)


@pytest.mark.parametrize(
    ("world_size", "changes"),
    [
        (2, {"pipeline": "crop", "backend": "zarr"}),
        (3, {"streaming": True, "shuffle_buffer": 20, "max_tokens": 16 * 100}),
    ],
)
def test_processes_tokenise_the_text_together_in_the_bytes_of_one(
    world_size: int,
    changes: dict[str, Any],
    whole: Any,
    tree: Tree,
    fork_server: Any,
    tmp_path: Path,
) -> None:
    one = dataclasses.replace(whole, out=str(tmp_path / "one"), **changes)
    harvest(one)
    arguments = command(one, tmp_path / "two")
    for name, value in changes.items():
        arguments += ["--" + name.replace("_", "-")] + ([str(value)] if value is not True else [])
    finish(fork_server.start_ranks(world_size, *arguments))
    assert tree(tmp_path / "two") == tree(tmp_path / "one")  # and no tokenised text is left


def test_one_process_finishes_a_killed_harvest_of_two(
    whole: Any, tree: Tree, fork_server: Any, tmp_path: Path
) -> None:
    out = tmp_path / "killed"
    kill_half_way(fork_server.start_ranks(2, *command(whole, out)), out)
    assert len(Cache.open(out).shards) < 100
    summary = harvest(dataclasses.replace(whole, out=str(out)))
    assert summary.complete
    assert tree(out) == tree(whole.out)


def test_one_process_finishes_a_killed_extension_by_two(
    whole: Any, tree: Tree, fork_server: Any, tmp_path: Path
) -> None:
    first = dataclasses.replace(whole, max_tokens=16 * 101, out=str(tmp_path / "one"))
    harvest(first)
    out = tmp_path / "two"
    shutil.copytree(first.out, out)
    harvest(dataclasses.replace(first, max_tokens=whole.max_tokens, extend=True))
    more = [*command(whole, out), "--extend"]
    kill_half_way(fork_server.start_ranks(2, *more), out, shards=56)
    assert 56 <= len(Cache.open(out).shards) < 101
    assert not Cache.open(out).complete
    finish([fork_server.start(*more)])
    assert tree(out) == tree(first.out)


def test_an_error_of_rank_zero_ends_all_ranks_with_its_message(
    whole: Any, tree: Tree, fork_server: Any
) -> None:
    before = tree(whole.out)
    ranks = fork_server.start_ranks(2, *command(whole, Path(whole.out)), "--bos", "never")
    zero, one = (rank.communicate()[1] for rank in ranks)
    assert all(rank.returncode for rank in ranks)
    assert "bos_id: 0, not None" in zero
    assert "rank 0 refused this harvest, so rank 1 ends too" in one
    assert "RuntimeError" not in zero + one
    assert tree(whole.out) == before


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")],
)
def test_a_signal_ends_a_harvest_cleanly_with_a_message_on_how_to_resume(
    number: signal.Signals,
    code: int,
    word: str,
    whole: Any,
    tree: Tree,
    fork_server: Any,
    tmp_path: Path,
) -> None:
    out = tmp_path / "stopped"
    process = fork_server.start(*command(whole, out))
    wait_for_shards(process, out)
    process.send_signal(number)
    _, stderr = process.communicate()
    assert process.returncode == code
    assert f"{word}: published files remain" in stderr
    assert "Traceback" not in stderr
    assert 5 <= len(Cache.open(out).shards) < 100
    assert not list(out.rglob("*.partial-*"))
    assert harvest(dataclasses.replace(whole, out=str(out))).complete
    assert tree(out) == tree(whole.out)


@pytest.mark.parametrize(
    "number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.soak)]
)
def test_a_signal_to_torchrun_ends_two_processes_cleanly_with_the_message(
    number: signal.Signals, whole: Any, tree: Tree, tmp_path: Path
) -> None:
    out = tmp_path / "stopped"
    launcher = [str(BIN / "torchrun"), "--no-python", "--standalone", "--nproc_per_node", "2"]
    program, *arguments = command(whole, out)
    process = subprocess.Popen(
        [*launcher, str(BIN / program), *arguments], stderr=subprocess.PIPE, text=True
    )
    wait_for_shards(process, out)
    workers = descendants_of(process.pid)
    process.send_signal(number)  # torchrun forwards it to its workers
    _, stderr = process.communicate(timeout=SECONDS)
    assert process.returncode != 0
    assert stderr.count("published files remain; the same command resumes") == 2
    assert "actcache_cli" not in stderr  # only torchrun prints a traceback
    assert not any(is_alive(pid) for pid in workers)
    assert 5 <= len(Cache.open(out).shards) < 100
    assert not list(out.rglob("*.partial-*"))
    assert harvest(dataclasses.replace(whole, out=str(out))).complete
    assert tree(out) == tree(whole.out)


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.soak)])
def test_of_two_commands_at_once_one_harvests_and_the_other_is_refused(
    processes: int, whole: Any, tree: Tree, fork_server: Any, tmp_path: Path
) -> None:
    out = tmp_path / "shared"
    both = [fork_server.start_ranks(processes, *command(whole, out)) for _ in range(2)]
    ended = [[(rank.communicate()[1], rank.returncode) for rank in ranks] for ranks in both]
    codes = [max(code for _, code in ranks) for ranks in ended]
    assert 0 in codes
    # The slower one may start after the faster has finished, and has nothing to do.
    for code, ranks in zip(codes, ended, strict=True):
        text = "".join(text for text, _ in ranks)
        assert code == 0 or "another harvest is running" in text, text
        assert processes > 1 or code in (0, 12)
    assert tree(out) == tree(whole.out)
