"""`benchmarks/bench_train_step.py` runs at small size, and with torch as the only package."""

import importlib.util
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.soak
def test_bench_train_step_compares_all_sides_and_prints_its_table_last():
    command = [sys.executable, str(FOLDER / "bench_train_step.py")]
    command += ["--smoke", "--pairs", "3", "--sizes", "1", "--threads", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "ceilings, measured in this run: product " in done.stdout
    table = done.stdout.strip().split("\n\n")[-1].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    assert rows[0][:4] == ["(N, D, M, K)", "optimiser", "step", "ms"]
    sides = ["ours", "ours, bfloat16", "ours, AuxK acting", "dense", "sparsify"]
    assert [row[1:3] for row in rows[2:]] == [[o, s] for o in ("signum", "adam") for s in sides]
    for row in rows[2:]:
        assert float(row[3]) > 0
        assert re.fullmatch(r"\*\*[0-9.]+x\*\*", row[4])
        assert float(row[8]) >= 0


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    file = FOLDER / "bench_train_step.py"
    spec = importlib.util.spec_from_file_location("bench_train_step", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "bench_train_step", module)
    spec.loader.exec_module(module)
    return module


def test_a_cuda_graph_is_captured_before_it_is_timed(bench, monkeypatch):
    """Check the order of calls with a fake graph, as a CPU has no CUDA graphs."""
    import saetrain.training.cuda_graphs

    log, steps = [], 4

    class Recorder:
        def __init__(self, device):
            pass

        def run(self, work):
            log.append("run")
            work()

        def record(self, work):
            log.append("record")
            return lambda: log.append("replay")

    monkeypatch.setattr(saetrain.training.cuda_graphs, "CudaGraphs", Recorder)
    device, size = torch.device("cpu"), bench.SMOKE[1]
    x = bench.rows(*size[:2], device)
    made = bench.many(bench.setting_of(size, "adam", device), x)
    lines = bench.compare("8 of them", "adam", x, made, 1.0, steps, time.perf_counter)
    assert [line[:3] for line in lines] == [["8 of them", "adam", name] for name in made]
    assert log == ["run"] * (bench.WARM_UP - 1) + ["record"] + ["replay"] * (1 + steps + 1)
