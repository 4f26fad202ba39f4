"""Weights & Biases: a copy of metrics.jsonl and timings.jsonl, whose errors never stop a run.

The files are authoritative. A resumed run uploads the lines that W&B lacks: online, those after its
last step; offline, all of them, because W&B keeps the last lines of an offline run in memory and
loses them when the process is killed. So every line is logged once. `wandb` is imported only with
--wandb.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from actcache.filesystem.rooted import walk
from saetrain.config.fit_config import FitConfig
from saetrain.config.sae import SaeEntry
from saetrain.runs.record import RunRecord
from saetrain.tracking import EDGES
from saetrain.tracking.jsonl import METRICS, TIMINGS, read_lines

_FINISH_SECONDS = 60
_UPLOAD_SECONDS = 600
_SET_ASIDE = "resumed-run"
"""Prefix that replaces offline-run in an offline folder once a later one holds its lines."""


def open_wandb(
    root: Path, record: RunRecord, print_line: Callable[[str], None]
) -> WandbRuns | None:
    """Create or resume the W&B runs of a run and upload missing lines; None without --wandb.

    Args:
        root: folder of the run.
        record: the run's record.
        print_line: prints a line for the user.
    """
    if record.options.wandb == "disabled":
        return None
    return WandbRuns(root, record, print_line)


class WandbRuns:
    """One W&B run for all SAEs, or one for each (--wandb-per-sae).

    After the first error, which is printed, nothing more is logged.

    Args:
        root: folder of the run.
        record: the run's record.
        print_line: prints a line for the user.
    """

    def __init__(self, root: Path, record: RunRecord, print_line: Callable[[str], None]) -> None:
        self._root, self._record, self._print_line = root, record, print_line
        self._runs: list[tuple[Any, list[SaeEntry]]] = []
        """Each W&B run and its SAEs."""
        self._failed = False
        self._exit_code = 1
        self._try(self._open)

    def log(self, line: Mapping[str, Any], timings: Mapping[str, Any] | None = None) -> None:
        """Log a line of metrics.jsonl and, unless None, the line of timings.jsonl of that step."""
        self._try(lambda: self._log(line, timings))

    def end(self) -> None:
        """Mark the run as finished, and upload its SAEs with --wandb-log-final-artifact."""
        self._exit_code = 0
        if self._record.options.wandb_log_final_artifact:
            self._try(self._log_artifacts)

    def close(self) -> None:
        """Upload the remaining lines, for a minute at most."""
        self._try(self._close)

    def _try(self, act: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            act()
        except (Exception, SystemExit) as error:
            self._failed = True
            what = " ".join(str(error).split()) or type(error).__name__
            self._print_line(
                f"warning: logging to W&B stopped: {what[:500]}. The run continues, and {METRICS} "
                "is complete; --resume with --wandb uploads it later"
            )
            for run, _ in self._runs:
                with contextlib.suppress(Exception, SystemExit):
                    run.finish(exit_code=1)

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
                one = options.of(entry.options)
                self._begin(f"{run_id}-{i}", f"{name}/{entry.name}", group, one, [entry])
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
        if offline:  # rename earlier folders, so that `wandb sync` uploads the complete one alone
            folder = Path(wandb.setup().settings.wandb_dir)
            for old in folder.glob(f"offline-run-*-{run_id}"):
                old.rename(old.with_name(old.name.replace("offline-run", _SET_ASIDE, 1)))
        settings = wandb.Settings(
            silent=True,
            console="off",  # a progress bar is no log
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
        self._runs.append((run, saes))
        where = f"offline in {run.settings.sync_dir}" if offline else run.url
        self._print_line(f"W&B: {name} is run {run_id}, {where}")

    def _log(self, line: Mapping[str, Any], timings: Mapping[str, Any] | None) -> None:
        step = line["step"]
        for run, saes in self._runs:
            if step < run.starting_step:  # W&B has it already
                continue
            row = {"rows": line["rows"]}
            for entry in saes:
                prefix = "" if self._record.options.wandb_per_sae else f"{entry.name}/"
                for name, value in line.get("saes", {}).get(entry.name, {}).items():
                    row |= {f"{prefix}{key}": shown for key, shown in _values(name, value).items()}
                for name, value in line.get("val", {}).get(entry.name, {}).items():
                    row[f"{prefix}val_{name}"] = value
            row |= {f"timings/{k}": value for k, value in (timings or {}).items() if k != "step"}
            run.log(row, step=step)

    def _log_artifacts(self) -> None:
        import wandb

        for run, saes in self._runs:
            for entry in saes:
                name = re.sub(r"[^A-Za-z0-9_.-]", "-", f"{run.id}-{entry.name}")
                artifact = wandb.Artifact(name, type="sae", metadata=dataclasses.asdict(entry))
                folder = self._root / entry.name
                for path, is_plain in walk(folder):
                    if is_plain:  # what a link points to is not ours to upload
                        artifact.add_file(str(path), str(path.relative_to(folder)))
                logged = run.log_artifact(artifact)
                if self._record.options.wandb == "online":
                    logged.wait(timeout=_UPLOAD_SECONDS)

    def _close(self) -> None:
        while self._runs:
            run, _ = self._runs.pop()
            run.finish(exit_code=self._exit_code)


def _values(name: str, value: Any) -> dict[str, Any]:
    """Convert a value of metrics.jsonl for W&B; None is left out."""
    if name == "log10_density":
        import wandb

        histogram = wandb.Histogram(np_histogram=(value["counts"], EDGES))
        return {name: histogram, "never_fired": value["never"]}
    return {} if value is None else {name: value}


def _config(record: RunRecord, options: FitConfig, saes: list[SaeEntry]) -> dict[str, Any]:
    """Return the configuration that W&B shows of a run."""
    shown = {k: v for k, v in dataclasses.asdict(options).items() if not k.startswith("wandb")}
    shown |= {"cache_id": record.cache_id, "steps": record.steps, "versions": record.versions}
    return shown | {"saes": {entry.name: dataclasses.asdict(entry) for entry in saes}}
