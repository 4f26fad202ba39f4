"""What a run tells: metrics.jsonl (functions of the run), timings.jsonl (all else), a bar."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from actcache.core.json_codec import decode_json, truncated_repr
from actcache.core.progress import Progress
from actcache.errors import FormatError
from actcache.filesystem.atomic import as_disk_full_error, write_atomic

METRICS = "metrics.jsonl"
TIMINGS = "timings.jsonl"


class MetricsSink(Protocol):
    """Where the lines go besides, such as `saetrain.tracking.wandb_mirror`."""

    def log(self, line: Mapping[str, Any], timings: Mapping[str, Any] | None = None) -> None:
        """Take a line of metrics.jsonl, and the one of timings.jsonl beside it."""

    def end(self) -> None:
        """The run has come to its end, and its SAEs are saved."""

    def close(self) -> None:
        """There will be no more lines, whether the run has come to its end or not."""


class JsonlTracker:
    """Writes both files and draws the bar.

    A resumed run first cuts both files back to its checkpoint's step, so that metrics.jsonl ends as
    if there had been no interruption.

    Args:
        root: folder of the run.
        step: steps done.
        steps: of the whole run.
        batch_size: rows of a step.
        row_bytes: bytes of a row on disk, of all hookpoints.
    """

    def __init__(
        self, root: Path, step: int, steps: int, batch_size: int, row_bytes: int = 0
    ) -> None:
        self._root, self._batch_size, self._row_bytes = root, batch_size, row_bytes
        self._files = {}
        for name in (METRICS, TIMINGS):
            truncate_after(root / name, step)
            # Unbuffered: what a full disk did not take must not be tried again when it is closed.
            self._files[name] = (root / name).open("ab", buffering=0)
        self.bar = Progress("fit", steps * batch_size, "rows", initial=step * batch_size)
        self._began = self._last = time.monotonic()
        self._first_step = self._last_step = step
        self._waited = 0.0
        self._held_out: dict[str, str] = {}
        self.mirror: MetricsSink | None = None
        """Who else is told every line."""

    def log(self, step: int, metrics: Mapping[str, Mapping[str, Any]], waited: float) -> None:
        """Write one line of each file.

        Args:
            step: steps done.
            metrics: by the SAE's name, means since the last line.
            waited: seconds spent waiting for rows since the run was started.
        """
        now = time.monotonic()
        rows = (step - self._last_step) * self._batch_size
        seconds = max(now - self._last, 1e-9)
        timings = {
            "step": step,
            "rows_per_second": rows / seconds,
            "bytes_per_second": rows * self._row_bytes / seconds,
            "mean_rows_per_second": (step - self._first_step)
            * self._batch_size
            / max(now - self._began, 1e-9),
            "data_wait": (waited - self._waited) / seconds,
            "seconds": now - self._began,
            "peak_memory_bytes": peak_memory(),
            **peak_device_memory(),
        }
        line = {"step": step, "rows": step * self._batch_size, "saes": metrics}
        self._write(METRICS, line)
        self._write(TIMINGS, timings)
        if self.mirror is not None:
            self.mirror.log(line, timings)
        waiting = f"{timings['data_wait']:.0%}"
        notes = {"fvu": _range(metrics), **self._held_out, "data_wait": waiting}
        self.bar.advance(rows, rows * self._row_bytes, **notes)
        self._last, self._last_step, self._waited = now, step, waited

    def log_held_out(
        self, step: int, figures: Mapping[str, Mapping[str, float]], rows: int
    ) -> None:
        """Write a line of metrics.jsonl on held-out rows.

        Args:
            step: steps done.
            figures: by the SAE's name.
            rows: held-out rows that they are of.
        """
        line = {"step": step, "rows": step * self._batch_size, "val_rows": rows, "val": figures}
        self._write(METRICS, line)
        if self.mirror is not None:
            self.mirror.log(line)
        self._held_out = {"val_fvu": _range(figures)}

    @property
    def seconds(self) -> float:
        """From the start to the last line."""
        return self._last - self._began

    def sync(self) -> None:
        """Make all lines durable: a checkpoint must not know more than they say."""
        for file in self._files.values():
            os.fsync(file.fileno())

    def end(self) -> None:
        """The run has come to its end."""
        if self.mirror is not None:
            self.mirror.end()

    def close(self) -> tuple[float, float]:
        """Close all; returns rows per second and the share of time spent waiting for rows."""
        if self.mirror is not None:
            self.mirror.close()
        self.bar.close()
        for file in self._files.values():
            file.close()
        seconds = max(self._last - self._began, 1e-9)
        rows = (self._last_step - self._first_step) * self._batch_size
        return rows / seconds, self._waited / seconds

    def _write(self, name: str, line: Mapping[str, Any]) -> None:
        text = json.dumps(line, allow_nan=False).encode() + b"\n"
        written = 0
        try:
            while written < len(text):
                written += self._files[name].write(text[written:])
        except OSError as error:
            raise as_disk_full_error(error, self._root / name, len(text)) from error


def truncate_after(path: Path, step: int) -> None:
    """Drop the lines after a step, and a last line that was cut off in writing.

    Raises:
        FormatError: a whole line is damaged.
    """
    if not path.exists():
        return
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n") or _parse(path, line)["step"] > step:
            break
        kept.append(line)
    write_atomic(path, ["".join(kept).encode()])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All lines of a .jsonl file that was cut back; raises `FormatError` if one is damaged."""
    text = path.read_text() if path.exists() else ""
    return [_parse(path, line) for line in text.splitlines()]


def _range(figures: Mapping[str, Mapping[str, Any]]) -> str:
    """The least and the largest FVU."""
    found = sorted(f"{figure['fvu']:.4f}" for figure in figures.values())
    return found[0] if len(found) == 1 else f"{found[0]} to {found[-1]}"


def last_line(path: Path, step: int | None = None, key: str | None = None) -> dict[str, Any] | None:
    """The last whole line of a .jsonl file, at or before a step; None if there is none.

    Args:
        path: the file.
        step: the last that counts.
        key: what the line must have.

    Raises:
        FormatError: a line that was looked at is damaged.
    """
    text = path.read_text() if path.exists() else ""
    whole, _, _ = text.rpartition("\n")  # what follows was cut off in writing
    for text_line in reversed(whole.splitlines()):
        line = _parse(path, text_line)
        if (step is None or line["step"] <= step) and (key is None or key in line):
            return line
    return None


def sae_metrics(path: Path, line: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """What a line of metrics.jsonl says of every SAE; raises `FormatError`."""
    saes = line.get("saes")
    for name in names:
        sae = saes.get(name) if isinstance(saes, dict) else None
        said = sae if isinstance(sae, dict) else {}
        numbers = [said.get(figure) for figure in ("fvu", "l0")]
        if said.get("dead_percent", "") is not None:  # None: not known yet
            numbers.append(said.get("dead_percent"))
        if not all(map(_is_number, numbers)):
            raise FormatError(
                f"{path} lacks figures of {name} at step {line['step']}",
                expected="fvu, l0, dead_percent",
                got=truncated_repr(sae),
                remedy="it is damaged; restore it from a copy",
            )
    assert isinstance(saes, dict)
    return saes


def number_of(path: Path, line: dict[str, Any], key: str) -> float:
    """One number of a line; raises `FormatError`."""
    value = line.get(key)
    if not _is_number(value):
        raise FormatError(
            f"{path} lacks {key} at step {line['step']}",
            expected="a number",
            got=truncated_repr(value),
            remedy="it is damaged; restore it from a copy",
        )
    return float(value)  # type: ignore[arg-type]


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < 1e300  # type: ignore[arg-type]


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        line = decode_json(text.encode())
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} holds a line that is not JSON", got=text[:80]) from error
    if not isinstance(line, dict) or not isinstance(line.get("step"), int):
        raise FormatError(f"{path} holds a line without a step", got=text[:80])
    return line


def peak_device_memory() -> dict[str, int]:
    """Most bytes that this process has had in tensors on one GPU so far; nothing without a GPU."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return {}
    devices = range(torch.cuda.device_count())
    return {"peak_device_memory_bytes": max(map(torch.cuda.max_memory_allocated, devices))}


def peak_memory() -> int:
    """Largest resident size of this process so far, bytes."""
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
