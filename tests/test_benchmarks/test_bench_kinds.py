"""`benchmarks/bench_kinds.py` runs small; its times are not asserted."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "bench_kinds.py"


@pytest.mark.soak
def test_bench_kinds_prints_a_line_for_each_kind_form_and_auxk():
    command = [sys.executable, str(SCRIPT), "--smoke", "--pairs", "3"]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    table = done.stdout.strip().split("\n\n")[-1].splitlines()
    lines = [line for line in table if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]
    assert [cell[1] for cell in cells[:3]] == ["topk", "topk, dead", "Multi-TopK"]
    for form in ("autoencoder", "transcoder", "skip", "crosscoder"):
        kinds = [cell[1] for cell in cells if cell[0] == form]
        assert sum("dead" in kind for kind in kinds) == 8
        assert len([kind for kind in kinds if "," not in kind]) == 8
    references = [cell[1] for cell in cells if "reference" in cell[1]]
    assert references == [f"{name}, reference" for name in ("relu", "jumprelu", "gated")]
    assert all(re.fullmatch(r"\*\*[0-9.]+x\*\*", cell[5]) for cell in cells)
