"""The processes of one harvest, as torchrun starts them. They talk once: to agree on a manifest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from actcache.errors import CacheMismatchError, ConfigError


@dataclass(frozen=True)
class World:
    """This process among its siblings."""

    rank: int
    world_size: int

    @classmethod
    def from_environment(cls) -> World:
        """What torchrun says; alone otherwise.

        Raises:
            ConfigError: the environment holds half of what torchrun sets.
        """
        found = {name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE")}
        if found["WORLD_SIZE"] is None:
            return cls(0, 1)
        rank, world_size = (int(n) if n and n.isdecimal() else -1 for n in found.values())
        alone = world_size == 1
        if not 0 <= rank < world_size or not (alone or "MASTER_ADDR" in os.environ):
            raise ConfigError(
                "the environment does not say which process this is",
                expected="RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT, as torchrun sets them",
                got=found,
                remedy="unset WORLD_SIZE to harvest alone, or start through torchrun",
            )
        return cls(rank, world_size)

    def check_equal_then_run_on_rank_zero(self, what: bytes, act: Callable[[], None]) -> None:
        """Check that every process holds the same bytes, then let rank 0 act before all go on.

        Args:
            what: what must be equal everywhere.
            act: done by rank 0 alone; the others wait for it.

        Raises:
            CacheMismatchError: the processes differ, and nothing was done; or rank 0 refused.
            Exception: on rank 0, whatever `act` raised.
        """
        if self.world_size == 1:
            act()
            return
        import torch.distributed as dist

        dist.init_process_group("gloo")
        try:
            digest = hashlib.blake2b(what, digest_size=16).digest()
            ours = torch.tensor(list(digest), dtype=torch.uint8)
            theirs = [torch.empty_like(ours) for _ in range(self.world_size)]
            dist.all_gather(theirs, ours)
            if any(not torch.equal(ours, other) for other in theirs):
                raise CacheMismatchError(
                    "the processes of this harvest would make different caches",
                    expected="equal models, texts and options on every rank",
                    got=f"rank {self.rank} has {digest.hex()}",
                    remedy="do all nodes see the same files and library versions?",
                )
            refusal: Exception | None = None
            if self.rank == 0:
                try:
                    act()
                except Exception as error:  # raised below, once the others know
                    refusal = error
            refused = torch.tensor([refusal is not None])
            dist.broadcast(refused, src=0)
            if refusal is not None:
                raise refusal
            if refused.item():
                raise CacheMismatchError(
                    f"rank 0 refused this harvest, so rank {self.rank} leaves too",
                    remedy="the error of rank 0 says why",
                )
        finally:
            dist.destroy_process_group()
