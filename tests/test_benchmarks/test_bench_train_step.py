"""`benchmarks/bench_train_step.py` runs small, and where nothing is installed but torch."""

import re
import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "benchmarks"


def test_the_benchmark_of_the_step_compares_all_sides_and_prints_its_table_last():
    command = [sys.executable, str(FOLDER / "bench_train_step.py")]
    command += ["--smoke", "--pairs", "3", "--sizes", "1", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "ceilings, measured in this run: product " in done.stdout
    table = done.stdout.strip().split("\n\n")[-1].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert rows[0][:4] == ["(N, D, M, K)", "optimiser", "step", "ms"]
    sides = ["ours", "ours, bfloat16", "dense", "sparsify"]
    assert [row[1:3] for row in rows[2:]] == [[o, s] for o in ("signum", "adam") for s in sides]
    for row in rows[2:]:
        assert float(row[3]) > 0
        assert re.fullmatch(r"\*\*[0-9.]+x\*\*", row[4])
        assert float(row[8]) >= 0
