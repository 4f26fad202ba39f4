"""Kill a harvest with SIGKILL repeatedly; each run forks its processes after the imports.

    python repeated_kills.py CONFIG.json WORLD_SIZE KILLS SEED

`test_kills` runs this as a separate program, because forking with the tests' threads is unsafe. It
harvests once without interruption into OUT-whole, then KILLS times into OUT, each time with a
SIGKILL to every process after a random delay, after which `verify` must find no damage. Last, the
same harvest runs to its end. The result is printed as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import NoReturn

# Imported before forking: each run would spend most of its time on them.
import datasets  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

from actcache.cache.verify import verify
from actcache.config import HarvestConfig
from actcache.errors import EmptyCacheError
from actcache.format.receipts import receipt_path
from actcache.harvester.run import harvest

FULL_VERIFY = 10  # every tenth verification reads every byte, the others sizes and headers


def run_rank(config: HarvestConfig, rank: int, world_size: int, port: int) -> NoReturn:
    """Run `harvest` as one rank and exit, without returning into the parent's code."""
    code = 1
    try:
        if world_size > 1:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(world_size)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        harvest(config)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def fork_ranks(config: HarvestConfig, world_size: int) -> list[int]:
    """Fork the processes of one run and return their ids."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    pids = []
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            run_rank(config, rank, world_size, port)
        pids.append(pid)
    return pids


def run_to_end(config: HarvestConfig, world_size: int) -> float:
    """Run a harvest without a kill and return its duration in seconds."""
    began = time.monotonic()
    codes = [
        os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in fork_ranks(config, world_size)
    ]
    assert not any(codes), codes
    return time.monotonic() - began


def run_killed(
    config: HarvestConfig, world_size: int, delays: list[float], quota: int
) -> list[int]:
    """Kill rank 0 after `delays[0]` seconds, or earlier once shard `quota` is published.

    The other ranks are killed `delays[1:]` seconds later. Returns the exit codes.
    """
    pids = fork_ranks(config, world_size)
    end = time.monotonic() + delays[0]
    enough = [receipt_path(Path(config.out), quota + rank) for rank in range(world_size)]
    while time.monotonic() < end and not any(path.exists() for path in enough):
        time.sleep(0.001)
    for pid, delay in zip(pids, [0.0, *delays[1:]], strict=True):
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def main(path: str, world_size: int, kills: int, seed: int) -> None:
    """Run the kills one after another."""
    given = json.loads(Path(path).read_text())
    tuples = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    config = HarvestConfig(**(given | tuples))
    root, state = Path(config.out), random.Random(seed)
    uninterrupted = dataclasses.replace(config, out=config.out + "-whole")
    whole = run_to_end(uninterrupted, 1)
    shards = verify(uninterrupted.out, threads=1).shards
    loading = run_to_end(uninterrupted, world_size)  # nothing is left to do: measures loading
    # Some runs are killed while loading, some while writing, some at their quota.
    length = 2 * loading + 10 * (whole - loading) / kills / world_size
    runs = []
    for number in range(kills):
        delays = [
            state.uniform(0, length),
            *(state.uniform(0, 0.02) for _ in range(world_size - 1)),
        ]
        # The quota keeps shards for the later runs: the harvest must not end before the last kill.
        codes = run_killed(config, world_size, delays, (number + 1) * (shards - 10) // kills)
        assert codes[0] == -signal.SIGKILL, f"run {number} ended by itself: {codes}"
        partial = len(list(root.rglob("*.partial-*")))
        try:
            found = verify(root, quick=number % FULL_VERIFY != 0, threads=1)
        except EmptyCacheError:  # killed before there was a manifest
            runs.append({"shards": 0, "partial": partial})
            continue
        assert found.is_sound, f"run {number}: {found.damages}"
        runs.append({"shards": found.shards, "partial": partial})
    last = run_to_end(config, world_size)
    result = {"shards": shards, "whole": whole, "loading": loading, "last": last, "runs": runs}
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
