"""Runs of several processes with gloo, compared with runs of one process."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import saetrain.training.sae_trainer
from actcache.core.json_codec import to_json
from actcache.filesystem.atomic import digest_file
from saetrain.config.fit_config import FitConfig
from saetrain.config.sae import SaeOptions
from saetrain.launch.run import fit
from saetrain.model.sae import Sae, build_sae
from saetrain.tracking.jsonl import METRICS

Snapshot = Callable[[Path], dict[str, bytes]]
RunJobs = Callable[[int, list[dict[str, Any]], Path], None]

BIN = Path(sys.executable).parent
SECONDS = 240  # timeout of a torchrun that hangs
HERE = Path(__file__).parent


def double(*arguments: Any, **options: Any) -> Sae:
    return build_sae(*arguments, **options | {"dtype": torch.float64})


@pytest.fixture(scope="module")
def run_jobs(fork_server: Any) -> RunJobs:
    """A function that runs jobs, one after another, see `processes.py`."""

    def run(processes: int, jobs: list[dict[str, Any]], folder: Path) -> None:
        path = folder / f"jobs-{processes}.json"
        path.write_text(json.dumps(jobs))
        for rank in fork_server.start_ranks(processes, HERE / "processes.py", path):
            assert rank.wait() == 0, rank.stderr

    return run


def lines(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / METRICS).read_text().splitlines()]


def numbers(root: Path) -> list[float]:
    """Return all numbers of metrics.jsonl."""

    def below(value: Any) -> Iterator[float]:
        if isinstance(value, (dict, list)):
            for item in value.values() if isinstance(value, dict) else value:
                yield from below(item)
        elif value is not None:
            yield value

    return [number for line in lines(root) for number in below(line)]


@pytest.fixture(scope="module")
def base(cache_path: Path) -> dict[str, Any]:
    """Options of a run of eight steps an epoch; 2, 3 and 4 processes can share its batches."""
    return {
        "cache": str(cache_path),
        "num_latents": 48,
        "k": 3,
        "batch_size": 48,
        "lr": 0.01,
        "lr_warmup_steps": 4,
        "dead_after": 96,
        "save_every": 3,
        "log_every": 4,
        "epochs": 3,
        "device": "cpu",
    }


MIXED = [
    {"num_latents": n, "k": k, "lr": 0.01, "optimizer": name, "lr_warmup_steps": 4, "seed": seed}
    for n, k, name, seed in ((24, 2, "adam", 0), (96, 4, "signum", 1), (48, 3, "adam", 2))
]
"""Three SAEs per hookpoint, of several widths."""


def modules(base: dict[str, Any], out: Path, **more: Any) -> dict[str, Any]:
    """Options of a run of six SAEs with validation and --save-best."""
    kept = {"num_latents", "k", "lr", "lr_warmup_steps"}
    grid = {name: value for name, value in base.items() if name not in kept}
    return grid | {"saes": MIXED, "out": str(out), "val_every": 5, "save_best": True} | more


def few(base: dict[str, Any], out: Path, **more: Any) -> dict[str, Any]:
    """Options of a run of two SAEs: one of three processes has nothing to train."""
    return modules(base, out, **more) | {"saes": MIXED[:1]}


def grid_of(saes: list[dict[str, Any]]) -> tuple[SaeOptions, ...]:
    return tuple(SaeOptions(**sae) for sae in saes)


KINDS = [
    {"activation": name, "num_latents": 48, "k": 4, "lr": 0.01, "optimizer": "adam"}
    | {"lr_warmup_steps": 4, "seed": 0}
    for name in ("groupmax", "jumprelu", "relu", "gated")
]
"""The other activations that --parallel ddp supports."""


def kinds(base: dict[str, Any], out: Path, **more: Any) -> dict[str, Any]:
    return modules(base, out, log_every=1) | {"saes": KINDS} | more


BATCHES: dict[str, dict[str, Any]] = {
    "signum": {},
    # Checkpoints fall in the middle of an update, and batches are split.
    "adam": {"optimizer": "adam", "grad_acc_steps": 2, "micro_batch_size": 5, "grad_clip": 1.0}
    | {"decoder_norm": "fold", "k_anneal_steps": 8},
}
"""Options of runs with --parallel ddp."""


@pytest.fixture(scope="module")
def alone(
    base: dict[str, Any], run_jobs: RunJobs, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Make the run of one process: `modules`, copied to `modules-9` at step 9."""
    folder = tmp_path_factory.mktemp("alone")
    copy = [9, str(folder / "modules-9")]
    job = {"options": modules(base, folder / "modules", parallel="modules"), "copy": copy}
    run_jobs(1, [job], folder)
    return folder


@pytest.fixture(scope="module")
def alone_in_float64(
    base: dict[str, Any], run_jobs: RunJobs, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Make the runs of one process that several are compared with in float64."""
    folder = tmp_path_factory.mktemp("float64")
    jobs: list[dict[str, Any]] = []
    for name, more in BATCHES.items():
        options = base | more | {"out": str(folder / f"double-{name}"), "epochs": 7, "log_every": 1}
        jobs.append({"options": options, "float64": True})
    jobs.append({"options": kinds(base, folder / "kinds"), "float64": True})
    run_jobs(1, jobs, folder)
    return folder


@pytest.mark.parametrize(
    ("processes", "doubles"),
    [
        (3, False),
        pytest.param(2, True, marks=pytest.mark.soak),
        pytest.param(4, True, marks=pytest.mark.soak),
    ],
)
def test_runs_of_several_processes_equal_those_of_one_and_resume_exactly(
    processes: int,
    doubles: bool,
    base: dict[str, Any],
    alone: Path,
    run_jobs: RunJobs,
    snapshot: Snapshot,
    tmp_path: Path,
    request: pytest.FixtureRequest,
) -> None:
    # Six SAEs; and a run that one process starts and several resume.
    at_9 = tmp_path / "modules-9"
    resumed = Path(shutil.copytree(alone / "modules-9", tmp_path / "resumed"))
    share = {"parallel": "modules"}
    jobs: list[dict[str, Any]] = [
        {"options": modules(base, tmp_path / "modules", **share), "copy": [9, str(at_9)]},
        {"options": modules(base, resumed, **share, resume=True)},
        {"options": few(base, tmp_path / "few", **share)},
        {"options": few(base, tmp_path / "few", **share, resume=True, epochs=4, force_config=True)},
    ]
    for name, more in BATCHES.items():
        share = base | more | {"parallel": "ddp"}
        double = share | {"out": str(tmp_path / f"double-{name}"), "epochs": 7, "log_every": 1}
        copied = str(tmp_path / f"{name}-9")
        jobs += [{"options": double, "float64": True}] * doubles
        jobs += [
            {"options": share | {"out": str(tmp_path / name)}, "copy": [9, copied]},
            {"options": share | {"out": copied, "resume": True}},
        ]
    kind = {"options": kinds(base, tmp_path / "kinds", parallel="ddp"), "float64": True}
    jobs += [kind] * doubles
    plain = few(base, tmp_path / "plain", parallel="modules", val_every=None, save_best=False)
    jobs.append({"options": plain})
    refused = base | {"out": str(tmp_path / "refused"), "parallel": "ddp", "batch_size": 35}
    jobs.append({"options": refused, "fails": True})
    run_jobs(processes, jobs, tmp_path)

    one = snapshot(alone / "modules")
    assert snapshot(tmp_path / "modules") == one
    assert snapshot(resumed) == one
    assert snapshot(at_9) == snapshot(alone / "modules-9")
    fit(FitConfig(**modules(base, at_9, resume=True) | {"saes": grid_of(MIXED)}))
    assert snapshot(at_9) == one
    record = (tmp_path / "modules" / "run.json").read_text()
    old_path, new_path = str(tmp_path / "modules"), str(alone / "modules")
    expected = (alone / "modules" / "run.json").read_text()
    seal = re.compile(r'"seal": "[0-9a-f]{32}"')  # covers the path, too
    assert seal.sub("", record.replace(old_path, new_path)) == seal.sub("", expected)

    for more in ({}, {"resume": True, "epochs": 4, "force_config": True}):
        fit(FitConfig(**few(base, tmp_path / "few-alone", **more) | {"saes": grid_of(MIXED[:1])}))
    assert snapshot(tmp_path / "few") == snapshot(tmp_path / "few-alone")

    for name in BATCHES:
        dead = [line["saes"]["layers.0"]["dead_percent"] for line in lines(tmp_path / name)]
        assert any(dead), "no latent is dead, so AuxK was not used"
        assert snapshot(tmp_path / f"{name}-9") == snapshot(tmp_path / name)

    for name in ["kinds", *(f"double-{name}" for name in BATCHES)] * doubles:
        wanted = request.getfixturevalue("alone_in_float64") / name
        assert lines(wanted)[-1]["step"] == (24 if name == "kinds" else 56)
        expected, found = numbers(wanted), numbers(tmp_path / name)
        assert found == pytest.approx(expected, rel=0, abs=1e-9)

    # Rank 0 measures every saved SAE on held-out rows, and has the findings.
    results = [json.loads((tmp_path / f"plain.result.{n}").read_text()) for n in range(processes)]
    assert results[0]["held_out"].keys() == {"layers.0", "layers.1"}
    assert results[0]["findings"] > 0
    assert all(r["held_out"] == {} and r["findings"] == 0 for r in results[1:])

    errors = [tmp_path / f"refused.error.{rank}" for rank in range(processes)]
    assert [p.read_text().split()[:2] for p in errors] == [["ConfigError", "2:"]] + [
        ["RemoteRankError", "2:"]
    ] * (processes - 1)
    assert "35 lanes cannot be divided" in errors[0].read_text()
    assert "1, 5, 7, 35 processes" in errors[0].read_text()
    assert not (tmp_path / "refused").exists()


# --- exit ---------------------------------------------------------------------------------


def fit_line(options: dict[str, Any]) -> list[str]:
    """Return the command line of `saetrain fit`."""
    line = ["saetrain", "fit", options["cache"]]
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if name != "cache" and value is not False:
            line += [flag] if value is True else [flag, str(value)]
    return line


def ranks_of(parent: int) -> dict[int, int]:
    """Return the process ids of torchrun's children, by rank."""
    found = {}
    for text in Path(f"/proc/{parent}/task").glob("*/children"):
        for pid in text.read_text().split():
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found |= {int(v[5:]): int(pid) for v in variables if v.startswith(b"RANK=")}
    return found


def start(processes: int, options: dict[str, Any]) -> subprocess.Popen[str]:
    """Start a run under torchrun, and wait for its first checkpoint."""
    launcher = [str(BIN / "torchrun"), "--no-python", "--standalone", "--nproc_per_node"]
    program, *arguments = fit_line(options)
    command = [*launcher, str(processes), str(BIN / program), *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not list(Path(options["out"]).glob("checkpoint-*.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    time.sleep(random.random() / 10)
    return process


def exit_status(root: Path) -> dict[str, Any]:
    """Return the contents of exit.json."""
    status: dict[str, Any] = json.loads((root / "exit.json").read_text())
    return status


@pytest.mark.parametrize("parallel", ["modules", pytest.param("ddp", marks=pytest.mark.soak)])
def test_a_killed_rank_is_named_and_ends_all_ranks_and_the_run_resumes_exactly(
    parallel: str, base: dict[str, Any], run_jobs: RunJobs, snapshot: Snapshot, tmp_path: Path
) -> None:
    run = base | {"parallel": parallel, "epochs": 12, "save_every": 5, "resume": True}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start(2, run | {"out": str(killed)})
    os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert stderr.count("error: process 1 of this run has ended without an error message") == 1
    assert "error_handling.py" not in stderr  # only torchrun prints a traceback
    ended = exit_status(killed)
    assert ended["code"] == 11
    assert ended["reason"].startswith("LostRankError: process 1 of this run has ended")
    assert lines(killed)[-1]["step"] < 96
    finish(run_jobs, run, whole, killed, tmp_path)
    assert exit_status(killed) == {"code": 0, "reason": "finished", "step": 96}
    assert snapshot(killed) == snapshot(whole)


@pytest.mark.parametrize(
    ("to", "parallel"),
    [
        ("torchrun", "modules"),
        pytest.param("torchrun", "ddp", marks=pytest.mark.soak),
        pytest.param("rank 1", "modules", marks=pytest.mark.soak),
    ],
)
def test_a_signal_stops_all_ranks_at_one_step_and_the_run_resumes_exactly(
    parallel: str,
    to: str,
    base: dict[str, Any],
    run_jobs: RunJobs,
    snapshot: Snapshot,
    tmp_path: Path,
) -> None:
    run = base | {"parallel": parallel, "epochs": 12, "keep_every": 5, "resume": True}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    process = start(2, run | {"out": str(stopped), "save_every": 10_000})
    if to == "torchrun":
        process.terminate()
    else:
        os.kill(ranks_of(process.pid)[1], signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    ended = exit_status(stopped)
    assert (ended["code"], ended["reason"]) == (143, "SIGTERM")
    assert 0 < ended["step"] < 96
    assert stderr.count(f"terminated: SIGTERM: step {ended['step']} is saved; --resume") == 1
    assert "error: " not in stderr
    assert "error_handling.py" not in stderr
    finish(run_jobs, run | {"save_every": 10_000}, whole, stopped, tmp_path)
    assert snapshot(stopped) == snapshot(whole)


@pytest.mark.soak  # torchrun waits 30 s for the rank that is stopped
@pytest.mark.parametrize("parallel", ["modules", "ddp"])
def test_a_signal_ends_a_run_whose_other_rank_is_stopped_and_it_resumes_exactly(
    parallel: str,
    base: dict[str, Any],
    run_jobs: RunJobs,
    snapshot: Snapshot,
    tmp_path: Path,
) -> None:
    run = base | {"parallel": parallel, "epochs": 12, "save_every": 5, "resume": True}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    process = start(2, run | {"out": str(stopped)})
    ids = ranks_of(process.pid)
    zero, one = ids[0], ids[1]
    os.kill(one, signal.SIGSTOP)
    os.kill(zero, signal.SIGTERM)
    began = time.monotonic()
    while Path(f"/proc/{zero}").exists():
        assert time.monotonic() < began + 120
        time.sleep(0.1)
    os.kill(one, signal.SIGKILL)
    _, stderr = process.communicate(timeout=60)
    assert stderr.count("error: process 1 of this run does not answer") == 1
    assert "error_handling.py" not in stderr
    assert exit_status(stopped)["code"] == 11
    finish(run_jobs, run, whole, stopped, tmp_path)
    assert snapshot(stopped) == snapshot(whole)


def finish(run_jobs: RunJobs, run: dict[str, Any], whole: Path, broken: Path, folder: Path) -> None:
    """Resume a run, and make a whole one: with one process, or two for --parallel ddp."""
    runs = [run | {"out": str(out)} for out in (whole, broken)]
    if run["parallel"] == "ddp":
        run_jobs(2, [{"options": options} for options in runs], folder)
    else:
        for options in runs:
            fit(FitConfig(**options))


@pytest.mark.soak
def test_stopped_damaged_and_overridden_runs_resume_like_those_of_one_process(
    base: dict[str, Any], run_jobs: RunJobs, snapshot: Snapshot, tmp_path: Path
) -> None:
    """Two processes repeat cases of test_signals, test_exact, test_overrides and test_finetune."""
    kept = base | {"keep_last": 2, "keep_every": 5, "resume": True, "val_every": 5}
    kept |= {"save_best": True, "optimizer": "adam", "input_scale": "rms"}
    kept |= {"encoder_scale": "auto", "wandb": "offline"}
    fresh = base | {"finetune": str(tmp_path / "modules"), "fresh_b_dec": True, "resume": True}
    fresh = {name: value for name, value in fresh.items() if name not in ("num_latents", "k")}
    forced = base | {"force_config": True, "resume": True, "lr": 0.003, "epochs": 4}
    jobs: list[dict[str, Any]] = []
    for parallel in ("ddp", "modules"):
        run = kept | {"parallel": parallel, "out": str(tmp_path / parallel)}
        whole = run | {"out": str(tmp_path / f"{parallel}-whole")}
        damaged = str(tmp_path / parallel / "checkpoint-000000024.00001.safetensors")
        tuned = fresh | {"parallel": parallel, "out": str(tmp_path / f"{parallel}-tuned")}
        other = base | {"parallel": parallel, "out": str(tmp_path / f"{parallel}-forced")}
        jobs += [
            {"options": run, "signal": [1, 6], "fails": True},
            {"options": whole},
            {"options": run},
            {"options": run, "damaged": damaged},
            {"options": tuned},
            {"options": other},
            {"options": forced | {"parallel": parallel, "out": other["out"]}},
        ]
    # The runs to fine-tune from must exist first.
    run_jobs(2, sorted(jobs, key=lambda job: "tuned" in job["options"]["out"]), tmp_path)

    for parallel in ("ddp", "modules"):
        texts = [(tmp_path / f"{parallel}.error.{rank}").read_text() for rank in (0, 1)]
        assert texts[0] == texts[1]
        assert texts[0].startswith("RunStopped 143: SIGTERM: step ")
        if parallel == "ddp":
            assert "step 7 is saved" in texts[0]
        zero, one = (result_of(tmp_path / parallel, rank) for rank in (0, 1))
        assert (zero["new_steps"], one["new_steps"]) == (3, 3)  # back to step 21
        assert "resuming from step 21" in " ".join(zero["warnings"])
        assert (zero["wandb"], one["wandb"]) == (["opened"], [])
        assert snapshot(tmp_path / parallel) == snapshot(tmp_path / f"{parallel}-whole")
        record = json.loads((tmp_path / f"{parallel}-forced" / "run.json").read_text())
        assert record["steps"] == 32
        assert record["options"]["parallel"] is None
        (change,) = record["history"]
        assert change["step"] == 24
        assert "--lr: 0.01 then, 0.003 now" in change["changes"]

    fit(FitConfig(**kept | {"out": str(tmp_path / "alone")}))
    fit(FitConfig(**fresh | {"out": str(tmp_path / "alone-tuned")}))
    fit(FitConfig(**base | {"out": str(tmp_path / "alone-forced")}))
    fit(FitConfig(**forced | {"out": str(tmp_path / "alone-forced")}))
    for name in ("alone", "alone-tuned", "alone-forced"):
        shared = tmp_path / name.replace("alone", "modules")
        assert snapshot(shared) == snapshot(tmp_path / name)
        assert scales(shared) == scales(tmp_path / name)

    # A changed number of processes with --parallel ddp gives a warning and a history entry.
    other = tmp_path / "ddp"
    for path in other.glob("checkpoint-00000002[1-9]*"):
        path.unlink()
    summary = fit(FitConfig(**kept | {"out": str(other)}))
    assert summary.new_steps == 4
    assert "share each batch: 2 then, 1 now" in " ".join(summary.warnings)
    record = json.loads((other / "run.json").read_text())
    assert record["batch_parts"] == 1
    assert [change["step"] for change in record["history"]] == [20]
    assert not fit(FitConfig(**kept | {"out": str(other)})).warnings


@pytest.mark.soak
@pytest.mark.parametrize("parallel", ["modules", "ddp"])
def test_a_checkpoint_that_one_rank_refuses_is_skipped_by_all(
    parallel: str,
    base: dict[str, Any],
    run_jobs: RunJobs,
    snapshot: Snapshot,
    tmp_path: Path,
) -> None:
    """With --parallel modules, rank 0 does not load the SAEs of rank 1."""
    run = base | {"parallel": parallel, "out": str(tmp_path / "run")}
    run |= {"keep_last": 2, "keep_every": 5, "resume": True}
    run_jobs(2, [{"options": run}], tmp_path)
    whole = snapshot(tmp_path / "run")
    path = sorted((tmp_path / "run").glob("checkpoint-*.json"))[-1]
    state = json.loads(path.read_text())
    for number, sae in enumerate(state["saes"]):
        if number != 0 or parallel == "ddp":
            tensors_path = path.with_suffix(f".{number:05d}.safetensors")
            save_file(load_file(tensors_path) | {"meter": torch.zeros(1)}, tensors_path)
            sae["file"] = dataclasses.asdict(digest_file(tensors_path))
    path.write_bytes(to_json(state, sealed=True))
    run_jobs(2, [{"options": run}], tmp_path)
    warnings = result_of(tmp_path / "run", 0)["warnings"]
    assert "tensor meter" in " ".join(warnings)
    assert "this checkpoint is damaged; resuming from step" in " ".join(warnings)
    assert result_of(tmp_path / "run", 1)["new_steps"] > 0
    assert snapshot(tmp_path / "run") == whole


def result_of(root: Path, rank: int) -> dict[str, Any]:
    """Return what a rank wrote at its end, see `processes.py`."""
    found: dict[str, Any] = json.loads(Path(f"{root}.result.{rank}").read_text())
    return found


def scales(root: Path) -> list[Any]:
    record = json.loads((root / "run.json").read_text())
    return [[sae["encoder_scale"], sae["scales"]] for sae in record["saes"]]


@pytest.mark.parametrize(
    "names",
    [
        ("sae", "transcoder", "crosscoder"),
        pytest.param(("skip", "prefixes"), marks=pytest.mark.soak),
    ],
    ids=" ".join,
)
def test_ddp_refuses_batchtopk_and_trains_other_modules_like_one_process(
    names: tuple[str, ...],
    base: dict[str, Any],
    make_cache: Callable[..., Path],
    run_jobs: RunJobs,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """In float64, where the order of summation changes only digits from the tenth on."""
    wide = {"layers.0.mlp:in": 16, "layers.0.mlp": 12, "layers.1": 16}
    paired = base | {"cache": str(make_cache(hookpoints=wide)), "optimizer": "adam"}
    paired |= {"log_every": 1, "input_scale": "rms"}
    runs = {
        "sae": base | BATCHES["adam"] | {"log_every": 1, "epochs": 7},
        "transcoder": paired | {"transcode": True, "hookpoint": ("layers.0.mlp",)},
        "skip": paired
        | {"transcode": True, "skip_connection": True, "hookpoint": ("layers.0.mlp",)},
        "crosscoder": paired | {"crosscode": True, "hookpoint": ("layers.0.mlp", "layers.1")},
        "prefixes": base | {"log_every": 1, "matryoshka": (12, 30)},
    }
    jobs: list[dict[str, Any]] = [
        {"options": runs[name] | {"parallel": "ddp", "out": str(tmp_path / name)}, "float64": True}
        for name in names
    ]
    whole = base | {"parallel": "ddp", "activation": "batchtopk", "out": str(tmp_path / "refused")}
    jobs.append({"options": whole, "fails": True})
    run_jobs(2, jobs, tmp_path)
    assert "chooses among a whole batch" in (tmp_path / "refused.error.0").read_text()
    assert not (tmp_path / "refused").exists()
    monkeypatch.setattr(saetrain.training.sae_trainer, "build_sae", double)
    for name in names:
        fit(FitConfig(**runs[name] | {"out": str(tmp_path / f"{name}-alone")}))
        found = numbers(tmp_path / name)
        assert found == pytest.approx(numbers(tmp_path / f"{name}-alone"), rel=0, abs=1e-9)


@pytest.mark.parametrize("parallel", ["ddp", "modules"])
def test_a_read_error_of_one_rank_is_reported_once_with_its_code(
    parallel: str, base: dict[str, Any], cache_path: Path, fork_server: Any, tmp_path: Path
) -> None:
    cache = Path(shutil.copytree(cache_path, tmp_path / "cache"))
    for file in (cache / "activations").rglob("*layers.1*/*"):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    out = tmp_path / "run"
    options = base | {"parallel": parallel, "cache": str(cache), "out": str(out)}
    ranks = fork_server.start_ranks(2, *fit_line(options))
    stderr = "".join(rank.communicate()[1] for rank in ranks)
    assert [rank.returncode for rank in ranks] == [8, 8]
    assert stderr.count("error: ") == 1, stderr
    assert "Traceback" not in stderr
    assert json.loads((out / "exit.json").read_text())["code"] == 8


def test_steps_before_a_read_error_of_one_rank_are_saved_and_the_run_resumes_exactly(
    base: dict[str, Any], run_jobs: RunJobs, snapshot: Snapshot, tmp_path: Path
) -> None:
    jobs: list[dict[str, Any]] = []
    for parallel in ("ddp", "modules"):
        run = base | {"parallel": parallel, "epochs": 1, "resume": True}
        broken = run | {"out": str(tmp_path / parallel)}
        # With modules the last common checkpoint is kept; with ddp all steps done are saved.
        step, saved = (5, 5) if parallel == "ddp" else (7, 6)
        copy = [saved, str(tmp_path / f"{parallel}-copy")]
        jobs += [
            {"options": broken, "unreadable": [1, step], "fails": True, "copy": copy},
            {"options": broken},
            {"options": run | {"out": str(tmp_path / f"{parallel}-whole")}},
        ]
    run_jobs(2, jobs, tmp_path)
    for parallel in ("ddp", "modules"):
        found = snapshot(tmp_path / parallel)
        assert found == snapshot(tmp_path / f"{parallel}-whole")
        errors = [
            (tmp_path / f"{parallel}.error.{rank}").read_text().split()[:2] for rank in (0, 1)
        ]
        assert errors == [["RemoteRankError", "8:"], ["CorruptShardError", "8:"]]
        assert (tmp_path / f"{parallel}-copy").is_dir()


def test_several_processes_follow_a_harvest_like_one(
    base: dict[str, Any], run_jobs: RunJobs, snapshot: Snapshot, tmp_path: Path
) -> None:
    follow = base | {"follow": True, "segment_shards": 2, "val_fraction": 0, "epochs": 1}
    follow |= {"batch_size": 32, "pool_rows": 64}
    out = {kind: tmp_path / kind for kind in ("alone", "modules", "ddp")}
    share = [follow | {"parallel": kind, "out": str(out[kind])} for kind in ("modules", "ddp")]
    run_jobs(2, [{"options": options} for options in share], tmp_path)
    fit(FitConfig(**follow | {"out": str(out["alone"])}))
    assert snapshot(out["modules"]) == snapshot(out["alone"])
    assert numbers(out["ddp"]) == pytest.approx(numbers(out["alone"]), rel=1e-2)
    for kind in ("modules", "ddp"):
        assert (out[kind] / "segments.json").read_bytes() == (
            out["alone"] / "segments.json"
        ).read_bytes()


def test_several_processes_without_parallel_report_one_error(
    base: dict[str, Any], fork_server: Any, tmp_path: Path
) -> None:
    options = base | {"out": str(tmp_path / "run")}
    ranks = fork_server.start_ranks(2, *fit_line(options))
    stderr = "".join(rank.communicate()[1] for rank in ranks)
    assert all(rank.returncode for rank in ranks)
    assert stderr.count("error: ") == 1
    assert "--parallel ddp" in stderr
    assert "--parallel modules" in stderr
    assert not (tmp_path / "run").exists()
