"""`benchmarks/bench_sinks.py` trains with and without the massive rows, and resumes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(work: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(BENCHMARKS / "bench_sinks.py"), "--smoke", "--work", str(work)]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env)


@pytest.mark.soak
def test_bench_sinks_prints_a_line_for_every_ratio_and_trains_nothing_twice(tmp_path: Path) -> None:
    first = run(tmp_path)
    results = {path.name: path.read_text() for path in (tmp_path / "results").iterdir()}
    assert len(results) == 2
    found = {name: json.loads(text) for name, text in results.items()}
    assert sorted(figures["left_out"] for figures in found.values())[0] == 0
    assert sorted(figures["left_out"] for figures in found.values())[1] in (4, 5)
    for figures in found.values():
        assert figures["fvu_kept"] > 0
        assert figures["spread"] >= 1
    assert re.findall(r"^\| layers\.0 +\| (\w+) +\| \d", first.stdout, re.M) == ["none", "10"]
    assert not list((tmp_path / "runs").iterdir())
    second = run(tmp_path)
    assert (second.stdout, "Figures" in second.stderr) == (first.stdout, False)
