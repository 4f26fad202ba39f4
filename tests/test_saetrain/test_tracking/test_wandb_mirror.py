"""Real offline runs read back, lines that are there once, and errors."""

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
from saetrain.tracking.density_bins import EDGES
from saetrain.tracking.jsonl import METRICS, TIMINGS

Options = Callable[..., FitConfig]
Snapshot = Callable[[Path], dict[str, bytes]]

GIVEN_UP = "W&B is left alone"


class Killed(BaseException):
    """Stands for a signal."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """W&B's folder, and nothing of this machine's W&B."""
    import wandb

    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    for name in ("WANDB_DIR", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb.teardown()  # it reads the environment once
    yield tmp_path / "wandb"
    wandb.teardown()


def records(path: Path) -> list[Any]:
    """What a .wandb file holds: records of Protocol Buffers, in the log format of LevelDB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, whole = path.read_bytes(), 7, b""
    assert data[:4] == b":W&B"
    found = []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        _, length, kind = struct.unpack_from("<IHB", data, place)
        if left < 7 or kind == 0:  # the rest of a block
            place += left
            continue
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or the end of one
            found.append(Record.FromString(whole))
            whole = b""
    return found


def of_kind(found: list[Any], kind: str) -> list[Any]:
    return [getattr(r, kind) for r in found if r.WhichOneof("record_type") == kind]


def history(found: list[Any]) -> list[dict[str, Any]]:
    """Rows, with the keys that W&B nests joined again."""
    rows = []
    for row in of_kind(found, "history"):
        items = {i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in row.item}
        rows.append({k: v for k, v in items.items() if k not in ("_runtime", "_timestamp")})
    return rows


def the_only_run(folder: Path, run_id: str = "*") -> list[Any]:
    import wandb

    wandb.teardown()  # as at the end of a process: its service writes the last records
    (path,) = folder.glob(f"offline-run-*-{run_id}/run-*.wandb")
    return records(path)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def expected(root: Path, names: dict[str, str]) -> list[dict[str, Any]]:
    """What W&B must hold of a run, a row for each step. `names`: SAEs, and what theirs begin with.

    Histograms come back as W&B spells them.
    """
    timings = {line["step"]: line for line in lines(root / TIMINGS)}
    rows: dict[int, dict[str, Any]] = {}
    for line in lines(root / METRICS):
        row = rows.setdefault(line["step"], {"_step": line["step"], "rows": line["rows"]})
        for name, prefix in names.items():
            of = dict(line.get("saes", {}).get(name, {}))
            if (density := of.pop("log10_density", None)) is not None:
                row[f"{prefix}never_fired"] = density["never"]
                for part, value in (("bins", EDGES), ("values", density["counts"])):
                    row[f"{prefix}log10_density/{part}"] = value
                row[f"{prefix}log10_density/_type"] = "histogram"
            row |= {f"{prefix}{k}": v for k, v in of.items() if v is not None}
            row |= {f"{prefix}val_{k}": v for k, v in line.get("val", {}).get(name, {}).items()}
        row |= {f"timings/{k}": v for k, v in timings[line["step"]].items() if k != "step"}
    return list(rows.values())


def stop_in_step(monkeypatch: pytest.MonkeyPatch, stop_at: int) -> None:
    real = saetrain.training.step.train_step

    def step(trainer: Any, rows: Any, number: int, alpha: float) -> None:
        if number == stop_at:
            raise Killed
        real(trainer, rows, number, alpha)

    monkeypatch.setattr(saetrain.training.step, "train_step", step)


BOTH = {"layers.0": "layers.0/", "layers.1": "layers.1/"}


def test_an_offline_run_holds_what_the_files_hold_and_what_the_options_say(
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
    told = capsys.readouterr().err
    assert told.count("W&B: run is run") == 1
    assert str(folder) in told


def test_a_run_stopped_and_resumed_has_one_id_and_every_step_once(
    options: Options, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Lines of steps 4 and 8 are written, the checkpoint is of step 6, and goes on from there."""
    config = options(wandb="offline", save_every=6)
    with monkeypatch.context() as patch:
        stop_in_step(patch, 10)
        with pytest.raises(Killed):
            fit(config)
    root = Path(config.out)
    begun = read_run(root).wandb_id
    (first,) = folder.glob("offline-run-*")
    assert [row["_step"] for row in history(the_only_run(folder))] == [4, 8]
    assert [e.exit_code for e in of_kind(the_only_run(folder), "exit")] == [1]
    fit(dataclasses.replace(config, resume=True))
    assert read_run(root).wandb_id == begun
    found = the_only_run(folder, str(begun))  # the other is out of the way of `wandb sync`
    assert (folder / first.name.replace("offline-run", "resumed-run")).is_dir()
    assert [row["_step"] for row in history(found)] == [4, 8, 12]
    assert history(found) == expected(root, BOTH)


def test_a_finished_run_is_handed_over_when_it_is_asked_for_later(
    options: Options, folder: Path
) -> None:
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


def test_each_sae_can_have_its_own_run(options: Options, folder: Path) -> None:
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


# --- what fails ----------------------------------------------------------------------------------


def no_wandb(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(sys.modules, "wandb", None)


def no_login(patch: pytest.MonkeyPatch) -> None:
    del patch  # the fixture hides whatever login there is


def no_network(patch: pytest.MonkeyPatch) -> None:
    import wandb

    patch.setenv("WANDB_API_KEY", "0" * 40)
    patch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    patch.setenv("WANDB_INIT_TIMEOUT", "1")
    wandb.teardown()


@pytest.mark.parametrize(
    ("broken", "told"),
    [(no_wandb, "wandb"), (no_login, "wandb login"), (no_network, "deadline|refused|timed out")],
)
def test_without_package_login_or_network_the_run_is_the_same_and_it_is_told_once(
    options: Options,
    snapshot: Snapshot,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    broken: Callable[[pytest.MonkeyPatch], None],
    told: str,
) -> None:
    plain = options(out=options().out + "-plain")
    fit(plain)
    capsys.readouterr()
    config = options(wandb="online", wandb_log_final_artifact=True)
    with monkeypatch.context() as patch:
        broken(patch)
        fit(config)
    said = [line for line in capsys.readouterr().err.splitlines() if GIVEN_UP in line]
    assert len(said) == 1
    assert re.search(told, said[0])
    assert snapshot(Path(config.out)) == snapshot(Path(plain.out))


class Fake:
    """A run at W&B: takes rows, knows of some already, and may fail at a step."""

    def __init__(self, starting_step: int = 0, fails_at: int | None = None, **given: Any) -> None:
        self.starting_step, self.fails_at, self.given = starting_step, fails_at, given
        self.id, self.url = given["id"], "https://wandb.test/run"
        self.steps: list[int] = []
        self.finished: list[int] = []

    def log(self, row: dict[str, Any], step: int) -> None:
        assert row
        if step == self.fails_at:
            raise BrokenPipeError("the service is gone")
        self.steps.append(step)

    def finish(self, exit_code: int) -> None:
        self.finished.append(exit_code)


def install(patch: pytest.MonkeyPatch, **known: Any) -> list[Fake]:
    """Put a fake in W&B's place; returns the runs that will be begun."""
    runs: list[Fake] = []

    def init(**given: Any) -> Fake:
        runs.append(Fake(**known, **given))
        return runs[-1]

    module = SimpleNamespace(
        init=init,
        login=lambda **_: True,
        Settings=lambda **settings: settings,
        Histogram=lambda np_histogram: np_histogram,
    )
    patch.setitem(sys.modules, "wandb", module)
    return runs


def test_online_a_resumed_run_is_handed_only_the_lines_that_are_not_there(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B has step 8, which the checkpoint of step 6 does not: it is made again, not sent."""
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
        late = install(patch, starting_step=5)  # it lost what was sent last
        fit(dataclasses.replace(config, resume=True))
    assert late[0].steps == [8, 12]


def test_an_error_in_the_middle_ends_logging_and_not_the_run(
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
    told = capsys.readouterr().err
    assert told.count(GIVEN_UP) == 1
    assert "the service is gone" in told
    assert snapshot(Path(config.out)) == snapshot(Path(plain.out))


def test_wandb_is_not_imported_unless_it_is_asked_for(
    options: Options, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # whoever imports it, fails
    fit(options(wandb_project="saes", wandb_log_final_artifact=True))
    assert "W&B" not in capsys.readouterr().err
