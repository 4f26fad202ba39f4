"""`benchmarks/bench_dead.py` trains the defaults of both versions, and trains nothing twice."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SIDES = ["--defaults 1", "--defaults 2", "--defaults 2, muon"]


def run(work: Path, *options: str) -> subprocess.CompletedProcess[str]:
    script = BENCHMARKS / "bench_dead.py"
    command = [sys.executable, str(script), "--smoke", "--work", str(work), *options]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env)


@pytest.mark.soak
def test_bench_dead_prints_every_side_and_trains_nothing_twice(tmp_path: Path) -> None:
    sides = [argument for side in SIDES for argument in ("--side", side)]
    first = run(tmp_path, *sides)
    results = {path.name: path.read_text() for path in (tmp_path / "dead").iterdir()}
    assert len(results) == len(SIDES)
    for text in results.values():
        figures = json.loads(text)
        assert figures["fvu"] > 0
        assert figures["l0"] == 8
        assert 0 <= figures["dead"] < 100
    assert re.findall(r"^\| (--d[^|]*?) +\|", first.stdout, re.M) == SIDES

    lost = next(iter(sorted(results)))
    (tmp_path / "dead" / lost).unlink()
    second = run(tmp_path, *sides)
    assert second.stdout == first.stdout
    assert re.findall(r"^(.+): Figures", second.stderr, re.M) == [lost.removesuffix(".json")]
    assert (tmp_path / "dead" / lost).read_text() == results[lost]


@pytest.mark.soak
def test_bench_dead_prints_rates_around_the_default(tmp_path: Path) -> None:
    printed = run(tmp_path, "--rates", "128").stdout
    adam, muon = re.findall(r"^\| --defaults 2.*$", printed, re.M)
    for line in (adam, muon):
        assert len(re.findall(r"\d \(\d+\)", line)) == 5
