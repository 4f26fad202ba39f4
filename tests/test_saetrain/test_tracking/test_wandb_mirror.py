"""Offline runs are read back, resumed runs log each line once, and errors stop only logging."""

from __future__ import annotations

import dataclasses
import json
import re
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import saetrain.training.step
from saetrain.config.fit_config import FitConfig
from saetrain.launch.run import fit
from saetrain.runs.record import read_run
from saetrain.tracking import EDGES
from saetrain.tracking.jsonl import METRICS, TIMINGS

Options = Callable[..., FitConfig]
Snapshot = Callable[[Path], dict[str, bytes]]

STOPPED = "logging to W&B stopped"


class Killed(BaseException):
    """Stands for a signal."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for W&B, isolated from this machine's settings and login."""
    import wandb

    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb.teardown()  # it caches the environment
    yield tmp_path / "wandb"
    wandb.teardown()


def records(path: Path) -> list[Any]:
    """Parse a .wandb file: Protocol Buffers records in LevelDB's log format."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, offset, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    found = []
    while offset + 7 <= len(data):
        left = 32768 - offset % 32768
        _, length, kind = struct.unpack_from("<IHB", data, offset)
        if left < 7 or kind == 0:  # padding at the end of a block
            offset += left
            continue
        whole += data[offset + 7 : offset + 7 + length]
        offset += 7 + length
        if kind in (1, 4):  # FULL or LAST
            found.append(Record.FromString(whole))
            whole = b""
    return found


def of_kind(found: list[Any], kind: str) -> list[Any]:
    return [getattr(r, kind) for r in found if r.WhichOneof("record_type") == kind]


def history(found: list[Any]) -> list[dict[str, Any]]:
    """Return the logged rows, with nested keys joined by slashes."""
    rows = []
    for row in of_kind(found, "history"):
        items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in row.item}
        rows.append({k: v for k, v in items.items() if k not in ("_runtime", "_timestamp")})
    return rows


def the_only_run(folder: Path, run_id: str = "*") -> list[Any]:
    import wandb

    wandb.teardown()  # flushes the last records, as the end of a process does
    (path,) = folder.glob(f"offline-run-*-{run_id}/run-*.wandb")
    return records(path)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def expected(root: Path, names: dict[str, str]) -> list[dict[str, Any]]:
    """Return the rows that W&B must hold, one a step; `names` maps SAEs to prefixes of keys."""
    timings = {line["step"]: line for line in lines(root / TIMINGS)}
    for line in timings.values():
        del line["xxh3_64"]
    rows: dict[int, dict[str, Any]] = {}
    for line in lines(root / METRICS):
        row = rows.setdefault(line["step"], {"_step": line["step"], "rows": line["rows"]})
        for name, prefix in names.items():
            metrics = dict(line.get("saes", {}).get(name, {}))
            if (density := metrics.pop("log10_density", None)) is not None:
                row[f"{prefix}never_fired"] = density["never"]
                for part, value in (("bins", EDGES), ("values", density["counts"])):
                    row[f"{prefix}log10_density/{part}"] = value
                row[f"{prefix}log10_density/_type"] = "histogram"
            row |= {f"{prefix}{k}": v for k, v in metrics.items() if v is not None}
            row |= {f"{prefix}val_{k}": v for k, v in line.get("val", {}).get(name, {}).items()}
        row |= {f"timings/{k}": v for k, v in timings[line["step"]].items() if k != "step"}
    return list(rows.values())


def stop_in_step(monkeypatch: pytest.MonkeyPatch, stop_at: int) -> None:
    real = saetrain.training.step.train_step

    def step(trainer: Any, rows: Any, number: int) -> None:
        if number == stop_at:
            raise Killed
        real(trainer, rows, number)

    monkeypatch.setattr(saetrain.training.step, "train_step", step)


BOTH = {"layers.0": "layers.0/", "layers.1": "layers.1/"}


def test_an_offline_run_holds_the_lines_of_the_files_and_the_options(
    options: Options, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = options(
        wandb="offline",
        wandb_project="saes",
        wandb_entity="us",
        wandb_group="trials",
        wandb_tags=("small", "first"),
        wandb_notes="what for",
        wandb_log_final_artifact=True,
        histogram_every=2,
        val_every=4,
    )
    fit(config)
    root, found = Path(config.out), the_only_run(folder)
    (run,) = of_kind(found, "run")
    assert run.run_id == read_run(root).wandb_id
    assert (run.project, run.entity, run.run_group) == ("saes", "us", "trials")
    assert (run.display_name, list(run.tags), run.notes) == ("run", ["small", "first"], "what for")
    settings = {item.key: json.loads(item.value_json) for item in run.config.update}
    sizes = {"d_in": 16, "num_latents": 48, "k": 3}
    assert settings["saes"]["layers.1"]["config"].items() >= sizes.items()
    assert (settings["steps"], settings["batch_size"]) == (12, 32)
    rows = history(found)
    assert rows == expected(root, BOTH)
    assert [row["_step"] for row in rows] == [4, 8, 12]
    assert ["layers.0/log10_density/values" in row for row in rows] == [False, True, True]
    assert all("layers.1/val_fvu" in row and "timings/data_wait" in row for row in rows)
    artifacts = {a.name: a for a in of_kind(found, "artifact")}
    assert artifacts.keys() == {f"{run.run_id}-layers.0", f"{run.run_id}-layers.1"}
    for artifact in artifacts.values():
        contents = {entry.path for entry in artifact.manifest.contents}
        assert (artifact.type, contents) == ("sae", {"cfg.json", "sae.safetensors"})
    assert [e.exit_code for e in of_kind(found, "exit")] == [0]
    printed = capsys.readouterr().err
    assert printed.count("W&B: run is run") == 1
    assert str(folder) in printed


def test_a_resumed_run_keeps_its_id_and_logs_every_step_once(
    options: Options, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is killed after the lines of steps 4 and 8 and resumes from step 6."""
    config = options(wandb="offline", save_every=6)
    with monkeypatch.context() as patch:
        stop_in_step(patch, 10)
        with pytest.raises(Killed):
            fit(config)
    root = Path(config.out)
    run_id = read_run(root).wandb_id
    (first,) = folder.glob("offline-run-*")
    assert [row["_step"] for row in history(the_only_run(folder))] == [4, 8]
    assert [e.exit_code for e in of_kind(the_only_run(folder), "exit")] == [1]
    fit(dataclasses.replace(config, resume=True))
    assert read_run(root).wandb_id == run_id
    found = the_only_run(folder, str(run_id))  # the first folder is renamed
    assert (folder / first.name.replace("offline-run", "resumed-run")).is_dir()
    assert [row["_step"] for row in history(found)] == [4, 8, 12]
    assert history(found) == expected(root, BOTH)


def test_resuming_a_finished_run_with_wandb_uploads_it(options: Options, folder: Path) -> None:
    config = options()
    fit(config)
    root = Path(config.out)
    assert read_run(root).wandb_id is None
    before = (root / METRICS).read_bytes()
    fit(dataclasses.replace(config, resume=True, wandb="offline", wandb_log_final_artifact=True))
    found = the_only_run(folder, str(read_run(root).wandb_id))
    assert history(found) == expected(root, BOTH)
    assert len(of_kind(found, "artifact")) == 2
    assert (root / METRICS).read_bytes() == before


def test_wandb_per_sae_makes_a_run_for_each_sae(options: Options, folder: Path) -> None:
    config = options(wandb="offline", wandb_per_sae=True, wandb_log_final_artifact=True)
    fit(config)
    root, run_id = Path(config.out), read_run(Path(config.out)).wandb_id
    for number, name in enumerate(BOTH):
        found = the_only_run(folder, f"{run_id}-{number}")
        (run,) = of_kind(found, "run")
        assert (run.display_name, run.run_group) == (f"run/{name}", "run")
        assert history(found) == expected(root, {name: ""})
        (artifact,) = of_kind(found, "artifact")
        assert artifact.name == f"{run_id}-{number}-{name}"


# --- errors --------------------------------------------------------------------------------------


def no_wandb(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "wandb", None)


def no_login(patch: pytest.MonkeyPatch) -> None:
    del patch  # the fixture hides this machine's login


def no_network(patch: pytest.MonkeyPatch) -> None:
    import wandb

    patch.setenv("WANDB_API_KEY", "0" * 40)
    patch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    patch.setenv("WANDB_INIT_TIMEOUT", "1")
    wandb.teardown()


@pytest.mark.parametrize(
    ("broken", "reason"),
    [(no_wandb, "wandb"), (no_login, "wandb login"), (no_network, "deadline|refused|timed out")],
)
def test_without_package_login_or_network_the_run_is_the_same_with_one_warning(
    options: Options,
    snapshot: Snapshot,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    broken: Callable[[pytest.MonkeyPatch], None],
    reason: str,
) -> None:
    plain = options(out=options().out + "-plain")
    fit(plain)
    capsys.readouterr()
    config = options(wandb="online", wandb_log_final_artifact=True)
    with monkeypatch.context() as patch:
        broken(patch)
        fit(config)
    warnings = [line for line in capsys.readouterr().err.splitlines() if STOPPED in line]
    assert len(warnings) == 1
    assert re.search(reason, warnings[0])
    assert snapshot(Path(config.out)) == snapshot(Path(plain.out))


class Fake:
    """A W&B run that already has rows before `starting_step` and may fail at a step."""

    def __init__(self, starting_step: int = 0, fails_at: int | None = None, **given: Any) -> None:
        self.starting_step, self.fails_at, self.given = starting_step, fails_at, given
        self.id, self.url = given["id"], "https://wandb.test/run"
        self.steps: list[int] = []
        self.finished: list[int] = []

    def log(self, row: dict[str, Any], step: int) -> None:
        assert row
        if step == self.fails_at:
            raise BrokenPipeError("the service exited")
        self.steps.append(step)

    def finish(self, exit_code: int) -> None:
        self.finished.append(exit_code)


def install(patch: pytest.MonkeyPatch, **state: Any) -> list[Fake]:
    """Replace the wandb package by a fake; return the list of runs that it will create."""
    runs: list[Fake] = []

    def init(**given: Any) -> Fake:
        runs.append(Fake(**state, **given))
        return runs[-1]

    module = SimpleNamespace(
        init=init,
        login=lambda **_: True,
        Settings=lambda **settings: settings,
        Histogram=lambda np_histogram: np_histogram,
    )
    patch.setitem(sys.modules, "wandb", module)
    return runs


def test_a_resumed_online_run_uploads_only_missing_lines(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 8 is repeated from the checkpoint of step 6, but W&B has it already."""
    config = options(wandb="online", save_every=6)
    with monkeypatch.context() as patch:
        runs = install(patch)
        stop_in_step(patch, 10)
        with pytest.raises(Killed):
            fit(config)
    assert (runs[0].steps, runs[0].finished) == ([4, 8], [1])
    with monkeypatch.context() as patch:
        again = install(patch, starting_step=9)
        fit(dataclasses.replace(config, resume=True))
    assert (again[0].steps, again[0].finished) == ([12], [0])
    assert again[0].given["id"] == runs[0].given["id"]
    assert again[0].given["resume"] == "allow"
    with monkeypatch.context() as patch:
        late = install(patch, starting_step=5)  # W&B lost the last lines
        fit(dataclasses.replace(config, resume=True))
    assert late[0].steps == [8, 12]


def test_an_error_stops_logging_and_not_the_run(
    options: Options,
    snapshot: Snapshot,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = options(out=options().out + "-plain")
    fit(plain)
    config = options(wandb="online", wandb_log_final_artifact=True)
    with monkeypatch.context() as patch:
        runs = install(patch, fails_at=8)
        fit(config)
    assert (runs[0].steps, runs[0].finished) == ([4], [1])
    printed = capsys.readouterr().err
    assert printed.count(STOPPED) == 1
    assert "the service exited" in printed
    assert snapshot(Path(config.out)) == snapshot(Path(plain.out))


def test_wandb_is_imported_only_with_the_option(
    options: Options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it fails
    fit(options(wandb_project="saes", wandb_log_final_artifact=True))
    assert "W&B" not in capsys.readouterr().err
