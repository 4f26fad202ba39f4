"""Dead latents and held-out FVU at the defaults: of this version, of the one before, and of others.

    python benchmarks/bench_dead.py [--work FOLDER] [--expansion 8] [--epochs 1 --epochs 4]
    python benchmarks/bench_dead.py --long       4,500 steps on synthetic rows of width 64
    python benchmarks/bench_dead.py --rates 512  rates around the default, at batch size 512

Without any tuning: SAEs with `fit --defaults 1` and `--defaults 2`, the latter with Adam and with
Muon, on the rows, in the order and by the measures of bench_quality.py; beside them sparsify's
`SparseCoder` with Adam at the best of three learning rates. Dead: fires on no held-out row. A seed
determines the weights, the order of rows, and which shards are held out.

With --rates: our Adam and Muon at the default times 1/4 to 4, one pass for all, first seed.

The result of each training is a file in FOLDER/dead: the same command resumes after a kill. Exit
status 1 if a goal is missed (`--defaults 2`: dead no more than 5% at 8x, FVU no more than 1.005
times that of `--defaults 1`; at 16x no worse than sparsify in FVU and dead latents); not with
--smoke, whose rows are random.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bench_quality import (
    HELD_OUT,
    HOOKPOINT,
    Figures,
    Form,
    Job,
    K,
    judge,
    quality_cache,
    shards,
    smoke_cache,
    train_peer,
)
from report import machine, print_table
from rivals import published
from synthetic import HOOKPOINT as SYNTHETIC
from synthetic import sparse_rows, write_rows

from actcache.cache.reader import Cache
from actcache.stream.order import make_plan
from saetrain.config.fit_config import FitConfig
from saetrain.config.sae import SaeOptions
from saetrain.formats.sparsify import load_sae
from saetrain.launch.run import fit
from saetrain.runs.record import read_run

BEFORE, NOW, MUON, PEER = "--defaults 1", "--defaults 2", "--defaults 2, muon", "sparsify, Adam"
OURS: dict[str, dict[str, Any]] = {
    BEFORE: {"defaults": 1},
    NOW: {"defaults": 2},
    MUON: {"defaults": 2, "optimizer": "muon"},
}
SIDES = (*OURS, PEER)
PEER_RATES = (4e-3, 8e-3, 1.6e-2)
FACTORS = (1 / 4, 1 / 2, 1.0, 2.0, 4.0)
MOST_DEAD, MOST_FVU = 5.0, 1.005
LONG = {"width": 64, "features": 2048, "rows": 2**14, "shards": 20, "batch": 512, "epochs": 8}
"""About 4,800 steps."""


@dataclass(frozen=True)
class Run:
    """Settings of one training run, with all that decides its result but for the cache."""

    form: Form
    side: str
    num_latents: int
    seed: int
    lr: float | None = None

    @property
    def name(self) -> str:
        """Name of its result."""
        side = self.side.replace("--", "").replace(", ", "-").replace(" ", "-")
        lr = "" if self.lr is None else f"-lr{self.lr:g}"
        sizes = f"{self.form.hookpoint}-{self.num_latents}-batch{self.form.batch}"
        return f"{side}-{sizes}-epochs{self.form.epochs}-seed{self.seed}{lr}"


def main() -> int:
    """Train what is not trained yet, print the tables."""
    options = parse()
    torch.set_num_threads(options.threads)
    cache = open_cache(options)
    if options.rates:
        for batch in options.rates:
            tell_rates(cache, form_of(options, 1, batch), options)
        return 0
    ok = True
    for epochs in options.epochs:
        form = form_of(options, epochs)
        for expansion in options.expansion:
            num_latents = cache.manifest.width(form.hookpoint) * expansion
            found = {side: every_seed(cache, form, side, num_latents) for side in options.side}
            tell(cache, form, num_latents, found)
            ok &= goals_met(found, expansion)
    return 0 if ok or options.smoke or options.long else 1


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/bench_quality"))
    parser.add_argument("--smoke", action="store_true", help="random rows, small, no goals")
    parser.add_argument("--long", action="store_true", help="narrow synthetic rows, many steps")
    parser.add_argument("--rates", type=int, action="append", metavar="BATCH")
    parser.add_argument("--expansion", type=int, action="append", help="default: 8")
    parser.add_argument("--epochs", type=int, action="append", help="default: 1 and 4")
    parser.add_argument("--side", choices=SIDES, action="append", help="default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    options.expansion = options.expansion or [2 if options.smoke else 16 if options.long else 8]
    options.epochs = options.epochs or ([1] if options.smoke else [1, 4])
    if options.long:
        options.epochs = [LONG["epochs"]]
    options.side = options.side or list(SIDES)
    return options


def form_of(options: argparse.Namespace, epochs: int, batch: int | None = None) -> Form:
    """Settings of a table."""
    small, narrow = options.smoke, options.long
    return Form(
        work=options.work,
        hookpoint=SYNTHETIC if small or narrow else HOOKPOINT,
        k=8 if small or narrow else K,
        batch=batch or (256 if small else LONG["batch"] if narrow else 2048),
        epochs=epochs,
        seeds=1 if small else options.seeds,
        rates=PEER_RATES[:1] if small else PEER_RATES,
        bfloat16=False,
    )


def open_cache(options: argparse.Namespace) -> Cache:
    """Rows of the real model, or synthetic ones."""
    if options.smoke:
        return Cache.open(smoke_cache(options.work))
    if not options.long:
        return Cache.open(quality_cache(options.work))
    root = options.work / "narrow-cache"
    if not root.exists():
        rows = sparse_rows(LONG["shards"], LONG["rows"], LONG["width"], LONG["features"])
        write_rows(root, LONG["shards"], ({SYNTHETIC: x} for x in rows))
    return Cache.open(root)


def every_seed(cache: Cache, form: Form, side: str, num_latents: int) -> list[Figures]:
    """Figures of a side at all seeds; of sparsify, at the rate that is best with the first."""
    if side != PEER:
        return [result(cache, Run(form, side, num_latents, seed)) for seed in range(form.seeds)]
    tried = {lr: result(cache, Run(form, side, num_latents, 0, lr)) for lr in form.rates}
    best = min(tried, key=lambda lr: tried[lr].fvu)
    return [result(cache, Run(form, side, num_latents, seed, best)) for seed in range(form.seeds)]


def result(cache: Cache, run: Run) -> Figures:
    """Figures of a training, made if they are not there."""
    path = run.form.work / "dead" / f"{run.name}.json"
    if not path.exists():
        began = time.monotonic()
        training, held_out = shards(cache, run.seed)
        if run.side == PEER:
            sizes = [(shard, cache.receipts[shard].rows) for shard in training]
            plan = make_plan(sizes, cache.manifest.block_rows, run.form.batch, run.seed)
            job = Job(run.side, run.num_latents, run.lr, run.seed)
            lr, trained = train_peer(cache, run.form, job, plan)
            found = judge(cache, run.form.hookpoint, training, held_out, trained, lr)
        else:
            found = train_ours(cache, run, [SaeOptions(**sae_options(run, run.lr))])[0]
        path.parent.mkdir(exist_ok=True)
        beside = path.with_suffix(".partial")
        beside.write_text(json.dumps(asdict(found)))
        beside.rename(path)
        print(f"{run.name}: {found}, {time.monotonic() - began:.0f} s", file=sys.stderr)
    return Figures(**json.loads(path.read_text()))


def sae_options(run: Run, lr: float | None) -> dict[str, Any]:
    """Options of one SAE: nothing but what all sides are given, and the learning rate."""
    of_side = {name: value for name, value in OURS[run.side].items() if name != "defaults"}
    return {"num_latents": run.num_latents, "k": run.form.k, "seed": run.seed, "lr": lr, **of_side}


def train_ours(cache: Cache, run: Run, saes: Sequence[SaeOptions]) -> list[Figures]:
    """`saetrain fit` of SAEs on the same rows, and what they come to."""
    form, out = run.form, run.form.work / "runs" / run.name
    config = FitConfig(
        cache=str(cache.root),
        out=str(out),
        hookpoint=(form.hookpoint,),
        saes=tuple(saes),
        batch_size=form.batch,
        epochs=form.epochs,
        val_fraction=HELD_OUT,
        data_seed=run.seed,
        defaults=OURS[run.side]["defaults"],
        resume=True,
    )
    fit(config)
    training, held_out = shards(cache, run.seed)
    found = []
    for entry in read_run(out).saes:
        sae = published(load_sae(out / entry.name))
        found.append(judge(cache, form.hookpoint, training, held_out, sae, entry.lr))
    shutil.rmtree(out)
    return found


def tell(cache: Cache, form: Form, num_latents: int, found: dict[str, list[Figures]]) -> None:
    """Print what was compared, and the table of one width and length."""
    print(f"\n{describe(cache, form)}; {num_latents:,} latents; {form.seeds} seeds\n")
    header = ["", "lr", "FVU", "by seed", "dead %", "by seed", "L0"]
    print_table(header, [[side, *line(every)] for side, every in found.items()])


def describe(cache: Cache, form: Form) -> str:
    """The rows and steps of a table, and the machine."""
    training, held_out = shards(cache, 0)
    rows = sum(cache.receipts[s].rows for s in training)
    left = sum(cache.receipts[s].rows for s in held_out)
    return (
        machine("eai-sparsify")
        + f"\n{cache.manifest.model} {form.hookpoint}, {rows:,} training rows x {form.epochs} "
        f"epoch(s), {form.epochs * (rows // form.batch):,} steps of {form.batch:,} rows, {left:,} "
        f"held out (seed 0); k {form.k}; in float32"
    )


def line(every: Sequence[Figures]) -> list[str]:
    """Cells of one side's table row."""
    return [
        f"{every[0].lr:.3g}",
        f"**{mean_fvu(every):.4f}**",
        " ".join(f"{figures.fvu:.4f}" for figures in every),
        f"**{mean_dead(every):.1f}**",
        " ".join(f"{figures.dead:.1f}" for figures in every),
        f"{statistics.fmean(figures.l0 for figures in every):.1f}",
    ]


def tell_rates(cache: Cache, form: Form, options: argparse.Namespace) -> None:
    """Train at rates around the default in one pass, and print FVU and dead latents of each."""
    num_latents = cache.manifest.width(form.hookpoint) * options.expansion[0]
    lines = []
    for side in (NOW, MUON):
        default = result(cache, Run(form, side, num_latents, 0))
        cells = []
        for factor in FACTORS:
            lr = None if factor == 1 else default.lr * factor
            figures = default if lr is None else result(cache, Run(form, side, num_latents, 0, lr))
            cells.append(f"{figures.fvu:.4f} ({figures.dead:.0f})")
        lines.append([side, f"{default.lr:.3g}", *cells])
    print(f"\n{describe(cache, form)}; {num_latents:,} latents; FVU (dead, %), by learning rate:\n")
    print_table(["", "default lr", *(f"x {factor:g}" for factor in FACTORS)], lines)


def mean_fvu(every: Sequence[Figures]) -> float:
    """Over the seeds."""
    return statistics.fmean(figures.fvu for figures in every)


def mean_dead(every: Sequence[Figures]) -> float:
    """Over the seeds, percent."""
    return statistics.fmean(figures.dead for figures in every)


def goals_met(found: dict[str, list[Figures]], expansion: int) -> bool:
    """Return whether our defaults are good enough, among the sides that were trained."""
    if NOW not in found:
        return True
    now, ok = found[NOW], True
    if expansion <= 8:
        ok &= mean_dead(now) <= MOST_DEAD
    if BEFORE in found:
        ok &= mean_fvu(now) <= MOST_FVU * mean_fvu(found[BEFORE])
    if expansion > 8 and PEER in found:
        peer = found[PEER]
        ok &= mean_fvu(now) <= mean_fvu(peer) and mean_dead(now) <= mean_dead(peer)
    return ok


if __name__ == "__main__":
    raise SystemExit(main())
