"""`benchmarks/bench_units.py` trains kinds of SAEs on the same rows in several units."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
KINDS = ["topk-adam", "transcoder", "crosscoder"]


@pytest.mark.soak
def test_bench_units_prints_a_figure_for_every_unit(tmp_path: Path) -> None:
    kinds = [argument for kind in KINDS for argument in ("--kind", kind)]
    script = BENCHMARKS / "bench_units.py"
    command = [sys.executable, str(script), "--smoke", "--work", str(tmp_path), *kinds]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout
    lines = re.findall(r"^\| (\w[\w-]*) +\| (\d) .*$", printed, re.M)
    assert lines == [(kind, defaults) for kind in KINDS for defaults in "12"]
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("units-results/*")}
    assert len(results) == 2 * len(KINDS)
    for name, found in results.items():
        assert len(found) == (5 if name.startswith("topk") else 3)
        for _, (fvu, l0, dead) in found:
            assert fvu > 0
            assert 0 <= l0 <= 8
            assert 0 <= dead <= 100
    assert not list((tmp_path / "runs").iterdir())
