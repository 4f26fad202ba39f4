"""The way from a call to its work stays short: product files and changes of file."""

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_ways.py"
MOST = {
    "`harvest()` to the first forward pass": (24, 152, 18),
    "`fit()` to `train()`": (30, 190, 17),
    "one TopK step with AuxK": (21, 75, 12),
}
"""Files, changes of file, depth of calls."""


def test_the_ways_through_the_code_stay_short():
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    lines = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    found = {name: tuple(map(int, numbers)) for name, *numbers in lines}
    assert found.keys() == MOST.keys()
    for name, most in MOST.items():
        assert all(got <= at_most for got, at_most in zip(found[name], most, strict=True)), name
