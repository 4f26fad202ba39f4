"""Shuffle quality of batches, and its effect on held-out FVU.

    OMP_NUM_THREADS=1 python benchmarks/bench_shuffle.py [--widths 576 768 2048 4096] [--seeds 3]
    OMP_NUM_THREADS=1 python benchmarks/bench_shuffle.py --quality [--work FOLDER] [--seeds 4]

The first counts, in every batch of an epoch over 4M rows in sequences of 512, the pairs of rows
that are of the same sequence, relative to what a uniform shuffle of all rows has on average. Only
row numbers are shuffled: ours are those of the writer's `RowLayout` and of `ActivationStream`
(which reads no hookpoint), SAELens's those of its own `mixing_buffer` over sequences in their
order, as its store returns them. Our shuffle buffers are those of `saetrain fit` by default, 2^19
rows or 4 GiB; SAELens has a buffer of 2^19 rows, and its own default.

The second trains on SmolLM2-135M's rows (see bench_quality.py) for one epoch, from the same start,
in the order of our stream and in perfect shuffles of the same training rows in memory, and compares
held-out FVU. There are two of these for each seed; their difference measures chance. The
default buffer holds all rows, so a buffer of an eighth of them is tried too, and the order of the
text.

Exit status 1 if a goal is missed: 1.25 at defaults; a mean FVU within 0.5%.

Letters: N rows, B rows of a batch, T rows of a sequence.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from bench_quality import HOOKPOINT, K, judge, shards
from common import real_cache, synthetic_manifest
from numpy.typing import NDArray
from report import machine, print_table
from rivals import Setting, ours

from actcache.cache.folder import sequences_per_shard
from actcache.cache.reader import Cache
from actcache.cache.writer import RowLayout
from actcache.config import HarvestConfig, RowOrder
from actcache.format.manifest import Hookpoint, Manifest
from actcache.stream.activation_stream import ActivationStream
from actcache.stream.memory_budget import plan_memory
from actcache.stream.order import POOL_ROWS, OrderPlan, make_plan
from saetrain.config.fit_config import FitConfig

Longs = NDArray[np.int64]
Reader = Callable[[int], Iterator[Longs]]

T = 512
MOST_PAIRS = 1.25
MOST_FVU = 0.005
SAELENS_PROMPTS, SAELENS_BUFFER = 32, 20 * T
"""Its defaults: sequences that come at once, and rows of its buffer (20 contexts)."""

QUALITY_BATCH, EXPANSION = 2048, 2


def main() -> int:
    """Answer one of the two questions."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sequences", type=int, default=8192)
    parser.add_argument("--widths", type=int, nargs="*", default=[576, 768, 2048, 4096])
    parser.add_argument("--batch", type=int, default=FitConfig.batch_size)
    parser.add_argument("--pool", type=int, help="rows; by default fit's own for these rows")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--work", type=Path, default=Path("build/bench_quality"))
    parser.add_argument("--tokens", type=int, default=300_032)
    options = parser.parse_args()
    return measure_quality(options) if options.quality else measure_pairs(options)


def measure_pairs(options: argparse.Namespace) -> int:
    """A line for each order of rows."""
    rows, seeds = options.sequences * T, options.seeds
    table, ok = [], True
    for name, block_rows, pool, read in readers(options):
        ratios = [[relative_pairs(batch, rows) for batch in read(seed)] for seed in range(seeds)]
        means = [statistics.fmean(of_seed) for of_seed in ratios]
        mean = statistics.fmean(means)
        first, _, third = statistics.quantiles([r for of_seed in ratios for r in of_seed], n=4)
        if name.startswith("ours, width"):
            ok = ok and mean <= MOST_PAIRS
        spread = [f"{min(means):.3f} to {max(means):.3f}", f"{first:.2f} to {third:.2f}"]
        table.append([name, block_rows, pool, f"**{mean:.3f}**", *spread])
    print(f"{rows:,} rows in sequences of {T}, batch {options.batch:,}")
    print(machine("numpy", "sae-lens") + "\n")
    header = ["order", "block", "pool", "pairs", f"mean of {seeds} seeds", "half of batches"]
    print_table(header, table)
    return 0 if ok else 1


def readers(options: argparse.Namespace) -> Iterator[tuple[str, str, str, Reader]]:
    """Name, rows of a block and of the pool, and what makes an epoch's batches from a seed."""
    count, batch = options.sequences, options.batch
    yield "uniform shuffle", "", f"{count * T:,}", partial(uniform, count, batch)
    orders: dict[str, RowOrder] = {"ours": "shuffled", "ours, unshuffled shards": "sequence"}
    for name, order in orders.items():
        for width in options.widths:
            manifest = synthetic(count, width, order)
            pool = options.pool or default_pool(manifest, batch)
            shape = f"{manifest.block_rows:,}", f"{pool:,}"
            yield f"{name}, width {width:,}", *shape, partial(streamed, manifest, batch, pool)
    for pool in (options.pool or POOL_ROWS, SAELENS_BUFFER):
        yield "SAELens's mixing buffer", "", f"{pool:,}", partial(saelens, count, batch, pool)
    yield "in sequence", "", "", lambda _: cut(np.arange(count * T) // T, batch)


def relative_pairs(sequences: Longs, rows: int, per_sequence: int = T) -> float:
    """Pairs of rows from one sequence in each batch [B], relative to a uniform shuffle."""
    held = np.bincount(sequences)
    found = int((held * (held - 1) // 2).sum())
    n = len(sequences)
    return found / (n * (n - 1) / 2 * (per_sequence - 1) / (rows - 1))


def cut(rows: Longs, batch: int) -> Iterator[Longs]:
    """Whole batches of a line of rows."""
    for start in range(0, len(rows) - batch + 1, batch):
        yield rows[start : start + batch]


def uniform(count: int, batch: int, seed: int) -> Iterator[Longs]:
    """Yield batches of a uniform shuffle, the reference for all other orders."""
    yield from cut(np.random.RandomState(seed).permutation(count * T) // T, batch)


def synthetic(count: int, width: int, row_order: RowOrder) -> Manifest:
    """A harvest of one hookpoint with all else at its defaults, and T rows a sequence."""
    points = (Hookpoint("layers.0", width),)
    config = HarvestConfig("model", "data", "out", ctx_len=T + 1, max_tokens=count * (T + 1))
    size = sequences_per_shard(config, count, points, "bfloat16")
    return synthetic_manifest(
        points,
        sequences_per_shard=size,
        shards=count // size,
        ctx_len=T + 1,
        row_order=row_order,
    )


def default_pool(manifest: Manifest, batch: int) -> int:
    """Rows in the default shuffle buffer of `fit` for one hookpoint."""
    return plan_memory(None, manifest, [manifest.identity.hookpoints[0].name], batch).pool_rows


def streamed(manifest: Manifest, batch: int, pool: int, seed: int) -> Iterator[Longs]:
    """An epoch of our stream over a cache that is a manifest and nothing else."""
    identity = dataclasses.replace(manifest.identity, seed=seed)
    size, rows = manifest.sequences_per_shard, manifest.shard_rows
    shards = range(manifest.plan.shards or 0)
    kept, outliers = np.ones((size, T), dtype=bool), np.zeros(rows, dtype=bool)
    layouts = [RowLayout.of(identity, shard, kept, outliers) for shard in shards]
    sequence_of: Longs = np.stack(  # [shards, rows]
        [shard * size + layout.sequence.astype(np.int64) for shard, layout in enumerate(layouts)]
    )
    plan = make_plan([(s, rows) for s in shards], manifest.block_rows, batch, seed, pool)
    cache = Cache(Path(), manifest, {}, None)
    with ActivationStream(cache, [], plan, epochs=1) as stream:
        for read in stream:
            yield sequence_of[read.addresses[:, 0], read.addresses[:, 1]]


def saelens(count: int, batch: int, pool: int, seed: int) -> Iterator[Longs]:
    """Its `mixing_buffer` with its default mixture, half old and half new."""
    from sae_lens.training.mixing_buffer import mixing_buffer

    torch.manual_seed(seed)
    size = SAELENS_PROMPTS * T
    sequences = (torch.arange(at, at + size) // T for at in range(0, count * T, size))
    for taken in mixing_buffer(pool, batch, sequences):
        yield taken.numpy()


def measure_quality(options: argparse.Namespace) -> int:
    """A line for each order of rows: pairs, FVU, and that over the two perfect shuffles' mean."""
    cache = Cache.open(real_cache(options.work, [HOOKPOINT], options.tokens))
    fvus: dict[str, list[float]] = {}
    pairs: dict[str, list[float]] = {}
    for seed in range(options.seeds):
        training, held_out = shards(cache, seed)
        memory = Memory(cache, training)
        count = len(memory.rows)
        pool = options.pool or default_pool(cache.manifest, QUALITY_BATCH)
        whole = memory.plan(seed, pool)
        eighth = memory.plan(seed, 2 ** round(np.log2(count / 8)))
        orders = {
            "perfect shuffle": memory.shuffled(seed),
            "another perfect shuffle": memory.shuffled(seed + 1000),
            f"ours, pool {pool:,}": memory.streamed(whole),
            f"ours, pool {eighth.window * eighth.lanes:,}": memory.streamed(eighth),
            "in sequence": memory.in_sequence(),
        }
        for name, order in orders.items():
            batches = list(cut(order, QUALITY_BATCH))[: whole.steps_per_epoch]
            pairs.setdefault(name, []).append(memory.relative_pairs(batches))
            fvu = train(memory, batches, seed, held_out)
            fvus.setdefault(name, []).append(fvu)
            print(f"{name}, seed {seed}: {fvu:.5f}", file=sys.stderr)
    best = (np.array(fvus["perfect shuffle"]) + np.array(fvus["another perfect shuffle"])) / 2
    table, ok = [], True
    for name, of_seeds in fvus.items():
        ratios = np.array(of_seeds) / best
        if name.startswith("ours"):
            ok = ok and abs(ratios.mean() - 1) <= MOST_FVU
        by_seed = " ".join(f"{ratio:.4f}" for ratio in ratios)
        means = [f"{np.mean(pairs[name]):.2f}", f"{np.mean(of_seeds):.4f}"]
        table.append([name, *means, f"**{ratios.mean():.4f}**", by_seed])
    print(
        f"SmolLM2-135M {HOOKPOINT}, {count:,} training rows (seed {seed}), one epoch; "
        f"{EXPANSION}x, k {K}, batch {QUALITY_BATCH:,}, signum, blocks of "
        f"{cache.manifest.block_rows:,} rows"
    )
    print(f"{machine('numpy')}, {torch.get_num_threads()} thread\n")
    print_table(["order", "pairs", "held-out FVU", "over perfect", "by seed"], table)
    return 0 if ok else 1


class Memory:
    """The training rows of a cache, all in memory; an order is of their numbers. N rows."""

    def __init__(self, cache: Cache, training: list[int]) -> None:
        self.cache, self.training = cache, training
        parts = [cache.row_dtype.to_torch(cache.read(HOOKPOINT, shard)) for shard in training]
        words = [cache.tokens(shard) for shard in training]
        self.rows = torch.cat(parts)  # [N, D]
        self.first = dict(zip(training, np.cumsum([0, *map(len, parts[:-1])]), strict=True))
        first = [cache.receipts[shard].first_sequence for shard in training]
        self.sequence: Longs = np.concatenate(  # [N]
            [f + word.row_sequence for f, word in zip(first, words, strict=True)]
        ).astype(np.int64)
        self.position = np.concatenate([w.row_position for w in words])  # [N]

    def plan(self, seed: int, pool: int) -> OrderPlan:
        """Our order of these rows."""
        sizes = [(shard, self.cache.receipts[shard].rows) for shard in self.training]
        return make_plan(sizes, self.cache.manifest.block_rows, QUALITY_BATCH, seed, pool)

    def streamed(self, plan: OrderPlan) -> Longs:
        """The order in which our stream has them."""
        with ActivationStream(self.cache, [], plan, epochs=1) as stream:
            addresses = np.concatenate([batch.addresses for batch in stream])
        rows: Longs = np.array([self.first[shard] for shard in addresses[:, 0]]) + addresses[:, 1]
        return rows

    def shuffled(self, seed: int) -> Longs:
        """A uniform order. [N]"""
        return np.random.RandomState(seed).permutation(len(self.rows)).astype(np.int64)

    def in_sequence(self) -> Longs:
        """The order of the text. [N]"""
        return np.lexsort((self.position, self.sequence)).astype(np.int64)

    def relative_pairs(self, batches: list[Longs]) -> float:
        """Mean over batches, as in the first table."""
        each = self.cache.manifest.identity.rows_per_sequence
        count = len(self.rows)
        return statistics.fmean(relative_pairs(self.sequence[b], count, each) for b in batches)


def train(memory: Memory, batches: list[Longs], seed: int, held_out: list[int]) -> float:
    """Held-out FVU after batches of rows, from a start that is the seed's."""
    cache, device = memory.cache, torch.device("cpu")
    d_in = cache.manifest.width(HOOKPOINT)
    setting = Setting(d_in, d_in * EXPANSION, K, "signum", len(batches), 0, seed, device)
    known = cache.statistics(HOOKPOINT, memory.training)
    step, finish = ours(setting, torch.from_numpy(known.mean), known.variance)
    for number, batch in enumerate(batches):
        step(memory.rows[torch.from_numpy(batch)].float(), number)
    return judge(cache, HOOKPOINT, memory.training, held_out, finish(), setting.rate).fvu


if __name__ == "__main__":
    raise SystemExit(main())
