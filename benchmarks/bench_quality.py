"""Held-out FVU of our SAEs against those of sparsify and SAELens, trained on the same rows.

    python benchmarks/bench_quality.py [--work FOLDER] [--expansion 4 --expansion 8] [--smoke]
    python benchmarks/bench_quality.py --kinds [--l0 32 --l0 64] [--epochs 4]

SmolLM2-135M's `layers.9` over real prose, context 256, position 0 dropped, bf16 rows. Ours (through
`saetrain fit` itself), sparsify's `SparseCoder` with Adam in the order of sparsify's own trainer,
and SAELens's TopK in its own trainer take the very same rows in the very same order, with equal
latents, k and steps. Each has its own initialisation, loss and schedule, the scale of rows with
which it trains best, and the best of the same five learning rates by the first seed, which is then
trained at three seeds. Ours is tuned with Muon and rows scaled to a mean square of 1. Beside them,
without any tuning: our defaults.

Products are in bfloat16 on all sides, as sparsify has them on CUDA (--no-bfloat16: in float32). All
are judged alike, on held-out rows in float32: FVU, a ratio of sums around the training rows'
mean; L0; and dead, latents that fire on none of these rows. A seed determines the weights, the
order of rows, and which shards are held out.

--kinds compares the activations instead, at one seed and equal L0, with 8 times the width: each of
ours at its defaults, those without a k with --target-l0, and SAELens's BatchTopK and JumpReLU (the
quadratic penalty with the same target) at --peer-lr. Its goal: L0 within 5% of what was asked for.

The result of each training is a file in FOLDER/results: the same command resumes after a kill, and
two commands with different --expansion may share a folder. Exit status 1 if a goal is missed (FVU
at most 1.00 times the best library's, dead no more than its; our defaults at most 1.02 times); not
with --smoke, whose rows are random.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import real_cache
from report import machine, print_table
from rivals import Contender, Published, Setting, published, sae_lens, sparsify
from synthetic import write_cache

from actcache.cache.reader import Cache
from actcache.stream.activation_stream import ActivationStream
from actcache.stream.order import OrderPlan, make_plan, split_shards
from saetrain.config.fit_config import FitConfig
from saetrain.formats.sparsify import load_sae
from saetrain.launch.run import fit
from saetrain.runs.record import read_run

HOOKPOINT = "layers.9"
K = 32
HELD_OUT = 0.05
RATES = (1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2)
TUNED, DEFAULT = "ours, tuned", "ours, defaults"
PEERS = ("sparsify, Adam", "SAELens TopK")
SIDES = (TUNED, DEFAULT, *PEERS)
OUR_KINDS = ("topk", "batchtopk", "groupmax", "relu", "gated", "jumprelu")
PEER_KINDS = ("SAELens BatchTopK", "SAELens JumpReLU")
WITH_TARGET = ("relu", "gated", "jumprelu")
NEAR = 0.05
"""Relative distance of L0 from what was asked for that meets the goal."""
OUR_CHOICE: dict[str, Any] = {"optimizer": "muon", "input_scale": "rms"}
"""What of our options is tuned for rows like these, besides the learning rate."""
ROWS_AT_ONCE = 1024
BATCHES_FOR_NORM = 16
"""Of the run's first, from which SAELens estimates its scale."""


@dataclass(frozen=True)
class Form:
    """Settings shared by all libraries."""

    work: Path
    hookpoint: str
    k: int
    batch: int
    epochs: int
    seeds: int
    rates: tuple[float, ...]
    bfloat16: bool
    """Whether products of matrices are in bfloat16."""


@dataclass(frozen=True)
class Job:
    """Settings of one training run."""

    side: str
    num_latents: int
    lr: float | None
    """None: the side's default."""
    seed: int
    l0: int | None = None
    """Of a comparison of kinds."""

    def name(self, form: Form) -> str:
        """Says all that decides the result, but for the cache."""
        side = self.side.replace(", ", "-").replace(" ", "-")
        lr = "default" if self.lr is None else f"{self.lr:g}"
        side += "" if self.l0 is None else f"-l0-{self.l0}"
        products = "bfloat16" if form.bfloat16 else "float32"
        return f"{side}-{self.num_latents}-lr{lr}-seed{self.seed}-epochs{form.epochs}-{products}"


@dataclass(frozen=True)
class Figures:
    """An SAE on held-out rows."""

    fvu: float
    l0: float
    dead: float
    """Latents that never fire there, percent."""
    lr: float
    """Learning rate that it was trained at."""


Found = dict[str, list[list[Figures]]]
"""By side: the first seed at every rate, then the best rate at every seed."""


def main() -> int:
    """Train what is not trained yet, print the tables."""
    options = parse()
    form = Form(
        work=options.work,
        hookpoint="layers.0" if options.smoke else HOOKPOINT,
        k=8 if options.smoke else K,
        batch=256 if options.smoke else 2048,
        epochs=options.epochs,
        seeds=options.seeds,
        rates=RATES[:2] if options.smoke else RATES,
        bfloat16=options.bfloat16,
    )
    cache = Cache.open(smoke_cache(form.work) if options.smoke else quality_cache(form.work))
    d_in = cache.manifest.width(form.hookpoint)
    if options.kinds:
        return compare_kinds(cache, form, d_in * options.expansion[-1], options)
    ok, tables = True, []
    for expansion in options.expansion:
        found = train_all(cache, form, d_in * expansion)
        ok &= goals_met(found)
        tables.append((expansion, found))
    tell(cache, form, tables)
    return 0 if ok or options.smoke else 1


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/bench_quality"))
    parser.add_argument("--smoke", action="store_true", help="random rows, small, no goals")
    parser.add_argument("--expansion", type=int, action="append", help="default: 4 and 8")
    parser.add_argument("--kinds", action="store_true", help="all activations at equal L0")
    parser.add_argument("--l0", type=int, action="append", help="with --kinds; default: 32 and 64")
    parser.add_argument("--peer-lr", type=float, default=4e-3, help="SAELens's, with --kinds")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--bfloat16", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    options.expansion = options.expansion or ([2] if options.smoke else [4, 8])
    return options


def quality_cache(work: Path) -> Path:
    """300,032 tokens of real rows."""
    return real_cache(work, [HOOKPOINT], 300_032)


def smoke_cache(work: Path) -> Path:
    """A few random rows."""
    root = work / "smoke-cache"
    if not root.exists():
        write_cache(root, "memmap", 2**13, 32, shards=16)
    return root


def train_all(cache: Cache, form: Form, num_latents: int) -> Found:
    """Train all: each side with the first seed at every rate, then its best rate at every seed."""
    found: Found = {}
    for side in SIDES:
        rates = (None,) if side == DEFAULT else form.rates
        tried = [result(cache, form, Job(side, num_latents, lr, 0)) for lr in rates]
        best = rates[min(range(len(rates)), key=lambda i: tried[i].fvu)]
        jobs = [Job(side, num_latents, best, seed) for seed in range(form.seeds)]
        found[side] = [tried, [result(cache, form, job) for job in jobs]]
    return found


def result(cache: Cache, form: Form, job: Job) -> Figures:
    """Figures of a training, made if they are not there."""
    path = form.work / "results" / f"{job.name(form)}.json"
    if not path.exists():
        began = time.monotonic()
        training, held_out = shards(cache, job.seed)
        sizes = [(shard, cache.receipts[shard].rows) for shard in training]
        plan = make_plan(sizes, cache.manifest.block_rows, form.batch, job.seed)
        train = train_ours if job.side in (TUNED, DEFAULT, *OUR_KINDS) else train_peer
        lr, trained = train(cache, form, job, plan)
        figures = judge(cache, form.hookpoint, training, held_out, trained, lr)
        path.parent.mkdir(exist_ok=True)
        beside = path.with_suffix(".partial")
        beside.write_text(json.dumps(asdict(figures)))
        beside.rename(path)
        print(f"{path.stem}: {figures}, {time.monotonic() - began:.0f} s", file=sys.stderr)
    return Figures(**json.loads(path.read_text()))


def shards(cache: Cache, seed: int) -> tuple[list[int], list[int]]:
    """Training and held-out shards."""
    return split_shards(cache.shards, HELD_OUT, seed)


def train_ours(cache: Cache, form: Form, job: Job, plan: OrderPlan) -> tuple[float, Published]:
    """`saetrain fit`, with nothing but what all sides are given, and what is tuned."""
    out = form.work / "runs" / job.name(form)
    config = FitConfig(
        cache=str(cache.root),
        out=str(out),
        hookpoint=(form.hookpoint,),
        num_latents=job.num_latents,
        batch_size=form.batch,
        epochs=form.epochs,
        val_fraction=HELD_OUT,
        seed=job.seed,
        autocast=form.bfloat16,
        resume=True,
        **our_options(form, job),
    )
    fit(config)
    record = read_run(out)
    assert record.plan == plan  # same rows in the same order as the other libraries
    sae = load_sae(out / form.hookpoint)
    shutil.rmtree(out)
    return record.saes[0].lr, published(sae)


def our_options(form: Form, job: Job) -> dict[str, Any]:
    """What is asked of ours: a kind and its L0, or the rate of what is tuned."""
    if job.side in OUR_KINDS:
        asked = {"target_l0": job.l0} if job.side in WITH_TARGET else {"k": job.l0}
        return {"activation": job.side} | asked
    return {"k": form.k} | ({} if job.side == DEFAULT else OUR_CHOICE | {"lr": job.lr})


def train_peer(cache: Cache, form: Form, job: Job, plan: OrderPlan) -> tuple[float, Published]:
    """Train another library's SAE on the batches of our stream."""
    steps = form.epochs * plan.steps_per_epoch
    setting = Setting(
        cache.manifest.width(form.hookpoint),
        job.num_latents,
        form.k if job.l0 is None else job.l0,
        "adam",
        steps,
        warmup=steps // 20,
        seed=job.seed,
        device=torch.device("cuda" if torch.cuda.is_available() else "cpu"),
        lr=job.lr,
        autocast=form.bfloat16,
    )
    step, finish = contender(cache, form, job.side, setting, plan)
    for number, x in enumerate(islice(batches(cache, form, plan), steps)):
        step(x.to(setting.device), number)
    return setting.rate, finish()


def contender(cache: Cache, form: Form, side: str, setting: Setting, plan: OrderPlan) -> Contender:
    """Build the trainer of another library."""
    if (kind := side.removeprefix("SAELens ")) != side:
        first = list(islice(batches(cache, form, plan), BATCHES_FOR_NORM))
        return sae_lens(setting, first, kind)
    return sparsify(setting)


def batches(cache: Cache, form: Form, plan: OrderPlan) -> Iterator[torch.Tensor]:
    """Rows in the order of a run, endless. Each float32 [N, D]"""
    with ActivationStream(cache, [form.hookpoint], plan) as stream:
        for batch in stream:
            yield batch.activations[form.hookpoint].float()


@torch.no_grad()
def judge(
    cache: Cache,
    hookpoint: str,
    training: list[int],
    held_out: list[int],
    run: Published,
    lr: float,
) -> Figures:
    """Held-out figures of an SAE, from any library."""
    errors, active, rows, fired = [], 0, 0, torch.zeros((), dtype=torch.bool)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for shard in held_out:
        stored = cache.row_dtype.to_torch(cache.read(hookpoint, shard))
        for x in torch.split(stored.to(device).float(), ROWS_AT_ONCE):
            reconstruction, latents = run(x)
            errors.append(float((x - reconstruction).double().pow(2).sum()))
            active += int((latents > 0).sum())
            fired = fired.to(device) | (latents > 0).any(dim=0)
            rows += len(x)
    mean = cache.statistics(hookpoint, training).mean
    denominator = cache.statistics(hookpoint, held_out).squared_error_of(mean)
    dead = 100.0 * float((~fired).double().mean())
    return Figures(float(np.sum(errors)) / denominator, active / rows, dead, lr)


def compare_kinds(cache: Cache, form: Form, num_latents: int, options: argparse.Namespace) -> int:
    """Train every kind at every L0, print a table, and return the exit status."""
    lines, ok = [], True
    targets = options.l0 or ([4, 8] if options.smoke else [32, 64])
    for side in (*OUR_KINDS, *PEER_KINDS):
        lr = options.peer_lr if side in PEER_KINDS else None
        line = [side if side in PEER_KINDS else f"ours, {side}"]
        for l0 in targets:
            found = result(cache, form, Job(side, num_latents, lr, 0, l0))
            line += [f"{found.fvu:.4f}", f"{found.l0:.1f}", f"{found.dead:.1f}"]
            ok &= side not in WITH_TARGET or abs(found.l0 / l0 - 1) <= NEAR
        lines.append(line)
    training, _ = shards(cache, 0)
    rows = sum(cache.receipts[s].rows for s in training)
    steps = form.epochs * (rows // form.batch)
    print(
        f"{cache.manifest.model} {form.hookpoint}, {num_latents:,} latents, {steps} steps of "
        f"{form.batch:,} rows, seed 0; held-out rows\n" + machine("sae-lens")
    )
    header = [f"{name} at L0 {l0}" for l0 in targets for name in ("FVU", "L0", "dead %")]
    print_table(["", *header], lines)
    return 0 if ok or options.smoke else 1


def mean_fvu(found: Found, side: str) -> float:
    """Over the seeds, at the side's best rate."""
    return statistics.fmean(figures.fvu for figures in found[side][1])


def mean_dead(found: Found, side: str) -> float:
    """Likewise, percent."""
    return statistics.fmean(figures.dead for figures in found[side][1])


def best_peer(found: Found) -> str:
    """Return the tuned library with the lowest FVU."""
    return min(PEERS, key=lambda side: mean_fvu(found, side))


def goals_met(found: Found) -> bool:
    """Return whether ours is as good as the best other library, tuned and by default."""
    peer = best_peer(found)
    theirs = mean_fvu(found, peer)
    return (
        mean_fvu(found, TUNED) <= 1.00 * theirs
        and mean_fvu(found, DEFAULT) <= 1.02 * theirs
        and mean_dead(found, TUNED) <= mean_dead(found, peer)
    )


def tell(cache: Cache, form: Form, tables: list[tuple[int, Found]]) -> None:
    """Print what was compared, and the tables."""
    training, held_out = shards(cache, 0)
    rows = sum(cache.receipts[s].rows for s in training)
    steps = form.epochs * (rows // form.batch)
    left = sum(cache.receipts[s].rows for s in held_out)
    products = "bfloat16" if form.bfloat16 else "float32"
    print(
        f"{cache.manifest.model} {form.hookpoint}, {rows:,} training rows x {form.epochs} "
        f"epoch(s), {steps} steps of {form.batch:,} rows, {left:,} held out (seed 0); k {form.k}; "
        f"{form.seeds} seeds; products in {products}; warm-up of a twentieth of the steps\n"
        + machine("eai-sparsify", "sae-lens", "schedulefree")
    )
    for expansion, found in tables:
        tell_width(cache.manifest.width(form.hookpoint) * expansion, expansion, found)


def tell_width(num_latents: int, expansion: int, found: Found) -> None:
    """The tables of one width: rates tried, and what the best of them comes to."""
    print(f"\n{num_latents:,} latents ({expansion}x). Held-out FVU (dead, %) at seed 0:\n")
    rates = [figures.lr for figures in found[TUNED][0]]
    print_table(
        ["", *(f"lr {lr:g}" for lr in rates)],
        [
            [side, *(f"{figures.fvu:.4f} ({figures.dead:.0f})" for figures in found[side][0])]
            for side in (TUNED, *PEERS)
        ],
    )
    print("\nThe best of them, and defaults, over the seeds:\n")
    theirs, lines = mean_fvu(found, best_peer(found)), []
    for side in SIDES:
        every = found[side][1]
        fvus = [figures.fvu for figures in every]
        lines.append(
            [
                side,
                f"{every[0].lr:.3g}",
                f"{statistics.fmean(fvus):.4f}",
                f"{min(fvus):.4f} to {max(fvus):.4f}",
                f"**{statistics.fmean(fvus) / theirs:.3f}**",
                f"{statistics.fmean(figures.l0 for figures in every):.1f}",
                f"{mean_dead(found, side):.1f}",
            ]
        )
    header = ["", "lr", "FVU", "by seed", "over the best peer", "L0", "dead %"]
    print_table(header, lines)


if __name__ == "__main__":
    raise SystemExit(main())
