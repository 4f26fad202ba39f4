"""`benchmarks/bench_kernels.py` runs without a GPU; its times are not asserted."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("bench_kernels", FOLDER / "bench_kernels.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_kernels", module)
    spec.loader.exec_module(module)
    return module


@pytest.mark.soak
def test_bench_kernels_checks_every_side_and_prints_one_table_last():
    command = [sys.executable, str(FOLDER / "bench_kernels.py")]
    command += ["--smoke", "--rounds", "3", "--sizes", "1", "--device", "cpu"]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    assert "ceilings, measured in this run: product " in done.stdout
    assert "not judged here" in done.stdout
    table = done.stdout.strip().split("\n\n")[-1].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert rows[0][:3] == ["(N, D, M, K)", "firing", "stage"]
    assert len(rows) == 2 + 2 * 2 * 5
    for row in rows[2:]:
        assert row[1] in ("uniform", "zipf")
        assert float(row[3]) > 0
        assert float(row[5]) > 0  # sparsify's, which is installed for the tests
        assert re.fullmatch(r"\*\*[0-9.]+x\*\*", row[9])
    assert sum("whole step, adam" in row[2] and float(row[6]) > 0 for row in rows[2:]) == 2


def test_a_side_with_a_different_loss_stops_the_benchmark(bench):
    bench.check_losses({"ours": 1.0, "dense": 1.01})
    for other in (1.1, float("nan")):
        with pytest.raises(SystemExit, match="first loss of dense"):
            bench.check_losses({"ours": 1.0, "dense": other})


def test_goals_are_reported_as_met_or_missed(bench):
    size = (8192, 4096, 131072, 64)
    problem = bench.Problem(size, *(torch.zeros(1) for _ in range(3)))
    times = {
        bench.STEP: {"ours": [10.0], "sparsify": [30.0]},
        "encoder + selection": {"ours": [6.0]},
    }
    memory = {"ours": bench.Memory(30, 10), "sparsify": bench.Memory(30, 20)}
    figures = bench.Figures(problem, "zipf", "adam", times, {bench.STEP: 7.0}, 4.0, memory)
    told = bench.goals([figures])
    assert [line.split(":")[0] for line in told] == [
        "goal 2.50, met",
        "goal 0.60, met",
        "goal 1.15, MISSED",
        "goal 0.33, MISSED",
    ]
    assert "3.00x over sparsify at (8192, 4096, 131072, 64), zipf, adam" in told[0]


def test_a_floor_is_the_larger_of_arithmetic_and_bytes(bench):
    from ceilings import Work, work_of

    assert Work(2e9, 1e6).floor(1e12, 1e12) == pytest.approx(2.0)
    assert Work(2e6, 4e9).floor(1e12, 1e12) == pytest.approx(4.0)
    work = work_of((8, 4, 32, 2), torch.float32, "signum", hit=10)
    assert work["encoder + selection"].operations == 2 * 8 * 4 * 32
    # y, z and the gradient read, y and z written, of both weights.
    assert work["update"].bytes == 2 * 32 * 4 * 20


def test_latents_fire_in_proportion_to_their_rank(bench):
    problem = bench.make_problem((4096, 32, 256, 8), "zipf", torch.device("cpu"))
    fires = (problem.x @ problem.W.T + problem.b_enc > 0).float().mean(dim=0)
    assert fires.sum().item() == pytest.approx(8, rel=0.1)
    # The first would fire more often than always, and does at 95% of tokens.
    assert fires[0].item() == pytest.approx(0.95, abs=0.02)
    assert fires[19].item() == pytest.approx(fires[4].item() / 4, rel=0.2)
