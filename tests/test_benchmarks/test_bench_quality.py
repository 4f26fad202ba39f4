"""`benchmarks/bench_quality.py` trains and evaluates every side, and resumes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SIDES = ["ours, tuned", "ours, defaults", "sparsify, Adam", "SAELens TopK"]


def run(work: Path, *more: str) -> subprocess.CompletedProcess[str]:
    script = BENCHMARKS / "bench_quality.py"
    command = [
        sys.executable,
        str(script),
        "--smoke",
        "--no-bfloat16",
        "--seeds",
        "2",
        "--work",
        str(work),
        *more,
    ]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=True, env=env)


@pytest.mark.soak
def test_bench_quality_prints_all_sides_and_trains_nothing_twice(tmp_path: Path) -> None:
    pytest.importorskip("sparsify", reason="the extra `peers` is not installed")
    pytest.importorskip("sae_lens", reason="the extra `peers` is not installed")
    first = run(tmp_path)
    results = {path.name: path.read_text() for path in (tmp_path / "results").iterdir()}
    # Two rates and a second seed of three sides, two seeds of our defaults.
    assert len(results) == 3 * 3 + 2
    for text in results.values():
        figures = json.loads(text)
        assert figures["fvu"] > 0
        assert figures["l0"] == 8
        assert 0 <= figures["dead"] < 100
    table = first.stdout.rpartition("over the seeds")[2]
    ratios = dict(re.findall(r"^\| (\w[^|\n]*?) +\|[^*\n]*\*\*([0-9.]+)\*\*", table, re.M))
    assert list(ratios) == SIDES
    assert min(float(ratios[peer]) for peer in SIDES[2:]) == 1
    assert not list((tmp_path / "runs").iterdir())

    lost = next(iter(sorted(results)))
    (tmp_path / "results" / lost).unlink()
    second = run(tmp_path)
    # sparsify prints a message at import, before this.
    assert second.stdout.partition("synthetic")[2] == first.stdout.partition("synthetic")[2]
    assert re.findall(r"^(\S+): Figures", second.stderr, re.M) == [lost.removesuffix(".json")]
    assert (tmp_path / "results" / lost).read_text() == results[lost]


@pytest.mark.soak
def test_bench_quality_compares_all_kinds_at_equal_l0(tmp_path: Path) -> None:
    pytest.importorskip("sae_lens", reason="the extra `peers` is not installed")
    printed = run(tmp_path, "--kinds").stdout
    kinds = ["topk", "batchtopk", "groupmax", "relu", "gated", "jumprelu"]
    sides = [*(f"ours, {kind}" for kind in kinds), "SAELens BatchTopK", "SAELens JumpReLU"]
    rows = re.findall(r"^\| (\w[^|]*?) +\| +([0-9.]+) +\| +([0-9.]+)", printed, re.M)
    assert [side for side, *_ in rows] == sides
    assert [l0 for side, _, l0 in rows if side == "ours, topk"] == ["4.0"]
