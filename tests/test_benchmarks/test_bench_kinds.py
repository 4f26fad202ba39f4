"""`benchmarks/bench_kinds.py` runs small; its times are not asserted."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_kinds.py"


@pytest.mark.soak
def test_bench_kinds_prints_a_line_for_each_kind():
    command = [sys.executable, str(SCRIPT), "--smoke", "--pairs", "3"]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    lines = done.stdout.strip().split("\n\n")[-1].splitlines()[2:]
    kinds = [line.strip("| ").split("|")[0].strip() for line in lines]
    assert kinds[:3] == ["topk", "topk, dead", "topk, Multi-TopK"]
    assert kinds[-3:] == [f"{name}, reference" for name in ("relu", "jumprelu", "gated")]
    assert all(re.search(r"\*\*[0-9.]+x\*\* *\|$", line) for line in lines)
