"""Does ours learn as well as sparsify's own module on the same rows?

    python benchmarks/bench_quality.py [--work FOLDER] [--epochs 4] [--seeds 3]

SmolLM2-135M's `layers.9` over real prose, context 256, position 0 dropped, bf16 rows. For each
optimiser and seed, sparsify 1.3.3's `SparseCoder` and ours take the very same batches, side by
side, with the same learning rate, width and k. Each is trained as its own library trains it:
sparsify's loss divides by the batch's variance and b_dec begins at the first batch's mean, ours
divides by the cache's and begins at the cache's mean. Both are then judged alike: FVU on held-out
rows, a ratio of sums around the training rows' mean. Exit status 1 if the goal (mean ratio at most
1.005) is missed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
from common import machine, print_table, real_cache
from rivals import Reconstruct, Setting, ours, sparsify

from actcache.order import make_plan, split_shards
from actcache.reader import Cache
from actcache.stream import ActivationStream
from saetrain.config import OptimizerName

HOOKPOINT = "layers.9"
EXPANSION, K, BATCH, WARMUP = 8, 32, 2048, 100
GOAL = 1.005


def main() -> int:
    """Train every pair, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/bench_quality"))
    parser.add_argument("--tokens", type=int, default=300_032)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()

    cache = Cache.open(real_cache(options.work, [HOOKPOINT], options.tokens))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows, ok = [], True
    for optimizer in ("signum", "adam"):
        pairs = []
        for seed in range(options.seeds):
            began = time.monotonic()
            ours, theirs = train_pair(cache, optimizer, seed, options.epochs, device)
            pairs.append((ours, theirs))
            took = f"{time.monotonic() - began:.0f} s"
            print(f"{optimizer} seed {seed}: {ours:.4f} vs {theirs:.4f}, {took}", file=sys.stderr)
        means = [statistics.mean(side) for side in zip(*pairs, strict=True)]
        ratio = means[0] / means[1]
        ok &= ratio <= GOAL
        for seed, (ours, theirs) in enumerate(pairs):
            line = [optimizer, str(seed), f"{ours:.4f}", f"{theirs:.4f}", f"{ours / theirs:.4f}"]
            rows.append(line)
        rows.append(
            [f"{optimizer}, mean", "", f"{means[0]:.4f}", f"{means[1]:.4f}", f"**{ratio:.4f}**"]
        )
    training, held_out = shards(cache, 0)
    count = sum(cache.receipts[s].rows for s in training)
    print(
        f"{cache.manifest.model} {HOOKPOINT}, {count:,} training rows x {options.epochs} epochs, "
        f"{sum(cache.receipts[s].rows for s in held_out):,} held out (seed 0); text: "
        f"pydoc_data.topics and the standard library's docstrings; {EXPANSION}x, k {K}, batch "
        f"{BATCH}; adam warm-up {WARMUP}"
    )
    print(machine("eai-sparsify", "schedulefree") + "\n")
    print_table(["optimiser", "seed", "ours", "sparsify", "ours / sparsify"], rows)
    return 0 if ok else 1


def shards(cache: Cache, seed: int) -> tuple[list[int], list[int]]:
    """Training and held-out shards."""
    return split_shards(cache.shards, 0.05, seed)


def train_pair(
    cache: Cache, optimizer: OptimizerName, seed: int, epochs: int, device: torch.device
) -> tuple[float, float]:
    """Held-out FVU of ours and of sparsify's after the same batches."""
    training, held_out = shards(cache, seed)
    sizes = [(shard, cache.receipts[shard].rows) for shard in training]
    plan = make_plan(sizes, cache.manifest.block_rows, BATCH, seed)
    steps = epochs * plan.steps_per_epoch
    stream = ActivationStream(cache, [HOOKPOINT], plan)
    d_in = cache.manifest.width(HOOKPOINT)
    setting = Setting(d_in, d_in * EXPANSION, K, optimizer, steps, WARMUP, seed, device)
    statistics_ = cache.statistics(HOOKPOINT, training)
    our_step, our_sae = ours(setting, torch.from_numpy(statistics_.mean), statistics_.variance)
    their_step, their_sae = sparsify(setting)
    for step in range(steps):
        x = next(stream).activations[HOOKPOINT].to(device).float()
        our_step(x, step)
        their_step(x, step)
    stream.close()
    denominator = cache.statistics(HOOKPOINT, held_out).squared_error_of(statistics_.mean)
    return (
        held_out_error(cache, held_out, our_sae(), device) / denominator,
        held_out_error(cache, held_out, their_sae(), device) / denominator,
    )


@torch.no_grad()
def held_out_error(
    cache: Cache, held_out: list[int], reconstruct: Reconstruct, device: torch.device
) -> float:
    """Σ‖x - x̂‖² over the held-out rows."""
    errors = []
    for shard in held_out:
        x = cache.codec.to_torch(cache.read(HOOKPOINT, shard)).to(device).float()
        errors.append(float((x - reconstruct(x)).double().pow(2).sum()))
    return float(np.sum(errors))


if __name__ == "__main__":
    raise SystemExit(main())
