"""Weights & Biases: a mirror of metrics.jsonl and timings.jsonl, that must never stop a run.

The files are the truth. Whoever goes on with a run hands W&B the lines that it does not have:
online those after the last that it knows; offline all of them, for W&B keeps an offline run's last
lines in memory and loses them when the process is killed. So every line is there once, whatever
happened. `wandb` is imported when it is asked for, and not before.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import secrets
import string
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from saetrain.config.fit_config import FitConfig
from saetrain.runs.record import RunRecord, SaeEntry
from saetrain.tracking.density_bins import EDGES
from saetrain.tracking.jsonl import METRICS, TIMINGS, read_lines

_FINISH_SECONDS = 60
_UPLOAD_SECONDS = 600
_SET_ASIDE = "resumed-run"
"""What an offline run's folder is called, for offline-run, once a later one holds its lines."""


def new_id(options: FitConfig) -> str | None:
    """An id for a run at W&B, if it is to be logged there."""
    if options.wandb == "disabled":
        return None
    letters = string.ascii_lowercase + string.digits
    return "".join(secrets.choice(letters) for _ in range(8))


def open_wandb(root: Path, record: RunRecord, say: Callable[[str], None]) -> WandbRuns | None:
    """The runs at W&B of a run, with all lines that its files have; None unless asked for.

    Args:
        root: folder of the run.
        record: what the run is.
        say: tells the user.
    """
    if record.options.wandb == "disabled":
        return None
    runs = WandbRuns(root, record, say)
    runs.open()
    return runs


class WandbRuns:
    """One run at W&B for all SAEs, or one for each. The first error is told, and the last thing.

    Args:
        root: folder of the run.
        record: what the run is.
        say: tells the user.
    """

    def __init__(self, root: Path, record: RunRecord, say: Callable[[str], None]) -> None:
        self._root, self._record, self._say = root, record, say
        self._runs: list[_Run] = []
        self._given_up = False
        self._exit_code = 1

    def open(self) -> None:
        """Begin the runs, or go on with them."""
        self._try(self._open)

    def log(self, line: Mapping[str, Any], timings: Mapping[str, Any] | None = None) -> None:
        """Take a line of metrics.jsonl, and the one of timings.jsonl beside it."""
        self._try(lambda: self._log(line, timings))

    def end(self) -> None:
        """The run has come to its end, and its SAEs are saved."""
        self._exit_code = 0
        if self._record.options.wandb_log_final_artifact:
            self._try(self._log_artifacts)

    def close(self) -> None:
        """Upload what is left, for a minute at most."""
        self._try(self._close)

    def _try(self, act: Callable[[], None]) -> None:
        if self._given_up:
            return
        try:
            act()
        except (Exception, SystemExit) as error:
            self._given_up = True
            what = " ".join(str(error).split()) or type(error).__name__
            self._say(
                f"warning: W&B is left alone from here on: {what[:500]}. The run goes on, and "
                f"{METRICS} has all of it; --resume with --wandb hands it over later"
            )
            for run in self._runs:
                run.forget()

    def _open(self) -> None:
        import wandb

        options = self._record.options
        if options.wandb == "online" and not wandb.login(prompt=False, verify=False):
            raise RuntimeError("no API key is configured: wandb login, or --wandb offline")
        run_id = self._record.wandb_id
        assert run_id is not None
        name = self._root.resolve().name
        if options.wandb_per_sae:
            group = options.wandb_group or name
            for i, entry in enumerate(self._record.saes):
                of_one = options.of(entry.options)
                self._begin(f"{run_id}-{i}", f"{name}/{entry.name}", group, of_one, [entry])
        else:
            saes = list(self._record.saes)
            self._begin(run_id, name, options.wandb_group, options, saes)
        timings = {line["step"]: line for line in read_lines(self._root / TIMINGS)}
        for line in read_lines(self._root / METRICS):
            self._log(line, timings.get(line["step"]) if "saes" in line else None)

    def _begin(
        self, run_id: str, name: str, group: str | None, options: FitConfig, saes: list[SaeEntry]
    ) -> None:
        import wandb

        offline = options.wandb == "offline"
        if offline:
            _set_aside(run_id)
        settings = wandb.Settings(
            silent=True,
            console="off",  # the bar is no log
            finish_timeout=float(os.environ.get("WANDB_FINISH_TIMEOUT", _FINISH_SECONDS)),
            finish_timeout_raises=True,
        )
        run = wandb.init(
            mode=options.wandb,
            id=run_id,
            resume=None if offline else "allow",
            reinit="create_new",
            name=name,
            group=group,
            project=options.wandb_project,
            entity=options.wandb_entity,
            tags=options.wandb_tags or None,
            notes=options.wandb_notes,
            config=_config(self._record, options, saes),
            settings=settings,
        )
        self._runs.append(_Run(run, saes, prefixed=not options.wandb_per_sae))
        where = f"offline in {run.settings.sync_dir}" if offline else run.url
        self._say(f"W&B: {name} is run {run_id}, {where}")

    def _log(self, line: Mapping[str, Any], timings: Mapping[str, Any] | None) -> None:
        for run in self._runs:
            run.log(line, timings or {})

    def _log_artifacts(self) -> None:
        import wandb

        for run in self._runs:
            for entry in run.saes:
                name = re.sub(r"[^A-Za-z0-9_.-]", "-", f"{run.id}-{entry.name}")
                artifact = wandb.Artifact(name, type="sae", metadata=dataclasses.asdict(entry))
                artifact.add_dir(str(self._root / entry.name))
                run.upload(artifact, wait=self._record.options.wandb == "online")

    def _close(self) -> None:
        while self._runs:
            self._runs.pop().finish(self._exit_code)


class _Run:
    """One run at W&B, of some SAEs."""

    def __init__(self, run: Any, saes: list[SaeEntry], *, prefixed: bool) -> None:
        self._run, self.saes, self._prefixed = run, saes, prefixed
        self.id: str = run.id

    def log(self, line: Mapping[str, Any], timings: Mapping[str, Any]) -> None:
        """Hand over a line, unless W&B has it."""
        step = line["step"]
        if step < self._run.starting_step:
            return
        row = {"rows": line["rows"]}
        for entry in self.saes:
            of = f"{entry.name}/" if self._prefixed else ""
            for name, value in line.get("saes", {}).get(entry.name, {}).items():
                row |= {f"{of}{key}": found for key, found in _figures(name, value).items()}
            for name, value in line.get("val", {}).get(entry.name, {}).items():
                row[f"{of}val_{name}"] = value
        row |= {f"timings/{name}": value for name, value in timings.items() if name != "step"}
        self._run.log(row, step=step)

    def upload(self, artifact: Any, *, wait: bool) -> None:
        logged = self._run.log_artifact(artifact)
        if wait:
            logged.wait(timeout=_UPLOAD_SECONDS)

    def finish(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)

    def forget(self) -> None:
        """Finish as well as may be; what went wrong has been told."""
        with contextlib.suppress(Exception, SystemExit):
            self._run.finish(exit_code=1)


def _figures(name: str, value: Any) -> dict[str, Any]:
    """A figure of metrics.jsonl as W&B takes it; what is not known is left out."""
    if name == "log10_density":
        import wandb

        histogram = wandb.Histogram(np_histogram=(value["counts"], EDGES))
        return {name: histogram, "never_fired": value["never"]}
    return {} if value is None else {name: value}


def _config(record: RunRecord, options: FitConfig, saes: list[SaeEntry]) -> dict[str, Any]:
    """What W&B shows of a run beside its curves."""
    shown = {k: v for k, v in dataclasses.asdict(options).items() if not k.startswith("wandb")}
    shown |= {"cache_id": record.cache_id, "steps": record.steps, "versions": record.versions}
    return shown | {"saes": {entry.name: dataclasses.asdict(entry) for entry in saes}}


def _set_aside(run_id: str) -> None:
    """Rename earlier folders of an offline run, so that `wandb sync` finds the whole one alone."""
    import wandb

    folder = Path(wandb.setup().settings.wandb_dir)
    for old in folder.glob(f"offline-run-*-{run_id}"):
        old.rename(old.with_name(old.name.replace("offline-run", _SET_ASIDE, 1)))
