"""Runs of several processes, real ones under torchrun with gloo: the same as those of one."""

from __future__ import annotations

import json
import os
import random
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

import saetrain.training.init
from saetrain.config.fit_config import FitConfig
from saetrain.config.sae_options import SaeOptions
from saetrain.launch.run import fit
from saetrain.model.factory import build_sae
from saetrain.model.sae import Sae
from saetrain.tracking.jsonl import METRICS

Snapshot = Callable[[Path], dict[str, bytes]]

BIN = Path(sys.executable).parent
SECONDS = 240  # until processes that hang are given up
HERE = Path(__file__).parent


def double(*arguments: Any, **options: Any) -> Sae:
    return build_sae(*arguments, **options | {"dtype": torch.float64})


def torchrun(processes: int, *command: str) -> list[str]:
    launcher = [str(BIN / "torchrun"), "--no-python", "--standalone", "--nproc_per_node"]
    return [*launcher, str(processes), *command]


def together(processes: int, jobs: list[dict[str, Any]], folder: Path) -> None:
    """Do jobs (see `processes.py`) in so many processes."""
    path = folder / f"jobs-{processes}.json"
    path.write_text(json.dumps(jobs))
    command = torchrun(processes, sys.executable, str(HERE / "processes.py"), str(path))
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    assert done.returncode == 0, done.stderr


def lines(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / METRICS).read_text().splitlines()]


def numbers(root: Path) -> list[float]:
    """All figures of metrics.jsonl."""

    def below(value: Any) -> Iterator[float]:
        if isinstance(value, (dict, list)):
            for item in value.values() if isinstance(value, dict) else value:
                yield from below(item)
        elif value is not None:
            yield value

    return [number for line in lines(root) for number in below(line)]


@pytest.fixture(scope="module")
def base(cache_path: Path) -> dict[str, Any]:
    """Eight steps an epoch of 48 rows: 2, 3 and 4 processes can share each batch."""
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
"""Three SAEs a hookpoint, of several widths."""


def modules(base: dict[str, Any], out: Path, **more: Any) -> dict[str, Any]:
    """A run of six SAEs that is validated and keeps its best."""
    kept = {"num_latents", "k", "lr", "lr_warmup_steps"}
    grid = {name: value for name, value in base.items() if name not in kept}
    return grid | {"saes": MIXED, "out": str(out), "val_every": 5, "save_best": True} | more


def few(base: dict[str, Any], out: Path, **more: Any) -> dict[str, Any]:
    """A run of two SAEs: fewer than three processes, of which one has nothing to train."""
    return modules(base, out, **more) | {"saes": MIXED[:1]}


def grid_of(saes: list[dict[str, Any]]) -> tuple[SaeOptions, ...]:
    return tuple(SaeOptions(**sae) for sae in saes)


KINDS = [
    {"activation": name, "num_latents": 48, "k": 4, "lr": 0.01, "optimizer": "adam"}
    | {"lr_warmup_steps": 4, "seed": 0}
    for name in ("groupmax", "jumprelu", "relu", "gated")
]
"""The other activations whose batches can be shared."""


def kinds(base: dict[str, Any], out: Path, **more: Any) -> dict[str, Any]:
    return modules(base, out, log_every=1) | {"saes": KINDS} | more


BATCHES: dict[str, dict[str, Any]] = {
    "signum": {},
    # With checkpoints in the middle of an update, and batches in parts.
    "adam": {"optimizer": "adam", "grad_acc_steps": 2, "micro_batch_size": 5, "grad_clip": 1.0}
    | {"decoder_norm": "fold", "k_anneal_steps": 8},
}
"""Options of runs whose batches are shared."""


@pytest.fixture(scope="module")
def alone(base: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The runs of one process: `modules`, copied `modules-9` at step 9; and in float64."""
    folder = tmp_path_factory.mktemp("alone")
    copy = [9, str(folder / "modules-9")]
    jobs = [{"options": modules(base, folder / "modules", parallel="modules"), "copy": copy}]
    for name, more in BATCHES.items():
        options = base | more | {"out": str(folder / f"double-{name}"), "epochs": 7, "log_every": 1}
        jobs.append({"options": options, "float64": True})
    jobs.append({"options": kinds(base, folder / "kinds"), "float64": True})
    together(1, jobs, folder)
    return folder


@pytest.mark.parametrize(
    ("processes", "doubles"),
    [
        (3, False),
        pytest.param(2, True, marks=pytest.mark.soak),
        pytest.param(3, True, marks=pytest.mark.soak),
        pytest.param(4, True, marks=pytest.mark.soak),
    ],
)
def test_runs_of_several_processes_are_those_of_one_and_go_on_exactly(
    processes: int,
    doubles: bool,
    base: dict[str, Any],
    alone: Path,
    snapshot: Snapshot,
    tmp_path: Path,
) -> None:
    # Six SAEs, and a run that one process began, and this many go on with.
    at_9 = tmp_path / "modules-9"
    taken_over = Path(shutil.copytree(alone / "modules-9", tmp_path / "taken-over"))
    share = {"parallel": "modules"}
    jobs: list[dict[str, Any]] = [
        {"options": modules(base, tmp_path / "modules", **share), "copy": [9, str(at_9)]},
        {"options": modules(base, taken_over, **share, resume=True)},
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
    refused = base | {"out": str(tmp_path / "refused"), "parallel": "ddp", "batch_size": 35}
    jobs.append({"options": refused, "fails": True})
    together(processes, jobs, tmp_path)

    one = snapshot(alone / "modules")
    assert snapshot(tmp_path / "modules") == one
    assert snapshot(taken_over) == one
    assert snapshot(at_9) == snapshot(alone / "modules-9")
    fit(FitConfig(**modules(base, at_9, resume=True) | {"saes": grid_of(MIXED)}))
    assert snapshot(at_9) == one
    record = (tmp_path / "modules" / "run.json").read_text()
    there, here = str(tmp_path / "modules"), str(alone / "modules")
    assert record.replace(there, here) == (alone / "modules" / "run.json").read_text()

    for more in ({}, {"resume": True, "epochs": 4, "force_config": True}):
        fit(FitConfig(**few(base, tmp_path / "few-alone", **more) | {"saes": grid_of(MIXED[:1])}))
    assert snapshot(tmp_path / "few") == snapshot(tmp_path / "few-alone")

    for name in BATCHES:
        assert lines(alone / f"double-{name}")[-1]["step"] == 56
        dead = [line["saes"]["layers.0"]["dead_percent"] for line in lines(tmp_path / name)]
        assert any(dead), "AuxK must be at work"
        assert snapshot(tmp_path / f"{name}-9") == snapshot(tmp_path / name)

    for name in ["kinds", *(f"double-{name}" for name in BATCHES)] * doubles:
        expected, found = numbers(alone / name), numbers(tmp_path / name)
        assert found == pytest.approx(expected, rel=0, abs=1e-9)

    told = [tmp_path / f"refused.error.{rank}" for rank in range(processes)]
    assert [p.read_text().split()[:2] for p in told] == [["ConfigError", "2:"]] + [
        ["PeerFailedError", "2:"]
    ] * (processes - 1)
    assert "35 lanes cannot be divided" in told[0].read_text()
    assert "1, 5, 7, 35 processes" in told[0].read_text()
    assert not (tmp_path / "refused").exists()


# --- how they end ---------------------------------------------------------------------------------


def command(processes: int, options: dict[str, Any]) -> list[str]:
    """`saetrain fit` under torchrun."""
    line = [str(BIN / "saetrain"), "fit", options["cache"]]
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if name != "cache" and value is not False:
            line += [flag] if value is True else [flag, str(value)]
    return torchrun(processes, *line)


def ranks_of(parent: int) -> dict[int, int]:
    """Process ids of torchrun's children, by rank."""
    found = {}
    for text in Path(f"/proc/{parent}/task").glob("*/children"):
        for pid in text.read_text().split():
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            found |= {int(v[5:]): int(pid) for v in variables if v.startswith(b"RANK=")}
    return found


def begin(processes: int, options: dict[str, Any]) -> subprocess.Popen[str]:
    """A run that has made a checkpoint, and is at work."""
    process = subprocess.Popen(command(processes, options), stderr=subprocess.PIPE, text=True)
    while not list(Path(options["out"]).glob("checkpoint-*.json")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    time.sleep(random.random() / 10)
    return process


def ending(root: Path) -> dict[str, Any]:
    """Contents of exit.json."""
    told: dict[str, Any] = json.loads((root / "exit.json").read_text())
    return told


@pytest.mark.parametrize("parallel", ["modules", pytest.param("ddp", marks=pytest.mark.soak)])
def test_a_rank_that_is_killed_ends_all_at_once_and_the_run_goes_on_exactly(
    parallel: str, base: dict[str, Any], snapshot: Snapshot, tmp_path: Path
) -> None:
    run = base | {"parallel": parallel, "epochs": 12, "save_every": 5, "resume": True}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = begin(2, run | {"out": str(killed)})
    os.kill(ranks_of(process.pid)[1], signal.SIGKILL)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1
    assert told.count("error: process 1 of this run is gone without a word") == 1
    assert "guard.py" not in told  # no traceback of ours; torchrun prints one of its own
    ended = ending(killed)
    assert ended["code"] == 11
    assert ended["reason"].startswith("PeerGoneError: process 1 of this run is gone")
    assert lines(killed)[-1]["step"] < 96
    finish(run, whole, killed, tmp_path)
    assert ending(killed) == {"code": 0, "reason": "finished", "step": 96}
    assert snapshot(killed) == snapshot(whole)


@pytest.mark.parametrize("parallel", ["modules", pytest.param("ddp", marks=pytest.mark.soak)])
@pytest.mark.parametrize("to", ["torchrun", pytest.param("rank 1", marks=pytest.mark.soak)])
def test_a_signal_stops_all_at_one_step_and_the_run_goes_on_exactly(
    parallel: str, to: str, base: dict[str, Any], snapshot: Snapshot, tmp_path: Path
) -> None:
    run = base | {"parallel": parallel, "epochs": 12, "keep_every": 5, "resume": True}
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    process = begin(2, run | {"out": str(stopped), "save_every": 10_000})
    if to == "torchrun":
        process.terminate()
    else:
        os.kill(ranks_of(process.pid)[1], signal.SIGTERM)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1
    ended = ending(stopped)
    assert (ended["code"], ended["reason"]) == (143, "SIGTERM")
    assert 0 < ended["step"] < 96
    assert told.count(f"terminated: SIGTERM: step {ended['step']} is saved; --resume") == 1
    assert "error: " not in told
    assert "guard.py" not in told
    finish(run | {"save_every": 10_000}, whole, stopped, tmp_path)
    assert snapshot(stopped) == snapshot(whole)


def finish(run: dict[str, Any], whole: Path, broken: Path, folder: Path) -> None:
    """Go on with a run, and make it in one go: SAEs by one process, shared batches by two."""
    runs = [run | {"out": str(out)} for out in (whole, broken)]
    if run["parallel"] == "ddp":
        together(2, [{"options": options} for options in runs], folder)
    else:
        for options in runs:
            fit(FitConfig(**options))


def test_runs_that_are_stopped_damaged_and_forced_go_on_as_those_of_one_process(
    base: dict[str, Any], snapshot: Snapshot, tmp_path: Path
) -> None:
    """Two processes do what one does in test_stopping, test_exact, test_forcing, test_finetune."""
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
    # What the runs of `modules` are fine-tuned from must be there before they are.
    together(2, sorted(jobs, key=lambda job: "tuned" in job["options"]["out"]), tmp_path)

    for parallel in ("ddp", "modules"):
        said = [(tmp_path / f"{parallel}.error.{rank}").read_text() for rank in (0, 1)]
        assert said[0] == said[1]
        assert said[0].startswith("Stopped 143: SIGTERM: step ")
        if parallel == "ddp":
            assert "step 7 is saved" in said[0]
        zero, one = (told(tmp_path / parallel, rank) for rank in (0, 1))
        assert (zero["new_steps"], one["new_steps"]) == (3, 3)  # back to step 21
        assert "going on from step 21" in " ".join(zero["warnings"])
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

    # Another number of processes that share each batch is warned of, and written down.
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


def told(root: Path, rank: int) -> dict[str, Any]:
    """What a process says at its end, see `processes.py`."""
    found: dict[str, Any] = json.loads(Path(f"{root}.told.{rank}").read_text())
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
def test_what_looks_at_a_whole_batch_is_refused_and_other_modules_learn_as_of_one_process(
    names: tuple[str, ...],
    base: dict[str, Any],
    make_cache: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """In float64, in which the order of adding is seen from the tenth digit on only."""
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
    together(2, jobs, tmp_path)
    assert "chooses among a whole batch" in (tmp_path / "refused.error.0").read_text()
    assert not (tmp_path / "refused").exists()
    monkeypatch.setattr(saetrain.training.init, "build_sae", double)
    for name in names:
        fit(FitConfig(**runs[name] | {"out": str(tmp_path / f"{name}-alone")}))
        found = numbers(tmp_path / name)
        assert found == pytest.approx(numbers(tmp_path / f"{name}-alone"), rel=0, abs=1e-9)


@pytest.mark.parametrize("parallel", ["ddp", "modules"])
def test_what_one_rank_cannot_read_is_told_once_with_its_code(
    parallel: str, base: dict[str, Any], cache_path: Path, tmp_path: Path
) -> None:
    cache = Path(shutil.copytree(cache_path, tmp_path / "cache"))
    for file in (cache / "activations").rglob("*layers.1*/*"):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)
    out = tmp_path / "run"
    options = base | {"parallel": parallel, "cache": str(cache), "out": str(out)}
    done = subprocess.run(
        command(2, options), capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1, done.stderr
    assert "guard.py" not in done.stderr  # no traceback of ours; torchrun prints one of its own
    assert json.loads((out / "exit.json").read_text())["code"] == 8


def test_what_all_had_done_is_saved_before_rows_of_one_could_not_be_read_and_goes_on_exactly(
    base: dict[str, Any], snapshot: Snapshot, tmp_path: Path
) -> None:
    jobs: list[dict[str, Any]] = []
    for parallel in ("ddp", "modules"):
        run = base | {"parallel": parallel, "epochs": 1, "resume": True}
        broken = run | {"out": str(tmp_path / parallel)}
        # SAEs of several processes are saved as they last met, shared batches as far as they came.
        step, saved = (5, 5) if parallel == "ddp" else (7, 6)
        copy = [saved, str(tmp_path / f"{parallel}-copy")]
        jobs += [
            {"options": broken, "unreadable": [1, step], "fails": True, "copy": copy},
            {"options": broken},
            {"options": run | {"out": str(tmp_path / f"{parallel}-whole")}},
        ]
    together(2, jobs, tmp_path)
    for parallel in ("ddp", "modules"):
        found = snapshot(tmp_path / parallel)
        assert found == snapshot(tmp_path / f"{parallel}-whole")
        told = [(tmp_path / f"{parallel}.error.{rank}").read_text().split()[:2] for rank in (0, 1)]
        assert told == [["PeerFailedError", "8:"], ["CorruptShardError", "8:"]]
        assert (tmp_path / f"{parallel}-copy").is_dir()


def test_several_processes_follow_a_harvest_as_one_does(
    base: dict[str, Any], snapshot: Snapshot, tmp_path: Path
) -> None:
    follow = base | {"follow": True, "segment_shards": 2, "val_fraction": 0, "epochs": 1}
    follow |= {"batch_size": 32, "pool_rows": 64}
    out = {kind: tmp_path / kind for kind in ("alone", "modules", "ddp")}
    share = [follow | {"parallel": kind, "out": str(out[kind])} for kind in ("modules", "ddp")]
    together(2, [{"options": options} for options in share], tmp_path)
    fit(FitConfig(**follow | {"out": str(out["alone"])}))
    assert snapshot(out["modules"]) == snapshot(out["alone"])
    assert numbers(out["ddp"]) == pytest.approx(numbers(out["alone"]), rel=1e-2)
    for kind in ("modules", "ddp"):
        assert (out[kind] / "segments.json").read_bytes() == (
            out["alone"] / "segments.json"
        ).read_bytes()


def test_processes_that_are_not_told_what_to_share_are_refused_once(
    base: dict[str, Any], tmp_path: Path
) -> None:
    options = base | {"out": str(tmp_path / "run")}
    done = subprocess.run(
        command(2, options), capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 1
    assert done.stderr.count("error: ") == 1
    assert "--parallel ddp" in done.stderr
    assert "--parallel modules" in done.stderr
    assert not (tmp_path / "run").exists()
