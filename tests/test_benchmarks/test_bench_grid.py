"""`benchmarks/bench_grid.py` runs, and counts the bytes of one pass; its times are not asserted."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_grid.py"


@pytest.mark.soak
def test_bench_grid_prints_both_tables(tmp_path):
    command = [sys.executable, str(SCRIPT), "--smoke", "--pairs", "3", "--work", str(tmp_path)]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    read = re.findall(r"^\| (\d) SAEs? +\| \**([0-9.]+)", done.stdout, re.M)
    assert [name for name, _ in read] == ["1", "8"]
    # All of the rows, once, however many SAEs; and headers of files.
    assert all(1.0 <= float(ratio) < 1.1 for _, ratio in read)
    assert re.search(r"^\| clock +\| [0-9.]+ +\| [0-9.]+ +\| \*\*[0-9.]+\*\*", done.stdout, re.M)
    assert "8 SAEs of 256 latents" in done.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.soak
def test_bench_grid_times_plans(tmp_path):
    command = [sys.executable, str(SCRIPT), "--plan", "40", "--work", str(tmp_path)]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert re.findall(r"^\| (\d+) +\| [0-9.]+ +\|$", done.stdout, re.M) == ["4", "40"]
