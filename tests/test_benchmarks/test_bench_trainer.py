"""`benchmarks/bench_trainer.py` runs; its times are not asserted."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_trainer.py"


@pytest.mark.soak
def test_bench_trainer_prints_a_line_for_each_optimiser(tmp_path):
    command = [sys.executable, str(SCRIPT), "--smoke", "--pairs", "3", "--work", str(tmp_path)]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    lines = re.findall(r"^\| \(512, 576, 256, 32\) \| (\w+) .*\*\*([0-9.]+)\*\*", done.stdout, re.M)
    assert [optimizer for optimizer, _ in lines] == ["signum", "adam"]
    assert done.stderr.count(": 3 pairs") == 2
    assert not list(tmp_path.iterdir())
