"""What a few rows of a very large norm do to training, with and without `fit --max-norm-ratio`.

    python benchmarks/bench_sinks.py [--work FOLDER] [--tokens N] [--seeds N] [--smoke]
        [--hookpoint layers.15] [--ratio 0 --ratio 10]

SmolLM2-135M's `layers.4`, `layers.9` and `layers.15` over real prose, context 256, position 0
dropped, bf16 rows. At each hookpoint an SAE is trained alone, at the defaults of `saetrain fit`,
for every ratio from none to 100. All are judged alike, on held-out rows: FVU over all of them; FVU
over those below 10 median norms, whatever the ratio of the training; and dead, latents that fire on
none of the latter. Beside them, the rows left out, and the spread of FVU over the last ten lines of
metrics.jsonl: largest over smallest.

The result of each training is a file in FOLDER/results: the same command resumes after a kill. With
--smoke, rows are random and few, five of them 128 times as long as the others.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from common import real_cache
from report import machine, print_table
from synthetic import write_cache

from actcache.cache.reader import Cache
from actcache.errors import ConfigError
from saetrain.config.fit_config import FitConfig
from saetrain.evaluation import evaluate
from saetrain.launch.run import fit
from saetrain.runs.record import read_run, with_massive_rows
from saetrain.tracking.jsonl import METRICS

HOOKPOINTS = ("layers.4", "layers.9", "layers.15")
RATIOS = (0.0, 5.0, 10.0, 30.0, 100.0)
KEPT = 10.0
"""Ratio below which held-out rows are judged apart, the same for all."""
LINES = 10


@dataclass(frozen=True)
class Figures:
    """One training."""

    left_out: int
    """Training rows that it left out; -1: it was refused, as more than a few."""
    fvu_all: float
    fvu_kept: float
    dead: float
    """Latents that fire on none of the kept held-out rows, percent."""
    spread: float
    """Largest over smallest FVU of the last lines of training."""


def main() -> None:
    """Train what is not trained yet, print the table."""
    options = parse()
    work, seeds = options.work, range(options.seeds)
    hookpoints = ("layers.0",) if options.smoke else options.hookpoint or HOOKPOINTS
    ratios = (0.0, 10.0) if options.smoke else options.ratio or RATIOS
    root = smoke_cache(work) if options.smoke else real_cache(work, HOOKPOINTS, options.tokens)
    small: dict[str, Any] = {"num_latents": 64, "k": 4, "batch_size": 128, "log_every": 4}
    large: dict[str, Any] = {"expansion_factor": 8, "k": 32, "batch_size": 2048, "log_every": 4}
    shared = (small if options.smoke else large) | {"epochs": options.epochs}
    cache = Cache.open(root)
    print(
        f"{cache.manifest.model}, {cache.rows:,} rows, {options.epochs} epoch(s), {options.seeds} "
        f"seeds; kept: rows below {KEPT:g} median norms\n" + machine()
    )
    header = ["hookpoint", "ratio", "left out", "FVU, kept", "FVU, all", "dead %", "spread"]
    rows = []
    for hookpoint in hookpoints:
        for ratio in ratios:
            name = f"{hookpoint}-{ratio:g}-epochs{options.epochs}"
            given = shared | {"hookpoint": (hookpoint,), "max_norm_ratio": ratio}
            found = [result(work, cache, f"{name}-seed{s}", given | {"seed": s}) for s in seeds]
            rows.append([hookpoint, f"{ratio:g}" if ratio else "none", *cells(found)])
    print_table(header, rows)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/bench_sinks"))
    parser.add_argument("--smoke", action="store_true", help="random rows, small")
    parser.add_argument("--hookpoint", action="append", choices=HOOKPOINTS, help="default: all")
    parser.add_argument("--ratio", action="append", type=float, help="0: none; default: all")
    parser.add_argument("--tokens", type=int, default=300_032)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--seeds", type=int, default=1)
    return parser.parse_args()


def smoke_cache(work: Path) -> Path:
    """A few random rows, among them five that are 128 times as long."""
    root = work / "smoke-cache"
    if not root.exists():
        write_cache(root, "memmap", 2**13, 32, shards=16, massive=5)
    return root


def result(work: Path, cache: Cache, name: str, given: dict[str, Any]) -> Figures:
    """Figures of a training, made if they are not there."""
    path = work / "results" / f"{name}.json"
    if not path.exists():
        began, out = time.monotonic(), work / "runs" / name
        try:
            config = FitConfig(cache=str(cache.root), out=str(out), resume=True, **given)
            fit(config)
            figures = judge(out, cache)
            shutil.rmtree(out)
        except ConfigError as error:  # the ratio would leave out more than a few rows
            print(f"{name}: {error}", file=sys.stderr)
            figures = Figures(-1, np.nan, np.nan, np.nan, np.nan)
        path.parent.mkdir(exist_ok=True, parents=True)
        beside = path.with_suffix(".partial")
        beside.write_text(json.dumps(asdict(figures)))
        beside.rename(path)
        print(f"{name}: {figures}, {time.monotonic() - began:.0f} s", file=sys.stderr)
    return Figures(**json.loads(path.read_text()))


def judge(out: Path, cache: Cache) -> Figures:
    """Figures of a finished run."""
    massive = with_massive_rows(read_run(out), cache).massive
    (every,), (kept,) = (evaluate(out, max_norm_ratio=ratio).saes for ratio in (0.0, KEPT))
    lines = [json.loads(line) for line in (out / METRICS).read_text().splitlines()]
    fvus = [next(iter(line["saes"].values()))["fvu"] for line in lines if "saes" in line][-LINES:]
    return Figures(
        left_out=0 if massive is None else massive.training.count,
        fvu_all=every.fvu,
        fvu_kept=kept.fvu,
        dead=100 - kept.fired_percent,
        spread=max(fvus) / min(fvus),
    )


def cells(found: list[Figures]) -> list[str]:
    """Means over the seeds."""
    if found[0].left_out < 0:
        return ["refused", *["-"] * 4]

    def mean(name: str) -> float:
        return statistics.fmean(getattr(figures, name) for figures in found)

    digits = {"fvu_kept": ".4f", "fvu_all": ".4f", "dead": ".1f", "spread": ".2f"}
    return [f"{mean('left_out'):.0f}", *(f"{mean(name):{form}}" for name, form in digits.items())]


if __name__ == "__main__":
    main()
