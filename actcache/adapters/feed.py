"""From few arguments to rows in an order: what every adapter starts from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from actcache.cache.reader import Cache
from actcache.errors import ConfigError
from actcache.stream.activation_stream import ActivationStream
from actcache.stream.order import POOL_ROWS, OrderPlan, make_plan, split_shards
from actcache.stream.verified_reads import Verify


@dataclass(frozen=True, eq=False)
class Feed:
    """Rows of some hookpoints of a cache, aligned, in the order of a plan. Nothing is read yet."""

    cache: Cache
    hookpoints: tuple[str, ...]
    """Which to read; nothing else is read."""
    plan: OrderPlan
    epochs: int | None
    """Passes over the rows; None: endless."""
    held_out_shards: tuple[int, ...]
    """Shards that are not among the plan's."""

    def held_out(self, batch_size: int | None = None) -> Feed:
        """The held-out rows, to evaluate on: one pass, in an order of their own.

        As of all feeds, fewer than B + L rows are left out of the pass.

        Args:
            batch_size: rows of a batch; None: as in training, or all rows if they are fewer.

        Raises:
            ConfigError: nothing was held out, or the batch is larger than what was.
        """
        if not self.held_out_shards:
            raise ConfigError(
                f"of {self.cache.root}, no rows were held out",
                remedy="open_feed with a val_fraction above 0",
            )
        shards = _with_rows(self.cache, self.held_out_shards)
        size = batch_size or min(self.plan.batch_size, sum(rows for _, rows in shards))
        pool_rows = self.plan.window * self.plan.lanes
        plan = make_plan(shards, self.plan.block_rows, size, self.plan.seed, pool_rows)
        return Feed(self.cache, self.hookpoints, plan, 1, ())

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
        """The rows as an `ActivationStream`, whose arguments these are."""
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


def open_feed(
    cache: str | Path | Cache,
    hookpoint: str | Sequence[str],
    *,
    batch_size: int = 4096,
    seed: int = 0,
    val_fraction: float = 0.05,
    pool_rows: int = POOL_ROWS,
    epochs: int | None = None,
) -> Feed:
    """The training rows of a cache; `held_out` of what comes back has the others.

    Batches and split are those of `saetrain fit` with the same options, --pool-rows among them:
    otherwise that takes its pool from a budget of bytes.

    Args:
        cache: its folder, or the cache itself.
        hookpoint: which activations, or several, whose rows are then aligned.
        batch_size: rows of a global batch.
        seed: of the order and of the held-out split.
        val_fraction: share of the shards that is held out; 0: none.
        pool_rows: rows held in memory, to be mixed; part of the order.
        epochs: passes over the rows; None: endless, which is what other trainers expect.

    Raises:
        EmptyCacheError: there is no cache, or it has too few shards to hold one out.
        HookpointError: the cache does not hold a hookpoint.
        ConfigError: a number is out of range.
    """
    opened = cache if isinstance(cache, Cache) else Cache.open(cache)
    opened.require_shards()
    hookpoints = (hookpoint,) if isinstance(hookpoint, str) else tuple(hookpoint)
    for name in hookpoints:
        opened.require_hookpoint(name)
    training, held_out = split_shards(opened.shards, val_fraction, seed)
    shards = _with_rows(opened, training)
    plan = make_plan(shards, opened.manifest.block_rows, batch_size, seed, pool_rows)
    return Feed(opened, hookpoints, plan, epochs, tuple(held_out))


def _with_rows(cache: Cache, shards: Sequence[int]) -> list[tuple[int, int]]:
    return [(shard, cache.receipts[shard].rows) for shard in shards]
