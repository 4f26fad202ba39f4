"""`Feed`: the rows of a cache in a fixed order, from which every adapter starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from actcache.cache.reader import Cache
from actcache.core.arguments import COUNT, SEED, SIZE, checked
from actcache.errors import ConfigError, HookpointError
from actcache.stream.activation_stream import ActivationStream
from actcache.stream.order import POOL_ROWS, OrderPlan, make_plan, split_shards
from actcache.stream.verified_reads import Verify


@dataclass(frozen=True, eq=False)
class Feed:
    """Aligned rows of some hookpoints of a cache, in the order of a plan. Reading starts later."""

    cache: Cache
    hookpoints: tuple[str, ...]
    """Hookpoints to read; no others are read."""
    plan: OrderPlan
    epochs: int | None
    """Passes over the rows; None: endless."""
    held_out_shards: tuple[int, ...]
    """Shards that the plan leaves out."""

    @checked(batch_size=SIZE)
    def held_out(self, batch_size: int | None = None) -> Feed:
        """Return a feed of the held-out rows for evaluation: one epoch, in an order of its own.

        As in every feed, fewer than B + L rows are left out of an epoch.

        Args:
            batch_size: rows of a batch; None: that of training, or all rows if they are fewer.

        Raises:
            ConfigError: no rows are held out, or they are fewer than a batch.
        """
        if not self.held_out_shards:
            raise ConfigError(
                f"no rows of {self.cache.root} were held out",
                remedy="open_feed with a val_fraction above 0",
            )
        shards = _with_rows(self.cache, self.held_out_shards)
        size = batch_size or min(self.plan.batch_size, sum(rows for _, rows in shards))
        pool_rows = self.plan.window * self.plan.lanes
        plan = make_plan(shards, self.plan.block_rows, size, self.plan.seed, pool_rows)
        return Feed(self.cache, self.hookpoints, plan, 1, ())

    @checked()
    def stream(
        self,
        *,
        epoch: int = 0,
        step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        text: bool = False,
        verify: Verify = "first-read",
    ) -> ActivationStream:
        """Open the rows as an `ActivationStream`; the arguments are those of the stream."""
        return ActivationStream(
            self.cache,
            self.hookpoints,
            self.plan,
            epoch=epoch,
            step=step,
            epochs=self.epochs,
            rank=rank,
            world_size=world_size,
            text=text,
            verify=verify,
        )


@checked(batch_size=SIZE, seed=SEED, pool_rows=(1, 2**53), epochs=COUNT)
def open_feed(
    cache: str | os.PathLike[str] | Cache,
    hookpoint: str | Sequence[str],
    *,
    batch_size: int = 4096,
    seed: int = 0,
    val_fraction: float = 0.05,
    pool_rows: int = POOL_ROWS,
    epochs: int | None = None,
) -> Feed:
    """Open a feed of the training rows of a cache; its `held_out` has the other rows.

    Batches and split are those of `saetrain fit` with the same options. Pass --pool-rows there too:
    without it, `fit` derives the pool from a budget of bytes.

    Args:
        cache: folder of the cache, or an open `Cache`.
        hookpoint: name of the hookpoint, or several, whose rows are then aligned.
        batch_size: rows of a global batch.
        seed: seed of the order and of the held-out split.
        val_fraction: share of the shards that is held out; 0: none.
        pool_rows: rows held in memory for shuffling; the order depends on it.
        epochs: passes over the rows; None: endless, as other trainers expect.

    Raises:
        EmptyCacheError: there is no cache, or it has too few shards to hold one out.
        HookpointError: the cache does not hold a hookpoint.
        ConfigError: an argument has another type, or a number is out of range.
    """
    opened = cache if isinstance(cache, Cache) else Cache.open(cache)
    opened.require_shards()
    hookpoints = (hookpoint,) if isinstance(hookpoint, str) else tuple(hookpoint)
    if not hookpoints:
        known = " | ".join(opened.hookpoints)
        raise HookpointError("no hookpoint is named", expected=known, got="none")
    for name in hookpoints:
        opened.require_hookpoint(name)
    training, held_out = split_shards(opened.shards, val_fraction, seed)
    shards = _with_rows(opened, training)
    plan = make_plan(shards, opened.manifest.block_rows, batch_size, seed, pool_rows)
    return Feed(opened, hookpoints, plan, epochs, tuple(held_out))


def _with_rows(cache: Cache, shards: Sequence[int]) -> list[tuple[int, int]]:
    return [(shard, cache.receipts[shard].rows) for shard in shards]
