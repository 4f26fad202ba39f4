"""Held-out FVU and dead latents of SAEs of every kind, of the same rows in several units.

    python benchmarks/bench_units.py [--work FOLDER] [--kind topk-adam ...] [--smoke]

The rows of SmolLM2-135M's layers.9 that bench_quality.py uses, in float32, times 0.01, 0.1, 1, 10
and 1,000: a hookpoint for each, so that one run trains on all, on the same rows in the same order,
with equal initial weights. Each kind is trained with nothing given but its activation or optimiser,
with `fit --defaults 1` and `--defaults 2`. Transcoders read rows in one unit and predict them in
another, a hundred times as large; crosscoders read both. "Largest": the largest FVU over the
smallest, less 1, in percent.

The result of each run is a file in FOLDER/units: the same command resumes after a kill. Exit status
1 if the goal is missed (`--defaults 2`: FVU within 1%, dead latents within 2 points); not with
--smoke, whose rows are synthetic.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from bench_quality import HOOKPOINT, K, quality_cache
from report import machine, print_table
from synthetic import sparse_rows, write_rows
from torch import Tensor

from actcache.cache.reader import Cache
from saetrain.config.fit_config import FitConfig
from saetrain.evaluation import evaluate
from saetrain.launch.run import fit

UNITS = (0.01, 0.1, 1.0, 10.0, 1000.0)
UNITS_OF_PAIRS = (0.01, 1.0, 1000.0)
KINDS: dict[str, dict[str, Any]] = {
    "topk-adam": {},
    "topk-signum": {"optimizer": "signum"},
    "topk-muon": {"optimizer": "muon"},
    "batchtopk": {"activation": "batchtopk"},
    "groupmax": {"activation": "groupmax"},
    "relu": {"activation": "relu"},
    "jumprelu": {"activation": "jumprelu"},
    "gated": {"activation": "gated"},
    "transcoder": {"transcode": True},
    "crosscoder": {"crosscode": True},
}
MOST_FVU, MOST_DEAD = 1.0, 2.0

Result = dict[float, tuple[float, float, float]]
"""By unit: FVU, L0 and the share of latents that fire on no held-out row, percent."""


def main() -> int:
    """Train what is not trained yet, print the table."""
    options = parse()
    torch.set_num_threads(options.threads)
    cache = scaled_cache(options)
    ok, lines = True, []
    for kind in options.kind:
        for defaults in (1, 2):
            found = result(cache, options, kind, defaults)
            fvus, dead = ([figures[i] for figures in found.values()] for i in (0, 2))
            spread = 100 * (max(fvus) / min(fvus) - 1)
            apart = max(dead) - min(dead)
            ok &= defaults == 1 or (spread <= MOST_FVU and apart <= MOST_DEAD)
            cells = ["-"] * len(UNITS)
            for unit, (fvu, _, of_dead) in found.items():
                cells[UNITS.index(unit)] = f"{fvu:.4f} ({of_dead:.1f})"
            lines.append([kind, str(defaults), *cells, f"**{spread:.2f}**", f"**{apart:.1f}**"])
    rows = sum(receipt.rows for receipt in cache.receipts.values())
    print(f"{machine()}\n{rows:,} rows; {options.epochs} epochs of batches of {options.batch:,}; ")
    print(f"{options.latents:,} latents. Held-out FVU (dead, %) by unit of the rows:\n")
    header = ["", "defaults", *(f"x {unit:g}" for unit in UNITS), "FVU apart, %", "dead apart"]
    print_table(header, lines)
    return 0 if ok or options.smoke else 1


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/bench_quality"))
    parser.add_argument("--smoke", action="store_true", help="narrow synthetic rows, no goals")
    parser.add_argument("--kind", choices=KINDS, action="append", help="default: all")
    parser.add_argument("--latents", type=int)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    options.latents = options.latents or (128 if options.smoke else 2304)
    options.batch = 256 if options.smoke else 2048
    options.k = 8 if options.smoke else K
    options.kind = options.kind or list(KINDS)
    return options


def scaled_cache(options: argparse.Namespace) -> Cache:
    """The rows in every unit; `:in` names what a transcoder reads."""
    root = options.work / ("smoke-units" if options.smoke else "units")
    if not root.exists():
        if options.smoke:
            shards, rows = 4, sparse_rows(4, 2048, 32, 256)
        else:
            source = Cache.open(quality_cache(options.work))
            shards = len(source.shards)
            rows = whole_shards(source)
        partial = root.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        write_rows(partial, shards, (in_units(x) for x in rows))
        partial.rename(root)
    return Cache.open(root)


def whole_shards(source: Cache) -> Iterator[Tensor]:
    """The rows of each shard, float32; of a short one, its first again up to the length of all."""
    longest = max(receipt.rows for receipt in source.receipts.values())
    for shard in source.shards:
        x = source.row_dtype.to_torch(source.read(HOOKPOINT, shard)).float()
        yield torch.cat([x] * -(-longest // len(x)))[:longest]


def in_units(x: Tensor) -> dict[str, Tensor]:
    """One shard's hookpoints."""
    rows = {rows_in(unit): x * unit for unit in UNITS}
    for unit in UNITS_OF_PAIRS:
        rows |= {f"{pair_in(unit)}:in": x * unit, pair_in(unit): x * unit * 100}
    return rows


def rows_in(unit: float) -> str:
    """Hookpoint of an autoencoder."""
    return f"rows.{UNITS.index(unit)}"


def pair_in(unit: float) -> str:
    """Hookpoint of the larger rows of a transcoder or crosscoder."""
    return f"pair.{UNITS.index(unit)}"


def result(cache: Cache, options: argparse.Namespace, kind: str, defaults: int) -> Result:
    """Figures of all units, made if they are not there."""
    name = f"{kind}-defaults{defaults}-{cache.root.name}-{options.latents}-epochs{options.epochs}"
    path = options.work / "units-results" / f"{name}.json"
    if not path.exists():
        began = time.monotonic()
        found = train_units(cache, options, kind, defaults)
        path.parent.mkdir(exist_ok=True)
        beside = path.with_suffix(".partial")
        beside.write_text(json.dumps(list(found.items())))
        beside.rename(path)
        print(f"{name}: {found}, {time.monotonic() - began:.0f} s", file=sys.stderr)
    return {unit: (fvu, l0, dead) for unit, (fvu, l0, dead) in json.loads(path.read_text())}


def train_units(cache: Cache, options: argparse.Namespace, kind: str, defaults: int) -> Result:
    """One run for all units; a crosscoder, which reads all hookpoints of its run, has one each."""
    if kind == "crosscoder":
        pairs = {unit: (pair_in(unit), f"{pair_in(unit)}:in") for unit in UNITS_OF_PAIRS}
        return {u: train(cache, options, kind, defaults, pairs[u])[0] for u in pairs}
    units, name = (UNITS_OF_PAIRS, pair_in) if kind == "transcoder" else (UNITS, rows_in)
    names = tuple(map(name, units))
    return dict(zip(units, train(cache, options, kind, defaults, names), strict=True))


def train(
    cache: Cache,
    options: argparse.Namespace,
    kind: str,
    defaults: int,
    hookpoints: tuple[str, ...],
) -> list[tuple[float, float, float]]:
    """`saetrain fit` and `saetrain eval` with nothing given but the kind and the sizes."""
    out = options.work / "runs" / f"{kind}-defaults{defaults}-{hookpoints[0]}"
    shutil.rmtree(out, ignore_errors=True)
    fit(
        FitConfig(
            cache=str(cache.root),
            out=str(out),
            hookpoint=hookpoints,
            num_latents=options.latents,
            k=options.k,
            batch_size=options.batch,
            epochs=options.epochs,
            val_fraction=0.25 if options.smoke else 0.05,
            defaults=defaults,
            **KINDS[kind],
        )
    )
    saes = sorted(evaluate(out, device="cpu").saes, key=lambda sae: sae.hookpoint)
    shutil.rmtree(out)
    return [(sae.fvu, sae.l0, 100 - sae.fired_percent) for sae in saes]


if __name__ == "__main__":
    raise SystemExit(main())
