"""Cost of each storage dtype: bytes, error, time.

    OMP_NUM_THREADS=1 python benchmarks/bench_dtypes.py [--work FOLDER] [--tokens 16384]

SmolLM2-135M over real prose, in float32 throughout, every position kept. The rows of each
hookpoint are then stored in each dtype, in memory, and read back. Error: FVU against the float32
rows, a ratio of sums around their mean, over all positions and without position 0. Time: from
float32 to stored and back to float32, in turns with a plain copy of the float32 rows.

Letters: N rows, D width.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import real_cache
from numpy.typing import NDArray
from report import machine, print_table

from actcache.cache.reader import Cache
from actcache.storage import ROW_DTYPES, RowDtype, StoredRows

HOOKPOINTS = ["layers.1", "layers.14", "layers.28", "layers.14.mlp"]
TIMED = "layers.14"


def main() -> None:
    """Harvest, then print the table of errors and the table of times."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/bench_dtypes"))
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--batch", type=int, default=4096, help="rows encoded at once")
    parser.add_argument("--repeats", type=int, default=101)
    options = parser.parse_args()
    exact = ["--model-dtype", "float32", "--skip-positions", "0"]
    cache = Cache.open(real_cache(options.work, HOOKPOINTS, options.tokens, exact))
    shards = cache.shards
    position = np.concatenate([cache.tokens(s).row_position for s in shards])  # [N]
    rows = {
        name: np.concatenate([cache.read(name, s).values for s in shards]) for name in HOOKPOINTS
    }
    about = f"SmolLM2-135M, {len(position):,} rows of context 256; {machine()}"
    print(f"FVU against the float32 rows: all positions / without position 0\n{about}\n")
    print_errors(rows, position > 0)
    print(f"\nTimes of {options.batch:,} rows of {TIMED}: median of {options.repeats} (quartiles),")
    print(f"contenders in turns, {torch.get_num_threads()} thread; {machine()}\n")
    print_times(torch.from_numpy(rows[TIMED][: options.batch]), options.repeats)


def print_errors(rows: dict[str, NDArray[np.float32]], kept: NDArray[np.bool_]) -> None:
    """A line for each type."""
    table = []
    for row_dtype in ROW_DTYPES.values():
        line = [row_dtype.name, f"{row_dtype.row_bytes(next(iter(rows.values())).shape[1]):,}"]
        for x in rows.values():
            decoded = row_dtype.to_float32(row_dtype.from_torch(torch.from_numpy(x)))
            line.append(f"{fvu(x, decoded):.1e} / {fvu(x[kept], decoded[kept]):.1e}")
        table.append(line)
    print_table(["type", "bytes a row", *rows], table)


def fvu(x: NDArray[np.float32], decoded: NDArray[np.float32]) -> float:
    """Σ‖x - x̂‖² / Σ‖x - mean‖², in float64."""
    exact = x.astype(np.float64)  # [N, D]
    error = ((exact - decoded) ** 2).sum()
    return float(error / ((exact - exact.mean(axis=0)) ** 2).sum())


def print_times(x: torch.Tensor, repeats: int) -> None:
    """A line for each type, and one for the copy."""
    copy = torch.empty_like(x)
    acts: dict[str, Callable[[], object]] = {"copy": lambda: copy.copy_(x)}
    for name, row_dtype in ROW_DTYPES.items():
        if name != "float32":  # nothing is done
            acts[f"encode {name}"] = partial(row_dtype.from_torch, x)
            acts[f"decode {name}"] = partial(decode, row_dtype, row_dtype.from_torch(x))
    seconds: dict[str, list[float]] = {what: [] for what in acts}
    for _ in range(repeats + 1):
        for what, act in acts.items():
            began = time.perf_counter()
            act()
            seconds[what].append(time.perf_counter() - began)
    base = statistics.median(seconds["copy"][1:])
    width = x.shape[1]
    table = []
    for what, times in seconds.items():
        first, median, third = statistics.quantiles(times[1:], n=4)
        row = x.itemsize * width if what == "copy" else ROW_DTYPES[what.split()[1]].row_bytes(width)
        table.append(
            [
                what,
                f"{1e3 * median:.2f} ({1e3 * first:.2f} to {1e3 * third:.2f})",
                f"{len(x) / median / 1e6:.2f}",
                f"{x.nbytes / median / 1e9:.1f}",
                f"{row * len(x) / median / 1e9:.1f}",
                f"{median / base:.2f}",
            ]
        )
    header = ["what", "ms", "million rows/s", "GB/s float32", "GB/s stored", "times the copy"]
    print_table(header, table)


def decode(row_dtype: RowDtype, stored: StoredRows) -> torch.Tensor:
    """Decode a batch as `fit` does: the rows, then their conversion to float32."""
    return row_dtype.to_torch(stored).float()


if __name__ == "__main__":
    main()
