"""A harvest that is killed again and again: each life is the true `harvest`, forked after imports.

    python lives.py CONFIG.json WORLD_SIZE KILLS SEED

`test_dying` runs it as a program of its own, so that no thread of the tests is forked along. It
harvests once in peace into OUT-whole, then KILLS times into OUT, each time with a SIGKILL to every
process after a random time; `verify` has to find no damage after any of them. Last, the same
harvest runs to its end. What happened is printed as JSON.
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

# What a life would spend its time on: a fork has them already.
import datasets  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

from actcache.cache.verify import verify
from actcache.config import HarvestConfig
from actcache.errors import EmptyCacheError
from actcache.format.receipts import receipt_path
from actcache.harvester.run import harvest

FULL_VERIFY = 10  # every tenth look is at every byte, the others at sizes and headers


def live(config: HarvestConfig, rank: int, world_size: int, port: int) -> NoReturn:
    """One process of one life. It must never return into the parent's code."""
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


def begin(config: HarvestConfig, world_size: int) -> list[int]:
    """Fork the processes of a life."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    pids = []
    for rank in range(world_size):
        pid = os.fork()
        if pid == 0:
            live(config, rank, world_size, port)
        pids.append(pid)
    return pids


def in_peace(config: HarvestConfig, world_size: int) -> float:
    """A life to its end; returns its seconds."""
    began = time.monotonic()
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in begin(config, world_size)]
    assert not any(codes), codes
    return time.monotonic() - began


def killed(config: HarvestConfig, world_size: int, delays: list[float], quota: int) -> list[int]:
    """A life that ends after `delays[0]` seconds, or before when the shard `quota` is there.

    The other processes die `delays[1:]` seconds later. Returns how each ended.
    """
    pids = begin(config, world_size)
    end = time.monotonic() + delays[0]
    enough = [receipt_path(Path(config.out), quota + rank) for rank in range(world_size)]
    while time.monotonic() < end and not any(path.exists() for path in enough):
        time.sleep(0.001)
    for pid, delay in zip(pids, [0.0, *delays[1:]], strict=True):
        time.sleep(delay)
        os.kill(pid, signal.SIGKILL)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def main(path: str, world_size: int, kills: int, seed: int) -> None:
    """Lives, one after another."""
    given = json.loads(Path(path).read_text())
    tuples = {name: tuple(value) for name, value in given.items() if isinstance(value, list)}
    config = HarvestConfig(**(given | tuples))
    root, state = Path(config.out), random.Random(seed)
    peaceful = dataclasses.replace(config, out=config.out + "-whole")
    whole = in_peace(peaceful, 1)
    shards = verify(peaceful.out, threads=1).shards
    loading = in_peace(peaceful, world_size)  # it finds nothing left to do
    # Some lives end while they load, some at work, some at their quota.
    length = 2 * loading + 10 * (whole - loading) / kills / world_size
    lives = []
    for number in range(kills):
        delays = [
            state.uniform(0, length),
            *(state.uniform(0, 0.02) for _ in range(world_size - 1)),
        ]
        # No life may come further than this: the harvest must not be done before the last kill.
        codes = killed(config, world_size, delays, (number + 1) * (shards - 10) // kills)
        assert codes[0] == -signal.SIGKILL, f"life {number} ended by itself: {codes}"
        partial = len(list(root.rglob("*.partial-*")))
        try:
            found = verify(root, quick=number % FULL_VERIFY != 0, threads=1)
        except EmptyCacheError:  # killed before there was a manifest
            lives.append({"shards": 0, "partial": partial})
            continue
        assert found.is_sound, f"life {number}: {found.damages}"
        lives.append({"shards": found.shards, "partial": partial})
    last = in_peace(config, world_size)
    told = {"shards": shards, "whole": whole, "loading": loading, "last": last, "lives": lives}
    print(json.dumps(told))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
