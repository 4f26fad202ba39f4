"""Overhead of the trainer over the bare training step.

    python benchmarks/bench_trainer.py [--smoke] [--pairs 20] [--work FOLDER]

A real `fit` over a cache in memory: the loop, the stream with its thread, copies and
casts, the log with its files. After every block of its steps the same number of bare steps is made
by an SAE of the same kind and size, on rows already in float32: forward, backward, update,
unit norm, and counters. They are timed in turns, so that a slow minute of the machine affects both.
Batches that the stream prefetched during the other block are dropped before a block of the trainer
begins. CPU time of all threads is printed beside wall time. Exit status 1 if
the goal (1.03) is missed; not with --smoke, whose steps are too small.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from report import machine, print_table
from rivals import Setting, ours
from synthetic import write_cache
from torch import Tensor

from actcache.cache.reader import Cache
from actcache.stream.activation_stream import ActivationStream, Batch
from saetrain.config.fit_config import FitConfig
from saetrain.config.sae import OptimizerName
from saetrain.launch.run import fit

GOAL = 1.03
WIDTH, K = 576, 32


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurement."""

    rows: int
    num_latents: int
    batch: int
    block: int
    """Steps of each side in a pair; the log has a line every 10."""


FULL = (Sizes(2**17, 4608, 2048, 10), Sizes(2**17, 18432, 2048, 10))
SMOKE = (Sizes(2**13, 256, 512, 10),)
READY = 16
"""Batches that the bare steps take in turns."""
PREFETCH = 8
"""More batches than a stream holds ready."""


class TurnTaking(ActivationStream):
    """The stream of a fit, which lets bare steps in between the trainer's blocks.

    Attributes:
        bare: one bare step on rows [N, D].
        block: steps of each side.
    """

    bare: Callable[[Tensor], None]
    block: int

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        self._number = 0
        batches = [super(TurnTaking, self).__next__() for _ in range(READY)]
        ready = [rows.float() for batch in batches for rows in batch.activations.values()]
        self._rows = itertools.cycle(ready)
        self._began = Times.now()
        self.pairs: list[tuple[Times, Times]] = []
        """Of a block: the trainer's, the bare steps'."""
        made.append(self)

    def __next__(self) -> Batch:
        """The next batch, for the trainer."""
        if self._number % self.block == 0:
            trainer = self._began.until_now()
            began = Times.now()
            for _ in range(self.block):
                type(self).bare(next(self._rows))
            if self._number:
                self.pairs.append((trainer, began.until_now()))
            for _ in range(PREFETCH):
                super().__next__()
            self._began = Times.now()
        self._number += 1
        return super().__next__()


made: list[TurnTaking] = []


@dataclass(frozen=True)
class Times:
    """Seconds of the clock and of the processor."""

    clock: float
    processor: float

    @staticmethod
    def now() -> Times:
        """Since something."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return Times(time.perf_counter(), time.process_time())

    def until_now(self) -> Times:
        """Since this was now."""
        now = Times.now()
        return Times(now.clock - self.clock, now.processor - self.processor)


def main() -> int:
    """Measure every size and optimiser, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--smoke", action="store_true", help="small sizes, no goal")
    parser.add_argument("--pairs", type=int, default=20, help="interleaved blocks of each side")
    parser.add_argument("--work", type=Path, help="folder for the cache and the runs")
    options = parser.parse_args()
    lines, met = [], True
    optimizers: tuple[OptimizerName, ...] = ("signum", "adam")
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        for sizes in SMOKE if options.smoke else FULL:
            cache = Path(folder) / f"cache-{sizes.num_latents}"
            write_cache(cache, "memmap", sizes.rows, WIDTH, shards=16)
            for optimizer in optimizers:
                run = Path(folder) / f"run-{sizes.num_latents}-{optimizer}"
                pairs = measure(cache, run, sizes, optimizer, options.pairs)
                clock = [trainer.clock / bare.clock for trainer, bare in pairs]
                processor = [trainer.processor / bare.processor for trainer, bare in pairs]
                low, middle, high = statistics.quantiles(clock, n=4)
                bare_ms = statistics.median(bare.clock for _, bare in pairs) / sizes.block * 1e3
                met &= middle <= GOAL
                lines.append(
                    [
                        f"({sizes.batch}, {WIDTH}, {sizes.num_latents}, {K})",
                        optimizer,
                        f"{bare_ms:.1f}",
                        f"**{middle:.3f}**",
                        f"{low:.3f} to {high:.3f}",
                        f"{statistics.median(processor):.3f}",
                    ]
                )
    print(f"blocks of {sizes.block} steps, {options.pairs} pairs; verify first-read, warm cache")
    print(f"{machine()}, {torch.get_num_threads()} threads\n")
    header = ["(N, D, M, K)", "optimiser", "bare step, ms", "trainer / bare", "quartiles"]
    print_table([*header, "processor's time"], lines)
    return 0 if met or options.smoke else 1


def measure(
    cache: Path, run: Path, sizes: Sizes, optimizer: OptimizerName, pairs: int
) -> list[tuple[Times, Times]]:
    """A fit of as many blocks as there are pairs to be, and one to warm up."""
    steps = (pairs + 2) * sizes.block
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    setting = Setting(WIDTH, sizes.num_latents, K, optimizer, steps, 0, 0, device)
    (hookpoint,) = (opened := Cache.open(cache)).hookpoints
    found = opened.statistics(hookpoint)
    step, _ = ours(setting, torch.from_numpy(found.mean).to(device), found.variance)
    config = FitConfig(
        str(cache),
        str(run),
        num_latents=sizes.num_latents,
        k=K,
        optimizer=optimizer,
        batch_size=sizes.batch,
        max_tokens=steps * sizes.batch,
        dead_after=10**9,  # no AuxK, which is no part of the bare step
        save_every=steps,
        device=str(device),
    )
    numbers = iter(range(10**9))
    TurnTaking.bare = staticmethod(lambda x: step(x, next(numbers)))
    TurnTaking.block = sizes.block
    with patch("saetrain.training.loop.ActivationStream", TurnTaking):
        fit(config)
    taken = made.pop().pairs[1 : pairs + 1]  # the first warms up
    print(f"{sizes.num_latents} {optimizer}: {len(taken)} pairs", file=sys.stderr)
    return taken


if __name__ == "__main__":
    raise SystemExit(main())
